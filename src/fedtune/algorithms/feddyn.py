"""FedDyn: Acar et al. 2021, "Federated Learning Based on Dynamic Regularization", Algorithm 1.

    server: h <- 0; client k: g_k <- 0
    for each round, for each client k of the cohort S, of N clients in all:
        y_k <- about argmin of f_k(y) - <g_k, y> + alpha / 2 |y - x|^2, by local steps from x
        g_k <- g_k - alpha (y_k - x); remember it
    h <- h - alpha / N * sum over S of (y_k - x)
    x <- mean over S of y_k - h / alpha

The server keeps -h / alpha. All clients weigh the same. alpha = 0 leaves out all that is added to FedAvg. The limit of small
alpha does not: h / alpha has the size of an update, whatever alpha is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import Tensor

from fedtune.algorithms.fedavg import fedavg
from fedtune.errors import UsageError
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.corrections import Offsets, pull_
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm, ServerStep
from fedtune.tensors import Groups


@final
@dataclass(frozen=True)
class Dynamic(ClientUpdate):
    """Local epochs with a dynamic regulariser, whose linear part the client remembers.

    Args:
        alpha: its strength, 0 or more; 0 is FedAvg, to the bit.
    """

    alpha: float = 0.01
    weighting: ClassVar[str | None] = "uniform"

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise UsageError("alpha", self.alpha, "a number, 0 or more")

    def __call__(self, client: Client) -> Groups:
        """Train; send the update."""
        linear = client.memory.get("linear", {})
        offsets = Offsets({name: -tensor for name, tensor in linear.items()})

        def correct(names: list[str], gradients: list[Tensor], weights: list[Tensor]) -> None:
            pull_(gradients, weights, [client.server[name] for name in names], self.alpha)
            offsets.add_to_(names, gradients)

        client.train(correct=correct if self.alpha else None)
        update = client.update()
        if self.alpha:
            moved = {name: tensor * -self.alpha for name, tensor in update.items()}
            client.memory["linear"] = {name: tensor.add_(linear[name]) if linear else tensor for name, tensor in moved.items()}
        return {"update": update}


@final
@dataclass(frozen=True)
class Drift(ServerStep):
    """What clients have moved in all, by which the server goes on.

    Args:
        on: False where alpha is 0.
    """

    on: bool = True
    counts: ClassVar[bool] = True

    def __call__(self, groups: Groups, memory: Groups, context: Context) -> tuple[Groups, Groups]:
        """One step; `drift` is -h / alpha."""
        if not self.on:
            return groups, {}
        share, before = len(context.answered) / context.num_clients, memory.get("drift", {})
        drift = {name: share * tensor + (before[name] if before else 0) for name, tensor in groups["update"].items()}
        return {"update": {name: tensor + drift[name] for name, tensor in groups["update"].items()}}, {"drift": drift}


def feddyn(alpha: float = 0.01) -> Algorithm:
    """FedDyn."""
    return replace(fedavg("uniform"), client=Dynamic(alpha), server=(Drift(alpha > 0),))
