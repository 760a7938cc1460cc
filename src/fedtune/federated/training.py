"""Optimizer steps: of a client's local epochs, and of the baselines; with the hooks of a module in a `Trainer`'s order."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from fedtune.errors import RunError
from fedtune.federated.batches import (
    Transfer,
    begin_epoch,
    call_step,
    examples_in,
    limited,
    loss_of,
    num_batches,
    num_tokens,
    one_loader,
    with_last,
)
from fedtune.federated.dropout import FastDropout
from fedtune.federated.examples import ByExample
from fedtune.federated.logs import TrainingLog, logging_to
from fedtune.federated.messages import ClientReport
from fedtune.federated.optimisation import Optimisation
from fedtune.federated.trainer import ModuleTrainer
from fedtune.federated.walks import walked

Correction = Callable[[list[str], list[Tensor], list[Tensor]], None]  # names, gradients (in place), weights
Limit = int | float  # so many batches, or that share of them
_SEE_GRADIENTS = ("on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_before_zero_grad", "optimizer_zero_grad")


@dataclass(frozen=True)
class Training:
    """How this process trains: the one module in which every client trains, and all that stays the same for them.

    Args:
        fabric: precision and device.
        module: the module, on the device.
        seed: seed of the run.
        data: the data module, whose hooks of batches are called.
        gradient_clip_val, gradient_clip_algorithm: largest "norm" (by default) of a gradient, or "value" in it; None or 0: any.
        accumulate_grad_batches: batches whose gradients are added up for a step.
        limit_train_batches, limit_val_batches, limit_test_batches: at most so many batches of a loader, or that share.
        fast_dropout: whether dropout draws the cheap masks of `fedtune.federated.dropout`.
    """

    fabric: Fabric
    module: pl.LightningModule
    seed: int
    data: Any = None
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None
    accumulate_grad_batches: int = 1
    limit_train_batches: Limit = 1.0
    limit_val_batches: Limit = 1.0
    limit_test_batches: Limit = 1.0
    fast_dropout: bool = True
    trainer: ModuleTrainer = field(init=False, repr=False)
    transfer: Transfer = field(init=False, repr=False)
    frees_gradients: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        clip = self.gradient_clip_val, self.gradient_clip_algorithm
        trainer = ModuleTrainer(self.module, self.fabric, self.data, self.accumulate_grad_batches, *clip)
        object.__setattr__(self, "trainer", trainer)
        object.__setattr__(self, "transfer", Transfer(self.fabric, self.module, self.data))
        object.__setattr__(self, "frees_gradients", not any(is_overridden(hook, self.module) for hook in _SEE_GRADIENTS))

    def limit(self, part: str) -> Limit:
        """How much of a loader of the "validation" or the "test" part counts."""
        return self.limit_test_batches if part == "test" else self.limit_val_batches


class Steps:
    """Optimizer steps of a client, of one module with one optimizer.

    Args:
        correct: what an algorithm does with the gradients of each step.
        by_example: what makes them of those of single examples; batches are then `Part`s.
    """

    def __init__(
        self, training: Training, optimisation: Optimisation, correct: Correction | None, by_example: ByExample | None
    ) -> None:
        self._training, self._optimisation, self._correct = training, optimisation, correct
        self._by_example, self._trainer = by_example, training.trainer
        self._trainer.strategy.before_step = self._before_step
        self._first = self._trainer.global_step
        self._loss: Tensor | None = None
        self._passes = self.seen = 0
        self._output: dict[str, Any] = {}
        self.log, self.metrics = TrainingLog(), dict[str, float]()
        self.losses, self.sizes, self.tokens = list[Tensor](), list[int](), list[Tensor]()

    @property
    def num_steps(self) -> int:
        """Optimizer steps so far."""
        return self._trainer.global_step - self._first

    def epoch(self, batches: Iterable[Any], count: int | None) -> None:
        """One epoch over some batches; `count` of them, where that is known."""
        self._trainer.call("on_train_epoch_start")
        for index, (batch, is_last) in enumerate(with_last(batches, count)):
            if self._batch(batch, index, is_last) == -1:
                break
        self.log.batch = None
        self._trainer.call("on_train_epoch_end")
        self.metrics |= self.log.results()
        self._trainer.current_epoch += 1

    def _batch(self, batch: Any, index: int, is_last: bool) -> int | None:
        """One batch; -1 where the module wants no more of this epoch."""
        trainer, optimisation, drawn = self._trainer, self._optimisation, True
        ends = is_last or (index + 1) % self._training.accumulate_grad_batches == 0
        if self._by_example is not None:
            batch, ends = batch
            drawn = batch is not None  # else the step is one of noise alone
        self._loss, self._output, self._passes = None, {}, 0
        batch = self._training.transfer(batch) if drawn else None
        self.log.batch, self.seen = batch, self.seen + 1
        answer = trainer.call("on_train_batch_start", batch, index) if drawn else None
        if answer != -1 and optimisation.walk is not None:
            self._loss = walked(optimisation.walk, lambda: self._forward(batch, index)[1], trainer.strategy.root_device)
            self._output = {} if self._loss is None else {"loss": self._loss}
            trainer.global_step += 1
            optimisation.end("step")
        elif answer != -1:
            closure = _Closure(self, batch, index) if drawn else _nothing
            if ends:
                trainer.call("optimizer_step", trainer.current_epoch, index, optimisation.wrapped, closure)
                trainer.global_step += 1
                if self._training.frees_gradients:
                    optimisation.optimizer.zero_grad()  # the next forward pass has their memory
                optimisation.end("step")
            else:
                closure()
        else:
            optimisation.end("step")  # a `Trainer` does so
        if is_last or answer == -1:
            optimisation.end("epoch")
        if answer == -1:
            return -1
        if self._loss is not None:
            self.losses.append(self._loss)
            self.sizes.append(examples_in(batch))
            self.tokens.append(num_tokens(batch))
        if drawn:
            trainer.call("on_train_batch_end", self._output, batch, index)
        return None

    def forward_backward(self, batch: Any, index: int) -> Tensor | None:
        """The loss of a batch and its gradients; None where the module skips the batch, as it may in a `Trainer`."""
        trainer, share, optimizer = self._trainer, self._training.accumulate_grad_batches, self._optimisation.optimizer
        output, loss = self._forward(batch, index)
        self._passes += 1  # an optimizer as LBFGS makes several
        if index % share == 0 and (self._passes > 1 or not self._training.frees_gradients):  # else there are none to be seen
            trainer.call("on_before_zero_grad", optimizer)
            trainer.call("optimizer_zero_grad", trainer.current_epoch, index, optimizer)
        if loss is None:
            return None
        part = loss if share == 1 else loss / share
        trainer.call("on_before_backward", part)
        trainer.call("backward", part)
        trainer.call("on_after_backward")
        if self._by_example is not None:
            self._by_example.add(examples_in(batch))
        self._loss = loss.detach().reshape(())
        self._output = (dict(output) if isinstance(output, Mapping) else {}) | {"loss": part.detach()}
        return self._output["loss"]

    def _forward(self, batch: Any, index: int) -> tuple[Any, Tensor | None]:
        """What the module's training step returns, and the loss in it."""
        with self._training.fabric.autocast():
            output = call_step(self._trainer, "training_step", batch, index)
        return output, loss_of(output)

    def report(self, where: str, client: int, seconds: float) -> ClientReport:
        """What was done; the first time that something waits for the device.

        Raises:
            RunError: there was no batch, or a loss was no finite number.
        """
        if not self.sizes and self._by_example is None:
            raise RunError(f"{where}: there is no batch to train on" + (", as the module skipped each" if self.seen else ""))
        values = torch.stack(self.losses).cpu().double() if self.losses else torch.empty(0, dtype=torch.float64)
        bad = (~torch.isfinite(values)).nonzero()
        if len(bad):
            step = int(bad[0])
            raise RunError(f"{where}, training step {step + 1}: the loss became {values[step].item()}; lower the learning rate")
        return ClientReport(
            client=client,
            num_examples=sum(self.sizes),
            num_steps=self.num_steps,
            num_tokens=int(torch.stack(self.tokens).sum()) if self.tokens else 0,
            train_loss_nats=float(values @ torch.tensor(self.sizes, dtype=torch.float64)) / (sum(self.sizes) or math.nan),
            seconds=seconds,
            metrics=self.metrics,
            learning_rates=self._optimisation.rates(),
        )

    def _before_step(self) -> None:
        """Between gradients and step: noise, the algorithm's correction, the module's hook, clipping."""
        trainer, optimizer = self._trainer, self._optimisation.optimizer
        if self._by_example is not None:
            self._by_example.finish()
        if self._correct is not None:
            with torch.no_grad():
                self._correct(*self._optimisation.gradients())
        trainer.call("on_before_optimizer_step", optimizer)
        trainer.call("configure_gradient_clipping", optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)


