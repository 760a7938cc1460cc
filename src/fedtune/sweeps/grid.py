"""What a sweep file says: a list of cells. The format is that of Weights & Biases, so one file serves both ways."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedtune.errors import UsageError, one_of
from fedtune.randomness import stream
from fedtune.runs.flags import name_of, resolve
from fedtune.storage.config import nested

METHODS = ("grid", "random")
GOALS = ("minimize", "maximize")
_OWN = ("config", "run_dir", "runs_dir", "logger")  # the sweep decides on these
_KEYS = ("method", "metric", "parameters", "name", "description", "project", "entity", "run_cap", "program", "command")
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
        return name_of(self.arguments)

    @property
    def title(self) -> str:
        """What it is, for a reader: the values that differ between cells."""
        return ", ".join(f"{key.removesuffix('.name').rpartition('.')[2]} {value}" for key, value in self.varied.items())


@dataclass(frozen=True)
class Sweep:
    """The cells of a sweep file, each once; `metric`: the name of what is best, and whether more of it is better."""

    name: str
    cells: list[Cell]
    metric: tuple[str, bool] = ("accuracy", True)


def read(file: str | Path, only: Sequence[str] = ()) -> Sweep:
    """Read a sweep file.

    Args:
        file: YAML with `method` ("grid" or "random" with `run_cap`), `parameters` and, optionally, `metric` {name, goal}.
            A parameter has `value`, `values`, `distribution` with its bounds, or `parameters` of its own; dotted names are the
            same as nested ones. `seed` sets all three seeds.
        only: "key=value" each; cells without that value are left out. The key may be shortened to its last part.

    Raises:
        UsageError: the file cannot be read, or holds what a sweep cannot be made of; `only` takes no cell.
        SystemExit: a parameter that a run does not have, or a value of a wrong type; said in one line.
    """
    content = load(file)
    if content.get("method") not in METHODS:
        raise one_of("method", content.get("method"), METHODS, also="; bayes with --wandb and a key")
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        also = "; early_terminate with --wandb and a key" if unknown[0] in _NOT_LOCAL else ""
        raise one_of("sweep file", unknown[0], _KEYS, also=also)
    parameters = parameters_of(content["parameters"])
    chosen = [values for values in _draws(content, parameters) if _taken(values, only)]
    if not chosen:
        keys = {condition.partition("=")[0] for condition in only}
        known = {
            name: spec.get("values", spec.get("value"))
            for name, spec in parameters.items()
            if keys & {name, name.rpartition(".")[2]}
        }
        raise UsageError("--only", " ".join(only), "; ".join(f"{name} {values}" for name, values in known.items()))
    varied = [key for key, spec in parameters.items() if "value" not in spec]
    cells: dict[str, Cell] = {}
    for values in chosen:
        cell = Cell(resolve(nested(values)), {key: values[key] for key in varied})
        cells.setdefault(cell.name, cell)
    return Sweep(str(content.get("name", Path(file).stem)), list(cells.values()), _metric(content.get("metric")))


def _metric(given: Any) -> tuple[str, bool]:
    """The name of what is best, and whether more is better; W&B minimises unless told otherwise."""
    if given is None:
        return "accuracy", True
    if not isinstance(given, Mapping) or "name" not in given:
        raise UsageError("metric", given, "name and goal")
    goal = given.get("goal", "minimize")
    if goal not in GOALS:
        raise one_of("goal", goal, GOALS)
    return str(given["name"]), goal == "maximize"


def load(file: str | Path) -> dict[str, Any]:
    """The content of a sweep file. Raises `UsageError` when it is none."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError("sweep file", str(file), f"a YAML file that can be read ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict):
        raise UsageError("sweep file", str(file), "YAML with `method` and `parameters`")
    return content


