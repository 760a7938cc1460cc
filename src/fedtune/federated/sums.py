"""Exact weighted sums: the same bits in whatever order clients answer, and on however many workers.

A value is put on a fixed grid (whole multiples of 2^-bits), multiplied by its integer weight and added as int64, which does not
round. Only the mean at the end is rounded, to fp64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedtune.errors import RunError
from fedtune.federated.pieces import Pieces, Place
from fedtune.tensors import Tensors

MANTISSA_64, MANTISSA_32 = 51, 22  # bits of a value on the grid that one addition in fp64, in fp32, can put there
_WORD = 62  # bits of a sum


class ExactSum:
    """Weighted sums of tensors by name.

    Args:
        limit: the largest absolute value that is added, a power of two.
        max_weight: the largest total of the weights. With `limit` it decides the grid, so all workers must have the same.
    """

    def __init__(self, limit: float, max_weight: int) -> None:
        self.bits, self.max_weight, self.weight = grid_bits(limit, max_weight), max_weight, 0
        self._sums: Tensors = {}

    @torch.no_grad()
    def add(self, pieces: Pieces, weight: int, factor: float = 1.0) -> None:
        """Take in one contribution, its values times a factor, `weight` times.

        The caller sees to it that values are finite and within the limit.

        Raises:
            RunError: the weight is no count, or takes the total beyond `max_weight`.
        """
        if isinstance(weight, bool) or not isinstance(weight, int) or weight < 0:
            raise RunError(f"a contribution to a sum has weight {weight!r}; allowed: a whole number, 0 or more")
        self.weight += weight
        if self.weight > self.max_weight:
            raise RunError(f"contributions to a sum weigh {self.weight}; its grid was made for {self.max_weight} at most")
        for name, tensor in pieces.tensors.items():
            if name not in self._sums:
                self._sums[name] = torch.zeros(tensor.shape, dtype=torch.int64, device=tensor.device)
        for name, place, values in pieces:
            scaled = values if factor == 1.0 else values * factor
            add_at_(self._sums[name], place, on_grid(scaled, 2.0**self.bits), weight)

    @torch.no_grad()
    def mean(self) -> Tensors:
        """The weighted mean of all contributions, fp64, in the memory of the sums.

        Raises:
            RunError: there is nothing to average: an empty round must not become zeros.
        """
        if not self.weight:
            raise RunError("no client contributed an example to this round; there is nothing to average")
        found = {name: sums.view(torch.float64) for name, sums in self._sums.items()}
        for name, place, values in Pieces(self._sums):
            found[name].view(-1)[place] = values.double().div_(self.weight * 2.0**self.bits)
        self._sums = {}
        return found


def grid_bits(limit: float, max_weight: int) -> int:
    """Bits behind the point of the finest grid on which values up to `limit` can be added `max_weight` times.

    Raises:
        RunError: the limit is no power of two.

    >>> grid_bits(8.0, 30_000)
    44
    """
    fraction, exponent = math.frexp(limit)
    if fraction != 0.5:
        raise RunError(f"the limit of a sum is {limit}; allowed: a power of two")
    return min(MANTISSA_64, _WORD - (max_weight - 1).bit_length()) - (exponent - 1)


def on_grid(values: Tensor, scale: float, mantissa: int = MANTISSA_64) -> Tensor:
    """(n,) whole numbers nearest to values * scale (ties to even): int64, or int32 where the mantissa is that of fp32.

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
