"""What the terminal says of a run: a line a round, and a bar with the time left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fedtune.federated.messages import ClientReport
from fedtune.storage.records import RoundRecord


class Progress:
    """A line for every round, and where the output is a terminal a bar over clients with the time left.

    It also follows the baselines, which are no concern of the callbacks of a user.
    """

    def __init__(self, enabled: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._console = Console(quiet=not enabled, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._note = ""

    @contextmanager
    def phase(self, name: str, rounds: int, clients: int) -> Iterator[None]:
        """A stretch of work: the federated rounds, or a baseline.

        Args:
            rounds, clients: how many rounds it has, and clients in each.
        """
        self._name, self._rounds, self._clients = name, rounds, clients
        self._done, self._steps, self._note = 0, 0, ""
        self._task = self._bar.add_task(name, total=rounds * clients)
        try:
            with self._bar:
                yield
        finally:
            self._bar.remove_task(self._task)

    def resumed(self, done: int) -> None:
        """So many rounds were done in an earlier start."""
        self._done = done
        if done:
            self.line(f"{self._name}: {done} of {self._rounds} rounds were done before")
            self._bar.reset(self._task, completed=done * self._clients)

    def client(self, report: ClientReport) -> None:
        """One more client is done."""
        self._steps += report.num_steps
        number = f"round {self._done + 1}/{self._rounds}, client {report.client}"
        text = f"{self._name}: {number}, {self._steps} steps{self._note}"
        self._bar.update(self._task, advance=1, description=text)

    def round(self, record: RoundRecord) -> None:
        """One more round is done."""
        self._done = record.round
        metrics = "  ".join(f"{name} {value:.3f}" for name, value in record.metrics.items())
        number = f"{record.round:>{len(str(self._rounds))}}/{self._rounds}"
        losses = f"{metrics}  train_loss_nats {record.train_loss_nats:.3f}"
        self.line(f"{self._name} round {number}  {losses}  {record.seconds:.1f} s")
        accuracy = record.metrics.get("accuracy")
        self._note = "" if accuracy is None else f", accuracy {accuracy:.3f}"
        self._bar.update(self._task, completed=record.round * self._clients)

    def local(self, record: Mapping[str, Any]) -> None:
        """One more client has trained alone."""
        part = "validation" if "validation" in record else "test"
        metrics = "  ".join(f"{name} {value:.3f}" for name, value in record[part].items())
        self.line(f"local client {record['client']}  {metrics}  {record['seconds']:.1f} s")
        self._bar.update(self._task, advance=1)

    def line(self, text: str) -> None:
        """Print a line, above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)
