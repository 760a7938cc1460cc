"""What is said of a run while it goes on: a line a round with the time left for all of it, and where it stands."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fedtune.federated.messages import ClientReport
from fedtune.runs.displays import display
from fedtune.runs.forecast import Forecast, Plan, duration
from fedtune.storage.records import RoundRecord

_SILENCE = 60.0  # seconds after which a line says where a run stands, where there is no bar


class Progress:
    """A line for every round; a bar over clients on a terminal and in a notebook, elsewhere a line a minute.

    It also follows the baselines, which are no concern of the callbacks of a user.
    """

    def __init__(self, enabled: bool) -> None:
        self._display, self._forecast = display(enabled), Forecast()
        self._note, self._said = "", time.monotonic()

    def plan(self, plan: Plan) -> None:
        """What the run consists of: its baselines are announced, and are part of the time left."""
        self._forecast = Forecast(plan)
        if plan.said():
            self.line(plan.said())

    @contextmanager
    def phase(self, name: str, rounds: int, clients: int) -> Iterator[None]:
        """A stretch of work: the federated rounds, or a baseline.

        Args:
            rounds, clients: how many rounds it has, and clients in each; of "local" each client is a round.
        """
        self._name, self._rounds, self._clients = name, rounds, clients
        self._done, self._steps, self._pieces, self._note = 0, 0, 0, ""
        self._forecast.begin(name, rounds * clients)
        self._show(name)
        try:
            yield
        finally:
            self._forecast.end()
            self._display.clear()

    def resumed(self, history: Sequence[Any]) -> None:
        """Work begins, after these rounds of an earlier start, which have records."""
        self._done, self._pieces = len(history), len(history) * self._clients
        self._learn(history)
        self._forecast.resumed(self._pieces)
        if history:
            what = "clients" if self._name == "local" else "rounds"
            self.line(f"{self._name}: {len(history)} of {self._rounds} {what} were done before{self._left()}")
            self._show(self._name)

    def client(self, report: ClientReport) -> None:
        """One more client is done."""
        self._steps += report.num_steps
        self._reach(self._pieces + 1)
        number = f"round {self._done + 1}/{self._rounds}, client {report.client}"
        text = f"{self._name}: {number}, {self._steps} steps{self._note}"
        self._show(text)
        if not self._display.live and time.monotonic() - self._said >= _SILENCE:
            self.line(f"{text}{self._left()}")

    def round(self, record: RoundRecord) -> None:
        """One more round is done."""
        self._done = record.round
        self._learn([record])
        self._reach(record.round * self._clients)
        metrics = "  ".join(f"{name} {value:.3f}" for name, value in record.metrics.items())
        number = f"{record.round:>{len(str(self._rounds))}}/{self._rounds}"
        losses = f"{metrics}  train_loss_nats {record.train_loss_nats:.3f}"
        self.line(f"{self._name} round {number}  {losses}  {record.seconds:.1f} s{self._left()}")
        accuracy = record.metrics.get("accuracy")
        self._note = "" if accuracy is None else f", accuracy {accuracy:.3f}"
        self._show(f"{self._name}: round {self._done}/{self._rounds}{self._note}")

    def local(self, record: Mapping[str, Any]) -> None:
        """One more client has trained alone."""
        part = "validation" if "validation" in record else "test"
        metrics = "  ".join(f"{name} {value:.3f}" for name, value in record[part].items())
        self._reach(self._pieces + 1)
        self.line(f"local client {record['client']}  {metrics}  {record['seconds']:.1f} s{self._left()}")
        self._show(f"local: {self._pieces}/{self._rounds} clients")

    def line(self, text: str) -> None:
        """Print a line, above the bar."""
        self._said = time.monotonic()
        self._display.line(text)

    def _learn(self, history: Sequence[RoundRecord]) -> None:
        if self._name == "federated":
            self._forecast.learn(history)

    def _reach(self, pieces: int) -> None:
        self._pieces = pieces
        self._forecast.reached(pieces)

    def _show(self, text: str) -> None:
        self._display.show(text, self._pieces, self._rounds * self._clients, self._forecast.left())

    def _left(self) -> str:
        """The time that is left, for the end of a line; nothing where it is not known, or all is done."""
        left = self._forecast.left()
        return f"  {duration(max(1.0, left))} left in all" if left else ""
