"""FedAvg with server momentum (FedAvgM): Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for
Federated Visual Classification", section 4.3.

    D <- the mean update of the round
    v <- beta v + D
    w <- w + eta v
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from fedtune.algorithms.fedavg import fedavg
from fedtune.errors import UsageError
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm, ServerStep
from fedtune.tensors import Groups


@final
@dataclass(frozen=True)
class Momentum(ServerStep):
    """Momentum of the server.

    Args:
        beta: what is left of the momentum after a round, at least 0 and below 1; 0 with rate 1 is FedAvg, to the bit.
        learning_rate: eta, of the server.
    """

    beta: float = 0.9
    learning_rate: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise UsageError("beta", self.beta, "at least 0 and below 1")
        if not self.learning_rate > 0:
            raise UsageError("learning_rate", self.learning_rate, "a number above 0")

    def __call__(self, groups: Groups, memory: Groups, context: Context) -> tuple[Groups, Groups]:
        """One step."""
        update, before = groups["update"], memory.get("momentum")
        momentum = update if before is None else {name: self.beta * before[name] + update[name] for name in update}
        step = {name: self.learning_rate * tensor for name, tensor in momentum.items()}
        return groups | {"update": step}, {"momentum": momentum}


def fedavgm(beta: float = 0.9, learning_rate: float = 1.0, weighting: str = "examples") -> Algorithm:
    """FedAvg with server momentum."""
    return replace(fedavg(weighting), server=(Momentum(beta, learning_rate),))