def parameters_of(parameters: Mapping[str, Any], prefix: str = "") -> dict[str, dict[str, Any]]:
    """Dotted name -> what the file says of the parameter.

    >>> parameters_of({"data": {"parameters": {"task": {"value": "imdb"}}}, "loop.seed": {"values": [0, 1]}})
    {'data.task': {'value': 'imdb'}, 'loop.seed': {'values': [0, 1]}}
    """
    found: dict[str, dict[str, Any]] = {}
    if not isinstance(parameters, Mapping):
        raise UsageError(
            "parameters of " + prefix.rstrip("."), parameters, "names with value, values, distribution or parameters"
        )
    for key, spec in parameters.items():
        if prefix + str(key) in _OWN:
            raise UsageError("parameter", key, f"any of a run but {', '.join(_OWN)}")
        if not isinstance(spec, Mapping) or not {"value", "values", "distribution", "parameters", "min"} & spec.keys():
            raise UsageError(f"parameter {prefix}{key}", spec, "value, values, distribution or parameters")
        found |= (
            parameters_of(spec["parameters"], f"{prefix}{key}.") if "parameters" in spec else {f"{prefix}{key}": dict(spec)}
        )
    return found


def _draws(content: Mapping[str, Any], parameters: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The values of each cell by dotted name."""
    if content["method"] == "random":
        if not isinstance(content.get("run_cap"), int):
            raise UsageError("run_cap", content.get("run_cap"), "the number of runs, for the method random")
        for number in range(content["run_cap"]):
            yield {name: _draw(name, spec, number) for name, spec in parameters.items()}
        return
    for name, spec in parameters.items():
        if "value" not in spec and not isinstance(spec.get("values"), list):
            raise UsageError(f"parameter {name}", dict(spec), "value or values (a list), for the method grid")
    choices = [[spec["value"]] if "value" in spec else spec["values"] for spec in parameters.values()]
    for values in itertools.product(*choices):
        yield dict(zip(parameters, values, strict=True))


def _draw(name: str, spec: Mapping[str, Any], number: int) -> Any:
    """One value of a parameter; the same file gives the same values."""
    rng = stream(0, f"sweep/{name}", number)
    if "value" in spec:
        return spec["value"]
    whole = all(isinstance(spec.get(bound), int) for bound in ("min", "max"))
    kind = "categorical" if "values" in spec else spec.get("distribution", "int_uniform" if whole else "uniform")
    if kind not in _DISTRIBUTIONS:
        raise one_of(f"parameter {name}, distribution", kind, _DISTRIBUTIONS)
    try:
        return _DISTRIBUTIONS[kind](rng, spec)
    except (KeyError, TypeError, ValueError) as error:
        allowed = f"what its distribution {kind} needs ({type(error).__name__}: {error})"
        raise UsageError(f"parameter {name}", dict(spec), allowed) from error


_DISTRIBUTIONS: dict[str, Callable[[Any, Mapping[str, Any]], Any]] = {
    "categorical": lambda rng, spec: spec["values"][int(rng.choice(len(spec["values"]), p=spec.get("probabilities")))],
    "int_uniform": lambda rng, spec: int(rng.integers(int(spec["min"]), int(spec["max"]) + 1)),
    "uniform": lambda rng, spec: float(rng.uniform(float(spec["min"]), float(spec["max"]))),
    "log_uniform_values": lambda rng, spec: math.exp(rng.uniform(math.log(float(spec["min"])), math.log(float(spec["max"])))),
    "normal": lambda rng, spec: float(rng.normal(float(spec["mu"]), float(spec["sigma"]))),
}


def _taken(values: Mapping[str, Any], only: Sequence[str]) -> bool:
    for condition in only:
        key, separator, wanted = condition.partition("=")
        keys = [name for name in values if name == key or name.endswith(f".{key}")]
        if not separator or not keys:
            raise UsageError("--only", condition, f"key=value, with a key of the file: {', '.join(values)}")
        if all(wanted != str(values[name]) and _number(yaml.safe_load(wanted)) != _number(values[name]) for name in keys):
            return False
    return True


def _number(value: Any) -> Any:
    """YAML takes 1e-3 for text; a parameter given like that is a number all the same."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
