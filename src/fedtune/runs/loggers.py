"""Where a run is mirrored: Weights & Biases, other loggers of Lightning, or several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger, WandbLogger

from fedtune.errors import one_of, warn
from fedtune.files import said
from fedtune.runs.callbacks import FederatedCallback, Run
from fedtune.runs.sections import final_numbers, numbers_of, pooled_numbers
from fedtune.runs.wandb import WandbMirror
from fedtune.storage.records import RoundRecord

LOGGERS = ("none", "wandb")


class LoggerMirror(FederatedCallback):
    """Gives every number of a round to a logger of Lightning; the step is the round. One that fails is left alone."""

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
            warn(f"the run is no longer logged, {name} failed: {type(error).__name__}: {said(error)}")

    def on_fit_start(self, run: Run, module: pl.LightningModule) -> None:
        """Log the configuration."""
        self._fails = False
        with self._no_harm():
            self._logger.log_hyperparams(run.config)

    def on_round_end(self, run: Run, module: pl.LightningModule, record: RoundRecord) -> None:
        """Log every number of the record."""
        self._log(numbers_of(run, record), record.round)

    def on_fit_end(self, run: Run, module: pl.LightningModule) -> None:
        """Log the centralised rounds and the numbers of the summary, and close the log."""
        for record in run.baselines.get("centralised", ()):
            self._log(pooled_numbers(record), record.round)
        self._log(final_numbers(run), len(run.history))
        self._close("success")

    def on_exception(self, run: Run, module: pl.LightningModule, error: BaseException) -> None:
        """Close the log of a failed run."""
        self._close("failed")

    def _log(self, numbers: dict[str, float], step: int) -> None:
        if not self._fails:
            with self._no_harm():
                self._logger.log_metrics(numbers, step=step)
                self._logger.save()

    def _close(self, status: str) -> None:
        if not self._fails:
            with self._no_harm():
                self._logger.finalize(status)


def loggers_of(given: Any) -> list[Any]:
    """What the argument `logger` names, one by one: loggers of Lightning, and "wandb"; nothing for "none", None and False.

    Raises:
        UsageError: none of those.
    """
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    found = [one for one in several if one is not None and one is not False and one != "none"]
    for one in found:
        if one != "wandb" and not isinstance(one, Logger):
            raise one_of("logger", one, LOGGERS, ", a logger of Lightning, or a list of them")
    return found


def mirror_of(logger: Any) -> list[FederatedCallback]:
    """The callbacks that mirror a run into what the argument `logger` names.

    Raises:
        UsageError: as `loggers_of`.
    """
    found: list[FederatedCallback] = []
    for one in loggers_of(logger):
        if isinstance(one, str):
            found.append(WandbMirror())
        else:
            found.append(WandbMirror(one) if isinstance(one, WandbLogger) else LoggerMirror(one))
    return found
