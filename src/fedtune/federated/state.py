"""What a round takes and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedtune.federated.agreement import Agreement
from fedtune.federated.messages import ClientReport, Failure, Position
from fedtune.tensors import Groups, Tensors


@dataclass(frozen=True)
class ServerState:
    """All that the next round needs: a round takes one and returns the next.

    Args:
        round: rounds done.
        weights: the server's weights, buffers among them.
        position: in the learning-rate schedule.
        examples: examples seen by all clients together.
        memory: what outlives the round beside the weights, a namespace for each server step (the momentum of a server); in the
            centralised baseline its optimizer's state. Empty in FedAvg.
    """

    round: int
    weights: Tensors
    position: Position = field(default_factory=Position)
    examples: int = 0
    memory: dict[str, Groups] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundResult:
    """The next server state, and what is known of the round.

    Args:
        clients: what each client did whose reply counts, by number.
        failures: the clients whose replies do not count, by number.
        agreement: how the clients' updates relate.
        seconds_aggregate: of the server: checks, sums, its step.
        bytes_up, bytes_down: of all messages, as encoded.
        injected: the clients that failed or lied on purpose, and how.
        diagnostics: lengths by name: of what server steps remember, and, where clients lie on purpose, of the difference
            between the aggregate and the mean of the honest ("distance_from_honest_mean").
    """

    state: ServerState
    clients: list[ClientReport]
    agreement: Agreement
    failures: list[Failure] = field(default_factory=list)
    seconds_aggregate: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    injected: dict[int, str] = field(default_factory=dict)
    diagnostics: dict[str, float] = field(default_factory=dict)
