"""FedPer: Arivazhagan et al. 2019, "Federated Learning with Personalization Layers", Algorithms 1 and 2.
FedRep: Collins et al. 2021, "Exploiting Shared Representations for Personalized Federated Learning", Algorithm 1.

Some tensors of the model stay with each client (its head, mostly); the others are averaged as in FedAvg.

    FedPer, client k: local epochs of both
    FedRep, client k: some local epochs of what is its own, then those of what is shared
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from fedtune.algorithms.fedavg import fedavg
from fedtune.errors import at_least
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.parts import Algorithm
from fedtune.tensors import Groups


@final
@dataclass(frozen=True)
class InTurn(ClientUpdate):
    """First what is the client's own, then what is shared.

    Args:
        own_epochs: local epochs of what is the client's own.
    """

    own_epochs: int = 1
    personal: ClassVar[str | None] = "part"

    def __post_init__(self) -> None:
        at_least("own_epochs", self.own_epochs, 1)

    def __call__(self, client: Client) -> Groups:
        """Train; send the update of what is shared."""
        own, shared = client.own.keys(), client.server.keys()
        client.train(self.own_epochs, only=lambda name: name in own)
        client.train(only=lambda name: name in shared)
        return {"update": client.update()}


def fedper(personal: tuple[str, ...] = ("head",), weighting: str = "examples") -> Algorithm:
    """FedPer; `personal` says what stays with the clients, as in `Algorithm`."""
    return replace(fedavg(weighting), personal=tuple(personal))


def fedrep(personal: tuple[str, ...] = ("head",), own_epochs: int = 1, weighting: str = "examples") -> Algorithm:
    """FedRep; `personal` says what stays with the clients, as in `Algorithm`."""
    return replace(fedavg(weighting), client=InTurn(own_epochs), personal=tuple(personal))
