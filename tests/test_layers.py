"""Data take one road: every module imports only modules to its left."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "fedtune"
ROAD = [
    *(
        "version",
        "errors",
        "files",
        "randomness",
        "tensors",
        "data.task",
        "data.authors",
        "data.hilmkil",
        "data.registry",
        "models.pretrained",
        "data.tokens",
        "data.batches",
        "data.splits",
        "data.classification",
    ),
    *(
        "models.packed",
        "models.padding_free",
        "models.classifier",
        "models.bert",
        "models.distilbert",
        "models.albert",
        "models",
        "federated.dropout",
        "federated.messages",
        "federated.training",
        "federated.agreement",
        "federated.state",
        "federated.cohorts",
        "algorithms.fedavg",
        "algorithms",
        "federated.evaluation",
        "runs.baselines",
        "storage.checkpoint",
    ),
    *(
        "storage.records",
        "storage.summary",
        "runs.figures",
        "federated.session",
        "runs.callbacks",
        "storage.config",
        "storage.directory",
        "runs.rounds",
        "runs.hardware",
        "storage.locks",
        "runs.progress",
        "runs.wandb",
        "runs.loop",
        "runs.parser",
        "runs.options",
        "sweeps.grid",
        "sweeps.worker",
        "sweeps.runner",
        "sweeps.wandb_agents",
        "reports.results",
        "reports.curves",
        "reports.page",
        "reports.report",
        "cli",
    ),
]
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCE.rglob("*.py")
}
LEFT_OUT = {"__init__", "data", "federated", "storage", "runs", "reports", "sweeps"}  # these import nothing themselves


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, inside functions too, but not for type checkers alone."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name.removeprefix("fedtune.") for name in found if name.startswith("fedtune.")}


def test_every_module_has_its_place_on_the_road() -> None:
    assert set(ROAD) == set(MODULES) - LEFT_OUT


@pytest.mark.parametrize("name", ROAD)
def test_a_module_imports_only_modules_to_its_left(name: str) -> None:
    place = ROAD.index(name)
    used = {module for module in imports(MODULES[name]) if module in ROAD}
    assert not [module for module in used if ROAD.index(module) >= place]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_training_imports_neither_datasets_nor_wandb_nor_jsonargparse(name: str) -> None:
    if name in ("runs.parser", "runs.options", "cli"):  # from here on it is the command line
        return
    tree = ast.parse(MODULES[name].read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    roots = {(node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name for node in top}
    assert not {root.split(".")[0] for root in roots} & {"datasets", "wandb", "jsonargparse", "matplotlib"}
