"""A client while it answers a request.

There is one module a process, in which every client trains: the server's weights are copied into it, it is trained, and what
the client sends is made of it. No client has a module of its own, so memory does not grow with their number.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from fedtune.errors import ClientError, Elsewhere, RunError, UsageError
from fedtune.federated.corrections import of_some
from fedtune.federated.directions import SCALARS, Directions
from fedtune.federated.examples import not_once
from fedtune.federated.feedback import fed_back, received
from fedtune.federated.memory import ClientMemory
from fedtune.federated.messages import ClientReport, Context, Reply, Request, Stage, bytes_of, decoded, encoded
from fedtune.federated.optimisation import Filter, Optimisation, training_only
from fedtune.federated.passes import Epochs, one_pass
from fedtune.federated.pieces import Pieces
from fedtune.federated.still import Still
from fedtune.federated.training import Correction, Training, train_epochs
from fedtune.federated.walks import Walk, check_walk
from fedtune.randomness import seeded
from fedtune.tensors import (
    Groups,
    Tensors,
    assign_,
    buffers,
    distance,
    mapped,
    restore_counters,
    snapshot,
    subtract_,
    trainable,
    without,
)


class Client:
    """What a `ClientUpdate` works with.

    Args:
        worker: the process that is this client now.
        request: what the server asks; its groups decoded.
        memory: what the client remembers; whoever changes it in place, or adds to it, finds it so the next time.
    """

    def __init__(self, worker: Worker, request: Request, memory: Groups, context: Context) -> None:
        self.request, self.memory, self.reports = request, memory, list[ClientReport]()
        self._worker, self._context = worker, context
        self._optimisation: Optimisation | None = None
        self._pieces: Pieces | None = None
        self._weights, self.buffers = self._tensors()
        self._same_as(self._weights)
        assign_(self._weights, self.server)
        assign_(self.buffers, request.groups.get("buffers", {}))
        assign_(self.own, self.personal)
        base = request.groups.get("base", {})
        assign_({name: worker.training.module.get_parameter(name).detach() for name in base}, base)
        restore_counters(worker.training.module, worker.counters)
        if worker.still is not None:
            worker.still.begin()

    @property
    def server(self) -> Tensors:
        """The server's weights, from which the client starts."""
        return self.request.groups["weights"]

    @property
    def weights(self) -> Tensors:
        """What the module has in their place, live."""
        return self._weights

    @property
    def directions(self) -> Directions:
        """Along which they move, where the part says so (`seeds`)."""
        if self._context.directions is None:
            raise RunError(f"{self._where}: {type(self._worker.client).__name__} has no seeds, so there are no directions")
        return self._context.directions

    @property
    def personal(self) -> Tensors:
        """What of the client's model is its own, as it was after its last round; at first as the run began."""
        return self.memory.get("personal") or self._worker.personal

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of the next `train`; before that, and within it, of the one that is under way."""
        return self._next.optimizer

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The optimizer's parameter group of each trained tensor, by its name; in a correction with the rate of the step."""
        return self._next.group_of()

    @property
    def gradient_clip_val(self) -> float | None:
        """To what gradients are clipped; None or 0: to nothing."""
        return self._worker.training.gradient_clip_val

    def train(
        self,
        epochs: int | None = None,
        correct: Correction | None = None,
        only: Filter | None = None,
        walk: Walk | None = None,
    ) -> ClientReport:
        """Train the module, as it stands, on the client's data with a fresh optimizer.

        Args:
            epochs: local epochs, by default those of the run.
            correct: called after each backward pass and before gradients are clipped, with the names of the tensors that
                travel, their gradients (to be changed in place) and the weights.
            only: which tensors are trained, by their names; by default all that the run trains.
            walk: makes each step in the optimizer's place, without gradients (`federated.walks`).

        Returns:
            what was done. The last one of a round is what its record says of the client.
        """
        worker, request = self._worker, self.request
        if walk is not None:
            training = worker.training
            check_walk(training.module, type(worker.client).__name__, self.gradient_clip_val, training.accumulate_grad_batches)
        if worker.privately is not None and (self.reports or walk is not None):  # a walk has no gradients to clip
            raise not_once(worker.client)
        train = train_epochs if worker.privately is None else worker.privately(self._context.of(request.client))
        with training_only(worker.training.module, only):
            self._next.walk = walk
            loader, epochs = worker.data.client_dataloader(request.client), epochs or worker.local_epochs
            correct = of_some(correct, self.server) if correct and self.own else correct
            report = train(worker.training, self._next, loader, epochs, self._where, request.client, correct)
        self._optimisation = None
        self.reports.append(report)
        return report

    def loss(self) -> float:
        """The mean loss in nats over the client's training examples, of the module as it stands; nothing is changed."""
        return self._pass(gradients=False)[0]

    def gradient(self) -> Tensors:
        """The mean gradient of that loss, by name; nothing is changed."""
        return self._pass(gradients=True)[1]

    def apart(self, purpose: str) -> contextlib.AbstractContextManager[None]:
        """Inside the block random numbers are drawn that nothing else in the round draws, and that move no other draw."""
        return seeded(self._context.seed, purpose, self.request.round, self.request.client)

    def keep(self) -> None:
        """Take the module, as it stands, for the client's own model, and go back to what the server sent."""
        self.memory["personal"] = snapshot(self._weights | self.buffers)
        assign_(self._weights, self.server)
        assign_(self.buffers, self.request.groups.get("buffers", {}))
        restore_counters(self._worker.training.module, self._worker.counters)

    def resume(self) -> None:
        """Go on with the client's own model, where it has one."""
        here = self._weights | self.buffers
        assign_({name: here[name] for name in self.personal}, self.personal)

    @property
    def _next(self) -> Optimisation:
        if self._optimisation is None:
            self._optimisation = Optimisation(self._worker.training.trainer, self.request.position)
        return self._optimisation

    def _pass(self, gradients: bool) -> tuple[float, Tensors]:
        training, module = self._worker.training, self._worker.training.module
        if self._worker.privately is not None:
            raise not_once(self._worker.client)
        before = snapshot(buffers(module))
        training.trainer.at(self.request.position)
        with self.apart("pass"):
            found = one_pass(training, self._worker.data.client_dataloader(self.request.client), self._where, gradients)
        assign_(buffers(module), before)
        restore_counters(module, self._worker.counters)
        return found

    @property
    def _where(self) -> str:
        return f"round {self.request.round}, client {self.request.client}"

    def _tensors(self) -> tuple[Tensors, Tensors]:
        """The parameters and the buffers that travel, live; in `own` goes what stays with the client."""
        module, names = self._worker.training.module, self._worker.personal
        weights, others = trainable(module), buffers(module)
        self.own = {name: tensor for name, tensor in {**weights, **others}.items() if name in names}
        return without(weights, names), without(others, names)

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
        self._weights, self.buffers = self._tensors()  # a module may have put others in their place
        self._same_as(self._weights)
        trains = self._worker.client.trains
        self._weights = {name: tensor for name, tensor in self._weights.items() if trains(name, self.request.round)}
        if self.own:
            self.memory["personal"] = snapshot(self.own)
        if self._worker.still is not None:
            self._worker.still.check(f"round {self.request.round}, client {self.request.client}")
        if self._worker.on_client_end is not None:
            update_norm = distance(self._weights, self.server)
            self._worker.on_client_end(replace(self.reports[-1], update_norm=update_norm))
        self._pieces = Pieces(self._weights, minus=self.server)
        return self._weights

    def pieces(self, groups: Groups) -> dict[str, Pieces]:
        """Those of the update, where it is among the groups as it was handed out."""
        return {name: self._pieces for name, group in groups.items() if self._pieces is not None and self._pieces.are(group)}


