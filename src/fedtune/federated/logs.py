"""What a module logs, as one number a name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from fedtune.errors import RunError

_REDUCTIONS = {"mean": "mean", "sum": "sum", "min": "min", "max": "max", "avg": "mean"}


class LogRecorder:
    """Stands in for `LightningModule.log`: a running value for every scalar, the metric object for every `Metric`.

    Nothing is read from the device before `results`.

    Args:
        reserved: names that a module must not log, as records have them already.
    """

    def __init__(self, reserved: Collection[str] = ()) -> None:
        self._reserved = reserved
        self._values: dict[str, Tensor] = {}
        self._reductions: dict[str, str] = {}
        self._weights: dict[str, float] = {}
        self._metrics: dict[str, Metric] = {}
        self.batch_size = 1
        self.suffix = ""  # of names, where there are several loaders

    def log(
        self,
        name: str,
        value: Any,
        *_: Any,
        on_epoch: bool | None = None,
        reduce_fx: str | Callable[..., Any] = "mean",
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        **__: Any,
    ) -> None:
        """As `LightningModule.log`; what concerns loggers, progress bars and processes has no meaning here.

        Raises:
            RunError: a reserved name, a value that is no single number, a reduction that a `Trainer` doesn't know either.
        """
        if name in self._reserved:
            raise RunError(f"self.log: the name {name!r} is taken, as records have it; allowed: any other name")
        if on_epoch is False:
            return
        name += self.suffix if add_dataloader_idx else ""
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        found = self._number(name, value)
        reduction = self._reductions.setdefault(name, _reduction(name, reduce_fx))
        weight = (batch_size or self.batch_size) if reduction == "mean" else 1
        self._weights[name] = self._weights.get(name, 0.0) + weight
        before, now = self._values.get(name), found * weight
        self._values[name] = now if before is None else _JOIN[reduction](before, now)

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """As `LightningModule.log_dict`."""
        items = dictionary.items(keep_base=False) if isinstance(dictionary, MetricCollection) else dictionary.items()
        for name, value in items:
            self.log(name, value, *args, **kwargs)

    def results(self) -> dict[str, float]:
        """Scalars reduced (a mean is over examples), metrics computed over all examples (and reset for the next time)."""
        values = {
            name: float(value) / (self._weights[name] if self._reductions[name] == "mean" else 1)
            for name, value in self._values.items()
        }
        for name, metric in self._metrics.items():
            values[name] = float(self._number(name, metric.compute()))
        for metric in self._metrics.values():
            metric.reset()
        return values

    @staticmethod
    def _number(name: str, value: Any) -> Tensor:
        """A value as one number, in fp64 where the device has that."""
        if not isinstance(value, (Tensor, int, float)) or (isinstance(value, Tensor) and value.numel() != 1):
            shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            raise RunError(f"self.log: {name!r} is a {type(value).__name__}{shape}; allowed: one number, or a metric of one")
        found = torch.as_tensor(value).detach().reshape(())
        return found.to(torch.float32 if found.device.type == "mps" else torch.float64)


_JOIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": torch.add,
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}


def _reduction(name: str, reduce_fx: Any) -> str:
    given = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", repr(reduce_fx))
    if given not in _REDUCTIONS:
        raise RunError(f"self.log: {name!r} has reduce_fx {given!r}; allowed: mean, sum, min, max")
    return _REDUCTIONS[given]


class TrainingLog(LogRecorder):
    """What a module logs while it is trained for a client: means over the client's examples, or as `reduce_fx` says."""

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """As `LightningModule.log`; `on_step` and `on_epoch` have no meaning here. The loss is in every report anyway."""
        if name != "train_loss_nats":
            super().log(name, value, *args, **kwargs | {"on_epoch": True})


class Silence(LogRecorder):
    """Takes what is logged outside of training and evaluation, and keeps nothing of it."""

    def log(self, name: str, value: Any, *_: Any, **__: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def logging_to(module: pl.LightningModule, recorder: LogRecorder) -> Iterator[None]:
    """Inside the block `module.log` and `module.log_dict` speak to the recorder."""
    before = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
    for name in before:
        object.__setattr__(module, name, getattr(recorder, name))
    try:
        yield
    finally:
        for name, function in before.items():
            object.__delattr__(module, name) if function is None else object.__setattr__(module, name, function)


def unusable(metrics: Mapping[str, float]) -> list[str]:
    """The names of metrics that are no finite number."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]
