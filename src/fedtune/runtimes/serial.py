"""All clients in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

from torch import Tensor

from fedtune.federated.client import Worker
from fedtune.federated.messages import Context, Failure, Reply, Request
from fedtune.federated.parts import Runtime
from fedtune.federated.sums import Value


@final
class Serial(Runtime):
    """One worker, which is every client in turn."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def replies(self, requests: Sequence[Request], context: Context) -> Iterator[Reply | Failure]:
        """One answer a request, in their order."""
        return (self._worker.answer(request, context) for request in requests)

    def add_up_(self, tensors: list[Tensor]) -> None:
        """Nothing: there is one worker."""

    def gather(self, values: list[Value]) -> list[Value]:
        """The values."""
        return values

    def discard(self, round: int, clients: Sequence[int]) -> None:
        """Forget what the clients have kept of the round."""
        self._worker.memory.discard(round, clients)
