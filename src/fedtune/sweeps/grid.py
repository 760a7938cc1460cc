"""What a sweep file says: a list of cells. The format is that of Weights & Biases, so one file serves both ways."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.errors import UsageError, one_of, shown
from fedtune.runs import flags
from fedtune.storage.config import nested
from fedtune.sweeps import parameters as specs
from fedtune.sweeps.command import PROGRAMS, flags_of, words_of
from fedtune.yaml_files import parse_or_text
from fedtune.yaml_files import read as read_yaml

METHODS = ("grid", "random")
GOALS = ("minimize", "maximize")
METRICS = ("accuracy", "macro_f1", "loss_nats")  # of every run
_TEXTS = ("name", "description", "project", "entity")
_KEYS = ("method", "metric", "parameters", "run_cap", "program", "command", *_TEXTS)
_NOT_LOCAL = ("early_terminate",)  # W&B's agents know these; the local runner would have to ignore them


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Args:
        arguments: of data module, model and loop, complete.
        varied: flat key -> value, of what differs between cells.
    """

    arguments: dict[str, dict[str, Any]]
    varied: dict[str, Any]

    @functools.cached_property
    def name(self) -> str:
        """The name of its directory."""
        return flags.name_of(self.arguments)

    @property
    def title(self) -> str:
        """What it is, for a reader: the values that differ between cells."""
        return ", ".join(f"{key.removesuffix('.name').rpartition('.')[2]} {value}" for key, value in self.varied.items())


@dataclass(frozen=True)
class Sweep:
    """The cells of a sweep file, each once.

    Args:
        metric: the name of what is best, and whether more of it is better.
        target: of the metric: once a run reaches it, no other is started.
        environment: where the runs go in W&B, where they are mirrored.
    """

    name: str
    cells: list[Cell]
    metric: tuple[str, bool] = ("accuracy", True)
    target: float | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def is_reached(self, value: Any) -> bool:
        """Whether a value of the metric is as good as the target."""
        return (
            self.target is not None and value is not None and (value >= self.target if self.metric[1] else value <= self.target)
        )


def read(file: str | Path, only: Sequence[str] = ()) -> Sweep:
    """Read a sweep file.

    Args:
        file: YAML with `method` ("grid", or "random" with `run_cap`), `parameters` and, optionally, `run_cap`, `name`,
            `command`, `metric` {name, goal, target}. A parameter has `value`, `values`, a `distribution` with its bounds, or
            `parameters` of its own; dotted names are the same as nested ones. `seed` sets all three seeds. Flags in `command`
            hold for each run.
        only: "key=value" each; cells without that value are left out. The key may be shortened to its last part.

    Raises:
        UsageError: the file cannot be read, or holds what a sweep cannot be made of; `only` takes no cell.
        SystemExit: a parameter that a run does not have, or a value of a wrong type; said in one line.
    """
    with _naming(file):
        content = load(file)
        fixed = check(content)
        parameters = specs.parameters_of(content["parameters"])
        chosen = [values for values in _draws(content, parameters) if _taken(values, only)]
        if not chosen:
            raise _none_taken(parameters, only)
        varied = [name for name, spec in parameters.items() if specs.kind_of(name, spec) != "constant"]
        cells: dict[str, Cell] = {}
        for values in chosen:
            arguments = flags.resolve(nested(copy.deepcopy({**fixed, **values})), str(file))
            cell = Cell(arguments, {name: values[name] for name in varied})
            cells.setdefault(cell.name, cell)
        environment = {f"WANDB_{key.upper()}": content[key] for key in ("project", "entity") if key in content}
        name = str(content.get("name", Path(file).stem))
        return Sweep(name, list(cells.values()), *_metric(content.get("metric")), environment)


def check(content: Mapping[str, Any], with_wandb: bool = False) -> dict[str, Any]:
    """Check every key of a sweep file; the values of runs are checked with the runs.

    Args:
        with_wandb: W&B hands out the runs; it has more methods.

    Returns:
        name -> value, of the flags in `command`.

    Raises:
        UsageError: a key, or a value of one, that could not be applied.
    """
    methods, keys = (METHODS, _KEYS) if not with_wandb else ((*METHODS, "bayes"), (*_KEYS, *_NOT_LOCAL))
    method = content.get("method")
    if not isinstance(method, str) or method not in methods:
        raise one_of("method", method, methods, also="" if with_wandb else "; bayes with --wandb and a key")
    for key in content:
        if key not in keys:
            also = "; early_terminate with --wandb and a key" if key in _NOT_LOCAL else ""
            raise one_of("sweep file", key, keys, also=also)
        if key in _TEXTS and not isinstance(content[key], str):
            raise UsageError(key, content[key], "text")
    if content.get("program", PROGRAMS[0]) not in PROGRAMS:
        raise UsageError("program", content["program"], f"{PROGRAMS[0]}, or none: the runs are those of fedtune run")
    _check_cap(content, with_wandb)
    _metric(content.get("metric"), with_wandb)
    fixed = flags_of(words_of(content["command"])) if "command" in content else {}
    parameters = specs.parameters_of(content["parameters"])
    for name in fixed.keys() & parameters.keys():
        raise UsageError(f"parameter {name}", parameters[name], "nothing beside the flag of the same name in command")
    specs.check(parameters | {name: {"value": value} for name, value in fixed.items()}, method)
    return fixed


