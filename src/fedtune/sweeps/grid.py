"""What a sweep file says: a list of cells. The format is that of Weights & Biases, so one file serves both ways."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.errors import UsageError, one_of, shown
from fedtune.runs import building, flags
from fedtune.storage.config import fingerprint, nested
from fedtune.sweeps import parameters as specs
from fedtune.sweeps.bayes import Search, axis
from fedtune.sweeps.cell import Cell
from fedtune.sweeps.command import PROGRAMS, flags_of, words_of
from fedtune.sweeps.files import load, said_of, stem
from fedtune.sweeps.hyperband import Hyperband, rule_of
from fedtune.sweeps.metric import metric_of
from fedtune.sweeps.several import EACH, check_each, runs_at_a_time
from fedtune.yaml_files import parse_or_text

METHODS = ("grid", "random", "bayes")
_TEXTS = ("name", "description", "project", "entity")
_KEYS = ("method", "metric", "parameters", "run_cap", "early_terminate", "program", "command", *_TEXTS, EACH)


@dataclass(frozen=True)
class Sweep:
    """The cells of a sweep file, each once.

    Args:
        cells: none yet where they are found by a `search`.
        metric: the name of what is best, and whether more of it is better.
        target: of the metric: once a run reaches it, no other is started.
        environment: where the runs go in W&B, where they are mirrored.
        search: proposes the cells, for the method bayes.
        early: when a run is stopped that is behind the others.
        workers_per_run: processes that share the clients of each run.
    """

    name: str
    cells: list[Cell]
    metric: tuple[str, bool] = ("accuracy", True)
    target: float | None = None
    environment: dict[str, str] = field(default_factory=dict)
    search: Search | None = None
    early: Hyperband | None = None
    workers_per_run: int = 1

    def at_a_time(self, workers: int) -> int:
        """Runs at a time, with so many processes in all."""
        return runs_at_a_time(workers, self.workers_per_run)

    def is_reached(self, value: Any) -> bool:
        """Whether a value of the metric is as good as the target."""
        return (
            self.target is not None and value is not None and (value >= self.target if self.metric[1] else value <= self.target)
        )


def read(file: str | Path | Mapping[str, Any], only: Sequence[str] = (), imports: Sequence[str] = ()) -> Sweep:
    """Read a sweep file.

    Args:
        file: YAML with `method` ("grid", "random" with `run_cap`, or "bayes" with `run_cap` and `metric`), `parameters` and,
            optionally, `run_cap`, `name`, `command`, `metric` {name, goal, target}, `early_terminate` (hyperband). A parameter
            has `value`, `values`, a `distribution` with its bounds, or `parameters` of its own; dotted names are the same as
            nested ones. `seed` sets all three seeds. Flags in `command` hold for each run. `workers_per_run` is our own key.
            Or its content; or `fedtune:NAME`, a file that comes with fedtune.
        only: "key=value" each; cells without that value, or one of several of a key, are left out. The key may be shortened to
            its last part.
        imports: modules of one's own that each run imports.

    Raises:
        UsageError: the file cannot be read, or holds what a sweep cannot be made of; `only` takes no cell; for bayes, Optuna is
            not installed.
    """
    where = said_of(file)
    with _naming(where):
        content = load(file)
        fixed = check(content) | ({"import": list(imports)} if imports else {})
        parameters = specs.parameters_of(content["parameters"])
        varied = [name for name, spec in parameters.items() if specs.kind_of(name, spec) != "constant"]
        arguments_of = _resolver(str(where))

        def make(values: Mapping[str, Any]) -> Cell:
            return Cell(arguments_of({**fixed, **values}), {name: values[name] for name in varied})

        metric, target = metric_of(content.get("metric"))
        search: Search | None = None
        cells: dict[str, Cell] = {}
        if content["method"] == "bayes":
            search = _search(content, parameters, fixed, make, only)
        else:
            for cell in map(make, _taken(list(_draws(content, parameters)), parameters, only)):
                cells.setdefault(cell.name, cell)
        environment = {f"WANDB_{key.upper()}": content[key] for key in ("project", "entity") if key in content}
        name = str(content.get("name", stem(file)))
        early = rule_of(content["early_terminate"], metric) if "early_terminate" in content else None
        return Sweep(name, list(cells.values()), metric, target, environment, search, early, content.get(EACH, 1))


def _resolver(where: str) -> Callable[[Mapping[str, Any]], dict[str, dict[str, Any]]]:
    """Makes the arguments of runs from dotted values; once of runs that differ in their seed alone, as flags take a while."""
    known: dict[str, dict[str, dict[str, Any]]] = {}

    def arguments(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        seed, others = values.get("seed"), repr({name: value for name, value in values.items() if name != "seed"})
        if type(seed) is not int or not 0 <= seed < 2**31:  # it is refused, or none is given
            return flags.resolve(nested(copy.deepcopy(dict(values))), where)
        if others not in known:
            known[others] = flags.resolve(nested(copy.deepcopy(dict(values))), where)
        return {part: copy.deepcopy(of) | {"seed": seed} for part, of in known[others].items()}

    return arguments


def check(content: Mapping[str, Any], with_wandb: bool = False) -> dict[str, Any]:
    """Check every key of a sweep file; the values of runs are checked with the runs.

    Args:
        with_wandb: W&B hands out the runs; it knows more metrics, and when to stop a run.

    Returns:
        name -> value, of the flags in `command`.

    Raises:
        UsageError: a key, or a value of one, that could not be applied.
    """
    method = content.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise one_of("method", method, METHODS)
    for key in content:
        if key not in _KEYS:
            raise one_of("sweep file", key, _KEYS)
        if key in _TEXTS and not isinstance(content[key], str):
            raise UsageError(key, content[key], "text")
    if content.get("program", PROGRAMS[0]) not in PROGRAMS:
        raise UsageError("program", content["program"], f"{PROGRAMS[0]}, or none: the runs are those of fedtune run")
    _check_cap(content, with_wandb)
    check_each(content)
    metric, _ = metric_of(content.get("metric"), with_wandb)
    if not with_wandb:
        _check_compared(content)
        if "early_terminate" in content:
            rule_of(content["early_terminate"], metric)
    fixed = flags_of(words_of(content["command"])) if "command" in content else {}
    parameters = specs.parameters_of(content["parameters"])
    for name in fixed.keys() & parameters.keys():
        raise UsageError(f"parameter {name}", parameters[name], "nothing beside the flag of the same name in command")
    specs.check(parameters | {name: {"value": value} for name, value in fixed.items()}, method)
    return fixed


def check_cells(sweep: Sweep, file: str | Path) -> None:
    """Check each run of a sweep as its start would, before any text is read; for bayes, the ends of ranges and the categories.

    Raises:
        UsageError: the first value that cannot be used, and in how many runs.
    """
    known: dict[str, UsageError | None] = {}
    bad = []
    cells = sweep.search.probes if sweep.search else sweep.cells
    for cell in cells:
        arguments = {part: {key: value for key, value in of.items() if key != "seed"} for part, of in cell.arguments.items()}
        key = repr(arguments)
        if key not in known:
            try:
                building.check(cell.arguments)
                known[key] = None
            except UsageError as error:
                known[key] = error
        found = known[key]
        bad += [] if found is None else [found]
    if bad:
        what = "ends of ranges and categories" if sweep.search else "runs"
        raise bad[0].renamed(lambda name: f"{file}: {name}", f" ({len(bad)} of {len(cells)} {what} could not start)")


@contextlib.contextmanager
def _naming(file: str | Path) -> Iterator[None]:
    """Name the file in errors about what it says."""
    try:
        yield
    except UsageError as error:
        if error.argument == "--only" or str(file) in (error.came, error.argument.rpartition(": ")[0]):
            raise
        raise error.renamed(lambda name: f"{file}: {name}") from error


def _check_cap(content: Mapping[str, Any], with_wandb: bool) -> None:
    cap, method = content.get("run_cap"), content["method"]
    if "run_cap" in content or (method != "grid" and not with_wandb):
        if isinstance(cap, bool) or not isinstance(cap, int) or cap < 1:
            raise UsageError(
                "run_cap", cap, "the number of runs, 1 or more" + (f", for the method {method}" * (method != "grid"))
            )
        if method != "grid" and cap > specs.MOST:
            raise UsageError("run_cap", cap, f"at most {specs.MOST} runs")


def _check_compared(content: Mapping[str, Any]) -> None:
    """Runs that are compared while the sweep goes on are so by what the file says, and not by a default."""
    metric, is_bayes = content.get("metric"), content["method"] == "bayes"
    if (is_bayes or "early_terminate" in content) and not (isinstance(metric, Mapping) and "goal" in metric):
        raise UsageError("metric", metric, f"name and goal, for {'the method bayes' if is_bayes else 'early_terminate'}")


def _search(
    content: Mapping[str, Any],
    parameters: Mapping[str, Mapping[str, Any]],
    fixed: Mapping[str, Any],
    make: Callable[[Mapping[str, Any]], Cell],
    only: Sequence[str],
) -> Search:
    """What the method bayes searches; a seed that is the same for all runs is that of the search, too."""
    if only:
        raise UsageError("--only", " ".join(only), "nothing, for the method bayes; take the part out of the file")
    same = {name: spec["value"] for name, spec in parameters.items() if specs.kind_of(name, spec) == "constant"}
    axes = {name: axis(name, spec) for name, spec in parameters.items() if name not in same}
    metric, _ = metric_of(content["metric"])
    seed = {**fixed, **same}.get("seed")
    about = {f"parameter {name}": repr(sorted(spec.items())) for name, spec in parameters.items()}
    about |= {f"flag {name}": repr(value) for name, value in fixed.items()} | {"metric": repr(metric)}
    search = Search(
        axes,
        lambda values: make({**same, **values}),
        content["run_cap"],
        metric,
        seed if isinstance(seed, int) and seed >= 0 else 0,
        fingerprint(about),
    )
    search.probes  # noqa: B018 - reading them checks them
    return search


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


def _taken(
    draws: Sequence[dict[str, Any]], parameters: Mapping[str, Mapping[str, Any]], only: Sequence[str]
) -> Sequence[dict[str, Any]]:
    """Those cells that have one of the wanted values of each wanted key; every condition is one of some cell."""
    wanted: dict[str, set[int]] = {}  # by key, of which there may be several values
    missed = []
    for condition in only:
        key, separator, text = condition.partition("=")
        names = [name for name in parameters if name == key or name.endswith(f".{key}")]
        if not separator or not names:
            raise UsageError("--only", condition, f"key=value, with a key of the file: {', '.join(parameters)}")
        found = _having(draws, names, text)
        missed += [] if found else [condition]
        wanted[key] = wanted.get(key, set()) | found
    taken = [values for number, values in enumerate(draws) if all(number in found for found in wanted.values())]
    if missed or not taken:
        raise _none_taken(parameters, missed or only)
    return taken


def _having(draws: Sequence[Mapping[str, Any]], names: Sequence[str], text: str) -> set[int]:
    """The numbers of the cells in which one of some parameters has a value: written so, else one that is the same."""
    value = parse_or_text(text)
    written = {number for number, values in enumerate(draws) if any(text == str(values[name]) for name in names)}
    return written or {number for number, values in enumerate(draws) if any(_same(value, values[name]) for name in names)}


def _same(one: Any, other: Any) -> bool:
    """Whether two values are the same: 1 and 1.0 are, 1 and true are not."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _none_taken(parameters: Mapping[str, Mapping[str, Any]], only: Sequence[str]) -> UsageError:
    keys = {condition.partition("=")[0] for condition in only}
    known = {
        name: spec.get("values", spec.get("value", dict(spec)))
        for name, spec in parameters.items()
        if keys & {name, name.rpartition(".")[2]}
    }
    return UsageError("--only", " ".join(only), "; ".join(f"{name} {shown(values)}" for name, values in known.items()))
