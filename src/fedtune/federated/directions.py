"""Weights that are those at the start and a sum over random directions, so that K scalars can travel in their place.

    w(a) = w_0 - sum over j < K of a_j z_j       z_j: standard normal, drawn at the address (seed of the run, "direction", j)

Whoever has w_0 has w(a) to the bit, whatever rounds it missed, on any machine: z_j is drawn on the CPU, in the order of the
tensors' names, and the terms are taken off in the order of j, each multiplied, rounded, subtracted and rounded. An element of
z_j is what 16 random bits choose of 65,536 quantiles of the standard normal distribution: no element needs a logarithm, which
C libraries round as they like, and one takes 1.3 ns where NumPy's normal numbers take 8.6. None is beyond 4.33.

No z_j is ever there as a whole: it is made in pieces that the caches hold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from statistics import NormalDist
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from fedtune.federated.pieces import blocks
from fedtune.randomness import stream
from fedtune.tensors import Tensors

SCALARS = "scalars"  # the name of a, in the place of the names of weights


@final
class Directions:
    """K random directions from the weights with which a run began.

    Args:
        seed: of the run.
        start: w_0, by name; not to be changed.
        count: K.

    `kind` is the type of the scalars: fp32, or fp64 where a weight is of that type.
    """

    def __init__(self, seed: int, start: Tensors, count: int) -> None:
        self._seed, self._start, self.count = seed, start, count
        exact = any(tensor.dtype == torch.float64 for tensor in start.values())
        self.kind = torch.float64 if exact else torch.float32
        self._last: tuple[Tensor, Tensors] | None = None

    def zeros(self) -> Tensor:
        """(K,) the scalars at the start, where the weights lie."""
        return torch.zeros(self.count, dtype=self.kind, device=next(iter(self._start.values())).device)

    @torch.no_grad()
    def add_(self, weights: Tensors, number: int, factor: float) -> None:
        """Add factor times one direction to weights, in place; `number` is j."""
        rng = self._rng(number)
        for name in sorted(weights):
            for piece in _pieces(weights[name]):
                piece.add_(_normal(rng, piece).mul_(factor))

    @torch.no_grad()
    def weights(self, scalars: Tensor) -> Tensors:
        """w(a), not to be changed: who asks for the same again gets the same tensors.

        Args:
            scalars: (K,) a. A scalar that is 0 costs nothing.
        """
        if self._last is not None and torch.equal(self._last[0], scalars):
            return self._last[1]
        terms = [(self._rng(number), value) for number, value in enumerate(scalars.tolist()) if value]
        found: Tensors = {}
        for name in sorted(self._start):
            exact = torch.promote_types(self._start[name].dtype, torch.float32)
            sum_ = self._start[name].to(exact, copy=True, memory_format=torch.contiguous_format)
            for piece in _pieces(sum_):
                for rng, value in terms:  # each goes on where it stopped in the piece before
                    piece.sub_(_normal(rng, piece).mul_(value))
            found[name] = sum_.to(self._start[name].dtype)
        self._last = scalars.clone(), {name: found[name] for name in self._start}
        return self._last[1]

    def _rng(self, number: int) -> np.random.Generator:
        return stream(self._seed, "direction", number)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views of a tensor that the caches hold; one that is not contiguous as it is."""
    if not tensor.is_contiguous():
        yield tensor
        return
    flat = tensor.view(-1)
    for place in blocks(tensor):
        yield flat[place]


def _normal(rng: np.random.Generator, like: Tensor) -> Tensor:
    """The next elements of a direction, as many as a tensor has, in its shape and type, fp32 at least."""
    count = like.numel()
    words = rng.integers(0, 2**64, size=-(-count // 4), dtype=np.uint64)  # of four elements each
    drawn = torch.from_numpy(_quantiles().take(words.view(np.uint16)[:count], mode="clip")).view(like.shape)
    return drawn.to(like.device, torch.promote_types(like.dtype, torch.float32))


@functools.cache
def _quantiles() -> np.ndarray[Any, np.dtype[np.float32]]:
    """(65536,) quantiles of the standard normal distribution in the middle of equal shares, scaled to the variance 1."""
    half, normal = 2**15, NormalDist()
    upper = [normal.inv_cdf(0.5 + (place + 0.5) / (2 * half)) for place in range(half)]
    scale = math.sqrt(math.fsum(value * value for value in upper) / half)  # the ends of the tails lack a little
    above = np.array([value / scale for value in upper])
    return np.concatenate([-above[::-1], above]).astype(np.float32)