def check_cells(sweep: Sweep, file: str | Path) -> None:
    """Check each run of a sweep as its start would, before any text is read.

    Raises:
        UsageError: the first value that cannot be used, and in how many runs.
    """
    known: dict[str, UsageError | None] = {}
    bad = []
    for cell in sweep.cells:
        arguments = {part: {key: value for key, value in of.items() if key != "seed"} for part, of in cell.arguments.items()}
        key = json.dumps(arguments, sort_keys=True, default=str)
        if key not in known:
            try:
                flags.check(cell.arguments)
                known[key] = None
            except UsageError as error:
                known[key] = error
        found = known[key]
        bad += [] if found is None else [found]
    if bad:
        allowed = f"{bad[0].allowed} ({len(bad)} of {len(sweep.cells)} runs could not start)"
        raise UsageError(f"{file}: {bad[0].argument}", bad[0].came, allowed)


@contextlib.contextmanager
def _naming(file: str | Path) -> Iterator[None]:
    """Name the file in errors about what it says."""
    try:
        yield
    except UsageError as error:
        if error.argument == "--only" or str(file) in (error.came, error.argument.rpartition(": ")[0]):
            raise
        raise UsageError(f"{file}: {error.argument}", error.came, error.allowed) from error


def _check_cap(content: Mapping[str, Any], with_wandb: bool) -> None:
    cap, is_random = content.get("run_cap"), content["method"] == "random"
    if "run_cap" in content or (is_random and not with_wandb):
        if isinstance(cap, bool) or not isinstance(cap, int) or cap < 1:
            raise UsageError("run_cap", cap, "the number of runs, 1 or more" + (", for the method random" if is_random else ""))
        if is_random and cap > specs.MOST:
            raise UsageError("run_cap", cap, f"at most {specs.MOST} runs")


def _metric(given: Any, with_wandb: bool = False) -> tuple[tuple[str, bool], float | None]:
    """The name of what is best, whether more is better (W&B minimises unless told otherwise), and the target."""
    if given is None:
        return ("accuracy", True), None
    if not isinstance(given, Mapping) or "name" not in given:
        raise UsageError("metric", given, "name and goal")
    for key in given:
        if key not in ("name", "goal", "target"):
            raise one_of("metric", key, ("name", "goal", "target"))
    name, goal, target = given["name"], given.get("goal", "minimize"), given.get("target")
    if name not in METRICS and not (with_wandb and isinstance(name, str) and name.startswith("final/")):
        raise one_of("metric, name", name, METRICS)
    if goal not in GOALS:
        raise one_of("goal", goal, GOALS)
    if "target" in given and (isinstance(target, bool) or not isinstance(target, (int, float)) or not math.isfinite(target)):
        raise UsageError("metric, target", target, "a number")
    return (str(name), goal == "maximize"), target


def load(file: str | Path) -> dict[str, Any]:
    """The content of a sweep file. Raises `UsageError` when it is none."""
    content = read_yaml(file, "sweep file")
    if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict):
        raise UsageError("sweep file", str(file), "YAML with `method` and `parameters`")
    return content


def _draws(content: Mapping[str, Any], parameters: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The values of each cell by dotted name."""
    if content["method"] == "random":
        for number in range(content["run_cap"]):
            yield {name: specs.draw(name, spec, number) for name, spec in parameters.items()}
        return
    choices = [specs.choices(name, spec) for name, spec in parameters.items()]
    sizes = [one.stop - one.start if isinstance(one, range) else len(one) for one in choices]
    runs = math.prod(sizes)
    cap = min(content.get("run_cap", runs), runs)
    if cap > specs.MOST:
        raise UsageError("parameters", f"{cap:.3g} runs", f"at most {specs.MOST} runs; fewer with run_cap")
    for number in range(cap):  # the last parameter varies first; a product would hold every value of a long range
        values = []
        for one, size in zip(reversed(choices), reversed(sizes), strict=True):
            number, place = divmod(number, size)
            values.append(one[place])
        yield dict(zip(parameters, reversed(values), strict=True))


def _taken(values: Mapping[str, Any], only: Sequence[str]) -> bool:
    for condition in only:
        key, separator, wanted = condition.partition("=")
        keys = [name for name in values if name == key or name.endswith(f".{key}")]
        if not separator or not keys:
            raise UsageError("--only", condition, f"key=value, with a key of the file: {', '.join(values)}")
        if all(wanted != str(values[name]) and parse_or_text(wanted) != values[name] for name in keys):
            return False
    return True


def _none_taken(parameters: Mapping[str, Mapping[str, Any]], only: Sequence[str]) -> UsageError:
    keys = {condition.partition("=")[0] for condition in only}
    known = {
        name: spec.get("values", spec.get("value", dict(spec)))
        for name, spec in parameters.items()
        if keys & {name, name.rpartition(".")[2]}
    }
    return UsageError("--only", " ".join(only), "; ".join(f"{name} {shown(values)}" for name, values in known.items()))
