"""What travels between the server and its clients.

A message has groups of tensors by name: "weights" go down, an "update" comes up, "buffers" (of batch norms) go both ways,
"base" (weights that nobody trains, and the server moves) goes down, and an algorithm may add groups of its own.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from fedtune.federated.adapters import Adapters
from fedtune.federated.directions import Directions
from fedtune.federated.pieces import Pieces
from fedtune.federated.sums import ExactSum, Sum
from fedtune.randomness import stream
from fedtune.tensors import Groups, Tensors, num_bytes

AS_THEY_ARE = ("buffers", "base")  # groups that no stage touches


@dataclass(frozen=True)
class Position:
    """Where the federation stands in a learning-rate schedule: optimizer steps and epochs of the client that did most, summed
    over rounds."""

    steps: int = 0
    epochs: int = 0


@dataclass(frozen=True)
class Context:
    """Where in a run something happens, and what does not change in it.

    Args:
        seed: of the run.
        round: its number, from 1.
        num_clients: clients of the federation.
        cohort: the clients of the round.
        max_weight: the most examples that a round can have, each epoch counted.
        client: whose message it is; None on the server.
        answered: in a server step, the clients whose replies count.
        weights: what the server sent; of a client's message, as that client has it.
        memory: what the sender of a message remembers; a stage that adds to it finds it so when next it encodes there.
        adapters: those of the module.
        directions: along which its weights move, where scalars travel in their place.
        sums: makes the sum of the round, of a limit and the largest total weight; another one than `ExactSum` may hide from the
            server what is added up.
    """

    seed: int
    round: int
    num_clients: int
    cohort: tuple[int, ...]
    max_weight: int
    client: int | None = None
    answered: tuple[int, ...] = ()
    weights: Tensors = field(default_factory=dict, compare=False, repr=False)
    memory: Groups = field(default_factory=dict, compare=False, repr=False)
    adapters: Adapters = field(default_factory=Adapters, compare=False, repr=False)
    directions: Directions | None = field(default=None, compare=False, repr=False)
    sums: Callable[[Callable[[str], float], int], Sum] = field(default=ExactSum, compare=False, repr=False)

    def of(self, client: int) -> Context:
        """The same for one client's message, of a sender who remembers nothing."""
        weights = self.adapters.narrowed(self.weights, self.adapters.rank_of(client))
        return replace(self, client=client, weights=weights, memory={})

    def rng(self, purpose: str) -> np.random.Generator:
        """Random numbers of this place and purpose, the same whenever they are drawn."""
        return stream(self.seed, purpose, self.round, 0 if self.client is None else self.client + 1)


@dataclass(frozen=True)
class Request:
    """What the server asks of one client; `groups` as encoded."""

    round: int
    client: int
    position: Position
    cohort: tuple[int, ...]
    groups: Groups


@dataclass(frozen=True)
class ClientReport:
    """What one client did in one round.

    Args:
        update_norm: Euclidean length of its update, as it arrived.
        metrics: what its module logged in training, means over the examples of its last epoch.
        learning_rates: of each parameter group, after its last step; named as by Lightning's LearningRateMonitor.
    """

    client: int
    num_examples: int
    num_steps: int
    num_tokens: int
    train_loss_nats: float
    seconds: float
    update_norm: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    learning_rates: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """What a client answers.

    Args:
        client: who.
        weight: its number of examples, each epoch counted.
        groups: on their way as encoded; in an aggregator's hands decoded.
        report: what it did.
        bytes_up: bytes of the groups as encoded.
        pieces: in an aggregator's hands, each group to be gone through in pieces, as `ExactSum` does; before, of those groups
            that never left the process.
    """

    client: int
    weight: int
    groups: Groups
    report: ClientReport
    bytes_up: int
    pieces: dict[str, Pieces] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Failure:
    """A client whose reply does not count, and why."""

    client: int
    reason: str


class Stage(abc.ABC):
    """What happens to a message on its way: compression, a mask. `decode` is given what `encode` made.

    Both return new groups and leave those that they were given as they are. `feedback`: what a message lacks is made up for by
    the next one (`federated.feedback`). One that `leads` works on tensors of the weights' shapes alone, so before other stages.
    """

    feedback: bool = False
    leads: ClassVar[bool] = False

    @abc.abstractmethod
    def encode(self, groups: Groups, context: Context) -> Groups:
        """At the sender."""

    @abc.abstractmethod
    def decode(self, groups: Groups, context: Context) -> Groups:
        """At the receiver."""


def encoded(groups: Groups, stages: tuple[Stage, ...], context: Context) -> Groups:
    """Groups after all stages, buffers and the base apart, which travel as they are."""
    rest = {name: group for name, group in groups.items() if name not in AS_THEY_ARE}
    for stage in stages:
        rest = stage.encode(rest, context)
    return rest | {name: groups[name] for name in groups if name in AS_THEY_ARE}


def decoded(groups: Groups, stages: tuple[Stage, ...], context: Context) -> Groups:
    """Groups before `encoded`."""
    rest = {name: group for name, group in groups.items() if name not in AS_THEY_ARE}
    for stage in reversed(stages):
        rest = stage.decode(rest, context)
    return rest | {name: groups[name] for name in groups if name in AS_THEY_ARE}


def bytes_of(groups: Groups) -> int:
    """Bytes that groups take, as they are."""
    return sum(map(num_bytes, groups.values()))
