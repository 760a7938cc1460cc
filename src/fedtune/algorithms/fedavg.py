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
from dataclasses import dataclass, replace

from fedtune.errors import RunError
from fedtune.federated.agreement import RunningAgreement
from fedtune.federated.messages import ClientReport
from fedtune.federated.state import RoundResult, ServerState
from fedtune.federated.training import Training, train_client
from fedtune.tensors import Weights, assign_, move_towards_, num_bytes, snapshot, travelling


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


def fedavg(
    training: Training,
    state: ServerState,
    clients: Sequence[int],
    loader_of: Callable[[int], object],
    local_epochs: int,
    on_client_end: Callable[[ClientReport], None],
    averaging: Averaging = Averaging(),
) -> RoundResult:
    """One round of federated averaging.

    Args:
        training: the module in which every client trains.
        state: the server before the round.
        clients: the cohort.
        loader_of: client -> its batches.
        local_epochs: E.
        on_client_end: told about each client as it finishes.
        averaging: how the clients' weights are averaged.
    """
    number = state.round + 1
    here = travelling(training.module)
    mean, agreement, reports, seconds = RunningMean(), RunningAgreement(state.weights, averaging.agreement), [], 0.0
    for client in clients:
        assign_(here, state.weights)
        report = train_client(training, client, loader_of(client), local_epochs, (number, state.steps, state.epochs))
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
