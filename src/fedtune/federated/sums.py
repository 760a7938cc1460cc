"""Exact weighted sums: the same bits in whatever order clients answer, and on however many workers.

A value is put on a fixed grid (whole multiples of 2^-bits), multiplied by its integer weight and added as int64, which does not
round. Only the mean at the end is rounded, to fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fedtune.errors import RunError
from fedtune.tensors import Groups, Tensors

Value = TypeVar("Value")
Place = slice | Tensor
Watch = Callable[[str, Place, Tensor], None]
MANTISSA_64, MANTISSA_32 = 51, 22  # bits of a value on the grid that one addition in fp64, in fp32, can put there
_WORD = 62  # bits of a sum
_BLOCK = 2**17  # elements of a piece: the caches of two cores hold them, and their int64
_TALL = 2**20  # elements from which on a matrix is searched for rows of zeros


class Workers(Protocol):
    """Processes that work on one round."""

    def add_up_(self, tensors: list[Tensor]) -> None:
        """Make whole numbers the sums over all workers, in place."""

    def gather(self, values: list[Value]) -> list[Value]:
        """The values of all workers."""


class Pieces:
    """Tensors by name, cut into pieces that the caches hold: all that is done with an update goes through them.

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


class ExactSum:
    """Weighted sums of groups of tensors.

    Args:
        limit: group -> the largest absolute value that is added, a power of two.
        max_weight: the largest total of the weights. With the limit it decides a group's grid, the same on all workers.
    """

    def __init__(self, limit: Callable[[str], float], max_weight: int) -> None:
        self._limit, self._max_weight, self._weight = limit, max_weight, 0
        self._sums: Groups = {}

    @torch.no_grad()
    def add(self, groups: Mapping[str, Pieces], weight: int, factor: float = 1.0) -> None:
        """Take in one contribution, its values times a factor, `weight` times.

        The caller sees to it that values are finite and within the limit.

        Raises:
            RunError: the weight is no count, or takes the total beyond `max_weight`.
        """
        if isinstance(weight, bool) or not isinstance(weight, int) or weight < 0:
            raise RunError(f"a contribution to a sum has weight {weight!r}; allowed: a whole number, 0 or more")
        self._weight += weight
        if self._weight > self._max_weight:
            raise RunError(f"contributions to a sum weigh {self._weight}; its grid was made for {self._max_weight} at most")
        for group, pieces in groups.items():
            sums = self._sums.setdefault(group, {})
            for name, tensor in pieces.tensors.items():
                if name not in sums:
                    sums[name] = torch.zeros(tensor.shape, dtype=torch.int64, device=tensor.device)
            scale = 2.0 ** self._bits(group)
            for name, place, values in pieces:
                scaled = values if factor == 1.0 else values * factor
                add_at_(sums[name], place, on_grid(scaled, scale), weight)

    @torch.no_grad()
    def mean(self, workers: Workers | None = None) -> Groups:
        """The weighted mean of all contributions, fp64, in the memory of the sums.

        Args:
            workers: whose sums are one; None where there is only this one.

        Raises:
            RunError: there is nothing to average: an empty round must not become zeros.
        """
        if workers is not None:
            self._join(workers)
        if not self._weight:
            raise RunError("no client contributed an example to this round; there is nothing to average")
        found: Groups = {}
        for group, sums in self._sums.items():
            found[group] = {name: tensor.view(torch.float64) for name, tensor in sums.items()}
            for name, tensor in sums.items():
                flat, mean = tensor.view(-1), found[group][name].view(-1)
                for place in blocks(tensor):
                    mean[place] = flat[place].double().div_(self._weight * 2.0 ** self._bits(group))
        self._sums = {}
        return found

    def _bits(self, group: str) -> int:
        return grid_bits(self._limit(group), self._max_weight)

    def _join(self, workers: Workers) -> None:
        """Make the sums those of all workers, also of those to which no client fell."""
        shapes = {group: {name: tensor.shape for name, tensor in sums.items()} for group, sums in self._sums.items()}
        for others in workers.gather([shapes]):
            for group, of_group in others.items():
                sums = self._sums.setdefault(group, {})
                for name, shape in of_group.items():
                    if name not in sums:
                        sums[name] = torch.zeros(shape, dtype=torch.int64)
        workers.add_up_([self._sums[group][name] for group in sorted(self._sums) for name in sorted(self._sums[group])])
        self._weight = sum(workers.gather([self._weight]))


def is_limit(limit: float) -> bool:
    """Whether a limit can be that of a sum: a power of two."""
    return math.frexp(limit)[0] == 0.5


def grid_bits(limit: float, max_weight: int) -> int:
    """Bits behind the point of the finest grid on which values up to `limit` can be added `max_weight` times.

    >>> grid_bits(8.0, 30_000)
    44
    """
    return min(MANTISSA_64, _WORD - (max_weight - 1).bit_length()) - (math.frexp(limit)[1] - 1)


def on_grid(values: Tensor, scale: float, mantissa: int = MANTISSA_64) -> Tensor:
    """Whole numbers nearest to values * scale (ties to even): int64, or int32 where the mantissa is that of fp32.

    Between 2^52 and 2^53 the numbers of fp64 are the whole ones, and their bits count up: so one addition rounds, and the
    bits of its result, less those of the anchor, are the number. The same holds for fp32 between 2^23 and 2^24.
    """
    exact, whole = (torch.float64, torch.int64) if mantissa == MANTISSA_64 else (torch.float32, torch.int32)
    anchor = torch.tensor(3.0 * 2**mantissa, dtype=exact, device=values.device)
    found = values.to(exact)
    found = torch.add(anchor.expand(found.shape), found, alpha=scale, out=None if found is values else found)
    return found.view(whole).sub_(anchor.view(whole))


def add_at_(target: Tensor, place: Place, values: Tensor, times: int = 1) -> None:
    """Add values at a place of `Pieces`, so many times."""
    if isinstance(place, slice):
        target.view(-1)[place].add_(values, alpha=times)
    else:
        target[place] = target[place].add_(values, alpha=times)  # no row is there twice; index_add_ is slower


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


def _is_tall(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and tensor.numel() >= _TALL


def _lengths(tensor: Tensor, minus: Tensor | None) -> list[Tensor]:
    """For each block its values, or the lengths of its rows in a tall matrix; `minus` is first subtracted in place."""
    flat, tall, found = tensor.detach().reshape(-1), _is_tall(tensor), []
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
    if _is_tall(tensor):
        rows = torch.cat(lengths).nonzero().view(-1)
        if 2 * len(rows) < len(tensor):
            return list(rows.split(max(1, _BLOCK // tensor.shape[1]))) if len(rows) else []
    return list(blocks(tensor))
