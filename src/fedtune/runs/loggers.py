"""Where a run is mirrored: Weights & Biases, or a logger of Lightning."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger

from fedtune.errors import one_of
from fedtune.files import said
from fedtune.runs.callbacks import FederatedCallback, Run
from fedtune.runs.wandb import LOGGERS, WandbMirror
from fedtune.storage.records import RoundRecord


class LoggerMirror(FederatedCallback):
    """Gives every number of a round's record to a logger of Lightning; the step is the round. One that fails is left alone."""

    everywhere = False

    def __init__(self, logger: Logger) -> None:
        self._logger, self._fails = logger, False

    @contextlib.contextmanager
    def _no_harm(self) -> Iterator[None]:
        """Inside the block an error of the logger is a warning, the only one: from then on it is left alone."""
        try:
            yield
        except Exception as error:  # whatever it is, the run is not about it
            self._fails = True
            name = type(self._logger).__name__
            warnings.warn(f"the run is no longer logged, {name} failed: {type(error).__name__}: {said(error)}", stacklevel=4)

    def on_fit_start(self, run: Run, module: pl.LightningModule) -> None:
        """Log the configuration; from now on `self.logger` of the module is the logger."""
        self._fails = False
        module.trainer.logger = self._logger
        with self._no_harm():
            self._logger.log_hyperparams(run.config)

    def on_round_end(self, run: Run, module: pl.LightningModule, record: RoundRecord) -> None:
        """Log every number of the record."""
        if self._fails:
            return
        flat = record.to_dict()
        numbers = {f"drift/{layer}": value for layer, value in flat.pop("drift").items()}
        numbers |= {f"train/{name}": value for name, value in flat.pop("train_metrics").items()}
        numbers |= {name: value for name, value in (flat | run.logged).items() if isinstance(value, (int, float))}
        with self._no_harm():
            self._logger.log_metrics(numbers, step=record.round)
            self._logger.save()

    def on_fit_end(self, run: Run, module: pl.LightningModule) -> None:
        """Close the log."""
        self._close("success")

    def on_exception(self, run: Run, module: pl.LightningModule, error: BaseException) -> None:
        """Close the log of a failed run."""
        self._close("failed")

    def _close(self, status: str) -> None:
        if not self._fails:
            with self._no_harm():
                self._logger.finalize(status)


def mirror_of(logger: Any) -> list[FederatedCallback]:
    """The callback that mirrors a run into what the argument `logger` names; none for "none", None and False.

    Raises:
        UsageError: none of those.
    """
    if logger is None or logger is False or logger == "none":
        return []
    if logger == "wandb":
        return [WandbMirror()]
    if isinstance(logger, Logger):
        return [LoggerMirror(logger)]
    raise one_of("logger", logger, LOGGERS, ", or a logger of Lightning")