class ClientUpdate(abc.ABC):
    """What a client does in a round: the part of an algorithm that runs at the client. A frozen dataclass of plain values.

    `makes` names the groups that it sends, `alike` those with a tensor for each weight that it trains, `numbers` those of
    numbers. `weighting` is "uniform" where all clients must weigh the same. `personal` is "model" where it keeps one of its own
    (`Client.keep`), "part" where it works with that which stays with the client. One for `adapters` is refused for a module
    without; `ranks` are those of the clients' adapters, dealt out by seed. `alternates`: see `trains`. With `seeds` so many
    scalars travel in the place of weights, and its update is theirs (`federated.directions`).
    """

    makes: ClassVar[tuple[str, ...]] = ("update",)
    alike: ClassVar[tuple[str, ...]] = ("update",)
    numbers: ClassVar[tuple[str, ...]] = ()
    weighting: ClassVar[str | None] = None
    personal: ClassVar[str | None] = None
    adapters: ClassVar[bool] = False
    alternates: ClassVar[bool] = False
    ranks: tuple[int, ...] = ()
    seeds: int = 0

    @abc.abstractmethod
    def __call__(self, client: Client) -> Groups:
        """Train, and return what the client sends: "update" and what the algorithm adds."""

    def trains(self, name: str, round: int) -> bool:
        """Whether a tensor is trained in a round, and travels up; the server keeps the others as they are."""
        return True


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
        personal: what does not travel but stays with each client, as it is at first.
        still: looks after what must not move.
        up, down: what happens to messages to the server, and to clients.
        on_client_end: called when a client has trained, while the module holds its weights.
        privately: for a client and a round, what is called in the place of `train_epochs` where examples have privacy.
    """

    training: Training
    data: Any
    client: ClientUpdate
    memory: ClientMemory
    local_epochs: int = 1
    counters: Tensors = field(default_factory=dict)
    personal: Tensors = field(default_factory=dict)
    still: Still | None = None
    up: tuple[Stage, ...] = ()
    down: tuple[Stage, ...] = ()
    on_client_end: Callable[[ClientReport], None] | None = None
    privately: Callable[[Context], Epochs] | None = None

    def answer(self, request: Request, context: Context) -> Reply:
        """What a client answers, on the device on which the request lies.

        Raises:
            RunError: its training had to stop; round, client and step are named.
        """
        device, number = self.training.module.device, request.client
        adapters, rank = context.adapters, context.adapters.rank_of(number)
        memory = self.memory.load(number, request.round)
        receive = received if any(stage.feedback for stage in self.down) else decoded
        groups = receive(request.groups, self.down, replace(context, memory=memory))
        here = replace(context.of(number), weights=groups["weights"])
        if context.directions is not None:
            groups["weights"] = context.directions.weights(groups["weights"][SCALARS])
        groups["weights"] = adapters.received(groups["weights"], rank)
        home = next(iter(groups["weights"].values())).device
        request = replace(request, groups=groups if home == device else mapped(groups, lambda _, tensor: tensor.to(device)))
        memory = mapped(memory, lambda _, tensor: tensor.to(device))
        client = Client(self, request, memory, context)
        try:
            with seeded(context.seed, "client", request.round, number), adapters.at_rank(self.training.module, rank):
                groups = self.client(client)
        except (UsageError, Elsewhere):
            raise
        except RunError as error:
            raise ClientError(f"round {request.round}, client {number}", str(error)) from error.__cause__ or error
        except Exception as error:
            raise ClientError(f"round {request.round}, client {number}", f"{type(error).__name__}: {error}") from error
        if not client.reports:
            raise RunError(f"round {request.round}, client {number}: {type(self.client).__name__} never trained it")
        if client.buffers:
            subtract_(client.buffers, request.groups["buffers"])
            groups = groups | {"buffers": client.buffers}
        if rank is not None:
            groups = groups | {"update": adapters.sent(groups["update"], rank)}
        if home != device:
            groups = mapped(groups, lambda _, tensor: tensor.to(home))
        encode = fed_back if any(stage.feedback for stage in self.up) else encoded
        groups = encode(groups, self.up, replace(here, memory=client.memory))
        self.memory.save(number, request.round, client.memory)
        report = client.reports[-1]
        return Reply(number, report.num_examples, groups, report, bytes_of(groups), {} if self.up else client.pieces(groups))
