"""FlexLoRA: Bai et al. 2024, "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources",
Algorithm 1.

    client k: trains A_k (r_k, in) and B_k (out, r_k), with s_k = alpha / r_k, from the r_k largest singular values of U S V
    server: U S V <- the SVD of sum p_k s_k B_k A_k; s B = U S and A = V, cut to the largest rank

The cut is the nearest product of its rank (Eckart and Young 1936), and so is that of each client. The SVD is that of a core of
R x R, R the sum of ranks, after a QR decomposition of the stacked factors. Where the sum has fewer than r singular values, the
other rows of A are fresh ones, and B is 0 there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from fedtune.algorithms.fedit import AdapterTraining, OfProducts
from fedtune.federated.adapters import fresh
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm
from fedtune.federated.stacks import Stacks, truncated
from fedtune.federated.state import ServerState
from fedtune.tensors import Groups

_NOTHING = 1e-12  # a singular value that is so small beside the largest is 0


@final
@dataclass(frozen=True)
class Resized(OfProducts):
    """The nearest product of the module's rank; each client gets the nearest of its own."""

    unequal: ClassVar[bool] = True

    def combine(self, groups: Groups, stacks: Stacks, state: ServerState, context: Context) -> Groups:
        """A and B."""
        found = {name: one.double().cpu() for name, one in fresh(context.adapters, context.rng("lora"), state.weights).items()}
        for layer in context.adapters.layers:
            left, right = truncated(*stacks.of(layer), layer.rank)
            values = left.norm(dim=0)
            count = int((values > _NOTHING * values.max()).sum()) if values.numel() else 0
            found[layer.b][:, :count] = left[:, :count] / layer.scale
            found[layer.a][:count] = right[:count]
        return {"set": found}


def flexlora(ranks: tuple[int, ...] = (), weighting: str = "examples") -> Algorithm:
    """FlexLoRA; `ranks` are those of the clients, dealt out by seed."""
    return Algorithm(client=AdapterTraining(tuple(ranks)), aggregator=Resized(weighting))
