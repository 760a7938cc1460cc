"""Clients dealt out to the processes that torchrun has started."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

from torch import Tensor

from fedtune.federated.client import Worker
from fedtune.federated.messages import Context, Failure, Reply, Request
from fedtune.federated.parts import Runtime
from fedtune.federated.ranks import Ranks
from fedtune.federated.sums import Value
from fedtune.runtimes.dealing import longest_first
from fedtune.runtimes.serial import Serial


@final
class Torchrun(Runtime):
    """One worker a rank, each of them some of the clients: the longest first, each to the rank with least to do.

    Every rank draws the same cohort and deals alike, so no client is sent anywhere; sums of whole numbers join what came of it.

    Args:
        worker: is this rank's clients.
        ranks: all of them.
        errors: as in `Serial`.
    """

    def __init__(self, worker: Worker, ranks: Ranks, errors: str = "stop") -> None:
        self._serial, self._ranks, self._cost = Serial(worker, errors), ranks, cost_of(worker.data)
        self.leads = ranks.leads

    def replies(self, requests: Sequence[Request], context: Context) -> Iterator[Reply | Failure]:
        """One answer a request that falls to this rank."""
        dealt = longest_first([self._cost(request.client) for request in requests], self._ranks.size)
        for place in dealt[self._ranks.rank]:
            with self._ranks.watched():
                (reply,) = self._serial.replies([requests[place]], context)
            yield reply

    def add_up_(self, tensors: list[Tensor]) -> None:
        """Sums over all ranks."""
        self._ranks.add_up_(tensors)

    def gather(self, values: list[Value]) -> list[Value]:
        """The values of all ranks."""
        return self._ranks.gather(values)

    def discard(self, round: int, clients: Sequence[int]) -> None:
        """Forget what the clients have kept of the round; each rank has written that of its own."""
        self._serial.discard(round, clients)


def cost_of(data: Any) -> Callable[[int], float]:
    """How long an epoch of a client takes, in any unit: its tokens where the data count them, else its examples, else 1."""
    tokens, parts = getattr(data, "client_tokens", None), getattr(data, "client_indices", None)
    if callable(tokens):
        return functools.cache(tokens)
    return (lambda client: 1.0) if parts is None else (lambda client: float(len(parts[client])))
