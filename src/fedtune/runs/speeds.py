"""How fast a classifier would begin to learn, measured on training texts, as `fedtune describe --features` shows it."""

from __future__ import annotations

import itertools
from typing import Any

from rich.table import Table

from fedtune.data.classification import FederatedDataModule
from fedtune.errors import UsageError
from fedtune.models.classifier import TextClassifier
from fedtune.models.features import features
from fedtune.randomness import seeded
from fedtune.runs.displays import new_console

_TEXTS = 1024  # that are measured, at most


def show_speed(module: Any, data: FederatedDataModule) -> None:
    """Measure a classifier on training texts of all clients, 1,024 at most, and print a table.

    Raises:
        UsageError: it is no classifier with a linear last layer, or there are too few texts.
    """
    if not isinstance(module, TextClassifier):
        raise UsageError("--features", type(module).__name__, "a classifier of texts")
    size = data.hparams["batch_size"]
    with seeded(data.hparams["seed"], "features"):
        batches = list(itertools.islice(data.train_dataloader(), max(2, _TEXTS // size // 2 * 2)))
    if len(batches) < 2:
        raise UsageError("--data.batch_size", size, "half of the training texts, or fewer, where features are measured")
    found = features(module, batches)
    table = Table(
        title=f"{type(module).__name__} {module.hparams.get('name', '')} on {found.texts} training texts, before training"
    )
    for name in ("what", "value"):
        table.add_column(name, justify="right" if name == "value" else "left")
    table.add_row("mean square of what the last layer reads", f"{found.square:.3g}")
    table.add_row("of it, variance between texts", f"{found.variance:.3g}")
    table.add_row("of it, variance between classes", f"{found.between:.3g}")
    for name, value in found.speed.items():
        table.add_row(f"speed: {name}", f"{value:.2g}")
    whole = sum(found.speed.values())
    table.add_row("speed in all: share learned by a step of plain gradient descent, over its learning rate", f"{whole:.2g}")
    new_console(markup=False, emoji=False).print(table)
