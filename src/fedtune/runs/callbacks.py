"""Hooks into a federated run, in Lightning's manner."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pytorch_lightning as pl

from fedtune.federated.messages import ClientReport
from fedtune.storage.records import RoundRecord

if TYPE_CHECKING:
    from fedtune.runs.loop import FederatedLoop


class FederatedCallback:
    """Override what you need; each hook gets the loop and the module. Setting `loop.should_stop` ends after the round."""

    def on_fit_start(self, loop: FederatedLoop, module: pl.LightningModule) -> None:
        """Before the first round, or the first after a resume; `loop.history` holds the rounds already done."""

    def on_round_start(self, loop: FederatedLoop, module: pl.LightningModule, number: int) -> None:
        """Before the first client of a round."""

    def on_client_end(self, loop: FederatedLoop, module: pl.LightningModule, report: ClientReport) -> None:
        """After a client has trained; the module holds that client's weights."""

    def on_round_end(self, loop: FederatedLoop, module: pl.LightningModule, record: RoundRecord) -> None:
        """After the record was written; the module holds the averaged weights."""

    def on_exception(self, loop: FederatedLoop, module: pl.LightningModule, error: BaseException) -> None:
        """When the run has to stop; the error goes on."""

    def on_fit_end(self, loop: FederatedLoop, module: pl.LightningModule) -> None:
        """After the last round and the baselines; `loop.summary` is complete, the module holds the averaged weights."""


@contextlib.contextmanager
def told_of_exceptions(
    callbacks: Sequence[FederatedCallback], loop: FederatedLoop, module: pl.LightningModule
) -> Iterator[None]:
    """Inside the block whatever is raised is told to the callbacks, and goes on."""
    try:
        yield
    except BaseException as error:
        for callback in callbacks:
            callback.on_exception(loop, module, error)
        raise
