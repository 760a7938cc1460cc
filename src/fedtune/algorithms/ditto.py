"""Ditto: Li et al. 2021, "Ditto: Fair and Robust Federated Learning Through Personalization", Algorithm 1.

    client k: w_k by local steps from w, as in FedAvg
              v_k <- v_k - eta (grad f_k(v_k) + lambda (v_k - w)), for some local epochs; v_k stays at the client
    server: as in FedAvg

The shared model is FedAvg's, to the bit, whatever lambda is. A client that takes part for the first time begins v_k at w.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import Tensor

from fedtune.algorithms.fedavg import fedavg
from fedtune.errors import UsageError
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.corrections import pull_
from fedtune.federated.parts import Algorithm
from fedtune.tensors import Groups


@final
@dataclass(frozen=True)
class Beside(ClientUpdate):
    """Local epochs of the shared model, and of one that is the client's own.

    Args:
        strength: lambda, of the pull of the own model towards the shared one, 0 or more.
        epochs: of the own model in a round; 0: as many as of the shared one.
    """

    strength: float = 0.1
    epochs: int = 0
    personal: ClassVar[str | None] = "model"

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise UsageError("strength", self.strength, "a number, 0 or more")
        if self.epochs < 0:
            raise UsageError("epochs", self.epochs, "a whole number, 0 or more")

    def __call__(self, client: Client) -> Groups:
        """Train both; send the update of the shared one."""

        def correct(names: list[str], gradients: list[Tensor], weights: list[Tensor]) -> None:
            pull_(gradients, weights, [client.server[name] for name in names], self.strength)

        client.resume()
        with client.apart("personal"):
            client.train(self.epochs or None, correct=correct if self.strength else None)
        client.keep()
        client.train()
        return {"update": client.update()}


def ditto(strength: float = 0.1, epochs: int = 0, weighting: str = "examples") -> Algorithm:
    """Ditto."""
    return replace(fedavg(weighting), client=Beside(strength, epochs))
