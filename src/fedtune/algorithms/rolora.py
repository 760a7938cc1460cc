"""RoLoRA: Chen et al. 2024, "Robust Federated Finetuning of LLMs via Alternating Optimization of LoRA": one factor a round.

    odd rounds: clients train B_k, with A as the server has it; B <- sum p_k B_k
    even rounds: clients train A_k, with B as the server has it; A <- sum p_k A_k

In a round one factor is the same for all, so that the mean of products is the product of means.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from fedtune.algorithms.fedavg import fedavg
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.parts import Algorithm
from fedtune.tensors import Groups


@final
@dataclass(frozen=True)
class Alternating(ClientUpdate):
    """E local epochs of one of the two factors; what is trained beside adapters (a head) is trained in every round."""

    adapters: ClassVar[bool] = True
    alternates: ClassVar[bool] = True

    def __call__(self, client: Client) -> Groups:
        """Train; send the update."""
        client.train(only=lambda name: self.trains(name, client.request.round))
        return {"update": client.update()}

    def trains(self, name: str, round: int) -> bool:
        """B in the first round, A in the second, and so on."""
        return (".lora_A." if round % 2 else ".lora_B.") not in name


def rolora(weighting: str = "examples") -> Algorithm:
    """RoLoRA."""
    return replace(fedavg(weighting), client=Alternating())
