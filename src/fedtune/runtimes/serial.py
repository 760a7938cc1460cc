"""All clients in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

from torch import Tensor

from fedtune.federated.client import ClientError, Worker
from fedtune.federated.messages import Context, Failure, Reply, Request
from fedtune.federated.parts import Runtime
from fedtune.federated.sums import Value


@final
class Serial(Runtime):
    """One worker, which is every client in turn.

    Args:
        worker: is the clients.
        errors: what an error in a client's training does: "stop" the run, or "drop" the client from the round.
    """

    def __init__(self, worker: Worker, errors: str = "stop") -> None:
        self._worker, self._errors = worker, errors

    def replies(self, requests: Sequence[Request], context: Context) -> Iterator[Reply | Failure]:
        """One answer a request, in their order."""
        return (self._answer(request, context) for request in requests)

    def _answer(self, request: Request, context: Context) -> Reply | Failure:
        try:
            return self._worker.answer(request, context)
        except ClientError as error:
            if self._errors == "stop":
                raise
            return Failure(request.client, error.reason)

    def add_up_(self, tensors: list[Tensor]) -> None:
        """Nothing: there is one worker."""

    def gather(self, values: list[Value]) -> list[Value]:
        """The values."""
        return values

    def discard(self, round: int, clients: Sequence[int]) -> None:
        """Forget what the clients have kept of the round."""
        self._worker.memory.discard(round, clients)
