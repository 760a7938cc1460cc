"""A runtime some of whose clients fail or lie, as a list of faults says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from fedtune.errors import RunError, UsageError, one_of
from fedtune.federated.client import Worker
from fedtune.federated.messages import Context, Failure, Reply, Request, Stage, bytes_of, decoded, encoded
from fedtune.federated.parts import Runtime
from fedtune.federated.ranks import Ranks
from fedtune.federated.sums import Value
from fedtune.federated.values import made, plain
from fedtune.randomness import stream
from fedtune.runtimes.faults import FAULTS, Fault, FlippedLabels, Moments
from fedtune.runtimes.serial import Serial
from fedtune.runtimes.torchrun import Torchrun


def faults_of(given: Any) -> tuple[Fault, ...]:
    """The faults that names and dictionaries of plain values mean.

    Raises:
        UsageError: an unknown name or parameter, or a value that it does not take.
    """
    if isinstance(given, (str, Mapping, Fault)):
        given = [given]
    if not isinstance(given, Sequence):
        raise UsageError("faults", given, f"a list of {', '.join(FAULTS)}, each a name, or a dictionary with its values")
    return tuple(_fault(one) for one in given)


def plain_faults(faults: Sequence[Fault], strict: bool = True) -> list[dict[str, Any]]:
    """Faults in plain values."""
    return [plain(one, "faults", FAULTS, strict) for one in faults]


def check_clients(faults: Sequence[Fault], num_clients: int) -> None:
    """Raise `UsageError` where a fault names a client that there is not."""
    for fault in faults:
        for client in fault.clients:
            if client >= num_clients:
                raise UsageError("faults.clients", client, f"clients from 0 to {num_clients - 1}")


def _fault(given: Any) -> Fault:
    if isinstance(given, Fault):
        found = given
    else:
        values = given if isinstance(given, Mapping) else {"name": given}
        if not isinstance(values.get("name"), str) or values["name"] not in FAULTS:
            raise one_of("faults", values.get("name"), FAULTS)
        others = {key: value for key, value in values.items() if key != "name"}
        found = made(FAULTS[values["name"]], others, "faults")
    if not found.rate and not found.clients:
        raise UsageError("faults", given, "a fault with a rate, or with clients; this one strikes nobody")
    return found


def runtime_of(worker: Worker, ranks: Ranks, errors: str = "stop", faults: Sequence[Fault] = ()) -> Runtime:
    """All clients in this process, or dealt out to the ranks, some of which fail or lie.

    Args:
        worker: is the clients, or this rank's.
        errors: as in `Serial`.
        faults: what goes wrong.

    Raises:
        UsageError: several ranks, and a fault that knows all honest updates.
    """
    data = Poisoned(worker.data) if faults else worker.data
    worker = replace(worker, data=data)
    inner = Serial(worker, errors) if ranks.size == 1 else Torchrun(worker, ranks, errors)
    knowing = [type(fault).__name__ for fault in faults if fault.knows]
    if knowing and ranks.size > 1:
        raise UsageError("faults", knowing[0], "in one process (runtime serial), as it is made from all honest updates")
    return Faulty(inner, faults, data, worker.up) if faults else inner


@final
class Faulty(Runtime):
    """Around another runtime.

    Args:
        inner: where clients run.
        faults: what goes wrong; the first that strikes a client counts.
        data: of the clients, through which liars see other labels.
        up: what happens to messages to the server, which a liar does to its lie, too.
    """

    def __init__(self, inner: Runtime, faults: Sequence[Fault], data: Poisoned, up: tuple[Stage, ...] = ()) -> None:
        self._inner, self._faults, self._data, self._up, self.leads = inner, faults, data, up, inner.leads

    def injected(self, context: Context) -> dict[int, str]:
        """The clients of a round that a fault strikes, and its name."""
        return {client: type(fault).__name__ for client, fault in self._struck(context).items()}

    def lying(self, context: Context) -> frozenset[int]:
        """Those of them that lie."""
        return frozenset(client for client, fault in self._struck(context).items() if fault.lies)

    def replies(self, requests: Sequence[Request], context: Context) -> Iterator[Reply | Failure]:
        """Honest replies first, as some liars know them."""
        struck, honest = self._struck(context), Moments()
        knowing = any(fault.knows for fault in struck.values())
        self._data.clients = {client for client, fault in struck.items() if isinstance(fault, FlippedLabels)}
        for reply in self._inner.replies([one for one in requests if one.client not in struck], context):
            if knowing and isinstance(reply, Reply):
                honest.add(decoded(reply.groups, self._up, context.of(reply.client))["update"])
            yield reply
        waiting = []
        for request in (one for one in requests if one.client in struck):
            reason = struck[request.client].before()
            if reason is None:
                waiting.append(request)
            elif self.leads:  # one worker says it
                yield Failure(request.client, reason)
        for reply in self._inner.replies(waiting, context):
            yield self._faulty(reply, struck[reply.client], honest, context) if isinstance(reply, Reply) else reply

    def _faulty(self, reply: Reply, fault: Fault, honest: Moments, context: Context) -> Reply | Failure:
        if fault.knows and not honest.count:
            raise RunError(f"round {context.round}: {type(fault).__name__} needs an honest client in the round")
        here = context.of(reply.client)
        groups = decoded(reply.groups, self._up, here)
        found = fault.after(reply, groups["update"], honest, here)
        if not isinstance(found, dict):
            return found
        groups = encoded(groups | {"update": found}, self._up, here)
        return replace(reply, groups=groups, bytes_up=bytes_of(groups), pieces={})

    def _struck(self, context: Context) -> dict[int, Fault]:
        found: dict[int, Fault] = {}
        for number, fault in enumerate(self._faults):
            for client in context.cohort:
                drawn = stream(context.seed, f"fault/{number}", context.round, client).random() < fault.rate
                if client not in found and (drawn or client in fault.clients):
                    found[client] = fault
        return found

    def add_up_(self, tensors: list[Tensor]) -> None:
        """As the inner runtime."""
        self._inner.add_up_(tensors)

    def gather(self, values: list[Value]) -> list[Value]:
        """As the inner runtime."""
        return self._inner.gather(values)

    def discard(self, round: int, clients: Sequence[int]) -> None:
        """As the inner runtime."""
        self._inner.discard(round, clients)


@final
class Poisoned:
    """Data some of whose clients see label y as C - 1 - y, of C classes.

    Args:
        data: a data module with `client_dataloader`, and `num_labels` where labels are flipped.

    Batches are dictionaries with "labels", or (inputs, labels).
    """

    def __init__(self, data: Any) -> None:
        self._data, self.clients = data, set[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def client_dataloader(self, client: int) -> Any:
        """The client's batches."""
        loader = self._data.client_dataloader(client)
        return _Flipped(loader, int(self._data.num_labels)) if client in self.clients else loader


class _Flipped:
    """A loader's batches with other labels; everything else is the loader's."""

    def __init__(self, loader: Any, num_labels: int) -> None:
        self._loader, self._num_labels = loader, num_labels

    def __iter__(self) -> Iterator[Any]:
        return map(self._flipped, self._loader)

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def _flipped(self, batch: Any) -> Any:
        if isinstance(batch, Mapping) and "labels" in batch:
            return {**batch, "labels": self._num_labels - 1 - batch["labels"]}
        if (
            isinstance(batch, (tuple, list))
            and len(batch) == 2
            and torch.is_tensor(batch[1])
            and not batch[1].is_floating_point()
        ):
            return batch[0], self._num_labels - 1 - batch[1]
        raise UsageError("faults", "FlippedLabels", "data whose batches are dictionaries with labels, or (inputs, labels)")
