"""What is handed out: an sdist with all files, and a wheel that does its main job beside nothing but what it asks for."""

from __future__ import annotations

import email
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import save_tiny_bert
from packaging.requirements import Requirement

import fedtune

ROOT = Path(__file__).parent.parent
NOT_HANDED_OUT = {".github"}
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"
# what a data scientist does first, in one process: a grid to look at, a run opened again, a report
SCRIPT = """
import fedtune
assert fedtune.sweep("fedtune:quick", "quick", dry_run=True, only=["num_clients=4"]) == 0
loaded = fedtune.load("runs/first")
assert loaded.round == 1 and len(loaded.history) == 1 and loaded.tokenizer is not None
fedtune.report("runs", "report")
fedtune.export("runs/first", "model")
print(fedtune.__file__)
"""


def tracked() -> list[str]:
    """The files of the repository."""
    found = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("no checkout: this is what was handed out")
    return [name for name in found.stdout.split("\0") if name]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """sdist, the folder that it unpacks to, and the wheel that is built from that."""
    place = tmp_path_factory.mktemp("built")
    copy = place / "copy"
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    _build("sdist", copy, place)
    [sdist] = place.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(place / "unpacked", filter="data")
    [folder] = (place / "unpacked").iterdir()
    _build("wheel", folder, place)
    [wheel] = place.glob("*.whl")
    return {"sdist": sdist, "folder": folder, "wheel": wheel}


def _build(what: str, folder: Path, place: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BUILD, what, str(place)], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def environment(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and of all that is installed here only what the wheel asks for, and so on."""
    place = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    python = str(place / "bin" / "python")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        str(built["wheel"]),
    ]
    subprocess.run(command, check=True)
    [packages] = place.glob("lib/python*/site-packages")
    made = set()
    for distribution in needed(metadata(built["wheel"]).get_all("Requires-Dist")):
        for file in distribution.files or ():
            if ".." in file.parts:
                continue  # commands, pages of manuals
            target = packages / file
            if target.parent not in made:
                target.parent.mkdir(parents=True, exist_ok=True)
                made.add(target.parent)
            if not os.path.lexists(target):
                target.symlink_to(file.locate())
    return place


def needed(requires: list[str]) -> list[importlib.metadata.Distribution]:
    """What is installed here of some requirements, what that asks for, and so on; each once."""
    found: dict[tuple[str, str], importlib.metadata.Distribution] = {}
    queue = [(line, "") for line in requires]
    while queue:
        line, of = queue.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": of}):
            continue
        distribution = importlib.metadata.distribution(requirement.name)
        for extra in ["", *requirement.extras]:
            if (distribution.name, extra) not in found:
                found[distribution.name, extra] = distribution
                queue += [(line, extra) for line in distribution.requires or []]
    return list({distribution.name: distribution for distribution in found.values()}.values())


def test_the_sdist_has_every_file_of_the_repository(built: dict[str, Path]) -> None:
    files = {str(path.relative_to(built["folder"])) for path in built["folder"].rglob("*") if not path.is_dir()}
    missing = [name for name in tracked() if name not in files and name.split("/")[0] not in NOT_HANDED_OUT]
    assert not missing


def test_the_tests_of_the_sdist_run_from_it(built: dict[str, Path]) -> None:
    """Some that look at files beside the package; all of them would be this suite once more."""
    own = {"PYTHONPATH": str(built["folder"] / "src")}
    words = ["tests/test_layers.py", "tests/test_readme.py", "-k", "not ten_lines", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *words]
    done = subprocess.run(command, cwd=built["folder"], env=os.environ | own, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_wheel_has_every_module_and_what_comes_with_them(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as archive:
        names = set(archive.namelist())
    wanted = {name.removeprefix("src/") for name in tracked() if name.startswith("src/fedtune/")}
    assert wanted <= names
    assert {name for name in names if ".dist-info/" not in name} == wanted


def metadata(wheel: Path) -> Any:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_what_the_wheel_says_of_itself_has_no_link_into_nowhere(built: dict[str, Path]) -> None:
    found = metadata(built["wheel"])
    assert found["Version"] == fedtune.__version__
    assert found["License"] == "Apache-2.0"
    text = found.get_payload(decode=True).decode()
    assert text.startswith("# fedtune")
    assert not _setup()._LINK.search(text)
    for version in ("3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {version}" in found.get_all("Classifier")
    assert bool(found.get_all("Project-URL")) == (_setup().repository((ROOT / "CITATION.cff").read_text()) is not None)


def _setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_of_fedtune", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_the_long_description_lead_to_the_version_in_the_repository_that_is_cited() -> None:
    ours = _setup()
    url = ours.repository('title: fedtune\nrepository-code: "https://example.org/team/fedtune/"\n')
    assert url == "https://example.org/team/fedtune"
    assert ours.repository("title: fedtune\n") is None
    text = "![A curve](docs/demo.png) [all](docs/a.md#b) [the paper](https://example.org/p) [there](#here)"
    assert ours.described(text, url, "1.2.0") == (
        "![A curve](https://example.org/team/fedtune/raw/v1.2.0/docs/demo.png) "
        "[all](https://example.org/team/fedtune/blob/v1.2.0/docs/a.md#b) [the paper](https://example.org/p) [there](#here)"
    )
    assert ours.described(text, None, "1.2.0") == " all [the paper](https://example.org/p) [there](#here)"
    assert ours.addresses(url)["Changelog"] == f"{url}/blob/main/CHANGELOG.md"
    assert ours.addresses(None) == {}


def test_the_wheel_does_its_main_job_in_an_environment_with_nothing_but_what_it_asks_for(
    environment: Path, tmp_path: Path
) -> None:
    text = "text,label\n" + "".join(f"word{i % 9} word{i % 5},{'ab'[i % 2]}\n" for i in range(80))
    (tmp_path / "data.csv").write_text(text)
    values = {"data.task": "csv", "data.task_options.path": "data.csv", "data.num_clients": 2, "data.batch_size": 8}
    values |= {"data.max_length": 8, "model.name": save_tiny_bert(tmp_path / "bert"), "loop.max_rounds": 1}
    flags = [f"--{name}={value}" for name, value in values.items()]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str) -> str:
        command = [str(environment / "bin" / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "test part: accuracy" in run("fedtune", "run", *flags, "--run_dir=runs/first")
    assert json.loads((tmp_path / "runs" / "first" / "summary.json").read_text())["rounds"] == 1
    assert str(environment) in run("python", "-c", SCRIPT)
    assert (tmp_path / "report" / "report.html").exists()
    assert (tmp_path / "model" / "config.json").exists()
