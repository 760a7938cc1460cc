"""FFA-LoRA: Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning": A stays as it was drawn.

    client k: trains B_k; A is frozen
    server: B <- sum p_k B_k, so that s B A = sum p_k s B_k A, exactly

It trains half as much, and wants a learning rate about ten times as high.
"""

from __future__ import annotations

from dataclasses import replace

from fedtune.algorithms.fedavg import fedavg
from fedtune.algorithms.fedit import AdapterTraining
from fedtune.federated.parts import Algorithm


def ffa_lora(weighting: str = "examples") -> Algorithm:
    """FFA-LoRA."""
    return replace(fedavg(weighting), client=AdapterTraining(), frozen=("*.lora_A.*",))
