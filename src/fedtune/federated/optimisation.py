"""The optimizer and the schedules of a module, at a place of the federation's schedule."""

from __future__ import annotations

import warnings
from typing import Any, cast

from pytorch_lightning.core.optimizer import _configure_optimizers, _configure_schedulers_automatic_opt
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from fedtune.errors import RunError
from fedtune.federated.messages import Position
from fedtune.federated.trainer import ModuleTrainer


class Optimisation:
    """The optimizer of a module and its schedules, at a position of the federation's schedule.

    Args:
        trainer: of the module, whose `configure_optimizers` is called, in any of the forms that a `Trainer` takes.
        position: optimizer steps and epochs already done.

    Raises:
        RunError: several optimizers, or a schedule that waits for a metric.
    """

    def __init__(self, trainer: ModuleTrainer, position: Position) -> None:
        module = trainer.lightning_module
        trainer.at(position)
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
        self._module = module
        self._named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.wrapped = trainer.strategy.wrapped(self.optimizer)
        trainer.optimizers, trainer.lr_scheduler_configs = [self.optimizer], self._schedules
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
                self._module.lr_scheduler_step(cast(Any, schedule.scheduler), None)


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
