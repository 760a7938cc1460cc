"""FedIT: Zhang et al. 2023, "Towards Building the Federated GPT: Federated Instruction Tuning", Algorithm 1: FedAvg of
adapters.

    client k: trains A_k and B_k (LoRA, Hu et al. 2022: the layer computes W_0 + s B A) for E local epochs
    server: A <- sum p_k A_k, B <- sum p_k B_k, with p_k = n_k / n

The mean of products is another one: s B A misses sum p_k s B_k A_k by the covariance s sum p_k (B_k - B) (A_k - A).

Here also lies what all algorithms of adapters build on.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, final

from fedtune.algorithms.fedavg import Mean, fedavg
from fedtune.errors import UsageError
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.messages import Context, Reply
from fedtune.federated.parts import Aggregator, Algorithm, Runtime
from fedtune.federated.stacks import Stacks
from fedtune.federated.state import ServerState
from fedtune.tensors import Groups


@final
@dataclass(frozen=True)
class AdapterTraining(ClientUpdate):
    """E local epochs of a module with adapters.

    Args:
        ranks: of the clients' adapters, dealt out by seed so that each is as frequent as in the list, none above the module's;
            a client trains with its own scale, alpha / r_k. Empty: all have the module's.
    """

    ranks: tuple[int, ...] = ()
    adapters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        wrong = [rank for rank in self.ranks if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1]
        if wrong:
            raise UsageError("ranks", wrong[0], "whole numbers, 1 or more")

    def __call__(self, client: Client) -> Groups:
        """Train; send the update."""
        client.train()
        return {"update": client.update()}


@dataclass(frozen=True)
class OfProducts(Aggregator):
    """What becomes of sum p_k s B_k A_k; all other tensors that are trained (a head) are averaged as ever.

    Args:
        weighting, update_limit: as of `Mean`.
    """

    weighting: str = "examples"
    update_limit: float = 8.0
    takes: ClassVar[tuple[str, ...] | None] = ("update",)
    adapters: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self._mean()

    def __call__(self, replies: Iterator[Reply], state: ServerState, context: Context, runtime: Runtime) -> Groups:
        """The mean of all, and what is made of the factors."""
        if not context.adapters.layers:
            raise UsageError("algorithm.aggregator", type(self).__name__, "for a module without adapters, Mean")
        with Stacks(context.adapters, state.weights, runtime, len(context.cohort)) as stacks:
            groups = self._mean()(stacks.watching(replies, self.weight), state, context, runtime)
            return groups | self.combine(groups, stacks, state, context)

    @abc.abstractmethod
    def combine(self, groups: Groups, stacks: Stacks, state: ServerState, context: Context) -> Groups:
        """What of the groups is another one: "set", or factors of what is added to weights ("base.left", "base.right").

        Args:
            groups: the mean of all that clients have sent.
            stacks: the factors of each.
        """

    def weight(self, reply: Reply) -> int:
        """n_k, or 1."""
        return self._mean().weight(reply)

    def limit(self, group: str) -> float:
        """As in the arguments."""
        return self._mean().limit(group)

    def _mean(self) -> Mean:
        return Mean(self.weighting, self.update_limit)


def fedit(weighting: str = "examples") -> Algorithm:
    """FedIT, weighted by "examples" or "uniform"."""
    return replace(fedavg(weighting), client=AdapterTraining())
