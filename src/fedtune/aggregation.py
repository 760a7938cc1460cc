"""Federated averaging: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
Data", Algorithm 1.

    server: w <- initial weights
    for each round t: S <- a random set of m clients
        for each client k in S: w_k <- ClientUpdate(k, w)
        w <- sum over k in S of (n_k / n) w_k            n_k examples of client k, n their sum
    ClientUpdate(k, w): E local epochs of gradient steps over batches of the client's data
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedtune.client import ClientReport, Resident, train_client
from fedtune.errors import RunError
from fedtune.randomness import stream
from fedtune.weights import Weights, assign_, distance, move_towards_, num_bytes, snapshot, travelling


@dataclass(frozen=True)
class ServerState:
    """All that the next round needs: a round takes one and returns the next.

    Args:
        round: rounds done.
        weights: the server's weights.
        steps, epochs: position in the learning-rate schedule: steps and epochs of the client that did most, summed over rounds.
        examples: examples seen by all clients together.
        optimizer: state of an optimizer that outlives its round (the centralised baseline), flat; empty in FedAvg.
    """

    round: int
    weights: Weights
    steps: int = 0
    epochs: int = 0
    examples: int = 0
    optimizer: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundResult:
    """The next server state, what each client did, the seconds spent on averaging, and the traffic in bytes."""

    state: ServerState
    clients: list[ClientReport]
    seconds_aggregate: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


class RunningMean:
    """Weighted mean of weights that come one after the other, in the memory of one copy.

    Each new contribution moves the mean towards itself by its share of the total so far. That is the weighted mean, needs
    no division at the end, and returns a lone contribution, or equal ones, to the bit.
    """

    def __init__(self) -> None:
        self._mean: Weights | None = None
        self._total = 0.0

    def add(self, weights: Weights, weight: float) -> None:
        """Take in one contribution, weighted by its number of examples.

        Raises:
            RunError: the weight is negative or not finite.
        """
        if not 0 <= weight < float("inf"):
            raise RunError(f"a contribution to the average has weight {weight}; allowed: 0 or more")
        if weight == 0:
            return
        self._total += weight
        if self._mean is None:
            self._mean = snapshot(weights)
        else:
            move_towards_(self._mean, weights, weight / self._total)

    def result(self) -> Weights:
        """The mean. Raises `RunError` when there was nothing to average: an empty round must not become zeros."""
        if self._mean is None:
            raise RunError("no client contributed an example to this round; there is nothing to average")
        return self._mean


def cohort(seed: int, number: int, num_clients: int, clients_per_round: int | None) -> list[int]:
    """The clients of a round, drawn uniformly without replacement; all of them when `clients_per_round` is None."""
    if clients_per_round is None or clients_per_round >= num_clients:
        return list(range(num_clients))
    return sorted(stream(seed, "cohort", number).choice(num_clients, clients_per_round, replace=False).tolist())


def fedavg(
    resident: Resident,
    state: ServerState,
    clients: Sequence[int],
    loader_of: Callable[[int], object],
    local_epochs: int,
    on_client_end: Callable[[ClientReport], None],
    weighting: str = "examples",
) -> RoundResult:
    """One round of federated averaging.

    Args:
        resident: the module in which every client trains.
        state: the server before the round.
        clients: the cohort.
        loader_of: client -> its batches.
        local_epochs: E.
        on_client_end: told about each client as it finishes.
        weighting: of the mean: "examples" (n_k), or "uniform" as in the code of Hilmkil et al. 2021.
    """
    number = state.round + 1
    here = travelling(resident.module)
    mean, reports, seconds = RunningMean(), [], 0.0
    for client in clients:
        assign_(here, state.weights)
        report = train_client(resident, client, loader_of(client), local_epochs, (number, state.steps, state.epochs))
        start = time.perf_counter()
        report = replace(report, update_norm=float(distance(here, state.weights)))
        if not math.isfinite(report.update_norm):
            raise RunError(f"round {number}, client {client}: its weights are no longer finite; lower the learning rate")
        mean.add(here, report.num_examples if weighting == "examples" else 1)
        seconds += time.perf_counter() - start
        reports.append(report)
        on_client_end(report)
    after = ServerState(
        round=number,
        weights=mean.result(),
        steps=state.steps + max(report.num_steps for report in reports),
        epochs=state.epochs + local_epochs,
        examples=state.examples + sum(report.num_examples for report in reports),
    )
    traffic = num_bytes(state.weights) * len(reports)
    return RoundResult(after, reports, seconds, bytes_up=traffic, bytes_down=traffic)