@dataclass(frozen=True)
class _Closure:
    """What an optimizer calls for the loss of a batch and its gradients."""

    steps: Steps
    batch: Any
    index: int

    @torch.enable_grad()
    def __call__(self) -> Tensor | None:
        return self.steps.forward_backward(self.batch, self.index)


def _nothing() -> None:
    return None


def train_epochs(
    training: Training,
    optimisation: Optimisation,
    loader: Any,
    epochs: int,
    where: str,
    client: int,
    correct: Correction | None = None,
) -> ClientReport:
    """Epochs over a client's batches; arguments and errors as in `train`."""
    loader = one_loader(loader, where)
    count = num_batches(loader, training.limit_train_batches, where)

    def passes() -> Iterator[Iterable[Any]]:
        for epoch in range(epochs):
            if epoch and isinstance(loader, Iterator):
                raise RunError(
                    f"{where}: a {type(loader).__name__} has one epoch; allowed: a loader with {epochs}, as a DataLoader"
                )
            begin_epoch(loader, training.trainer.current_epoch)
            yield limited(loader, count)

    training.trainer.train_dataloader = loader
    return train(training, optimisation, passes(), where, client, correct, count)


def train(
    training: Training,
    optimisation: Optimisation,
    passes: Iterable[Iterable[Any]],
    where: str,
    client: int = 0,
    correct: Correction | None = None,
    count: int | None = None,
    by_example: ByExample | None = None,
) -> ClientReport:
    """Optimizer steps over some passes through batches. Nothing waits for the device before the last one.

    Args:
        where: what to name when something goes wrong.
        client: whom the report is about.
        correct: what an algorithm does with the gradients of each step.
        count: batches of a pass, where that is known.
        by_example: what makes the gradients of those of single examples; batches are then `Part`s.

    Raises:
        RunError: the loss became NaN or infinite, the module raised, or there is no batch; `where` and the step are named.
    """
    start, steps = time.perf_counter(), Steps(training, optimisation, correct, by_example)
    trainer = training.trainer
    trainer.training, trainer.num_training_batches = True, float("inf") if count is None else count
    try:
        fast = training.fast_dropout and training.fabric.device.type == "cpu"
        with FastDropout() if fast else contextlib.nullcontext(), logging_to(trainer, steps.log):
            trainer.call("on_train_start")
            for batches in passes:
                steps.epoch(batches, count)
            trainer.call("on_train_end")
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"{where}, training step {len(steps.losses) + 1}: {type(error).__name__}: {error}") from error
    finally:
        trainer.training = False
    return steps.report(where, client, time.perf_counter() - start)
