"""Clients that fail or lie, on purpose: faults as an experiment, around any runtime.

A fault strikes some clients, always or with a probability each round; the draw has an address, so it is the same whatever else
happens. Of two faults that strike one client the first in the list counts. Liars train as honest clients do, and then send
something else.

    Drop, Late, Raise                       no reply that counts
    NotFinite, WrongShape                   a reply that is refused
    SignFlip, Scaled, Overweight            lies about the own update
    Alie       Baruch et al. 2019, "A Little Is Enough: Circumventing Defenses For Distributed Learning"
    InnerProduct    Xie et al. 2020, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation"
    FlippedLabels   honest training on data that lie
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from fedtune.errors import UsageError, one_of
from fedtune.federated.messages import Context, Failure, Reply
from fedtune.tensors import Tensors


class Moments:
    """Mean and standard deviation of each element of the honest clients' updates, so far."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensors = {}
        self._squares: Tensors = {}

    def add(self, update: Tensors) -> None:
        """Take in one update (Welford's recurrence, fp64)."""
        self.count += 1
        for name, tensor in update.items():
            value = tensor.detach().double()
            if name not in self.mean:
                self.mean[name], self._squares[name] = torch.zeros_like(value), torch.zeros_like(value)
            away = value - self.mean[name]
            self.mean[name] += away / self.count
            self._squares[name] += away * (value - self.mean[name])

    def deviation(self) -> Tensors:
        """The population's."""
        return {name: (square / self.count).sqrt() for name, square in self._squares.items()}


@dataclass(frozen=True)
class Fault:
    """What goes wrong with some clients.

    Args:
        rate: the probability that it strikes a client of a round.
        clients: those that it always strikes.

    `lies` says that the reply is dishonest, `knows` that it is made from all honest ones of the round.
    """

    rate: float = 0.0
    clients: tuple[int, ...] = ()
    lies: ClassVar[bool] = False
    knows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.rate, bool) or not 0 <= self.rate <= 1:
            raise UsageError("rate", self.rate, "a probability, from 0 to 1")
        if not all(type(client) is int and client >= 0 for client in self.clients):
            raise UsageError("clients", self.clients, "numbers of clients, from 0")
        object.__setattr__(self, "clients", tuple(self.clients))

    def before(self) -> str | None:
        """Why there is no reply, where the client need not even train."""
        return None

    def after(self, reply: Reply, update: Tensors, honest: Moments, context: Context) -> Reply | Tensors | Failure:
        """What comes instead of a reply: another one, another update, or nothing that counts."""
        return reply


@final
@dataclass(frozen=True)
class Drop(Fault):
    """The client does not answer."""

    def before(self) -> str:
        """It dropped out."""
        return "dropped out"


@final
@dataclass(frozen=True)
class Late(Fault):
    """The client answers too late.

    Args:
        steps: the deadline in local steps; 0: none.
        seconds: the deadline in seconds of training, which depends on the machine; 0: none. Without a deadline all that are
            struck are late.
    """

    steps: int = 0
    seconds: float = 0.0

    def before(self) -> str | None:
        """Late whatever it does, or not yet known."""
        return None if self.steps or self.seconds else "late"

    def after(self, reply: Reply, update: Tensors, honest: Moments, context: Context) -> Reply | Failure:
        """The reply, if it comes in time."""
        report = reply.report
        if self.steps and report.num_steps > self.steps:
            return Failure(reply.client, f"late: {report.num_steps} local steps, the deadline is {self.steps}")
        if self.seconds and report.seconds > self.seconds:
            return Failure(reply.client, f"late: {report.seconds:.1f} s, the deadline is {self.seconds:g} s")
        return reply


@final
@dataclass(frozen=True)
class Raise(Fault):
    """The client's code raises."""

    def before(self) -> str:
        """It raised."""
        return "RuntimeError: raised on purpose"


