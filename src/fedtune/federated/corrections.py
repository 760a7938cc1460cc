"""What algorithms add to gradients."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedtune.federated.pieces import Pieces, is_tall
from fedtune.federated.training import Correction


@torch.no_grad()
def pull_(gradients: Sequence[Tensor], weights: Sequence[Tensor], centres: Sequence[Tensor], strength: float) -> None:
    """Add strength x (weight - centre) to each gradient: the gradient of strength / 2 x the squared distance."""
    torch._foreach_add_(list(gradients), list(weights), alpha=strength)
    torch._foreach_sub_(list(gradients), list(centres), alpha=strength)


class Offsets:
    """Tensors that are added to gradients, the same in each step; rows of zeros of tall matrices are left out."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._tall = {name: Pieces({name: tensor}) for name, tensor in tensors.items() if is_tall(tensor)}

    @torch.no_grad()
    def add_to_(self, names: Sequence[str], gradients: Sequence[Tensor]) -> None:
        """Add those that there are, by name."""
        for name, gradient in zip(names, gradients, strict=True):
            if name not in self._tall:
                gradient.add_(self._tensors.get(name, 0))
                continue
            for _, place, values in self._tall[name]:
                if isinstance(place, slice):
                    gradient.add_(self._tensors[name])  # most of its rows
                    break
                gradient.index_add_(0, place, values)


def of_some(correct: Correction, names: Container[str]) -> Correction:
    """The correction, of tensors with these names."""

    def chosen(*given: list[Any]) -> None:
        correct(*map(list, zip(*(one for one in zip(*given, strict=True) if one[0] in names), strict=True)))

    return chosen
