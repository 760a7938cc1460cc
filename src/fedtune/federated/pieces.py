"""Tensors in pieces that the caches hold: all that is done with an update goes through them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fedtune.tensors import Tensors

Place = slice | Tensor
Watch = Callable[[str, Place, Tensor], None]
_BLOCK = 2**17  # elements of a piece: the caches of two cores hold them, and their int64
_TALL = 2**20  # elements from which on a matrix is searched for rows of zeros


class Pieces:
    """Tensors by name, cut into pieces.

    A piece has a name, a place and values. A place is a slice of the flattened tensor, or (n,) row numbers: most rows of an
    embedding's update are zeros, since their words do not occur in the client's texts, and are left out.

    Args:
        tensors: not to be changed from now on.
        minus: what is first subtracted from them, in place.

    `squares` are the squared Euclidean lengths by name. They, and the difference, take one pass through memory.
    """

    @torch.no_grad()
    def __init__(self, tensors: Tensors, minus: Tensors | None = None) -> None:
        self.tensors = tensors
        self._watch: Watch | None = None
        self._places: dict[str, list[Place]] = {}
        names: list[str] = []
        found: list[Tensor] = []
        for name, tensor in tensors.items():
            if minus is not None and not tensor.is_contiguous():
                tensor.sub_(minus[name])
            other = minus[name].reshape(-1) if minus is not None and tensor.is_contiguous() else None
            lengths = _lengths(tensor, other)
            names += [name] * len(lengths)
            found += [torch.dot(length, length) for length in lengths]
            self._places[name] = _places(tensor, lengths)
        self.squares = dict.fromkeys(tensors, 0.0)
        for name, square in zip(names, torch.stack(found).tolist() if found else [], strict=True):  # waits for the device once
            self.squares[name] += square
        self._versions = self._changes()

    def __iter__(self) -> Iterator[tuple[str, Place, Tensor]]:
        watch, self._watch = self._watch, None
        for name, places in self._places.items():
            tensor = self.tensors[name].detach()
            flat = tensor.reshape(-1)
            for place in places:
                values = flat[place] if isinstance(place, slice) else tensor[place]
                if watch is not None:
                    watch(name, place, values)
                yield name, place, values

    @property
    def length(self) -> float:
        """The Euclidean length over all tensors."""
        return math.sqrt(sum(self.squares.values()))

    def watched_by(self, watch: Watch) -> None:
        """Show every piece to `watch`, too, when next somebody goes through all of them."""
        self._watch = watch

    def finish(self) -> None:
        """Go through the pieces for the sake of `watched_by`, where nobody else has."""
        if self._watch is not None:
            for _ in self:
                pass

    def are(self, tensors: Tensors) -> bool:
        """Whether they are the pieces of these tensors, as they are now."""
        return self.tensors is tensors and self._versions == self._changes()

    def _changes(self) -> list[int]:
        """How often each tensor was changed in place, which torch counts."""
        return [tensor._version for tensor in self.tensors.values()]


@torch.no_grad()
def moved(tensors: Tensors, update: Pieces) -> Tensors:
    """New tensors + update, added in the more precise of both types and rounded once."""
    found = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    for name, place, values in update:
        if isinstance(place, slice):
            found[name].view(-1)[place].add_(values)
        else:
            found[name][place] = (found[name][place] + values).to(found[name].dtype)
    return found


def blocks(tensor: Tensor, width: int = 1) -> list[slice]:
    """Slices of a flattened tensor that the caches hold, whole rows of a width each."""
    size = max(1, _BLOCK // width) * width
    return [slice(start, start + size) for start in range(0, tensor.numel(), size)]


def together(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slices of flattened tensors of one shape, which the caches hold. Only contiguous ones may be written to."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    for place in blocks(tensors[0]):
        yield tuple(tensor[place] for tensor in flat)


def row_pieces(rows: Tensor, tensor: Tensor) -> list[Tensor]:
    """(n,) row numbers in pieces that the caches hold."""
    return list(rows.split(max(1, _BLOCK // tensor.shape[1]))) if len(rows) else []


def is_tall(tensor: Tensor) -> bool:
    """Whether a tensor is searched for rows of zeros."""
    return tensor.ndim == 2 and tensor.numel() >= _TALL


def _lengths(tensor: Tensor, minus: Tensor | None) -> list[Tensor]:
    """For each block its values, or the lengths of its rows in a tall matrix; `minus` is first subtracted in place."""
    flat, tall, found = tensor.detach().reshape(-1), is_tall(tensor), []
    for place in blocks(tensor, tensor.shape[1] if tall else 1):
        values = flat[place]
        if minus is not None:
            values.sub_(minus[place])
        if tall:
            values = torch.linalg.vector_norm(values.view(-1, tensor.shape[1]), dim=1)
        found.append(values if values.dtype == torch.float64 else values.float())
    return found


def _places(tensor: Tensor, lengths: list[Tensor]) -> list[Place]:
    """Where the pieces of a tensor are."""
    if is_tall(tensor):
        rows = torch.cat(lengths).nonzero().view(-1)
        if 2 * len(rows) < len(tensor):
            return list(row_pieces(rows, tensor))
    return list(blocks(tensor))
