"""FedProx: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", Algorithm 2.

    client k: w_k <- about argmin of f_k(v) + mu / 2 |v - w|^2, by local steps from w
    server: as in FedAvg

The gradient of the proximal term, mu (v - w), is added to that of the loss in each step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from fedtune.algorithms.fedavg import fedavg
from fedtune.errors import UsageError
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.corrections import pull_
from fedtune.federated.parts import Algorithm
from fedtune.tensors import Groups


@final
@dataclass(frozen=True)
class Proximal(ClientUpdate):
    """Local epochs with a pull towards the server's weights.

    Args:
        mu: its strength, 0 or more; 0 is FedAvg, to the bit.
    """

    mu: float = 0.01

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise UsageError("mu", self.mu, "a number, 0 or more")

    def __call__(self, client: Client) -> Groups:
        """Train; send the update."""
        moved = False

        def correct(names: list[str], gradients: list[Tensor], weights: list[Tensor]) -> None:
            nonlocal moved
            if moved:  # before the first step the client is where the server is
                pull_(gradients, weights, [client.server[name] for name in names], self.mu)
            moved = True

        client.train(correct=correct if self.mu else None)
        return {"update": client.update()}


def fedprox(mu: float = 0.01, weighting: str = "examples") -> Algorithm:
    """FedAvg with a proximal term."""
    return replace(fedavg(weighting), client=Proximal(mu))
