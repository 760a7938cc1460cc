"""HetLoRA's aggregation: Cho et al. 2024, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models": zero
padding and truncation, without their weighting by sparsity and their pruning of ranks. A baseline.

    client k: trains the first r_k rows of A and columns of B
    server: A <- sum p_k [A_k; 0], B <- sum p_k [B_k, 0]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from fedtune.algorithms.fedit import AdapterTraining, OfProducts
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm
from fedtune.federated.stacks import Stacks, after
from fedtune.federated.state import ServerState
from fedtune.tensors import Groups


@final
@dataclass(frozen=True)
class Padded(OfProducts):
    """The mean of either factor, with zeros for those rows and columns that a client does not have."""

    unequal: ClassVar[bool] = True

    def combine(self, groups: Groups, stacks: Stacks, state: ServerState, context: Context) -> Groups:
        """A and B: the mean update counts 0 for a row that is missing, where the row itself must count 0."""
        found = {}
        for layer in context.adapters.layers:
            missing, weights = 1 - stacks.cover(layer), state.weights
            found[layer.a] = after(groups, weights, layer.a) - missing[:, None] * weights[layer.a].detach().cpu().double()
            found[layer.b] = after(groups, weights, layer.b) - missing * weights[layer.b].detach().cpu().double()
        return {"set": found}


def hetlora(ranks: tuple[int, ...] = (), weighting: str = "examples") -> Algorithm:
    """Zero padding; `ranks` are those of the clients, dealt out by seed."""
    return Algorithm(client=AdapterTraining(tuple(ranks)), aggregator=Padded(weighting))
