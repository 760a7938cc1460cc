"""What pages say is there: links, commands, code, and the pages of the site."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
WITH_COMMANDS = ("howto", "index", "reproducing", "sweeps")


def pages() -> list[Path]:
    """Every page of the repository."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    return [ROOT / name for name in listed] or [*ROOT.glob("*.md"), *DOCS.glob("*.md")]  # where there is no git


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / f"{page}.md").read_text(), flags=re.S)


def headings(page: Path) -> set[str]:
    """Anchors of a page, as a code host and MkDocs make them of headings."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), flags=re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower())).strip("-") for title in found}


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        assert (page.parent / name).exists(), target
        if anchor:
            assert anchor in headings(page.parent / name if name else page), target


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_no_line_of_prose_is_so_long_that_a_difference_of_it_cannot_be_read(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S).splitlines()
    assert not [line for line in prose if len(line) > 160 and not line.startswith("|")]


def test_the_site_has_every_page_and_every_report() -> None:
    def leaves(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        below = entry.values() if isinstance(entry, dict) else entry
        return [leaf for one in below for leaf in leaves(one)]  # type: ignore[attr-defined]  # a list or a dictionary's values

    shown = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    reports = {str(page.relative_to(ROOT)) for page in pages() if page.parts[len(ROOT.parts)] in ("experiments", "notebooks")}
    assert len(shown) == len(set(shown))
    assert set(shown) == {page.name for page in DOCS.glob("*.md")} | reports | {"reference.md"}


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_every_command_of_a_page_parses(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags are real ones with values of the right type; what the commands do is tested elsewhere."""
    from fedtune.cli import parser

    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    commands = [line for line in lines if line.startswith("fedtune ")]
    assert commands
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "reviews").mkdir(parents=True)
    (tmp_path / "runs" / "reviews" / "config.yaml").write_text("data: {split: by_author}\n")
    for command in commands:
        _, name, *flags = shlex.split(command, comments=True)
        parser(name).parse_args(flags)


def test_the_flags_that_matter_are_real_ones_with_the_defaults_that_the_page_says() -> None:
    from fedtune.cli import parser

    text, defaults = (DOCS / "flags.md").read_text(), parser("run").get_defaults()
    said = re.findall(r"^\| `--([\w.]+)` \| `([^`|]+)` \|", text, flags=re.M)
    assert len(said) >= 10
    for name, default in said:
        own = defaults[name]
        assert (list(own) if isinstance(own, tuple) else own) == yaml.safe_load(default), name
    for words in re.findall(r"`(--[^`]+)`", text):
        flag, *value = shlex.split(words)
        if value:
            parser("run").parse_args([flag, *value])
        else:
            assert flag[2:] in defaults or flag == "--model.lora.rank", flag


def test_the_code_of_the_how_to_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("howto", "python"):
        *before, last = block.strip().splitlines()
        exec("\n".join(before), names)
        names["last"] = eval(last, names)
    assert (tmp_path / "runs" / "bag" / "rounds.jsonl").exists()
    assert list((tmp_path / "logs").rglob("metrics.csv"))
    assert names["last"].clients.tolist() == [4]


def test_the_grid_of_the_how_to_has_the_cells_that_it_says(tmp_path: Path) -> None:
    from fedtune.sweeps import grid

    (tmp_path / "grid.yaml").write_text(blocks("howto", "yaml")[0])
    sweep = grid.read(str(tmp_path / "grid.yaml"))
    assert len(sweep.cells) == 3 * (2 * 2 + 1)
