"""How long a run will take yet: its rounds and its baselines, from what is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedtune.storage.records import RoundRecord

_RECENT = 10  # rounds from which baselines are estimated


@dataclass(frozen=True)
class Plan:
    """What a run consists of.

    Args:
        rounds, cohort: rounds, and clients in each.
        num_clients: of the federation.
        baselines: those that come after the rounds.
        alone: clients that train alone, for the baseline "local".
        processes: that share the clients.
    """

    rounds: int
    cohort: int
    num_clients: int
    baselines: tuple[str, ...] = ()
    alone: int = 0
    processes: int = 1

    def said(self) -> str:
        """In a line, what is done and in which order; empty without baselines."""
        known = {
            "centralised": f"centralised ({_counted(self.rounds, 'round')} of as many examples, pooled)",
            "local": f"local ({_counted(self.alone, 'client')}, each alone)",
        }
        after = [text for name, text in known.items() if name in self.baselines]
        first = f"federated: {_counted(self.rounds, 'round')} of {_counted(self.cohort, 'client')}"
        return f"{first}; then the baselines: {', '.join(after)}" if after else ""


@dataclass
class Forecast:
    """Seconds that are left of a plan.

    A phase that has begun goes on as it went since its start. Before that, a centralised round takes as long as the clients of
    a federated one after each other, and a client alone as long as in the rounds that it takes part in; each with an
    evaluation.
    """

    plan: Plan | None = None
    clock: Callable[[], float] = time.monotonic
    _seen: list[RoundRecord] = field(default_factory=list)
    _ended: set[str] = field(default_factory=set)
    _phase: str = ""
    _total: int = 0
    _before: int = 0  # done in an earlier start
    _done: int = 0
    _began: float = 0.0
    _last: float = 0.0  # when something was done last

    def begin(self, phase: str, total: int) -> None:
        """A phase of so many pieces of work begins."""
        self._phase, self._total, self._before, self._done = phase, total, 0, 0
        self._began = self._last = self.clock()

    def end(self) -> None:
        """The phase is over."""
        self._ended.add(self._phase)
        self._phase = ""

    def resumed(self, done: int) -> None:
        """So many pieces of the phase were done in an earlier start."""
        self._before = self._done = done
        self._began = self._last = self.clock()

    def reached(self, done: int) -> None:
        """So many pieces of the phase are done."""
        self._done, self._last = done, self.clock()

    def learn(self, rounds: Sequence[RoundRecord]) -> None:
        """Rounds of the federation, by which baselines are estimated."""
        self._seen = [*self._seen, *rounds][-_RECENT:]

    def left(self) -> float | None:
        """Seconds from now on; None where nothing is known yet."""
        if self.plan is None:
            return None
        to_come = [name for name in self.plan.baselines if name not in {*self._ended, self._phase}]
        known = [self._rest(), *map(self._baseline, to_come)]
        return None if None in known else max(0.0, sum(one for one in known if one is not None))

    def _rest(self) -> float | None:
        """Of the phase that goes on."""
        left, here = self._total - self._done, self._done - self._before
        if not self._phase or not left:
            return 0.0
        if here:
            return (self._last - self._began) / here * left - (self.clock() - self._last)
        expected = self._baseline(self._phase)
        return None if expected is None else expected * left / self._total - (self.clock() - self._began)

    def _baseline(self, name: str) -> float | None:
        """Of a whole one, before anything of it is done."""
        plan, reports = self.plan, [report for record in self._seen for report in record.clients]
        if plan is None or not reports or name not in plan.baselines:
            return None
        trained, rounds = sum(report.seconds for report in reports), len(self._seen)
        if name == "centralised":
            return plan.rounds * (trained + sum(record.seconds_evaluate for record in self._seen)) / rounds
        times = max(1.0, plan.rounds * plan.cohort / plan.num_clients)
        once = max(record.seconds_evaluate for record in self._seen)  # some rounds may not be evaluated
        return plan.alone / plan.processes * (times * trained / len(reports) + once)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Seconds for a reader.

    >>> duration(4.2), duration(75), duration(7500)
    ('4 s', '1 min 15 s', '2 h 5 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
