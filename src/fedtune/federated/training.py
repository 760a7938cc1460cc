"""Optimizer steps: of a client's local epochs, and of the baselines."""

from __future__ import annotations

import contextlib
import operator
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.core.optimizer import _configure_optimizers, _configure_schedulers_automatic_opt
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from fedtune.errors import RunError
from fedtune.federated.dropout import FastDropout
from fedtune.federated.messages import ClientReport, Position

Correction = Callable[[list[str], list[Tensor], list[Tensor]], None]  # names, gradients (in place), weights


@dataclass(frozen=True)
class Training:
    """How this process trains: the one module in which every client trains, and all that stays the same for them.

    Args:
        fabric: precision and device.
        module: the module, on the device.
        seed: seed of the run.
        gradient_clip_val: largest norm of a gradient, or None.
        fast_dropout: whether dropout draws the cheap masks of `fedtune.federated.dropout`.
    """

    fabric: Fabric
    module: pl.LightningModule
    seed: int
    gradient_clip_val: float | None = None
    fast_dropout: bool = True


class Optimisation:
    """The optimizer of a module and its schedules, at a position of the federation's schedule.

    Args:
        module: the module; its `configure_optimizers` is called, in any of the forms that a `Trainer` takes.
        position: optimizer steps and epochs already done.

    Raises:
        RunError: several optimizers, manual optimisation, or a schedule that waits for a metric.
    """

    def __init__(self, module: pl.LightningModule, position: Position) -> None:
        if not module.automatic_optimization:
            raise RunError(f"{type(module).__name__} optimises manually; a federated client needs automatic optimisation")
        optimizers, schedulers, monitor = _configure_optimizers(cast(Any, module.configure_optimizers()))
        if len(optimizers) != 1:
            raise RunError(f"{type(module).__name__} has {len(optimizers)} optimizers; a federated client needs one")
        self.optimizer = optimizers[0]
        self._schedules = _configure_schedulers_automatic_opt(schedulers, monitor)
        if any(schedule.reduce_on_plateau for schedule in self._schedules):
            raise RunError("a schedule that waits for a metric (ReduceLROnPlateau) has no meaning within a client")
        self._done = {"step": position.steps, "epoch": position.epochs}
        for schedule in self._schedules:
            _forward(schedule.scheduler, self._done[schedule.interval] // schedule.frequency)
        self._named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        module.zero_grad()  # whoever trained the module before may have left gradients in it

    def gradients(self) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """Names, gradients and weights of what has a gradient now."""
        named = [(name, parameter) for name, parameter in self._named.items() if parameter.grad is not None]
        return [name for name, _ in named], [cast(Tensor, one.grad) for _, one in named], [one.detach() for _, one in named]

    def end(self, interval: str) -> None:
        """Advance the schedules after a "step" or an "epoch"."""
        self._done[interval] += 1
        for schedule in self._schedules:
            if schedule.interval == interval and self._done[interval] % schedule.frequency == 0:
                schedule.scheduler.step()  # type: ignore[call-arg]  # the one that takes a metric is refused above


def _forward(scheduler: Any, count: int) -> None:
    """Put a schedule where it is after `count` steps."""
    if not count:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a schedule that moves before its optimizer, and on purpose
        if isinstance(scheduler, LambdaLR):  # a function of the position: no need to walk there
            scheduler.last_epoch = count - 1
            count = 1
        for _ in range(count):
            scheduler.step()


def train_epochs(
    training: Training,
    optimisation: Optimisation,
    loader: Any,
    epochs: int,
    where: str,
    client: int,
    correct: Correction | None = None,
) -> ClientReport:
    """Epochs over a client's batches; arguments and errors as in `run_steps`."""
    batches = _epochs(loader, epochs, training.module, optimisation)
    return run_steps(training, optimisation, batches, where, client, correct)


def _epochs(loader: Any, epochs: int, module: pl.LightningModule, optimisation: Optimisation) -> Iterator[Any]:
    for _ in range(epochs):
        module.on_train_epoch_start()
        yield from loader
        module.on_train_epoch_end()
        optimisation.end("epoch")


def run_steps(
    training: Training,
    optimisation: Optimisation,
    batches: Iterable[Any],
    where: str,
    client: int = 0,
    correct: Correction | None = None,
) -> ClientReport:
    """Optimizer steps over some batches. Nothing waits for the device before the last one.

    Args:
        where: what to name when something goes wrong.
        client: whom the report is about.
        correct: what an algorithm does with the gradients of each step.

    Raises:
        RunError: the loss became NaN or infinite, the module raised, or there is no batch; `where` and the step are named.
    """
    start = time.perf_counter()
    losses: list[Tensor] = []
    sizes: list[int] = []
    tokens: list[Tensor] = []
    try:
        with FastDropout() if training.fast_dropout and training.fabric.device.type == "cpu" else contextlib.nullcontext():
            for batch in batches:
                loss = _step(training, optimisation, batch, len(losses), correct)
                if loss is None:
                    continue
                losses.append(loss)
                sizes.append(extract_batch_size(batch))
                tokens.append(_count_tokens(batch))
    except Exception as error:
        raise RunError(f"{where}, training step {len(losses) + 1}: {type(error).__name__}: {error}") from error
    if not sizes:
        raise RunError(f"{where}: there is no batch to train on")
    values = torch.stack(losses).cpu().double()
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        step = int(bad[0])
        raise RunError(f"{where}, training step {step + 1}: the loss became {values[step].item()}; lower the learning rate")
    return ClientReport(
        client=client,
        num_examples=sum(sizes),
        num_steps=len(sizes),
        num_tokens=int(torch.stack(tokens).sum()),
        train_loss_nats=float(values @ torch.tensor(sizes, dtype=torch.float64)) / sum(sizes),
        seconds=time.perf_counter() - start,
    )


def _step(training: Training, optimisation: Optimisation, batch: Any, index: int, correct: Correction | None) -> Tensor | None:
    """One optimizer step; None where the module skips the batch, as it may in a `Trainer`."""
    fabric, module = training.fabric, training.module
    with fabric.autocast():
        output: Any = call_step(module.training_step, fabric.to_device(batch), index)
    if output is None:
        return None
    loss: Tensor = output["loss"] if isinstance(output, dict) else output
    loss.backward()
    if correct is not None:
        with torch.no_grad():
            correct(*optimisation.gradients())
    if training.gradient_clip_val is not None:
        torch.nn.utils.clip_grad_norm_(module.parameters(), training.gradient_clip_val)
    optimisation.optimizer.step()
    optimisation.optimizer.zero_grad()
    optimisation.end("step")
    return loss.detach()


def call_step(step: Callable[..., Any], batch: Any, index: int) -> Any:
    """Call a step of a module as a `Trainer` does: with the number of the batch where the step asks for it."""
    return step(batch, index) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else step(batch)


def _count_tokens(batch: Any) -> Tensor:
    """Tokens of a batch, padding left out; 0 where a batch has no token ids."""
    if not isinstance(batch, dict) or "input_ids" not in batch:
        return torch.zeros((), dtype=torch.int64)
    return batch["attention_mask"].sum() if "attention_mask" in batch else torch.tensor(batch["input_ids"].numel())


def exactly(loader: Any, examples: int) -> Iterator[Any]:
    """Batches of as many passes over a loader as it takes to see exactly so many examples; the last one is cut."""
    left = examples
    while left > 0:
        before = left
        for batch in loader:
            size = extract_batch_size(batch)
            if size > left:
                batch = apply_to_collection(batch, Tensor, operator.itemgetter(slice(left)))
            yield batch
            left -= size
            if left <= 0:
                return
        if left == before:
            raise RunError("the pooled training data have no batch")
