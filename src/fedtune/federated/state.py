"""What a round takes and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from fedtune.federated.agreement import Agreement
from fedtune.federated.messages import ClientReport
from fedtune.tensors import Tensors


@dataclass(frozen=True)
class ServerState:
    """All that the next round needs: a round takes one and returns the next.

    Args:
        round: rounds done.
        weights: the server's weights.
        steps, epochs: position in the learning-rate schedule: steps and epochs of the client that did most, summed over rounds.
        examples: examples seen by all clients together.
        optimizer: what outlives the round beside the weights, by name (the optimizer of the centralised baseline, the momentum
            of a server); empty in FedAvg.
    """

    round: int
    weights: Tensors
    steps: int = 0
    epochs: int = 0
    examples: int = 0
    optimizer: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundResult:
    """The next server state, what each client did, how they agree, the seconds spent on averaging, the traffic in bytes."""

    state: ServerState
    clients: list[ClientReport]
    agreement: Agreement
    seconds_aggregate: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
