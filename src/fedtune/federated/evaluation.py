"""Validation and test as a `Trainer` would run them: whatever a module logs comes out as one number a name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from torchmetrics import Metric

from fedtune.federated.training import Training, call_step
from fedtune.randomness import seeded


class Evaluation(NamedTuple):
    """What the module logged, by name, and (N,) whether each example was answered rightly, in the order of the loader; None
    where the module does not say: its `validation_step` may return {"correct": (B,) bool}."""

    metrics: dict[str, float]
    correct_N: Tensor | None = None


class LogRecorder:
    """Stands in for `LightningModule.log`: a sum and a weight for every scalar, the metric object for every `Metric`.

    Nothing is read from the device before `results`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._metrics: dict[str, Metric] = {}
        self.batch_size = 1

    def log(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        """As `LightningModule.log`; the other arguments have no meaning here and are taken silently."""
        if isinstance(value, Metric):
            self._metrics[name] = value
            return
        weight = batch_size or self.batch_size
        found = torch.as_tensor(value).detach()
        summand = found.to(torch.float32 if found.device.type == "mps" else torch.float64) * weight  # mps has no float64
        self._sums[name] = self._sums[name] + summand if name in self._sums else summand
        self._weights[name] = self._weights.get(name, 0.0) + weight

    def log_dict(self, dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """As `LightningModule.log_dict`."""
        for name, value in dictionary.items():
            self.log(name, value, *args, **kwargs)

    def results(self) -> dict[str, float]:
        """Scalars averaged over examples, metrics computed over all of them (and reset for the next time)."""
        values = {name: float(total) / self._weights[name] for name, total in self._sums.items()}
        values |= {name: float(metric.compute()) for name, metric in self._metrics.items()}
        for metric in self._metrics.values():
            metric.reset()
        return values


class Silence(LogRecorder):
    """Takes what is logged in training, and keeps nothing of it."""

    def log(self, name: str, value: Any, *_: Any, batch_size: int | None = None, **__: Any) -> None:
        """Nothing."""


@contextlib.contextmanager
def attached(fabric: Fabric, module: pl.LightningModule) -> Iterator[None]:
    """Inside the block the module is on the device and what it logs in training goes nowhere; afterwards it is free for
    a `Trainer` again."""
    fabric.to_device(module)
    module.fabric = fabric
    try:
        with logging_to(module, Silence()):
            yield
    finally:
        module.fabric = None


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


def evaluate(fabric: Fabric, module: pl.LightningModule, loader: Any) -> Evaluation:
    """Run `validation_step` over a loader, without gradients or dropout.

    Returns:
        what the module logs: numbers averaged over examples, torchmetrics computed over all examples; and what was right.
    """
    recorder, correct = LogRecorder(), []
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with logging_to(module, recorder), torch.inference_mode(), fabric.autocast():
            module.on_validation_epoch_start()
            for index, batch in enumerate(loader):
                recorder.batch_size = extract_batch_size(batch)
                output = call_step(module.validation_step, fabric.to_device(batch), index)
                if isinstance(output, dict) and "correct" in output:
                    correct.append(output["correct"])
            recorder.batch_size = 1
            module.on_validation_epoch_end()
            return Evaluation(recorder.results(), torch.cat(correct).cpu() if correct else None)
    finally:
        for part, mode in training.items():
            part.training = mode


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a module, as it stands, on the parts of the data.

    Args:
        training: the module, its device and precision, the seed of the run.
        data: a data module.
        part: the part that rounds are evaluated on, "validation" or "test".
        evaluation: "pooled" (metrics over all examples), or "clients" (means over clients of means over batches).
    """

    training: Training
    data: Any
    part: str
    evaluation: str = "pooled"

    def loader(self, part: str) -> Any:
        """The batches of a part, or None where the data have no such part."""
        name, stage = ("test_dataloader", "test") if part == "test" else ("val_dataloader", "validate")
        if isinstance(self.data, pl.LightningDataModule):
            if not is_overridden(name, self.data):
                return None
            self.data.setup(stage)
        return getattr(self.data, name)() if hasattr(self.data, name) else None

    def loaders(self) -> dict[str, Any]:
        """Part -> its batches: the part that rounds are evaluated on, and the test part where there is one."""
        found = {part: self.loader(part) for part in dict.fromkeys((self.part, "test"))}
        return {part: batches for part, batches in found.items() if batches is not None}

    def evaluate(self, part: str) -> Evaluation:
        """The metrics on a part; none where the data have no such part."""
        loader = self.loader(part)
        if loader is None:
            return Evaluation({})
        with seeded(self.training.seed, "evaluate"):  # a loader draws a seed, even when nothing is random
            return evaluate(self.training.fabric, self.training.module, loader)

    def measure(self) -> tuple[dict[str, float], list[float | None]]:
        """The metrics of a round, and the accuracy for each client where it is known."""
        if self.evaluation == "pooled":
            metrics, correct_N = self.evaluate(self.part)
            of_client = getattr(self.data, "client_accuracy", None)
            return metrics, of_client(self.part, correct_N) if of_client and correct_N is not None else []
        of_clients = self._evaluate_clients()
        return _mean(of_clients), [one.get("accuracy") for one in of_clients]

    def _evaluate_clients(self) -> list[dict[str, float]]:
        """For each client the mean of batches, on its share of the test part."""
        fabric, module, of_clients = self.training.fabric, self.training.module, []
        with seeded(self.training.seed, "evaluate"):
            for client in range(self.data.num_clients):
                loader = self.data.client_test_dataloader(client)
                of_clients.append(_mean([evaluate(fabric, module, [batch]).metrics for batch in loader]))
        return of_clients


def _mean(metrics: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in metrics) / len(metrics) for name in metrics[0]}
