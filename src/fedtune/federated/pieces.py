"""Tensors cut into pieces that the caches hold, so that all that is done with an update goes through memory once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fedtune.tensors import Tensors

Place = slice | Tensor
Watch = Callable[[str, Place, Tensor], None]
_BLOCK = 2**17  # elements: the caches of two cores hold them, and their int64
_TALL = 2**20  # elements from which on a matrix is searched for rows of zeros


class Pieces:
    """Tensors by name, to be gone through in pieces: name, place, values.

    A place is a slice of the flattened tensor, or (n,) row numbers: most rows of an embedding's update are zeros, since their
    words do not occur in the client's texts, and are left out.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self._places = {name: list(_places(tensor)) for name, tensor in tensors.items()}
        self._watch: Watch | None = None

    def __iter__(self) -> Iterator[tuple[str, Place, Tensor]]:
        watch, self._watch = self._watch, None
        for name, places in self._places.items():
            tensor = self.tensors[name]
            flat = tensor.detach().reshape(-1)
            for place in places:
                values = flat[place] if isinstance(place, slice) else tensor[place]
                if watch is not None:
                    watch(name, place, values)
                yield name, place, values

    def watched_by(self, watch: Watch) -> None:
        """Hand every piece to `watch`, too, when next somebody goes through all of them."""
        self._watch = watch

    def finish(self) -> None:
        """Go through the pieces for the sake of `watched_by`, where nobody has."""
        if self._watch is not None:
            for _ in self:
                pass

    def squares(self) -> dict[str, float]:
        """The squared Euclidean length of each tensor. Waits for the device once."""
        names, found = [], []
        for name, _, values in self:
            flat = values.reshape(-1).to(torch.float64 if values.dtype == torch.float64 else torch.float32)
            names.append(name)
            found.append(torch.dot(flat, flat))
        sums = dict.fromkeys(self.tensors, 0.0)
        for name, square in zip(names, torch.stack(found).tolist() if found else [], strict=True):
            sums[name] += square
        return sums

    def largest(self, name: str) -> float:
        """The largest absolute value of a tensor."""
        return float(self.tensors[name].detach().abs().max()) if self.tensors[name].numel() else 0.0


def norm(tensors: Tensors) -> float:
    """The Euclidean length over all tensors."""
    return math.sqrt(sum(Pieces(tensors).squares().values()))


def _places(tensor: Tensor) -> Iterator[Place]:
    if tensor.ndim == 2 and tensor.numel() >= _TALL and tensor.is_floating_point():
        rows = torch.linalg.vector_norm(tensor, dim=1).nonzero().view(-1)
        if 2 * len(rows) < len(tensor):
            yield from rows.split(max(1, _BLOCK // tensor.shape[1]))
            return
    for start in range(0, tensor.numel(), _BLOCK):
        yield slice(start, start + _BLOCK)
