"""The method bayes: cells are proposed one after another, by Optuna's TPE, from what the earlier ones have reached.

The tree-structured Parzen estimator is that of Bergstra et al. 2011 ("Algorithms for Hyper-Parameter Optimization"); W&B's own
method is a Gaussian process. No study is kept: it is built anew for each proposal, from the journal and the runs' directories.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.errors import RunError, UsageError
from fedtune.files import append_line
from fedtune.randomness import stream
from fedtune.storage.locks import locked
from fedtune.sweeps.cell import Cell
from fedtune.sweeps.journal import proposals
from fedtune.sweeps.parameters import KINDS, kind_of, stepped
from fedtune.sweeps.worker import status

_TRIES = 100  # proposals of which one must be new
_BY_MODEL = 10  # so many of them by the model, the others at random
_WIDEST = 10**9  # a whole number that TPE tells from its neighbours
_FARTHEST = 1e100
_SCALES: dict[str, Callable[[float], float]] = {  # of a distribution without q_: where on the axis -> number
    "int_uniform": int,
    "uniform": float,
    "log_uniform": math.exp,
    "log_uniform_values": float,  # the axis itself is logarithmic
    "inv_log_uniform": lambda exponent: math.exp(-exponent),
    "inv_log_uniform_values": float,
}


@dataclass(frozen=True)
class Axis:
    """A parameter as Optuna searches it.

    Args:
        distribution: of Optuna, of places on the axis.
        value: place -> value of the parameter.
        ends: the values at the ends of its range, or each of its categories.
        text: what it is, for a reader.
    """

    distribution: Any
    value: Callable[[Any], Any]
    ends: Sequence[Any]
    text: str


def axis(name: str, spec: Mapping[str, Any]) -> Axis:
    """The axis of a parameter.

    Raises:
        UsageError: Optuna is not installed, or does not have the distribution or its bounds.
    """
    distributions, kind = import_optuna().distributions, kind_of(name, spec)
    if kind == "categorical":
        values = spec["values"]
        return Axis(
            distributions.CategoricalDistribution(range(len(values))),
            values.__getitem__,
            values,
            ", ".join(map(str, values)),
        )
    scale = _SCALES.get(kind.removeprefix("q_"))
    if scale is None:
        known = ["constant", "categorical", *(one for one in KINDS if one.removeprefix("q_") in _SCALES)]
        raise UsageError(f"parameter {name}, distribution", kind, f"for the method bayes: {', '.join(known)}")
    low, high, whole = spec["min"], spec["max"], kind == "int_uniform"
    farthest = _WIDEST if whole else math.inf if kind.endswith("_values") else _FARTHEST
    if max(abs(low), abs(high)) > farthest:
        raise UsageError(f"parameter {name}", dict(spec), f"bounds within {farthest:.0e}, for the method bayes")
    given = {**KINDS[kind], **spec}

    def value(place: float) -> Any:
        return int(place) if whole else stepped(scale(place), given, kind)

    try:
        ends = [value(low), value(high)]
        span = (
            distributions.IntDistribution(low, high)
            if whole
            else distributions.FloatDistribution(low, high, log=kind.endswith("_values"))
        )
    except (ArithmeticError, ValueError) as error:
        raise UsageError(f"parameter {name}", dict(spec), f"bounds for {kind} that give finite numbers ({error})") from error
    return Axis(span, value, ends, f"{kind}, {ends[0]} to {ends[1]}")


@dataclass(frozen=True)
class Search:
    """What is searched, and how far.

    Args:
        axes: dotted name -> axis, of what varies.
        make: dotted name -> value, of what varies, as a cell.
        most: cells in all.
        metric: the name of what is best, and whether more of it is better.
        seed: of the proposals.
        identity: names the journal; sweeps that are alike share one.
    """

    axes: Mapping[str, Axis]
    make: Callable[[dict[str, Any]], Cell]
    most: int
    metric: tuple[str, bool]
    seed: int
    identity: str

    @functools.cached_property
    def probes(self) -> list[Cell]:
        """A cell for each end of a range and each category, the other parameters at their first."""
        first = {name: one.ends[0] for name, one in self.axes.items()}
        others = [{**first, name: value} for name, one in self.axes.items() for value in one.ends[1:]]
        return [self.make(values) for values in [first, *others]]

    def journal(self, folder: Path) -> Path:
        """The file that says what was proposed in a folder of runs."""
        return folder / f"bayes-{self.identity}.jsonl"

    def proposed(self, folder: Path) -> list[Cell]:
        """The cells that were proposed in a folder of runs, in their order.

        Raises:
            RunError: the journal is damaged.
        """
        return self._cells(folder)

    def grow(self, folder: Path, known: Sequence[Cell]) -> list[Cell]:
        """Cells beyond the known ones: those that another process has proposed since, or a new one, which is written down
        before anybody can begin it. None where all are proposed, or no other can be found.

        Raises:
            RunError: the journal is damaged.
            UsageError: the folder cannot be written.
        """
        with locked(folder, wait=True):
            others = self._cells(folder, len(known))
            found = self._new(folder, known) if not others and len(known) < self.most else None
            if found is None:
                return others
            cell, at = found
            append_line(self.journal(folder), {"number": len(known) + 1, "run": cell.name, "at": at})
            return [cell]

    def _cells(self, folder: Path, start: int = 0) -> list[Cell]:
        """The cells of a journal, from one on."""
        file = self.journal(folder)
        return [self._cell(line["at"], f"{file}, line {line['number']}") for line in proposals(file)[start:]]

    def _new(self, folder: Path, cells: Sequence[Cell]) -> tuple[Cell, dict[str, Any]] | None:
        """A cell that is none of the others, and where it is."""
        optuna, names = import_optuna(), {cell.name for cell in cells}
        places = [line["at"] for line in proposals(self.journal(folder))]
        trials = [self._trial(at, status(folder / cell.name)) for at, cell in zip(places, cells, strict=True)]
        for attempt in range(_TRIES):
            seed = int(stream(self.seed, "sweep/bayes", len(cells), attempt).integers(2**32))
            kind = optuna.samplers.TPESampler if attempt < _BY_MODEL else optuna.samplers.RandomSampler
            at = self._asked(kind(seed=seed), trials)
            try:
                cell = self._cell(at)
            except UsageError:  # values that do not go together are no cell
                continue
            if cell.name not in names:
                return cell, at
        return None

    def _asked(self, sampler: Any, trials: Sequence[Any]) -> dict[str, Any]:
        """Where the next trial is."""
        optuna = import_optuna()
        loud = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                study = optuna.create_study(direction="maximize" if self.metric[1] else "minimize", sampler=sampler)
                study.add_trials(trials)
                return dict(study.ask({name: one.distribution for name, one in self.axes.items()}).params)
        finally:
            optuna.logging.set_verbosity(loud)

    def _trial(self, at: Mapping[str, Any], found: Mapping[str, Any]) -> Any:
        """A cell as a trial of Optuna: one that has not ended is running, one that ended without the metric has failed."""
        trial = import_optuna().trial
        value = found.get("metrics", {}).get(self.metric[0])
        states = trial.TrialState
        state = states.RUNNING if not found else states.FAIL if value is None else states.COMPLETE
        distributions = {name: one.distribution for name, one in self.axes.items()}
        return trial.create_trial(state=state, value=value, params=dict(at), distributions=distributions)

    def _cell(self, at: Mapping[str, Any], where: str = "") -> Cell:
        for name, one in self.axes.items():
            if name not in at or not _is_on(one, at[name]):
                raise RunError(f"{where}: {name} is not where the sweep file has it")
        return self.make({name: one.value(at[name]) for name, one in self.axes.items()})


def import_optuna() -> Any:
    """The module optuna.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        allowed = "after: pip install 'fedtune[sweep]' (the package optuna is not installed); or --wandb and a key"
        raise UsageError("method", "bayes", allowed) from error
    return optuna


def _is_on(one: Axis, place: Any) -> bool:
    """Whether a place in a journal is one on the axis."""
    distribution, categories = one.distribution, len(one.ends) if hasattr(one.distribution, "choices") else None
    whole = categories is not None or isinstance(distribution.low, int)
    if isinstance(place, bool) or not isinstance(place, int if whole else (int, float)):
        return False
    return 0 <= place < categories if categories is not None else bool(distribution.low <= place <= distribution.high)
