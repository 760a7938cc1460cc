"""A client while it answers a request.

There is one module a process, in which every client trains: the server's weights are copied into it, it is trained, and what
the client sends is made of it. No client has a module of its own, so memory does not grow with their number.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from fedtune.errors import RunError
from fedtune.federated.memory import ClientMemory
from fedtune.federated.messages import (
    ClientReport,
    Context,
    Reply,
    Request,
    Stage,
    bytes_of,
    decoded,
    encoded,
)
from fedtune.federated.optimisation import Optimisation
from fedtune.federated.pieces import Pieces
from fedtune.federated.still import Still
from fedtune.federated.training import Correction, Training, train_epochs
from fedtune.randomness import seeded
from fedtune.tensors import Groups, Tensors, assign_, buffers, distance, mapped, restore_counters, subtract_, trainable


class Client:
    """What a `ClientUpdate` works with.

    Args:
        worker: the process that is this client now.
        request: what the server asks; its groups decoded.
        memory: what the client remembers; whoever changes it in place, or adds to it, finds it so the next time.
    """

    def __init__(self, worker: Worker, request: Request, memory: Groups) -> None:
        self.request, self.memory, self.reports = request, memory, list[ClientReport]()
        self._worker = worker
        self._weights, self.buffers = trainable(worker.training.module), buffers(worker.training.module)
        self._optimisation: Optimisation | None = None
        self._pieces: Pieces | None = None
        self._same_as(self._weights)
        assign_(self._weights, self.server)
        assign_(self.buffers, request.groups.get("buffers", {}))
        restore_counters(worker.training.module, worker.counters)
        if worker.still is not None:
            worker.still.begin()

    @property
    def server(self) -> Tensors:
        """The server's weights, from which the client starts."""
        return self.request.groups["weights"]

    @property
    def learning_rate(self) -> float:
        """The rate of the last step of the last `train`, of the optimizer's first group."""
        if self._optimisation is None:
            raise RunError("a client has a learning rate once it has trained")
        return float(self._optimisation.optimizer.param_groups[0]["lr"])

    def train(self, epochs: int | None = None, correct: Correction | None = None) -> ClientReport:
        """Train the module, as it stands, on the client's data with a fresh optimizer.

        Args:
            epochs: local epochs, by default those of the run.
            correct: called after each backward pass and before gradients are clipped, with the names of the tensors, their
                gradients (to be changed in place) and the weights.
        """
        worker, request = self._worker, self.request
        self._optimisation = Optimisation(worker.training.trainer, request.position)
        where = f"round {request.round}, client {request.client}"
        loader = worker.data.client_dataloader(request.client)
        report = train_epochs(
            worker.training, self._optimisation, loader, epochs or worker.local_epochs, where, request.client, correct
        )
        self.reports.append(report)
        return report

    def _same_as(self, weights: Tensors) -> None:
        """Raise `RunError` where other tensors are trained than those that the server sent."""
        moved = sorted(weights.keys() ^ self.server.keys())
        if moved:
            names = ", ".join(moved[:3]) + (", …" if len(moved) > 3 else "")
            what = "unfrozen" if moved[0] in weights else "frozen"
            raise RunError(
                f"round {self.request.round}, client {self.request.client}: during the run there was {what}: {names}; "
                "allowed: what is trained stays the same, from the first round on"
            )

    def update(self) -> Tensors:
        """What the client has changed, w_k - w by name, in place: its last act, as the module holds the update from then on."""
        module = self._worker.training.module
        self._weights, self.buffers = trainable(module), buffers(module)  # a module may have put others in their place
        self._same_as(self._weights)
        if self._worker.still is not None:
            self._worker.still.check(f"round {self.request.round}, client {self.request.client}")
        if self._worker.on_client_end is not None:
            update_norm = distance(self._weights, self.server)
            self._worker.on_client_end(replace(self.reports[0], update_norm=update_norm))
        self._pieces = Pieces(self._weights, minus=self.server)
        return self._weights

    def pieces(self, groups: Groups) -> dict[str, Pieces]:
        """Those of the update, where it is among the groups as it was handed out."""
        return {name: self._pieces for name, group in groups.items() if self._pieces is not None and self._pieces.are(group)}


class ClientUpdate(abc.ABC):
    """What a client does in a round: the part of an algorithm that runs at the client. A frozen dataclass of plain values."""

    @abc.abstractmethod
    def __call__(self, client: Client) -> Groups:
        """Train, and return what the client sends: "update" and what the algorithm adds."""


@dataclass(frozen=True)
class Worker:
    """What a process needs to be any of the clients.

    Args:
        training: the module and how it trains.
        data: a data module with `client_dataloader`.
        client: what a client does.
        memory: what clients remember.
        local_epochs: epochs of a client in a round.
        counters: what counters of the module every client starts with.
        still: looks after what must not move.
        up, down: what happens to messages to the server, and to clients.
        on_client_end: called when a client has trained, while the module holds its weights.
    """

    training: Training
    data: Any
    client: ClientUpdate
    memory: ClientMemory
    local_epochs: int = 1
    counters: Tensors = field(default_factory=dict)
    still: Still | None = None
    up: tuple[Stage, ...] = ()
    down: tuple[Stage, ...] = ()
    on_client_end: Callable[[ClientReport], None] | None = None

    def answer(self, request: Request, context: Context) -> Reply:
        """What a client answers, on the device on which the request lies.

        Raises:
            RunError: its training had to stop; round, client and step are named.
        """
        device, number = self.training.module.device, request.client
        groups = decoded(request.groups, self.down, context)
        home = next(iter(groups["weights"].values())).device
        request = replace(request, groups=groups if home == device else mapped(groups, lambda _, tensor: tensor.to(device)))
        memory = mapped(self.memory.load(number, request.round), lambda _, tensor: tensor.to(device))
        client = Client(self, request, memory)
        try:
            with seeded(context.seed, "client", request.round, number):
                groups = self.client(client)
        except RunError:
            raise
        except Exception as error:
            raise RunError(f"round {request.round}, client {number}: {type(error).__name__}: {error}") from error
        if not client.reports:
            raise RunError(f"round {request.round}, client {number}: {type(self.client).__name__} never trained it")
        if client.buffers:
            subtract_(client.buffers, request.groups["buffers"])
            groups = groups | {"buffers": client.buffers}
        self.memory.save(number, request.round, client.memory)
        if home != device:
            groups = mapped(groups, lambda _, tensor: tensor.to(home))
        groups = encoded(groups, self.up, context.of(number))
        report = client.reports[0]
        return Reply(number, report.num_examples, groups, report, bytes_of(groups), {} if self.up else client.pieces(groups))
