"""FLoRA: Wang et al. 2024, "FLoRA: Federated Fine-Tuning Large Language Models with Heterogeneous Low-Rank Adaptations",
Algorithm 1.

    client k: W <- the server's; trains a fresh A_k (r_k, in) and B_k = 0 (out, r_k), with s_k = alpha / r_k
    server: W <- W + sum p_k s_k B_k A_k = W + [p_1 s_1 B_1, p_2 s_2 B_2, …] [A_1; A_2; …]     ("stacking")

Nothing is lost, whatever the ranks. Every round begins with a fresh A, drawn at the address (seed, "lora", round) and the same
for all clients, and with a fresh optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from fedtune.algorithms.fedit import AdapterTraining, OfProducts
from fedtune.federated.adapters import fresh
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm
from fedtune.federated.stacks import Stacks
from fedtune.federated.state import ServerState
from fedtune.tensors import Groups


@final
@dataclass(frozen=True)
class Stacking(OfProducts):
    """The stacked factors go into the weights of the layers, and adapters begin anew."""

    unequal: ClassVar[bool] = True
    moves_base: ClassVar[bool] = True

    def combine(self, groups: Groups, stacks: Stacks, state: ServerState, context: Context) -> Groups:
        """W, A and B."""
        factors = {layer.base: stacks.of(layer) for layer in context.adapters.layers}
        return {
            "base.left": {name: left for name, (left, _) in factors.items()},
            "base.right": {name: right for name, (_, right) in factors.items()},
            "set": fresh(context.adapters, context.rng("lora"), state.weights),
        }


def flora(ranks: tuple[int, ...] = (), weighting: str = "examples") -> Algorithm:
    """FLoRA; `ranks` are those of the clients, dealt out by seed."""
    return Algorithm(client=AdapterTraining(tuple(ranks)), aggregator=Stacking(weighting))
