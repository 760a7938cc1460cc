"""What `Steps` asks where the gradients of a step are made of those of single examples."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

from fedtune.errors import UsageError


class Part(NamedTuple):
    """A part of a step: a batch whose gradients are made at once, or None where the step has no example at all.

    `ends` says that the step is made after it.
    """

    batch: Any
    ends: bool


class ByExample(abc.ABC):
    """What becomes of the gradients of single examples. Batches are then `Part`s."""

    @abc.abstractmethod
    def add(self, size: int) -> None:
        """After a backward pass over so many examples: take their gradients."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Before the optimizer makes its step: leave the step's gradients in the parameters."""


def not_once(client: Any) -> UsageError:
    """The error for what a client of an algorithm does beyond training once in a round."""
    allowed = (
        "with privacy of examples, one that trains once a round, by gradients, and asks for no loss or gradient without noise"
    )
    return UsageError("algorithm.client", type(client).__name__, allowed)
