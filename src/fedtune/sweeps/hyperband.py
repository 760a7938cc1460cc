"""`early_terminate: {type: hyperband}`: a run that is behind the others of its sweep is stopped.

The rule is that of W&B, which is asynchronous successive halving (Li et al. 2018, "Hyperband"; 2020, "A System for Massively
Parallel Hyperparameter Tuning"). Optuna's pruners have another one: brackets by chance, and no brackets at rounds of one's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.errors import RunError, UsageError, one_of
from fedtune.files import read_lines
from fedtune.runs.callbacks import FederatedCallback, Run
from fedtune.sweeps.journal import directories

_KEYS = ("type", "min_iter", "max_iter", "s", "eta", "strict")
_MOST = 10**6  # rounds
_SHAPE = "type hyperband, with min_iter, or with max_iter and s"


@dataclass(frozen=True)
class Hyperband:
    """When a run is compared with others, and how many of them go on.

    Args:
        brackets: rounds after which runs are compared, ascending.
        eta: about one in so many goes on.
        strict: no more than that (but one), as in the paper; otherwise one more, as in W&B.
        metric: the name of what is compared, and whether more of it is better.
    """

    brackets: tuple[int, ...]
    eta: float
    strict: bool
    metric: tuple[str, bool]

    def kept(self, count: int) -> int:
        """How many of so many runs at a bracket go on."""
        share = int(count / self.eta)
        return max(1, share) if self.strict else min(count, share + 1)

    def is_stopped(self, own: float, others: Sequence[float]) -> bool:
        """Whether a run is not among the best that reached a bracket; equal values are equally good, NaN is worst.

        >>> rule = Hyperband((1,), 2, False, ("accuracy", True))
        >>> [rule.is_stopped(own, (0.6, 0.7, 0.8)) for own in (0.5, 0.6, 0.65)]
        [True, False, False]
        """
        costs = sorted(map(self._cost, [own, *others]))
        return self._cost(own) > costs[self.kept(len(costs)) - 1]

    def _cost(self, value: float) -> float:
        return math.inf if math.isnan(value) else -value if self.metric[1] else value


def rule_of(given: Any, metric: tuple[str, bool]) -> Hyperband:
    """The rule in a sweep file.

    Raises:
        UsageError: a key, or a value of one, that could not be applied.
    """
    if not isinstance(given, Mapping) or "type" not in given:
        raise UsageError("early_terminate", given, _SHAPE)
    for key in given:
        if key not in _KEYS:
            raise one_of("early_terminate", key, _KEYS)
    if given["type"] != "hyperband":
        raise UsageError("early_terminate, type", given["type"], "hyperband")
    if ("min_iter" in given) == ("max_iter" in given) or ("max_iter" in given) != ("s" in given):
        raise UsageError("early_terminate", dict(given), _SHAPE)
    for key in ("min_iter", "max_iter", "s"):
        value = given.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
            raise UsageError(f"early_terminate, {key}", value, f"a whole number from 1 to {_MOST}")
    eta, strict = given.get("eta", 3), given.get("strict", False)
    if isinstance(eta, bool) or not isinstance(eta, (int, float)) or not 1 < eta <= _MOST:
        raise UsageError("early_terminate, eta", eta, "a number above 1")
    if not isinstance(strict, bool):
        raise UsageError("early_terminate, strict", strict, "true or false")
    brackets = _brackets(given, float(eta))
    if not brackets:
        raise UsageError("early_terminate", dict(given), "max_iter of eta or more, so that there is a bracket")
    return Hyperband(brackets, float(eta), strict, metric)


def _brackets(given: Mapping[str, Any], eta: float) -> tuple[int, ...]:
    """The rounds min_iter, min_iter * eta and so on; or max_iter / eta, max_iter / eta**2 and so on, s of them."""
    found: set[int] = set()
    at = float(given.get("min_iter", 0))
    while 1 <= at <= _MOST and len(found) < 1000:
        found.add(int(at))
        at *= eta
    at = given.get("max_iter", 0) / eta
    for _ in range(min(given.get("s", 0), 1000)):
        found |= {int(at)} if at >= 1 else set()
        at /= eta
    return tuple(sorted(found))


class Stopping(FederatedCallback):
    """Ends a run by a rule about the runs beside it. What was decided of a bracket is not decided again.

    Args:
        rule: when and how runs are compared.
        folder: of the runs.
        runs: the names of their directories; this run's may be among them.
        journal: has more of them, where runs are proposed one after another.
    """

    everywhere = False

    def __init__(self, rule: Hyperband, folder: Path, runs: Sequence[str], journal: Path | None = None) -> None:
        self._rule, self._folder, self._runs, self._journal = rule, folder, tuple(runs), journal
        self.reason: str | None = None  # why the run was stopped

    def state_dict(self) -> dict[str, Any]:
        """Why the run was stopped, if it was."""
        return {} if self.reason is None else {"reason": self.reason}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Know that again."""
        self.reason = state.get("reason")

    def on_round_end(self, run: Run, module: Any, record: Any) -> None:
        """Compare, where the round is a bracket."""
        if record.round not in self._rule.brackets or record.round >= run.max_rounds:
            return
        own = _value([one.metrics for one in run.history], record.round, self._rule.metric[0])
        if own is None:
            return
        others = self._others(record.round, Path(str(run.run_dir)).name)
        if self._rule.is_stopped(own, others):
            count = len(others) + 1
            self.reason = (
                f"hyperband: {self._rule.metric[0]} {own:.4f} after round {record.round} is not among the best "
                f"{self._rule.kept(count)} of {count} runs"
            )
            run.should_stop = True
            run.print(self.reason)

    def _others(self, number: int, own: str) -> list[float]:
        """What the other runs had after so many rounds, as far as they got there."""
        found = []
        for name in dict.fromkeys([*self._runs, *directories(self._journal)]):
            try:
                rounds = read_lines(self._folder / name / "rounds.jsonl") if name != own else []
            except RunError:  # the run itself says so
                continue
            value = _value(rounds, number, self._rule.metric[0])
            found += [] if value is None else [value]
        return found


def _value(rounds: Sequence[Mapping[str, Any]], number: int, metric: str) -> float | None:
    """A metric after so many rounds, or when it was measured last before; None for a run that did not get there."""
    known = [one[metric] for one in rounds[:number] if metric in one] if len(rounds) >= number else []
    if not known:
        return None
    value = known[-1]
    return float(value) if isinstance(value, (int, float)) else math.nan
