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
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedtune.errors import RunError
from fedtune.federated.training import ClientReport, Resident, train_client
from fedtune.randomness import stream
from fedtune.tensors import (
    Weights,
    assign_,
    differences,
    distance,
    move_towards_,
    num_bytes,
    snapshot,
    squared_distances,
    travelling,
)


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
    weights: Weights
    steps: int = 0
    epochs: int = 0
    examples: int = 0
    optimizer: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Agreement:
    """How the updates u_k = w_k - w of a round's clients relate.

    Args:
        update_norm: Euclidean length of their weighted mean, the step that the server makes.
        update_cosine: mean cosine over all pairs of clients; None for a single client.
        drift: per layer, the weighted mean of the squared distances of the clients' weights from their mean.
    """

    update_norm: float
    update_cosine: float | None = None
    drift: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundResult:
    """The next server state, what each client did, how they agree, the seconds spent on averaging, the traffic in bytes."""

    state: ServerState
    clients: list[ClientReport]
    agreement: Agreement
    seconds_aggregate: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class Averaging:
    """How a round averages.

    Args:
        weighting: "examples" (n_k), or "uniform" as in the code of Hilmkil et al. 2021.
        agreement: whether the round also says how the clients' updates agree, beyond their norms.
    """

    weighting: str = "examples"
    agreement: bool = True


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


class RunningAgreement:
    """`Agreement` from running sums: whatever the number of clients, the memory of one copy of the weights.

    For K unit updates e_k the mean cosine over pairs is (|sum e_k|^2 - K) / (K (K - 1)); the drift of a layer is the mean of
    |u_k|^2 minus |mean of u_k|^2.

    Args:
        server: the weights w from which all clients start.
        full: False gives the norm of the mean update only, and needs no memory.
    """

    def __init__(self, server: Weights, full: bool = True) -> None:
        self._server, self._full = server, full
        self._units: Weights = {}
        self._squares: dict[str, float] = defaultdict(float)
        self._total, self._count = 0.0, 0

    @torch.no_grad()
    def add(self, weights: Weights, weight: float) -> float:
        """Take in one client's weights; returns the length of its update."""
        if not self._full:
            return distance(weights, self._server)
        squares = squared_distances(weights, self._server)
        norm = math.sqrt(sum(squares.values()))
        for name, square in squares.items():
            self._squares[layer_of(name)] += weight * square
        if not self._units:
            self._units = {name: torch.zeros_like(tensor.reshape(-1)) for name, tensor in self._server.items()}
        for name, place, update in differences(weights, self._server):
            self._units[name][place].add_(update, alpha=1 / max(norm, 1e-30))
        self._total, self._count = self._total + weight, self._count + 1
        return norm

    @torch.no_grad()
    def result(self, mean: Weights) -> Agreement:
        """The agreement of all clients; `mean` is the weighted mean of their weights."""
        if not self._full:
            return Agreement(distance(mean, self._server))
        moved: dict[str, float] = defaultdict(float)
        for name, square in squared_distances(mean, self._server).items():
            moved[layer_of(name)] += square
        drift = {layer: max(0.0, self._squares[layer] / self._total - square) for layer, square in moved.items()}
        pairs = self._count * (self._count - 1)
        units = sum(float(torch.linalg.vector_norm(unit, dtype=torch.float32)) ** 2 for unit in self._units.values())
        cosine = (units - self._count) / pairs if pairs else None
        return Agreement(math.sqrt(sum(moved.values())), cosine, drift)


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: its name up to the first number, else up to its module.

    >>> layer_of("network.bert.encoder.layer.3.attention.self.query.weight")
    'network.bert.encoder.layer.3'
    >>> layer_of("network.classifier.bias")
    'network.classifier'
    """
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: max(number, 0) + 1])


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
    averaging: Averaging = Averaging(),
) -> RoundResult:
    """One round of federated averaging.

    Args:
        resident: the module in which every client trains.
        state: the server before the round.
        clients: the cohort.
        loader_of: client -> its batches.
        local_epochs: E.
        on_client_end: told about each client as it finishes.
        averaging: how the clients' weights are averaged.
    """
    number = state.round + 1
    here = travelling(resident.module)
    mean, agreement, reports, seconds = RunningMean(), RunningAgreement(state.weights, averaging.agreement), [], 0.0
    for client in clients:
        assign_(here, state.weights)
        report = train_client(resident, client, loader_of(client), local_epochs, (number, state.steps, state.epochs))
        start = time.perf_counter()
        weight = report.num_examples if averaging.weighting == "examples" else 1
        report = replace(report, update_norm=agreement.add(here, weight))
        if not math.isfinite(report.update_norm):
            raise RunError(f"round {number}, client {client}: its weights are no longer finite; lower the learning rate")
        mean.add(here, weight)
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
    agreed = agreement.result(after.weights)
    return RoundResult(after, reports, agreed, seconds, bytes_up=traffic, bytes_down=traffic)


ALGORITHMS: dict[str, Callable[..., RoundResult]] = {"fedavg": fedavg}
