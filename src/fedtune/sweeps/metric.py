"""`metric` of a sweep file: what runs are compared by. W&B has it under the name that a run's logger gets (`runs.sections`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedtune.errors import UsageError, one_of
from fedtune.runs.arguments import EVALUATED_ON
from fedtune.runs.sections import FINAL
from fedtune.sweeps import parameters as specs

GOALS = ("minimize", "maximize")
METRICS = ("accuracy", "macro_f1", "loss_nats", "perplexity", "token_accuracy", "exact_match")  # of runs of ours
_PART = "loop.evaluate_on"


def metric_of(given: Any, with_wandb: bool = False) -> tuple[tuple[str, bool], float | None]:
    """The name of what is best, whether more is better (W&B minimises unless told otherwise), and the target.

    Args:
        given: {name, goal, target}; the name of a metric, also with its section: `validation/accuracy` is accuracy.
        with_wandb: W&B compares the runs; it knows what is in a run's summary, too.

    Raises:
        UsageError: a key, or a value of one, that could not be applied.
    """
    if given is None:
        return ("accuracy", True), None
    if not isinstance(given, Mapping) or "name" not in given:
        raise UsageError("metric", given, "name and goal")
    for key in given:
        if key not in ("name", "goal", "target"):
            raise one_of("metric", key, ("name", "goal", "target"))
    name, goal, target = given["name"], given.get("goal", "minimize"), given.get("target")
    plain = _without_section(name) if isinstance(name, str) else name
    if plain not in METRICS and not (with_wandb and isinstance(name, str) and name.startswith(FINAL)):
        raise one_of("metric, name", name, METRICS)
    if goal not in GOALS:
        raise one_of("goal", goal, GOALS)
    if "target" in given and (isinstance(target, bool) or not isinstance(target, (int, float)) or not math.isfinite(target)):
        raise UsageError("metric, target", target, "a number")
    return (str(plain), goal == "maximize"), target


def for_wandb(given: Mapping[str, Any], fixed: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The metric under the name that W&B has it by.

    Args:
        fixed, parameters: flags and parameters of the sweep; they say on which part its runs are evaluated.

    Raises:
        UsageError: runs that are evaluated on different parts have no name in common.
    """
    name = str(given["name"])
    if name.startswith(FINAL):
        return dict(given)
    spec = specs.parameters_of(parameters).get(_PART, {"value": fixed.get(_PART, EVALUATED_ON[0])})
    parts = spec.get("values", [spec.get("value")])
    if len(parts) != 1:
        raise UsageError("metric, name", name, f"{FINAL}NAME, where {_PART} has several values")
    return {**given, "name": f"{parts[0]}/{_without_section(name)}"}


def _without_section(name: str) -> str:
    section, _, rest = name.partition("/")
    return rest if section in EVALUATED_ON and rest else name
