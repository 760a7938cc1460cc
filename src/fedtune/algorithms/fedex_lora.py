"""FedEx-LoRA: Singhal et al. 2025, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation
Models".

    client k: trains A_k and B_k
    server: A <- sum p_k A_k, B <- sum p_k B_k, W <- W + s (sum p_k B_k A_k - B A)

The residual travels as factors: sum p_k B_k A_k - B A = sum p_k (B_k - B) (A_k - A), and as sum p_k (B_k - B) = 0, it is
sum over all but the last client of p_k (B_k - B) (A_k - A_last), of rank (N - 1) r.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch

from fedtune.algorithms.fedit import AdapterTraining, OfProducts
from fedtune.federated.adapters import Layer
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm
from fedtune.federated.stacks import Factors, Stacks, after
from fedtune.federated.state import ServerState
from fedtune.tensors import Groups


@final
@dataclass(frozen=True)
class Residual(OfProducts):
    """The mean of either factor, and what that misses goes into the weights of the layers."""

    moves_base: ClassVar[bool] = True

    def combine(self, groups: Groups, stacks: Stacks, state: ServerState, context: Context) -> Groups:
        """W; A and B are the means."""

        def residual(layer: Layer) -> Factors:
            *others, (_, last_b, last_a) = stacks.parts(layer)
            mean = after(groups, state.weights, layer.b)
            lefts = [p * layer.scale * (b - mean) for p, b, _ in others]
            return torch.cat([last_b[:, :0], *lefts], 1), torch.cat([last_a[:0], *(a - last_a for _, _, a in others)])

        factors = {layer.base: residual(layer) for layer in context.adapters.layers}
        return {
            "base.left": {name: left for name, (left, _) in factors.items()},
            "base.right": {name: right for name, (_, right) in factors.items()},
        }


def fedex_lora(weighting: str = "examples") -> Algorithm:
    """FedEx-LoRA."""
    return Algorithm(client=AdapterTraining(), aggregator=Residual(weighting))
