"""Processes that do one run together: each runs the same program, and has a number, its rank."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import final

import torch
from torch import Tensor

from fedtune.federated.sums import Value


class Ranks(abc.ABC):
    """All processes of a run, seen from one of them.

    Attributes:
        rank: the number of this process, from 0.
        size: how many there are.
        local_rank: its number among those of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this process keeps the records, and says what there is to say."""
        return self.rank == 0

    def mine(self, values: Sequence[Value]) -> list[Value]:
        """What falls to this rank, of things that all take about as long."""
        return list(values[self.rank :: self.size])

    @abc.abstractmethod
    def add_up_(self, tensors: list[Tensor]) -> None:
        """Make whole numbers the sums over all ranks, in place."""

    @abc.abstractmethod
    def gather(self, values: list[Value]) -> list[Value]:
        """The values of all ranks, those of rank 0 first."""

    @abc.abstractmethod
    def from_first(self, make: Callable[[], Value]) -> Value:
        """What `make` returns on rank 0, which alone calls it, while the others wait."""

    @abc.abstractmethod
    def on_device(self, device: torch.device) -> None:
        """All ranks say on which device they compute."""

    @abc.abstractmethod
    def first_here(self, do: Callable[[], object]) -> None:
        """Do something once a machine, while its other ranks wait."""

    @abc.abstractmethod
    def together(self) -> AbstractContextManager[None]:
        """Inside the block, which all ranks enter, an error of one ends all."""

    @abc.abstractmethod
    def watched(self) -> AbstractContextManager[None]:
        """Inside the block a rank that does no `step` for long counts as lost."""

    @abc.abstractmethod
    def step(self) -> None:
        """This rank is getting on.

        Raises:
            Elsewhere: another rank had to stop.
        """


@final
class Alone(Ranks):
    """The only process of a run."""

    def add_up_(self, tensors: list[Tensor]) -> None:
        """Nothing."""

    def gather(self, values: list[Value]) -> list[Value]:
        """The values."""
        return values

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What it returns."""
        return make()

    def on_device(self, device: torch.device) -> None:
        """Nothing."""

    def first_here(self, do: Callable[[], object]) -> None:
        """Do it."""
        do()

    def together(self) -> AbstractContextManager[None]:
        """Nothing."""
        return contextlib.nullcontext()

    def watched(self) -> AbstractContextManager[None]:
        """Nothing."""
        return contextlib.nullcontext()

    def step(self) -> None:
        """Nothing."""


ALONE = Alone()
