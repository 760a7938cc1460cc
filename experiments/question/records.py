"""What is read out of the records: T, the step of a client at which a run leaves chance, and what its head brought."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDS = HERE / "records.jsonl"
MARGIN, NATS = 0.05, 0.05  # of accuracy above the majority class; of loss below guessing the frequencies
Run = dict[str, Any]
Column = Callable[[Run], float]


def read(path: Path = RECORDS, nats: float = NATS) -> list[Run]:
    """The runs of records.jsonl, or of a folder of records, each with its settings and what came of it.

    `curve` has (step of a client, round, accuracy, loss) for each evaluation; `left` is T, or None, `last` the last step;
    `speed`, `last_speed`, `square` and `residual` are what its head
    brought at its seed, with gamma 1 (speeds.json, of Spooky).

    Args:
        nats: how far below guessing the loss is where a run has left chance.
    """
    lines = [one.read_text() for one in sorted(path.glob("*.json"))] if path.is_dir() else path.read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    for run in runs:
        run["client_steps"] = run["steps"] or 64 // run["clients"]
        run["curve"] = [
            (run["client_steps"] * one["round"], one["round"], one["accuracy"], one["loss_nats"])
            for one in run["rounds_evaluated"]
        ]
        run["last"] = run["curve"][-1][0]
        run["left"] = _by_loss(run, nats)
        run["left_by_accuracy"] = _by_accuracy(run)
        run["best_loss"] = min(point[3] for point in run["curve"])
        run["best_accuracy"] = max(point[2] for point in run["curve"] if point[3] == run["best_loss"])
        run |= _brought().get((run.get("head"), run.get("seed")), {})
    return runs


@cache
def _brought() -> dict[tuple[str, int], dict[str, float]]:
    found = json.loads((HERE / "speeds.json").read_text())
    return {
        (head, int(seed)): {
            "speed": sum(one["speed"].values()),
            "last_speed": one["speed"]["last layer"],
            "square": one["square"],
            "residual": one["residual"],
        }
        for head, seeds in found.items()
        for seed, one in seeds.items()
    }


def _by_loss(run: Run, nats: float) -> float | None:
    """The step at which the loss first is below that of guessing by so much, by a line from the evaluation before."""
    step_before, loss_before = 0.0, max(run["entropy"], math.log(16 if run["task"] == "authors" else 3))
    level = run["entropy"] - nats
    for step, _, _, loss in run["curve"]:
        if loss < level:
            return step_before + (step - step_before) * (loss_before - level) / (loss_before - loss)
        step_before, loss_before = step, loss
    return None


def _by_accuracy(run: Run) -> float | None:
    """The step of the first evaluation from which on the accuracy stays above the majority's by 0.05."""
    left = None
    for step, _, accuracy, _ in run["curve"]:
        left = None if accuracy <= run["majority"] + MARGIN else left if left is not None else step
    return left


def scaled(run: Run, factor: float) -> Run:
    """The run with its steps counted in another unit."""
    return run | {name: run[name] and run[name] * factor for name in ("left", "last")}


def dosed(run: Run) -> Run:
    """The run with rate x steps in the place of steps."""
    return scaled(run, run["rate"])


def in_epochs(run: Run) -> Run:
    """The run with epochs of a client's texts in the place of steps; with an epoch a round these are rounds."""
    return scaled(run, run["clients"] / 64)


def is_head(head: str) -> Column:
    """A column: 1 for the runs of a head, 0 for others."""
    return lambda run: float(run["head"] == head)


def log_of(name: str) -> Column:
    """A column: the log of a setting, or of what the head brought."""
    return lambda run: math.log(run[name])


def scaled_by_gamma(name: str) -> Column:
    """What the head brought, "speed", "last_speed" or "square", times gamma squared."""
    return lambda run: run["gamma"] ** 2 * run[name]
