"""FedSA-LoRA: Guo et al. 2025, "Selective Aggregation for Low-Rank Adaptation in Federated Learning": A is shared, B is not.

client k: trains A_k and B_k, from the server's A and its own B_k
server: A <- sum p_k A_k
"""

from __future__ import annotations

from dataclasses import replace

from fedtune.algorithms.fedavg import fedavg
from fedtune.algorithms.fedit import AdapterTraining
from fedtune.federated.parts import Algorithm


def fedsa_lora(weighting: str = "examples") -> Algorithm:
    """FedSA-LoRA; clients' own models are evaluated, too."""
    return replace(fedavg(weighting), client=AdapterTraining(), personal=("*.lora_B.*",))
