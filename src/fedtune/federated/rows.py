"""Updates of all clients as rows of a matrix that is not in memory: what robust rules ask of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedtune.federated.spool import Spool


class Rows:
    """(n, d) updates, of which `blocks` gives columns; after `mix`, means of some of them."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._gram: Tensor | None = None
        self._mixing: Tensor | None = None

    def __len__(self) -> int:
        return len(self._spool.clients)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns, and the (n, columns) values there, in fp64 or in the fp32 in which they came."""
        for place, values in self._spool.blocks():
            yield place, values if self._mixing is None else self._mixing @ values.double()

    def empty(self) -> Tensor:
        """(d,) fp64, to be filled in."""
        return torch.empty(self._spool.width, dtype=torch.float64)

    def gram(self) -> Tensor:
        """(n, n) inner products of the updates, from an origin near them."""
        if self._gram is None:
            self._gram = torch.zeros(len(self), len(self), dtype=torch.float64)
            for _, values in self._spool.blocks():
                values = values.double()
                values -= _central(values)
                self._gram.addmm_(values, values.T)
        return self._gram if self._mixing is None else self._mixing @ self._gram @ self._mixing.T

    def squared_distances(self) -> Tensor:
        """(n, n)."""
        gram = self.gram()
        squares = gram.diagonal()
        return (squares[:, None] + squares[None] - 2 * gram).clamp_(min=0)

    def mix(self, f: int) -> None:
        """Put the mean of its n - f nearest (itself among them) in the place of each."""
        nearest = self.squared_distances().argsort(dim=1, stable=True)[:, : len(self) - f]
        self._mixing = torch.zeros(len(self), len(self), dtype=torch.float64).scatter_(1, nearest, 1 / nearest.shape[1])

    def weighted(self, weights: Tensor) -> Tensor:
        """(d,) the sum of the updates, weighted by (n,); those without weight are not read."""
        weights = weights if self._mixing is None else weights @ self._mixing
        some, found = weights.nonzero().view(-1), self.empty()
        for place, values in self._spool.blocks(some.tolist()):
            torch.mv(values.double().T, weights[some], out=found[place])
        return found


def _central(values: Tensor) -> Tensor:
    """(columns,) of the (n, columns) values the row of middle length: far ones, fewer than half, must not be the origin.

    (From their mean as origin, say, values near 1e30 would leave nothing of what the others differ in.)
    """
    return values[torch.linalg.vector_norm(values, dim=1).argsort(stable=True)[(len(values) - 1) // 2]].clone()
