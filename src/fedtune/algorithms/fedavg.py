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
from fedtune.federated.pieces import Pieces
from fedtune.federated.state import RoundResult, ServerState
from fedtune.federated.sums import ExactSum
from fedtune.federated.training import Training, train_client
from fedtune.tensors import assign_, moved, num_bytes, subtract_, travelling


@dataclass(frozen=True)
class Averaging:
    """How a round averages.

    Args:
        weighting: "examples" (n_k), or "uniform" as in the code of Hilmkil et al. 2021.
        agreement: whether the round also says how the clients' updates agree, beyond their norms.
        max_weight: the largest total of the weights of a round.
    """

    weighting: str = "examples"
    agreement: bool = True
    max_weight: int = 2**24


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
    total, agreement = ExactSum(8.0, averaging.max_weight), RunningAgreement(len(clients), averaging.agreement)
    reports, seconds = [], 0.0
    for client in clients:
        assign_(here, state.weights)
        report = train_client(training, client, loader_of(client), local_epochs, (number, state.steps, state.epochs))
        start = time.perf_counter()
        weight = report.num_examples if averaging.weighting == "examples" else 1
        subtract_(here, state.weights)
        update = Pieces(here)
        squares = update.squares()
        report = replace(report, update_norm=math.sqrt(sum(squares.values())))
        if not math.isfinite(report.update_norm):
            raise RunError(f"round {number}, client {client}: its weights are no longer finite; lower the learning rate")
        agreement.add(client, update, weight, squares)
        total.add(update, weight)
        seconds += time.perf_counter() - start
        reports.append(report)
        on_client_end(report)
    mean = total.mean()
    after = ServerState(
        round=number,
        weights=moved(state.weights, mean),
        steps=state.steps + max(report.num_steps for report in reports),
        epochs=state.epochs + local_epochs,
        examples=state.examples + sum(report.num_examples for report in reports),
    )
    traffic = num_bytes(state.weights) * len(reports)
    agreed = agreement.result(mean)
    return RoundResult(after, reports, agreed, seconds, bytes_up=traffic, bytes_down=traffic)


ALGORITHMS: dict[str, Callable[..., RoundResult]] = {"fedavg": fedavg}
