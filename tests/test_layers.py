"""Folders are storeys: a module imports from its own folder and from storeys below, and no two modules import each other."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "fedtune"
GROUND = ("errors", "files", "randomness", "tables", "tensors", "threads", "version", "yaml_files")
# folder -> the folders it may import from; every folder may import the modules on the ground
FOLDERS = {
    "experiments": (),  # files that come with the package
    "models": (),
    "federated": (),
    "data": ("models",),
    "storage": ("federated",),
    "algorithms": ("federated",),
    "runtimes": ("federated",),
    "privacy": ("federated", "algorithms"),
    "secure": ("federated", "algorithms", "privacy"),
    "runs": ("models", "federated", "data", "storage", "algorithms", "privacy", "secure", "runtimes", "experiments"),
    "reports": ("runs", "storage"),
    "sweeps": ("runs", "storage", "runtimes", "experiments"),
    "testing": ("federated", "algorithms", "runtimes", "storage"),
    "flower": ("runs", "data", "models", "federated", "algorithms", "storage"),
    "commands": ("runs", "reports", "sweeps"),
    "cli": ("commands", "runs", "sweeps", "data", "runtimes"),
}
LAZY = ("datasets", "wandb", "jsonargparse", "matplotlib", "optuna")  # a machine that only trains need not have them
COMMANDS = ("runs.parser", "runs.flags", "cli")  # with these begins the command line
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCE.rglob("*.py")
}
LEFT_OUT = {"__init__", "__main__"}  # the list of what is offered
NAMES = sorted(set(MODULES) - LEFT_OUT)


def imports(name: str) -> set[str]:
    """Modules of ours that a module imports: at the top, within functions, and for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= whole if node.module == "fedtune" else {one if mine(one) in MODULES else node.module for one in whole}
    return {mine(one) for one in found if one.startswith("fedtune.")} - {name}


def mine(name: str) -> str:
    return name.removeprefix("fedtune.")


def folder_of(name: str) -> str:
    return name.split(".")[0]


def test_every_module_has_its_folder() -> None:
    assert {folder_of(name) for name in NAMES} == {*GROUND, *FOLDERS}


@pytest.mark.parametrize("name", NAMES)
def test_a_module_imports_only_from_its_folder_and_those_below(name: str) -> None:
    used = {folder_of(one) for one in imports(name)}
    allowed = GROUND if name in GROUND else (*GROUND, folder_of(name), *FOLDERS[folder_of(name)])
    assert used <= set(allowed)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graphlib.TopologicalSorter({name: imports(name) for name in NAMES}).prepare()


def test_an_algorithm_imports_no_algorithm_but_those_on_which_others_build() -> None:
    lists, ground = {"algorithms", "algorithms.specification"}, {"algorithms.fedavg", "algorithms.fedit"}  # of LoRA
    for name in NAMES:
        if folder_of(name) == "algorithms" and name not in lists:
            assert {one for one in imports(name) if folder_of(one) == "algorithms"} <= ground, name


@pytest.mark.parametrize("name", sorted(set(MODULES) - set(COMMANDS)))
def test_training_imports_neither_datasets_nor_wandb_nor_jsonargparse(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    roots = {(node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top}
    assert not {root.split(".")[0] for root in roots} & set(LAZY)
