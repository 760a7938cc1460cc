"""What a module logs, as one number a name: the other end of `LightningModule.log`, which checks what it is given."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from pytorch_lightning.utilities.data import extract_batch_size
from torch import Tensor
from torchmetrics import Metric

from fedtune.errors import RunError
from fedtune.federated.trainer import ModuleTrainer

_REDUCTIONS = {"mean": "mean", "sum": "sum", "min": "min", "max": "max", "avg": "mean"}
_JOIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": torch.add,
    "sum": torch.add,
    "min": torch.minimum,
    "max": torch.maximum,
}
Key = tuple[str, str]  # hook, name


class Entry(NamedTuple):
    """One call of `self.log`: in which batch, as what, how values become one, and the value, a mean's times its weight."""

    batch: int
    key: Key
    reduction: str
    weight: float
    value: Tensor | Metric


class LogRecorder:
    """A running value for every scalar, the metric object for every `Metric`. Nothing is read from the device before the end.

    Args:
        reserved: names that a module must not log, as records have them already.
    """

    def __init__(self, reserved: Collection[str] = ()) -> None:
        self._reserved = reserved
        self._values: dict[Key, Tensor] = {}
        self._reductions: dict[Key, str] = {}
        self._weights: dict[Key, float] = {}
        self._metrics: dict[Key, Metric] = {}
        self._computed: dict[Key, float] = {}
        self.batch: Any = None  # of which a mean is weighted, where the module does not say
        self.suffix = ""  # of names, where there are several loaders
        self.index = 0  # of the batch
        self.journal: list[Entry] | None = None  # what is logged, where other ranks log, too

    def log(
        self,
        hook: str,
        name: str,
        value: Any,
        on_step: bool = False,
        on_epoch: bool = True,
        reduce_fx: str | Callable[..., Any] = "mean",
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        **_: Any,
    ) -> None:
        """Take what `LightningModule.log` hands on; what concerns loggers, progress bars and processes has no meaning here.

        Raises:
            RunError: a reserved name, a reduction that a `Trainer` doesn't know either.
        """
        if name in self._reserved:
            raise RunError(f"self.log: the name {name!r} is taken, as records have it; allowed: any other name")
        if not on_epoch:
            return
        key = hook, name + ("_epoch" if on_step else "") + (self.suffix if add_dataloader_idx else "")
        if isinstance(value, Metric):
            self.take(Entry(self.index, key, "metric", 1, value))
            return
        reduction = self._reductions.get(key) or _reduction(name, reduce_fx)
        weight = (batch_size or self._batch_size()) if reduction == "mean" else 1
        now = value.detach().reshape(())
        now = now.to(torch.float32 if now.device.type == "mps" else torch.float64) * weight
        self.take(Entry(self.index, key, reduction, weight, now))

    def take(self, entry: Entry) -> None:
        """Count what was logged, or write it into the journal where there is one."""
        _, key, reduction, weight, now = entry
        if self.journal is not None:
            self.journal.append(entry)
        elif isinstance(now, Metric):
            self._metrics[key] = now
        else:
            self._reductions[key] = reduction
            self._weights[key] = self._weights.get(key, 0.0) + weight
            before = self._values.get(key)
            self._values[key] = now if before is None else _JOIN[reduction](before, now)

    def end_loader(self) -> None:
        """Compute what metrics say after one of several loaders."""
        for key, metric in self._metrics.items():
            if key not in self._computed:
                self._computed[key] = _one_number(key[1], metric.compute())

    def results(self) -> dict[str, float]:
        """Scalars reduced (a mean is over examples), metrics computed over all examples. All begins anew afterwards.

        What was logged in two hooks under one name is that of the later one, as in a `Trainer`.
        """
        values = {
            key: float(value) / (self._weights[key] if self._reductions[key] == "mean" else 1)
            for key, value in self._values.items()
        }
        self.end_loader()
        values |= self._computed
        order = list(dict.fromkeys([*self._weights, *self._metrics]))
        self.reset()
        return {name: values[hook, name] for hook, name in order}

    def reset(self) -> None:
        """Forget all, in the metrics, too."""
        for metric in self._metrics.values():
            metric.reset()
        for kept in (self._values, self._reductions, self._weights, self._metrics, self._computed):
            kept.clear()

    def _batch_size(self) -> int:
        return 1 if self.batch is None else extract_batch_size(self.batch)


class TrainingLog(LogRecorder):
    """What a module logs while it is trained for a client: means over an epoch's examples, or as `reduce_fx` says."""

    def log(
        self, hook: str, name: str, value: Any, on_step: bool = False, on_epoch: bool = True, *args: Any, **more: Any
    ) -> None:
        """As above, whether on steps or on epochs. The loss is in every report anyway."""
        if name != "train_loss_nats":
            super().log(hook, name, value, False, True, *args, **more)


def _one_number(name: str, value: Any) -> float:
    if not isinstance(value, (Tensor, int, float)) or (isinstance(value, Tensor) and value.numel() != 1):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
        raise RunError(f"self.log: {name!r} is a {type(value).__name__}{shape}; allowed: one number, or a metric of one")
    return float(value)


def _reduction(name: str, reduce_fx: Any) -> str:
    given = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", repr(reduce_fx))
    if given not in _REDUCTIONS:
        raise RunError(f"self.log: {name!r} has reduce_fx {given!r}; allowed: mean, sum, min, max")
    return _REDUCTIONS[given]


@contextlib.contextmanager
def logging_to(trainer: ModuleTrainer, recorder: LogRecorder) -> Iterator[None]:
    """Inside the block `self.log` of the trainer's module leads to the recorder."""
    before, trainer._results = trainer._results, recorder
    try:
        yield
    finally:
        trainer._results = before
        recorder.reset()


def unusable(metrics: Mapping[str, float]) -> list[str]:
    """The names of metrics that are no finite number."""
    return [name for name, value in metrics.items() if not math.isfinite(value)]
