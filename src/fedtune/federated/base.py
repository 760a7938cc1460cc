"""Weights of adapted layers that an algorithm moves, though nobody trains them (FLoRA, FedEx-LoRA).

They are among the server's weights, in fp32 at least, and so in its checkpoints; they go down, and never come up. An aggregator
returns what is added to them as factors: "base.left" (out, R) and "base.right" (R, in), by the name of the weight.

What a client needs of them in a round, and what is counted, are the factors of the rounds since it last took part, or, layer by
layer in each round, the whole matrix where that is smaller; and in all no more than the matrices. At the start it has them.
"""

from __future__ import annotations

import torch

from fedtune.federated.adapters import Adapters
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm
from fedtune.federated.state import ServerState
from fedtune.tensors import Groups, Tensors, num_bytes

MEMORY = "base"  # the namespace of the server's memory in which it is counted


def moving(algorithm: Algorithm, adapters: Adapters) -> frozenset[str]:
    """The names of the weights that move."""
    return frozenset(layer.base for layer in adapters.layers) if algorithm.aggregator.moves_base else frozenset()


@torch.no_grad()
def moved_base(weights: Tensors, groups: Groups, adapters: Adapters) -> Tensors:
    """The weights that an aggregate moves, new: added in fp64 and rounded once."""
    found: Tensors = {}
    for layer in adapters.layers:
        if layer.base in groups.get("base.left", {}):
            left, right = groups["base.left"][layer.base], groups["base.right"][layer.base]
            product = (left @ right).to(weights[layer.base].device)
            kind = weights[layer.base].dtype
            found[layer.base] = (weights[layer.base].double() + (product.T if layer.transposed else product)).to(kind)
    return found


def bytes_needed(state: ServerState, context: Context, names: frozenset[str]) -> int:
    """Bytes that the clients of a round need of them."""
    if not names or MEMORY not in state.memory:
        return 0
    counts = state.memory[MEMORY]["traffic"]
    whole = num_bytes({name: state.weights[name] for name in names})
    return sum(min(whole, int(counts["made"][int(counts["has"][client]) :].sum())) for client in context.cohort)


def counted(state: ServerState, context: Context, groups: Groups) -> dict[str, Groups]:
    """What the server remembers of them: "made", the bytes of each round's factors, and "has", of each client the last round
    whose weights it has."""
    before = state.memory.get(MEMORY, {}).get("traffic")
    made = torch.zeros(0, dtype=torch.int64) if before is None else before["made"].cpu()
    has = torch.zeros(context.num_clients, dtype=torch.int64) if before is None else before["has"].cpu().clone()
    new = 0
    for layer in context.adapters.layers:
        left, right = groups["base.left"][layer.base], groups["base.right"][layer.base]
        size = state.weights[layer.base].element_size()
        new += size * min(left.numel() + right.numel(), layer.outputs * layer.inputs)
    has[list(context.answered)] = state.round
    return {MEMORY: {"traffic": {"made": torch.cat([made, torch.tensor([new])]), "has": has}}}
