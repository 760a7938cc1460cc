"""A type checker knows what fedtune offers, and no more: its `__getattr__` is not for its eyes."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedtune

GOOD = "import fedtune\n\nloop = fedtune.FederatedLoop\nsweep, load = fedtune.sweep, fedtune.load\n"
BAD = "import fedtune\n\nfedtune.does_not_exist\n"


@pytest.fixture
def scripts(tmp_path: Path) -> dict[str, Path]:
    for name, text in (("good", GOOD), ("bad", BAD)):
        (tmp_path / f"{name}.py").write_text(text)
    return {name: tmp_path / f"{name}.py" for name in ("good", "bad")}


def test_mypy_knows_what_is_offered_and_refuses_the_rest(scripts: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    # modules that are imported are not looked at: what is offered is one file, and torch would take a minute
    command = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=skip", f"--cache-dir={tmp_path / 'cache'}"]
    command += [fedtune.__file__, *map(str, scripts.values())]
    said = subprocess.run(command, capture_output=True, text=True)
    assert "good.py:" not in said.stdout, said.stdout
    assert 'bad.py:3: error: Module has no attribute "does_not_exist"  [attr-defined]' in said.stdout, said.stdout + said.stderr


def test_pyright_knows_what_is_offered_and_refuses_the_rest(scripts: dict[str, Path]) -> None:
    pyright = shutil.which("pyright") or shutil.which("basedpyright")
    if pyright is None:
        pytest.skip("pyright is not installed")
    command = [pyright, "--pythonpath", sys.executable]
    good, bad = (subprocess.run([*command, str(scripts[name])], capture_output=True, text=True) for name in ("good", "bad"))
    assert good.returncode == 0, good.stdout
    assert '"does_not_exist" is not a known attribute of module "fedtune"' in bad.stdout


def test_every_name_that_is_offered_is_imported_for_type_checkers() -> None:
    text = Path(fedtune.__file__).read_text()
    block = text[text.index("if TYPE_CHECKING:\n") : text.index("spin_less_when_busy()")]
    nodes = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    assert {alias.name for node in nodes for alias in node.names} == set(fedtune.__all__)
