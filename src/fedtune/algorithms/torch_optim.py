"""Any optimizer of torch at the server, as Reddi et al. 2021 generalise FedAvg ("FedOpt", Algorithm 1): the mean update of a
round, negated, is the gradient of a step.

DiLoCo: Douillard et al. 2023, "DiLoCo: Distributed Low-Communication Training of Language Models", Algorithm 1: SGD with
Nesterov momentum 0.9 and rate 0.7 at the server; clients keep the state of their optimizer (in the paper AdamW; here what the
module configures) from round to round.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from fedtune.algorithms.fedavg import fedavg
from fedtune.errors import UsageError, one_of
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.messages import Context
from fedtune.federated.optimisation import flatten, restore
from fedtune.federated.parts import Algorithm, ServerStep
from fedtune.tensors import Groups, Tensors

_NOT = ("Optimizer", "LBFGS", "SparseAdam")  # that need a closure, or sparse gradients
OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and name not in _NOT
}
Settings = tuple[tuple[str, Any], ...]


@final
@dataclass(frozen=True)
class TorchOptimizer(ServerStep):
    """A step of an optimizer of torch, in fp64. SGD with rate 1 and no momentum is FedAvg, to the bit.

    Args:
        optimizer: its name in `torch.optim`.
        learning_rate: of the server.
        settings: its other arguments, by name.
    """

    optimizer: str = "SGD"
    learning_rate: float = 1.0
    settings: Settings = ()

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise one_of("optimizer", self.optimizer, OPTIMIZERS)
        given = self.settings.items() if isinstance(self.settings, Mapping) else self.settings
        pairs = tuple(sorted((str(name), tuple(one) if isinstance(one, list) else one) for name, one in given))
        object.__setattr__(self, "settings", pairs)
        names = set(inspect.signature(OPTIMIZERS[self.optimizer]).parameters) - {"params", "lr"}
        for name, value in pairs:
            if name not in names:
                raise one_of(f"settings.{name}", value, sorted(names))
        try:
            self._made([torch.zeros(1, dtype=torch.float64)])
        except (TypeError, ValueError) as error:
            allowed = f"what torch.optim.{self.optimizer} takes ({error})"
            raise UsageError("settings", dict(pairs) | {"lr": self.learning_rate}, allowed) from error

    def __call__(self, groups: Groups, memory: Groups, context: Context) -> tuple[Groups, Groups]:
        """One step."""
        update = groups["update"]
        start = {name: self._start(context.weights[name], tensor) for name, tensor in update.items()}
        weights = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
        optimizer = self._made(list(weights.values()))
        _remember(optimizer, weights, memory)
        for name, weight in weights.items():
            weight.grad = -update[name]
        optimizer.step()
        step = {name: weight.detach().sub_(start[name]) for name, weight in weights.items()}
        return groups | {"update": step}, _memory(optimizer, weights)

    def _start(self, weight: Tensor, update: Tensor) -> Tensor:
        """The weights; zeros where the step does not depend on them, so that none of its bits is lost beside them."""
        defaults = self._made([torch.zeros(1)]).defaults
        depends = defaults.get("weight_decay") or self.optimizer in ("ASGD", "Adafactor", "Muon")
        return weight.to(update.dtype) if depends else torch.zeros_like(update)

    def _made(self, weights: list[Tensor]) -> torch.optim.Optimizer:
        make: Callable[..., torch.optim.Optimizer] = OPTIMIZERS[self.optimizer]
        return make(weights, lr=self.learning_rate, **dict(self.settings))


def _remember(optimizer: torch.optim.Optimizer, weights: Tensors, memory: Groups) -> None:
    """Give an optimizer the state that `_memory` took."""
    for key, tensors in memory.items():
        for name, tensor in tensors.items():
            optimizer.state[weights[name]][key] = tensor.to(weights[name].dtype, copy=True)


def _memory(optimizer: torch.optim.Optimizer, weights: Tensors) -> Groups:
    """The state of an optimizer: a group for each kind of tensor."""
    found: Groups = {}
    for name, weight in weights.items():
        for key, value in optimizer.state.get(weight, {}).items():
            if value is not None:
                found.setdefault(key, {})[name] = torch.as_tensor(value, dtype=weight.dtype)
    return found


@final
@dataclass(frozen=True)
class Continued(ClientUpdate):
    """E local epochs, with the optimizer as it was after the client's last ones: its state is what the client remembers."""

    def __call__(self, client: Client) -> Groups:
        """Train; send the update."""
        optimizer = client.optimizer
        restore(optimizer, client.memory.get("optimizer", {}))
        client.train()
        client.memory["optimizer"] = flatten(optimizer)
        return {"update": client.update()}


def fedopt(
    optimizer: str = "SGD", learning_rate: float = 1.0, settings: Settings = (), weighting: str = "examples"
) -> Algorithm:
    """Any optimizer of `torch.optim` at the server, with its settings by name."""
    return replace(fedavg(weighting), server=(TorchOptimizer(optimizer, learning_rate, settings),))


def diloco(learning_rate: float = 0.7, momentum: float = 0.9, weighting: str = "uniform") -> Algorithm:
    """DiLoCo, whose clients keep the state of their optimizer."""
    outer = TorchOptimizer("SGD", learning_rate, (("momentum", momentum), ("nesterov", momentum > 0)))
    return replace(fedavg(weighting), client=Continued(), server=(outer,))
