"""The factors of all clients side by side: sum p_k s B_k A_k = [p_1 s B_1, p_2 s B_2, …] [A_1; A_2; …], a layer at a time.

Legend: as in `adapters`; p_k is the weight of a client among those that count, R the sum of their ranks. All is fp64, on the
CPU, in the order of client numbers, so that neither their order nor the number of workers changes a bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import TracebackType

import torch
from torch import Tensor

from fedtune.federated.adapters import Adapters, Layer
from fedtune.federated.messages import Reply
from fedtune.federated.parts import Runtime
from fedtune.federated.spool import Spool
from fedtune.tensors import Groups, Tensors

Factors = tuple[Tensor, Tensor]  # (out, R) and (R, in)


class Stacks:
    """Factors of the replies of a round, kept on the disk until they are needed.

    Args:
        adapters: the layers.
        weights: the server's, and those of factors that are frozen.
        runtime: whose workers have the other replies.
        most: the most replies.
    """

    def __init__(self, adapters: Adapters, weights: Tensors, runtime: Runtime, most: int) -> None:
        self._adapters, self._weights, self._runtime = adapters, weights, runtime
        self._names = {name for layer in adapters.layers for name in (layer.a, layer.b)}
        self._spool = Spool(runtime, most)
        self._counts: dict[int, int] = {}
        self._start: Tensors = {}

    def __enter__(self) -> Stacks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._spool.__exit__(kind, error, trace)

    def add(self, client: int, update: Tensors, weight: int) -> None:
        """Keep what one reply has of the factors."""
        self._counts[client] = weight
        self._spool.add(client, {name: tensor for name, tensor in update.items() if name in self._names})

    def watching(self, replies: Iterator[Reply], weight: Callable[[Reply], int]) -> Iterator[Reply]:
        """The replies, which are kept on their way; afterwards all are there."""
        for reply in replies:
            self.add(reply.client, reply.groups["update"], weight(reply))
            yield reply
        self.complete()

    def complete(self) -> None:
        """All replies are there."""
        self._spool.complete()
        found = self._runtime.gather([self._counts])
        self._counts = {client: weight for counts in found for client, weight in counts.items()}

    def parts(self, layer: Layer) -> list[tuple[float, Tensor, Tensor]]:
        """Of each client p_k, (out, r_k) B_k and (r_k, in) A_k."""
        total = sum(self._counts.values())
        b, a = (self._of(name) for name in (layer.b, layer.a))
        found = []
        for place, client in enumerate(self._spool.clients):
            rank = self._adapters.rank_of(client)
            found.append((self._counts[client] / total, b(place)[:, :rank], a(place)[:rank]))
        return found

    def of(self, layer: Layer) -> Factors:
        """Factors of sum p_k s B_k A_k; p_k s is part of the first."""
        parts = self.parts(layer)
        return torch.cat([p * layer.scale * b for p, b, _ in parts], 1), torch.cat([a for _, _, a in parts])

    def cover(self, layer: Layer) -> Tensor:
        """(r,) of each row of A the part of the clients, by weight, that have it."""
        found = torch.zeros(layer.rank, dtype=torch.float64)
        for p, b, _ in self.parts(layer):
            found[: b.shape[1]] += p
        return found

    def error(self, groups: Groups) -> float | None:
        """|s B A + what is added to W - sum p_k s B_k A_k| / |the sum| over all layers, of what an aggregator returned; None
        where the sum is 0.

        By QR of the factors; products are formed only of layers that are smaller than their factors.
        """
        apart = whole = 0.0
        for layer in self._adapters.layers:
            left, right = self.of(layer)
            whole += squared(left, right)
            base = groups.get("base.left", {}).get(layer.base), groups.get("base.right", {}).get(layer.base)
            b, a = after(groups, self._weights, layer.b), after(groups, self._weights, layer.a)
            lefts, rights = [left, -layer.scale * b], [right, a]
            if base[0] is not None and base[1] is not None:
                lefts, rights = [*lefts, -base[0]], [*rights, base[1]]
            apart += squared(torch.cat(lefts, 1), torch.cat(rights))
        return math.sqrt(apart / whole) if whole else None

    def _of(self, name: str) -> Callable[[int], Tensor]:
        """The values of a factor, by the place of the client."""
        start = self._weights[name].detach().cpu().double()
        updates = self._spool.tensor(name)
        return lambda place: start if updates is None else start + updates[place]


def after(groups: Groups, weights: Tensors, name: str) -> Tensor:
    """A factor as it is after a round, fp64 on the CPU, by what an aggregator returned."""
    if name in groups.get("set", {}):
        return groups["set"][name].detach().cpu().double()
    found = weights[name].detach().cpu().double()
    return found + groups["update"][name].detach().cpu() if name in groups["update"] else found


def squared(left: Tensor, right: Tensor) -> float:
    """|left right|^2, of (out, R) and (R, in)."""
    if left.shape[1] >= min(len(left), right.shape[1]):
        return float((left @ right).square().sum())
    one, other = (torch.linalg.qr(factor, mode="r").R for factor in (left, right.T))
    return float((one @ other.T).square().sum())


def truncated(left: Tensor, right: Tensor, rank: int) -> Factors:
    """(out, rank) and (rank, in), the nearest to left right that a product of such sizes comes (Eckart and Young 1936), or
    fewer columns where the product has no more. Rows of the second are orthonormal, singular values descend.

    The SVD is that of a core of R x R: left = Q_1 R_1, right^T = Q_2 R_2, left right = Q_1 (R_1 R_2^T) Q_2^T.
    """
    (q, r), (other_q, other_r) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r @ other_r.T, full_matrices=False)
    first, second = q @ (u * s)[:, :rank], v[:rank] @ other_q.T
    signs = torch.gather(second, 1, second.abs().argmax(1, keepdim=True)).sign()  # an SVD leaves them open
    return first * signs.T, second * signs
