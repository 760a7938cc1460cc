"""Clients whose data are not here: what a federation needs to know of them."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

from fedtune.federated.memory import ClientMemory
from fedtune.federated.parts import Runtime


class Share(NamedTuple):
    """What a client has found on its share of a part of the data.

    Args:
        examples: in its share.
        metrics: what its module logged, over these.
        own_accuracy: of the client's own model, where it has one.
    """

    examples: int
    metrics: dict[str, float]
    own_accuracy: float | None = None


class Remote(abc.ABC):
    """Stands in the place of a data module in `FederatedLoop.fit`; who has the data trains and evaluates.

    Attributes:
        num_clients: of the federation.
        memory: notes what clients remember, which is where they are.
    """

    num_clients: int
    memory: ClientMemory

    @abc.abstractmethod
    def begin(self, directory: Any) -> None:
        """Find the clients of a run that begins, or goes on, in a run directory.

        Raises:
            RunError: too few are there.
            UsageError: they don't belong together, or not to the run in the directory.
        """

    @abc.abstractmethod
    def max_weight(self) -> int:
        """As in `Context`."""

    @abc.abstractmethod
    def runtime(self) -> Runtime:
        """Carries requests to them."""

    @abc.abstractmethod
    def evaluate(self, part: str) -> list[Share | None]:
        """For each client what the module, as it stands here, does on its share of a part; None where it does not answer."""

    @abc.abstractmethod
    def own_accuracy(self) -> list[float | None]:
        """The accuracy of each client's own model, where it has one, else of the shared one, as last evaluated."""


def pooled(shares: Sequence[Share | None]) -> dict[str, float]:
    """Means over the examples of all shares.

    >>> pooled([Share(1, {"accuracy": 0.0}), None, Share(3, {"accuracy": 1.0})])
    {'accuracy': 0.75}
    """
    known = [one for one in shares if one is not None and one.examples]
    names = dict.fromkeys(name for one in known for name in one.metrics)
    return {
        name: sum(one.metrics[name] * one.examples for one in known if name in one.metrics)
        / sum(one.examples for one in known if name in one.metrics)
        for name in names
    }
