"""The optimizer and the schedules of a module, at a place of the federation's schedule."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from pytorch_lightning.core.optimizer import _configure_optimizers, _configure_schedulers_automatic_opt
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fedtune.errors import RunError, UsageError
from fedtune.federated.messages import Position
from fedtune.federated.trainer import ModuleTrainer
from fedtune.federated.walks import Walk
from fedtune.tensors import Tensors

Filter = Callable[[str], bool]  # of names of tensors


class Optimisation:
    """The optimizer of a module and its schedules, at a position of the federation's schedule.

    Args:
        trainer: of the module, whose `configure_optimizers` is called, in any of the forms that a `Trainer` takes.
        position: optimizer steps and epochs already done.

    `walk` makes the steps in the optimizer's place, where an algorithm has set it.

    Raises:
        RunError: several optimizers, or a schedule that waits for a metric, or does not move with every step.
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
        if any(schedule.interval == "step" and schedule.frequency != 1 for schedule in self._schedules):
            raise RunError("a schedule over steps has another frequency than 1, which a Trainer counts in an epoch; allowed: 1")
        self.walk: Walk | None = None
        self._done = {"step": position.steps, "epoch": position.epochs}
        self._module = module
        self._named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.wrapped = trainer.strategy.wrapped(self.optimizer)
        trainer.optimizers, trainer.lr_scheduler_configs = [self.optimizer], self._schedules
        self._forward(position)
        module.zero_grad()  # whoever trained the module before may have left gradients in it

    def gradients(self) -> tuple[list[str], list[Tensor], list[Tensor]]:
        """Names, gradients and weights of what has a gradient now."""
        named = [(name, parameter) for name, parameter in self._named.items() if parameter.grad is not None]
        return [name for name, _ in named], [cast(Tensor, one.grad) for _, one in named], [one.detach() for _, one in named]

    def group_of(self) -> dict[str, dict[str, Any]]:
        """The parameter group of each trained tensor, by its name; of those that the optimizer was given."""
        groups = {id(one): group for group in self.optimizer.param_groups for one in group["params"]}
        return {name: groups[id(one)] for name, one in self._named.items() if id(one) in groups}

    def end(self, interval: str) -> None:
        """Advance the schedules after a "step" or an "epoch"."""
        self._done[interval] += 1
        with _silently() if self.walk else contextlib.nullcontext():  # the optimizer makes none of its steps
            for schedule in self._schedules:
                if schedule.interval == interval and self._done[interval] % schedule.frequency == 0:
                    self._module.lr_scheduler_step(cast(Any, schedule.scheduler), None)

    def rates(self) -> dict[str, float]:
        """The learning rate of each parameter group, under the names of Lightning's LearningRateMonitor."""
        groups, name = self.optimizer.param_groups, f"lr-{type(self.optimizer).__name__}"
        if len(groups) == 1 and "name" not in groups[0]:
            return {name: float(groups[0]["lr"])}
        return {
            f"{name}/{group.get('name', f'pg{number}')}": float(group["lr"]) for number, group in enumerate(groups, start=1)
        }

    def _forward(self, position: Position) -> None:
        """Put the schedules where they are after so many steps and epochs, which are taken to be equally long."""
        own = is_overridden("lr_scheduler_step", self._module)
        if len(self._schedules) == 1 and not own and isinstance(self._schedules[0].scheduler, LambdaLR):
            schedule = self._schedules[0]
            count = self._done[schedule.interval] // schedule.frequency
            if count:  # a function of the position: no need to walk there
                schedule.scheduler.last_epoch = count - 1
                with _silently():
                    self._module.lr_scheduler_step(cast(Any, schedule.scheduler), None)
            return
        if not self._schedules:
            return
        with _silently():
            done = 0
            for epoch in range(1, max(position.epochs, 1 if position.steps else 0) + 1):
                until = position.steps * epoch // max(position.epochs, 1)
                for schedule in [one for _ in range(until - done) for one in self._schedules if one.interval == "step"]:
                    self._module.lr_scheduler_step(cast(Any, schedule.scheduler), None)
                for schedule in self._schedules:
                    if schedule.interval == "epoch" and epoch <= position.epochs and epoch % schedule.frequency == 0:
                        self._module.lr_scheduler_step(cast(Any, schedule.scheduler), None)
                done = until


@contextlib.contextmanager
def training_only(module: nn.Module, chosen: Filter | None) -> Iterator[None]:
    """Inside the block only the chosen parameters need gradients, of those that do."""
    others = [one for name, one in module.named_parameters() if one.requires_grad and chosen and not chosen(name)]
    for one in others:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in others:
            one.requires_grad_(True)


def flatten(optimizer: torch.optim.Optimizer) -> Tensors:
    """The state of an optimizer as named tensors, "parameter number.name"."""
    return {
        f"{index}.{name}": torch.as_tensor(value).detach().clone()
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if value is not None
    }


def restore(optimizer: torch.optim.Optimizer, flat: Tensors) -> None:
    """Give a fresh optimizer the state that `flatten` took."""
    state: dict[int, Tensors] = {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        kept = value.clone() if value.ndim else value.cpu().clone()  # the optimizer will write into it; counts are on the CPU
        state.setdefault(int(index), {})[name] = kept
    if state:
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def sgd_groups(optimizer: torch.optim.Optimizer, who: str, momentum: bool) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer that must be SGD.

    Args:
        who: the algorithm that needs it.
        momentum: whether momentum is allowed.

    Raises:
        UsageError: it is another optimizer, or has momentum.
    """
    groups: list[dict[str, Any]] = optimizer.param_groups
    came = type(optimizer).__name__
    if type(optimizer) is torch.optim.SGD and (momentum or not any(group["momentum"] for group in groups)):
        return groups
    if type(optimizer) is torch.optim.SGD:
        came = f"SGD with momentum {max(group['momentum'] for group in groups)}"
    allowed = "SGD, with or without momentum" if momentum else "SGD without momentum"
    raise UsageError("algorithm", f"{who} with {came}", f"{who} with {allowed} (of this package's models: optimizer sgd)")


@contextlib.contextmanager
def _silently() -> Iterator[None]:
    """Inside the block torch says nothing of schedules that move before their optimizer, which here is on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
