"""Smaller messages.

Quantise: unbiased rounding to 8 bits with a scale a tensor. With s the largest absolute value of a tensor, v = 127 x / s is
rounded up with the probability of its fraction, so E[decoded] = x, and the error of an element is below s / 127. (Alistarh et
al. 2017, "QSGD", with 127 levels and the largest value as the norm.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from fedtune.federated.messages import Context, Stage
from fedtune.tensors import Groups

_LEVELS = 127
_SCALES = ".scale"  # the group of the scales of a group


@final
@dataclass(frozen=True)
class Quantise(Stage):
    """Every tensor of every group as int8, and its scale."""

    @torch.no_grad()
    def encode(self, groups: Groups, context: Context) -> Groups:
        """For each group one of int8 tensors, and one of fp32 scalars."""
        rng, found = np.random.Generator(np.random.SFC64(context.rng("quantise").integers(2**63))), Groups()
        for group in sorted(groups):  # names in order, so that no dictionary's order decides on a draw
            tensors = {name: groups[group][name] for name in sorted(groups[group])}
            scales = {name: torch.linalg.vector_norm(tensor, ord=float("inf")).float() for name, tensor in tensors.items()}
            found[group] = {name: _rounded(tensor, scales[name], rng) for name, tensor in tensors.items()}
            found[group + _SCALES] = scales
        return found

    @torch.no_grad()
    def decode(self, groups: Groups, context: Context) -> Groups:
        """The groups in fp32."""
        return {
            group: {name: tensor.float().div_(_LEVELS).mul_(groups[group + _SCALES][name]) for name, tensor in tensors.items()}
            for group, tensors in groups.items()
            if not group.endswith(_SCALES)
        }


def _rounded(tensor: Tensor, scale: Tensor, rng: np.random.Generator) -> Tensor:
    drawn = torch.from_numpy(rng.random(tensor.numel(), dtype=np.float32)).view(tensor.shape).to(tensor.device)
    levels = (tensor.float() / scale).nan_to_num_(0.0).mul_(_LEVELS).add_(drawn)  # all zeros: 0 / 0
    return levels.floor_().clamp_(-_LEVELS, _LEVELS).to(torch.int8)  # a sum just below 128 may have been rounded up to it