@final
@dataclass(frozen=True)
class NotFinite(Fault):
    """The update has a number that is none.

    Args:
        value: "nan" or "inf".
    """

    value: str = "nan"
    lies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.value not in ("nan", "inf"):
            raise one_of("value", self.value, ("nan", "inf"))

    def after(self, reply: Reply, update: Tensors, honest: Moments, context: Context) -> Tensors:
        """All elements of one tensor."""
        name = next(iter(update))
        return update | {name: torch.full_like(update[name], float(self.value))}


@final
@dataclass(frozen=True)
class WrongShape(Fault):
    """The update has a tensor of another shape."""

    lies: ClassVar[bool] = True

    def after(self, reply: Reply, update: Tensors, honest: Moments, context: Context) -> Tensors:
        """One element too many."""
        name = next(iter(update))
        return update | {name: update[name].new_zeros(update[name].numel() + 1)}


@final
@dataclass(frozen=True)
class SignFlip(Fault):
    """The update, negated."""

    lies: ClassVar[bool] = True

    def after(self, reply: Reply, update: Tensors, honest: Moments, context: Context) -> Tensors:
        """-u."""
        return {name: -tensor for name, tensor in update.items()}


@final
@dataclass(frozen=True)
class Scaled(Fault):
    """The update, times a factor.

    Args:
        factor: any number.
    """

    factor: float = 10.0
    lies: ClassVar[bool] = True

    def after(self, reply: Reply, update: Tensors, honest: Moments, context: Context) -> Tensors:
        """factor u."""
        return {name: tensor * self.factor for name, tensor in update.items()}


@final
@dataclass(frozen=True)
class Overweight(Fault):
    """The client says that it has more examples than it has.

    Args:
        factor: how many times as many, above 0.
    """

    factor: float = 1000.0
    lies: ClassVar[bool] = True

    def after(self, reply: Reply, update: Tensors, honest: Moments, context: Context) -> Reply:
        """The update with another weight."""
        return replace(reply, weight=math.ceil(reply.weight * self.factor))


@final
@dataclass(frozen=True)
class Alie(Fault):
    """The honest mean less z standard deviations: as far away as goes unnoticed ("a little is enough").

    Args:
        z: how many; 0: the paper's, from the numbers of clients and liars: z = Phi^-1((n - f - s) / (n - f)),
            s = floor(n / 2 + 1) - f.
    """

    z: float = 0.0
    lies: ClassVar[bool] = True
    knows: ClassVar[bool] = True

    def after(self, reply: Reply, update: Tensors, honest: Moments, context: Context) -> Tensors:
        """mu - z sigma."""
        spread, z = honest.deviation(), self.z or alie_z(len(context.cohort), len(context.cohort) - honest.count)
        return {name: (honest.mean[name] - z * spread[name]).to(tensor.dtype) for name, tensor in update.items()}


def alie_z(clients: int, liars: int) -> float:
    """The z of "a little is enough"; 0 where liars are a majority.

    >>> round(alie_z(20, 4), 3)
    0.157
    """
    share = (clients - liars - (clients // 2 + 1 - liars)) / (clients - liars)
    return statistics.NormalDist().inv_cdf(share) if 0 < share < 1 else 0.0


@final
@dataclass(frozen=True)
class InnerProduct(Fault):
    """The honest mean, times a negative factor.

    Args:
        epsilon: the factor's size.
    """

    epsilon: float = 2.0
    lies: ClassVar[bool] = True
    knows: ClassVar[bool] = True

    def after(self, reply: Reply, update: Tensors, honest: Moments, context: Context) -> Tensors:
        """-epsilon mu."""
        return {name: (-self.epsilon * honest.mean[name]).to(tensor.dtype) for name, tensor in update.items()}


@final
@dataclass(frozen=True)
class FlippedLabels(Fault):
    """The client trains on texts whose label y has become C - 1 - y, of C classes."""

    lies: ClassVar[bool] = True


_ALL: tuple[type[Fault], ...] = (
    *(Drop, Late, Raise, NotFinite, WrongShape),
    *(SignFlip, Scaled, Overweight, Alie, InnerProduct, FlippedLabels),
)
FAULTS: dict[str, type[Fault]] = {one.__name__: one for one in _ALL}
