"""FedNova: Wang et al. 2020, "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", section 4.

    client k: y by local steps; d_k <- (x - y) / |a_k|_1
    server: x <- x - tau * sum p_k d_k, with tau = sum p_k |a_k|_1 and p_k = n_k / n

a_k says how much each local gradient counts in x - y. Its length |a_k|_1 is how far gradients of 1 would have taken the
client, in units of its first rate: K for K steps of plain SGD, more with momentum, less with a proximal term or weight decay.
Learning rates are part of a_k here, so a schedule is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from fedtune.algorithms.fedavg import Mean, fedavg
from fedtune.errors import UsageError
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.corrections import pull_
from fedtune.federated.messages import Context
from fedtune.federated.optimisation import sgd_groups
from fedtune.federated.parts import Algorithm, ServerStep
from fedtune.tensors import Groups

_SETTINGS = ("momentum", "dampening", "nesterov", "weight_decay")


class Path:
    """How far gradients of 1 take a tensor by SGD, with momentum, weight decay and a proximal term.

    >>> path = Path(mu=0.0)
    >>> for _ in range(3):
    ...     path.step(1.0, momentum=0.9)
    >>> round(path.length, 2)
    5.61
    """

    def __init__(self, mu: float) -> None:
        self.length, self._mu = 0.0, mu
        self._velocity: float | None = None

    def step(
        self, rate: float, momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
    ) -> None:
        """One step, as `torch.optim.SGD` makes it."""
        gradient = 1.0 - (self._mu + weight_decay) * self.length
        if momentum:
            before = self._velocity
            self._velocity = gradient if before is None else momentum * before + (1 - dampening) * gradient
            gradient = gradient + momentum * self._velocity if nesterov else self._velocity
        self.length += rate * gradient


@final
@dataclass(frozen=True)
class Normalised(ClientUpdate):
    """Local epochs, whose update is divided by their length.

    Args:
        mu: strength of a proximal term as in FedProx, 0 or more.
    """

    mu: float = 0.0
    makes: ClassVar[tuple[str, ...]] = ("update", "lengths")
    numbers: ClassVar[tuple[str, ...]] = ("lengths",)

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise UsageError("mu", self.mu, "a number, 0 or more")

    def __call__(self, client: Client) -> Groups:
        """Train; send the normalised update, and the length of each tensor's path."""
        groups = sgd_groups(client.optimizer, "FedNova", momentum=True)
        paths = {name: Path(self.mu) for name in client.server}
        unit = max(float(group.get("initial_lr", group["lr"])) for group in groups) or 1.0

        def correct(names: list[str], gradients: list[Tensor], weights: list[Tensor]) -> None:
            settings = client.settings
            if self.mu:
                pull_(gradients, weights, [client.server[name] for name in names], self.mu)
            for name in names:
                paths[name].step(settings[name]["lr"], **{key: settings[name][key] for key in _SETTINGS})

        client.train(correct=correct)
        update, lengths = client.update(), {name: path.length / unit for name, path in paths.items()}
        for name, tensor in update.items():
            if lengths[name]:
                tensor.div_(lengths[name])
        return {"update": update, "lengths": {name: torch.tensor(one, dtype=torch.float64) for name, one in lengths.items()}}


@final
@dataclass(frozen=True)
class Rescaled(ServerStep):
    """The mean of the normalised updates, times the mean length."""

    needs: ClassVar[tuple[str, ...]] = ("update", "lengths")

    def __call__(self, groups: Groups, memory: Groups, context: Context) -> tuple[Groups, Groups]:
        """One step."""
        lengths = groups["lengths"]
        step = {name: tensor * lengths[name] for name, tensor in groups["update"].items()}
        return {"update": step}, {}


def fednova(mu: float = 0.0, weighting: str = "examples") -> Algorithm:
    """FedNova, with a proximal term if mu is not 0."""
    mean = Mean(weighting, other_limit=2.0**20)  # as many steps
    return replace(fedavg(weighting), client=Normalised(mu), aggregator=mean, server=(Rescaled(),))
