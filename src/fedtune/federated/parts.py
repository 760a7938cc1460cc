"""What an algorithm is made of, and what carries its messages.

A part is a frozen dataclass of plain values, so that the configuration, the name of a run and a sweep see all of it.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fedtune.errors import UsageError
from fedtune.federated.client import ClientUpdate
from fedtune.federated.messages import Context, Failure, Reply, Request, Stage
from fedtune.federated.state import ServerState
from fedtune.federated.sums import Value
from fedtune.tensors import Groups


class Aggregator(abc.ABC):
    """What becomes of the replies.

    `takes` names the groups that it can work with; None: any. `keeps` names those that it returns for itself, and finds in the
    next round's `state.memory`, under its name. `weighting` is how clients weigh. `least` is how many replies it needs.

    One for adapters (`adapters`) works with A and B of each layer together, so that no server step may follow; `unequal` says
    whether clients may have ranks of their own, `moves_base` that it moves the weights of adapted layers (`federated.base`).
    Beside "update" it may return "set": tensors that take the place of those that the server has.
    """

    takes: ClassVar[tuple[str, ...] | None] = None
    keeps: ClassVar[tuple[str, ...]] = ()
    adapters: ClassVar[bool] = False
    unequal: ClassVar[bool] = False
    moves_base: ClassVar[bool] = False
    weighting: str = "uniform"
    least: int = 1

    @abc.abstractmethod
    def __call__(self, replies: Iterator[Reply], state: ServerState, context: Context, runtime: Runtime) -> Groups:
        """Make one of all replies.

        Args:
            replies: those that count, one after the other, of the clients of this worker; its tensors are gone when the next
                one is taken.
            state: the server before the round.
            runtime: adds up what the workers have.

        Returns:
            the same on every worker: "update", and what the algorithm adds.
        """

    @abc.abstractmethod
    def weight(self, reply: Reply) -> int:
        """How many times a reply counts in the mean; 1 in rules that are no mean."""

    @abc.abstractmethod
    def limit(self, group: str) -> float:
        """The largest absolute value that a reply may have in a group, or infinity."""


class ServerStep(abc.ABC):
    """What the server makes of the aggregate: momentum, an adaptive optimizer.

    `needs` names the groups that it works with, and `sends` what of its memory goes to the clients of the next round. `counts`
    says that what it does depends on how many clients answered.
    """

    needs: ClassVar[tuple[str, ...]] = ("update",)
    sends: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[bool] = False

    @abc.abstractmethod
    def __call__(self, groups: Groups, memory: Groups, context: Context) -> tuple[Groups, Groups]:
        """The groups for the next step, and what this one remembers; nothing is changed in place.

        Args:
            groups: from the aggregator, or from the step before; "update" in fp64.
            memory: what the step returned in the last round; empty in the first.
        """


class Runtime(abc.ABC):
    """What carries requests to clients and brings their replies: one process, many, or a network."""

    leads: bool = True  # whether this process keeps the records

    @abc.abstractmethod
    def replies(self, requests: Sequence[Request], context: Context) -> Iterator[Reply | Failure]:
        """Answers to those requests that fall to this worker, in any order."""

    def injected(self, context: Context) -> dict[int, str]:
        """The clients of a round that fail or lie on purpose, and how."""
        return {}

    def lying(self, context: Context) -> frozenset[int]:
        """Those of them that lie."""
        return frozenset()

    @abc.abstractmethod
    def add_up_(self, tensors: list[Tensor]) -> None:
        """Make whole numbers the sums over all workers, in place."""

    @abc.abstractmethod
    def gather(self, values: list[Value]) -> list[Value]:
        """The values of all workers."""

    @abc.abstractmethod
    def discard(self, round: int, clients: Sequence[int]) -> None:
        """Tell clients that their replies did not count, so that they forget the round."""


@dataclass(frozen=True)
class Algorithm:
    """A federated algorithm.

    Args:
        client: what a client does.
        aggregator: what becomes of the replies.
        server: what the server makes of the aggregate, step by step; then it is added to the weights.
        up: what happens to messages on their way to the server, in this order; undone in reverse.
        down: the same on their way to the clients.
        personal: what stays with each client: patterns of names of tensors ("network.classifier.*"), or names of
            `federated.personal.PRESETS` ("head").
        frozen: what is not trained in this run, and so does not travel: patterns or names as for `personal`.

    Raises:
        UsageError: two server steps of one class, whose memories would be one; or parts that do not go together.
    """

    client: ClientUpdate
    aggregator: Aggregator
    server: tuple[ServerStep, ...] = ()
    up: tuple[Stage, ...] = ()
    down: tuple[Stage, ...] = ()
    personal: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [type(step).__name__ for step in self.server]
        if len(set(names)) < len(names):
            raise UsageError("algorithm.server", names, "steps of different classes")
        sent, client, aggregator = self.client.makes, type(self.client).__name__, type(self.aggregator).__name__
        for step in self.server:
            if missing := set(step.needs) - set(sent):
                raise UsageError("algorithm.client", client, f"for {type(step).__name__}, one that sends {', '.join(missing)}")
        taken = self.aggregator.takes
        if taken is not None and not set(sent) <= set(taken):
            raise UsageError("algorithm.aggregator", aggregator, f"for {client}, which sends {', '.join(sent)}, Mean")
        wanted, weighting = self.client.weighting, self.aggregator.weighting
        if wanted is not None and weighting != wanted:
            raise UsageError("algorithm.aggregator.weighting", weighting, f"for {client}, {wanted}")
        keeps = self.client.personal
        if (keeps == "model" and self.personal) or (keeps == "part" and not self.personal):
            allowed = "nothing, as its clients keep a whole model" if self.personal else "what stays with each client"
            raise UsageError("algorithm.personal", list(self.personal), f"for {client}, {allowed}")
        if self.client.alternates and self.aggregator.keeps:
            allowed = f"for {client}, which trains other tensors in the next round, one that keeps nothing, as Mean"
            raise UsageError("algorithm.aggregator", aggregator, allowed)
        if self.aggregator.adapters and self.server:
            raise UsageError("algorithm.server", ", ".join(names), f"for {aggregator}, no step: it sets A and B together")
        if self.client.ranks and not self.aggregator.unequal:
            allowed = f"for {aggregator}, none, as it needs equal ranks (Stacking, Resized and Padded do not)"
            raise UsageError("algorithm.client.ranks", list(self.client.ranks), allowed)
        if self.client.seeds and self.aggregator.adapters:
            raise UsageError("algorithm.aggregator", aggregator, f"for {client}, one for scalars, which travel, as Mean")
        if self.client.seeds and self.personal:
            allowed = f"for {client}, nothing: its scalars move all weights together"
            raise UsageError("algorithm.personal", list(self.personal), allowed)
        handled = {"update", *(group for step in self.server for group in step.needs)}
        if left := set(sent) - handled:
            steps = ", ".join(names) or "no step"
            raise UsageError("algorithm.server", steps, f"for {client}, one that takes {', '.join(sorted(left))}")
        for direction in ("up", "down"):
            _check_stages(self, direction)


def _check_stages(algorithm: Algorithm, direction: str) -> None:
    """Raise `UsageError` where the stages of a direction do not go together, or not with the algorithm."""
    stages: tuple[Stage, ...] = getattr(algorithm, direction)
    names, argument = [type(stage).__name__ for stage in stages], f"algorithm.{direction}"
    if len(set(names)) < len(names):
        raise UsageError(argument, names, "stages of different classes")
    for place, stage in enumerate(stages):
        if stage.leads and place:
            raise UsageError(argument, names, f"{names[place]} before all others, as it knows the weights' shapes alone")
        if stage.leads and direction == "down" and not stage.feedback:
            raise UsageError(
                f"{argument}.feedback", False, f"for {names[place]}, true: of whole weights it would leave too little"
            )
    if not any(stage.feedback for stage in stages):
        return
    if direction == "down" and algorithm.client.ranks:
        raise UsageError(argument, names, "with clients of several ranks, stages without feedback")
    if direction == "up" and algorithm.aggregator.adapters:
        who = type(algorithm.aggregator).__name__
        raise UsageError(
            argument, names, f"for {who}, stages without feedback: it sets A and B anew, for which no error is kept"
        )


ROLES: dict[str, type[Any]] = {
    "client": ClientUpdate,
    "aggregator": Aggregator,
    "server": ServerStep,
    "up": Stage,
    "down": Stage,
}
