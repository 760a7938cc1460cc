"""Federated averaging: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
Data", Algorithm 1.

    server: w <- initial weights
    for each round t: S <- a random set of m clients
        for each client k in S: w_k <- ClientUpdate(k, w)
        w <- w + sum over k in S of (n_k / n) (w_k - w)      n_k examples of client k, n their sum
    ClientUpdate(k, w): E local epochs of gradient steps over batches of the client's data
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from fedtune.errors import UsageError, one_of
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.messages import Context, Reply
from fedtune.federated.parts import Aggregator, Algorithm, Runtime
from fedtune.federated.state import ServerState
from fedtune.federated.sums import is_limit
from fedtune.tensors import Groups

WEIGHTINGS = ("examples", "uniform")


@final
@dataclass(frozen=True)
class LocalTraining(ClientUpdate):
    """E local epochs."""

    def __call__(self, client: Client) -> Groups:
        """Train; send the update."""
        client.train()
        return {"update": client.update()}


@final
@dataclass(frozen=True)
class Mean(Aggregator):
    """The weighted mean, added exactly: the order of clients changes no bit.

    Args:
        weighting: "examples" (n_k, each local epoch counted), or "uniform" as in the code of Hilmkil et al. 2021.
        update_limit: the largest absolute change of a weight in a round, a power of two; a client beyond it has failed.
        other_limit: the same for groups that an algorithm adds (a control variate is as large as a gradient).
    """

    weighting: str = "examples"
    update_limit: float = 8.0
    other_limit: float = 64.0

    def __post_init__(self) -> None:
        if self.weighting not in WEIGHTINGS:
            raise one_of("weighting", self.weighting, WEIGHTINGS)
        for name in ("update_limit", "other_limit"):
            if not is_limit(getattr(self, name)):
                raise UsageError(name, getattr(self, name), "a power of two, such as 8 or 64")

    def __call__(self, replies: Iterator[Reply], state: ServerState, context: Context, runtime: Runtime) -> Groups:
        """Add up every group of every reply."""
        sums = context.sums(self.limit, context.max_weight if self.weighting == "examples" else context.num_clients)
        for reply in replies:
            sums.add(reply.pieces, self.weight(reply), client=reply.client)
        return sums.mean(runtime)

    def weight(self, reply: Reply) -> int:
        """n_k, or 1."""
        return reply.weight if self.weighting == "examples" else 1

    def limit(self, group: str) -> float:
        """As in the arguments."""
        return self.update_limit if group == "update" else self.other_limit


def fedavg(weighting: str = "examples") -> Algorithm:
    """Federated averaging, weighted by "examples" or "uniform"."""
    return Algorithm(client=LocalTraining(), aggregator=Mean(weighting))
