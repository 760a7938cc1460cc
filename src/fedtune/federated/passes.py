"""Passes over batches: one that trains nothing, and of others how they are called and how many optimizer steps they have."""

from __future__ import annotations

import math
from collections.abc import Sized
from typing import Any, Protocol

import torch

from fedtune.errors import RunError
from fedtune.federated.batches import begin_epoch, call_step, examples_in, limited, loss_of, num_batches, one_loader
from fedtune.federated.logs import TrainingLog, logging_to
from fedtune.federated.messages import ClientReport
from fedtune.federated.optimisation import Optimisation
from fedtune.federated.training import Correction, Training
from fedtune.tensors import Tensors


class Epochs(Protocol):
    """What trains a client: `train_epochs`, or what stands in its place."""

    def __call__(
        self,
        training: Training,
        optimisation: Optimisation,
        loader: Any,
        epochs: int,
        where: str,
        client: int,
        correct: Correction | None = None,
    ) -> ClientReport:
        """Local epochs of a client."""


def one_pass(training: Training, loader: Any, where: str, gradients: bool) -> tuple[float, Tensors]:
    """The mean loss over a client's batches, weighted by their examples, and its gradient if asked for; no step is made."""
    trainer, module = training.trainer, training.module
    log, total, seen = TrainingLog(), 0.0, 0
    trained = {name: one for name, one in module.named_parameters() if one.requires_grad}
    sums = {name: torch.zeros_like(one) for name, one in trained.items()} if gradients else {}
    loader = one_loader(loader, where)
    begin_epoch(loader, trainer.current_epoch)
    with logging_to(trainer, log), torch.set_grad_enabled(gradients):
        for index, batch in enumerate(limited(loader, num_batches(loader, training.limit_train_batches, where))):
            batch = training.transfer(batch)
            log.batch, size = batch, examples_in(batch)
            with training.fabric.autocast():
                loss = loss_of(call_step(trainer, "training_step", batch, index))
            if loss is None:
                continue
            total, seen = total + float(loss.detach()) * size, seen + size
            if gradients:
                found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
                for name, gradient in zip(trained, found, strict=True):
                    if gradient is not None:
                        sums[name].add_(gradient, alpha=size)
    if not seen or not math.isfinite(total):
        raise RunError(f"{where}: " + ("the loss is not finite before training" if seen else "there is no batch to train on"))
    return total / seen, {name: one.div_(seen) for name, one in sums.items()}


def steps_in(training: Training, loader: Any, epochs: int) -> float:
    """Optimizer steps of so many epochs over a client's batches; infinite where the loader has no length."""
    count = num_batches(loader, training.limit_train_batches)
    return math.inf if count is None else math.ceil(count / training.accumulate_grad_batches) * epochs


def pooled_steps(training: Training, loader: Any, examples: int) -> float:
    """Optimizer steps until a loader has given so many examples, to a step or two a round; infinite where it has no length."""
    count, dataset = num_batches(loader), getattr(loader, "dataset", None)
    if count is None or not isinstance(dataset, Sized):
        return math.inf
    return math.ceil(count * examples / len(dataset) / training.accumulate_grad_batches)
