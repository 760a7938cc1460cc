"""What the README says is run."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import fedtune

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_every_name_in_the_readme_exists_and_everything_offered_can_be_had() -> None:
    for name in re.findall(r"fedtune\.([A-Z]\w+)", README):
        assert hasattr(fedtune, name), name
    for name in fedtune.__all__:
        assert getattr(fedtune, name) is not None
    assert set(fedtune.__all__) == set(fedtune._HOME)


@pytest.mark.usefixtures("pictures")
def test_the_ten_lines_run_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word but for the size of the job: so few texts, one round and no baselines, so that it takes seconds."""
    (code,) = [block for block in blocks("python") if "history[-1]" in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    small, few, quiet = fedtune.FederatedDataModule, fedtune.FederatedLoop, fedtune.RunOptions(progress=False)
    monkeypatch.setattr(fedtune, "FederatedDataModule", lambda **options: small(**options, limit=64))
    monkeypatch.setattr(
        fedtune, "FederatedLoop", lambda **options: few(**(options | {"max_rounds": 1, "options": quiet, "baselines": ()}))
    )
    names: dict = {}
    with pytest.warns(UserWarning, match="batch_size 32 is larger"):
        exec(code, names)
    assert names["history"][-1].loss_nats > 0
    assert (tmp_path / "runs" / "first" / "curves.png").exists()


def test_the_algorithm_of_the_readme_is_what_it_says() -> None:
    (code,) = [block for block in blocks("python") if "Quantise" in block]
    names: dict = {}
    exec(code, names)
    assert names["loop"].algorithm == fedtune.algorithms.specification.algorithm_of(
        {"name": "fedavgm", "beta": 0.9, "up": ["Quantise"]}
    )


def test_every_make_target_in_the_readme_exists() -> None:
    targets = set(re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"make (\w+)", README)) <= targets


def test_an_installation_ends_with_what_to_do_next() -> None:
    command = ["make", "--no-print-directory", "--dry-run", "--assume-old=.venv/.installed", "install"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 1
    assert "source .venv/bin/activate" in said[0]
    assert "make demo" in said[0]


def test_every_file_that_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_command_of_the_readme_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags are real ones with values of the right type; what the commands do is tested elsewhere."""
    from fedtune.cli import parser

    commands = [
        line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines() if line.startswith("fedtune ")
    ]
    assert commands
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "cli").mkdir(parents=True)
    (tmp_path / "runs" / "cli" / "config.yaml").write_text("data: {split: by_author}\n")
    (tmp_path / "run.yaml").write_text("data: {split: by_author}\n")
    for command in commands:
        _, name, *flags = shlex.split(command, comments=True)
        parser(name).parse_args(flags)
