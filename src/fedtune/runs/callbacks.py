"""Hooks into a federated run, in Lightning's manner."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import pytorch_lightning as pl

from fedtune.errors import one_of
from fedtune.federated.messages import ClientReport
from fedtune.storage.records import RoundRecord


@dataclass
class Run:
    """What callbacks see of a run.

    Args:
        config: the resolved configuration, nested dictionaries of plain values.
        data: the data module.
        max_rounds: rounds in all.
        run_dir: directory of the run, or None.
        print: prints a line, above the progress bar.
        history: the rounds so far, those before a resume included.
        summary: as in `summary.json`; complete in `on_fit_end`.
        should_stop: a callback that sets it ends the rounds after this one.
    """

    config: dict[str, Any]
    data: Any
    max_rounds: int
    run_dir: str | None = None
    print: Callable[[str], None] = print
    history: list[RoundRecord] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    should_stop: bool = False


class FederatedCallback:
    """Override what you need; each hook gets the run and the module. Setting `run.should_stop` ends after the round."""

    def on_fit_start(self, run: Run, module: pl.LightningModule) -> None:
        """Before the first round, or the first after a resume; `run.history` holds the rounds already done."""

    def on_round_start(self, run: Run, module: pl.LightningModule, number: int) -> None:
        """Before the first client of a round."""

    def on_client_end(self, run: Run, module: pl.LightningModule, report: ClientReport) -> None:
        """After a client has trained; the module holds that client's weights."""

    def on_round_end(self, run: Run, module: pl.LightningModule, record: RoundRecord) -> None:
        """After the record was written; the module holds the averaged weights."""

    def on_exception(self, run: Run, module: pl.LightningModule, error: BaseException) -> None:
        """When the run has to stop; the error goes on."""

    def on_fit_end(self, run: Run, module: pl.LightningModule) -> None:
        """After the last round and the baselines; `run.summary` is complete, the module holds the averaged weights."""


@final
class MonitorCheck(FederatedCallback):
    """Ends a run whose rounds don't log the metric to monitor; the accuracy, which is the default, may be missing."""

    def __init__(self, monitor: str) -> None:
        self._monitor = monitor

    def on_round_end(self, run: Run, module: pl.LightningModule, record: RoundRecord) -> None:
        """Look at the metrics of the round."""
        if self._monitor not in ("accuracy", *record.metrics):
            raise one_of("monitor", self._monitor, record.metrics)


@contextlib.contextmanager
def exceptions_reported(callbacks: Sequence[FederatedCallback], run: Run, module: pl.LightningModule) -> Iterator[None]:
    """Inside the block whatever is raised is reported to the callbacks, and goes on."""
    try:
        yield
    except BaseException as error:
        for callback in callbacks:
            callback.on_exception(run, module, error)
        raise
