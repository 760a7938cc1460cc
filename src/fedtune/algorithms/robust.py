"""Rules that bear some clients that lie: they take the place of the mean, on updates, all clients weighing the same.

    Median, TrimmedMean    Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates"
    GeometricMedian        Pillutla et al. 2022, "Robust Aggregation for Federated Learning" (smoothed Weiszfeld steps)
    Krum, MultiKrum        Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent"
    CentredClipping        Karimireddy et al. 2021, "Learning from History for Byzantine Robust Optimization"
    mix (NNM)              Allouah et al. 2023, "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity"
    ClippedMean            Sun et al. 2019, "Can You Really Backdoor Federated Learning?" (norm thresholding)

Legend: n updates x_i of d elements, f of them of clients that may lie. Distances come from the inner products of all pairs of
updates, in fp64; so what needs distances needs one pass over the updates and one to make the result. Rows are in the order of
client numbers, so that of equal ones the lowest number comes first. Buffers (of batch norms) are averaged as ever, which a liar
can use.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from fedtune.errors import UsageError, at_least, one_of
from fedtune.federated.messages import Context, Reply
from fedtune.federated.parts import Aggregator, Runtime
from fedtune.federated.rows import Rows
from fedtune.federated.spool import Spool
from fedtune.federated.state import ServerState
from fedtune.federated.sums import ExactSum
from fedtune.tensors import Groups


@dataclass(frozen=True)
class _Robust(Aggregator):
    """What the rules have in common.

    Args:
        num_malicious: f, clients of a round that may lie, as the rule takes it.
        mix: whether first the mean of its n - f nearest takes the place of each update ("nearest neighbour mixing").
    """

    num_malicious: int = 1
    mix: bool = False
    takes: ClassVar[tuple[str, ...] | None] = ("update",)

    def __post_init__(self) -> None:
        at_least("num_malicious", self.num_malicious, 0)

    @property
    def least(self) -> int:  # type: ignore[override]
        """Replies that the rule needs."""
        return 2 * self.num_malicious + 1 if self.mix else 1

    def __call__(self, replies: Iterator[Reply], state: ServerState, context: Context, runtime: Runtime) -> Groups:
        """Keep all updates, then make one of them."""
        home = next((tensor.device for tensor in state.weights.values()), torch.device("cpu"))
        with Spool(runtime, len(context.cohort), home) as spool:
            for reply in replies:
                spool.add(reply.client, reply.groups["update"])
            spool.complete()
            rows = Rows(spool)
            if self.mix:
                rows.mix(self.num_malicious)
            last = state.memory.get(type(self).__name__, {}).get("last")
            update = spool.shaped(self.combine(rows, None if last is None else spool.flat(last)))
        return {"update": update} | dict.fromkeys(self.keeps, update)

    @abc.abstractmethod
    def combine(self, rows: Rows, last: Tensor | None = None) -> Tensor:
        """(d,) what becomes of the updates; `last` is what became of them in the last round, for a rule that keeps it."""

    def weight(self, reply: Reply) -> int:
        """1."""
        return 1

    def limit(self, group: str) -> float:
        """None: what a liar sends may be large."""
        return math.inf


@final
@dataclass(frozen=True)
class Median(_Robust):
    """The median of each element; of an even number, the mean of the two in the middle."""

    def combine(self, rows: Rows, last: Tensor | None = None) -> Tensor:
        """(d,)."""
        return _middle(rows, (len(rows) - 1) // 2)


@final
@dataclass(frozen=True)
class TrimmedMean(_Robust):
    """The mean of each element without its f largest and its f smallest values."""

    @property
    def least(self) -> int:  # type: ignore[override]
        """2 f + 1."""
        return 2 * self.num_malicious + 1

    def combine(self, rows: Rows, last: Tensor | None = None) -> Tensor:
        """(d,)."""
        return _middle(rows, self.num_malicious)


def _middle(rows: Rows, dropped: int) -> Tensor:
    """(d,) the mean of each element without so many values on either side."""
    found = rows.empty()
    for place, values in rows.blocks():
        kept = np.sort(values.numpy(), axis=0)[dropped : len(rows) - dropped]  # ten times as fast as torch's
        torch.mean(torch.from_numpy(kept), 0, dtype=torch.float64, out=found[place])
    return found


@final
@dataclass(frozen=True)
class NearestMean(_Robust):
    """The mean of the updates, after nearest neighbour mixing: lies count less, but one that is far away still moves it far.

    Against those take another rule, with `mix`.
    """

    mix: bool = True

    def combine(self, rows: Rows, last: Tensor | None = None) -> Tensor:
        """(d,)."""
        return rows.weighted(torch.full((len(rows),), 1 / len(rows), dtype=torch.float64))


@final
@dataclass(frozen=True)
class GeometricMedian(_Robust):
    """The point with the least sum of distances to the updates: z <- sum x_i / max(nu, |x_i - z|), over the sum of 1 / max(.).

    It starts at the mean of the half of the updates that is nearest to the one with the least sum of distances.

    Args:
        nu: smoothing: distances below it count as it.
        max_steps: at most so many steps.
        tolerance: no more steps once no weight of an update changes by more than this part of it.
    """

    nu: float = 1e-6
    max_steps: int = 1000
    tolerance: float = 1e-12

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("max_steps", self.max_steps, 1)
        for name in ("nu", "tolerance"):
            if not getattr(self, name) > 0:
                raise UsageError(name, getattr(self, name), "a number above 0")

    def combine(self, rows: Rows, last: Tensor | None = None) -> Tensor:
        """(d,)."""
        distances, gram, half = rows.squared_distances().sqrt_(), rows.gram(), len(rows) // 2 + 1
        nearest = distances[distances.sum(1).argmin()].argsort(stable=True)[:half]
        weights = torch.zeros(len(rows), dtype=torch.float64).index_fill_(0, nearest, 1 / half)
        for _ in range(self.max_steps):
            before, weights = weights, 1 / _distances(gram, weights).clamp(min=self.nu)
            weights /= weights.sum()
            if bool(((weights - before).abs() <= self.tolerance * weights).all()):
                break
        return rows.weighted(weights)


def _distances(gram: Tensor, weights: Tensor) -> Tensor:
    """(n,) distances of the updates from their sum weighted by (n,) numbers that add up to 1."""
    towards = gram @ weights
    return (gram.diagonal() - 2 * towards + weights @ towards).clamp_(min=0).sqrt_()


@dataclass(frozen=True)
class _ByScore(_Robust):
    """Scores of Krum: the sum of the squared distances to the n - f - 2 nearest others."""

    @property
    def least(self) -> int:  # type: ignore[override]
        """2 f + 3."""
        return 2 * self.num_malicious + 3

    def best(self, rows: Rows, count: int) -> Tensor:
        """(count,) the numbers of the rows with the least scores."""
        squares = rows.squared_distances().fill_diagonal_(math.inf)
        scores = squares.sort(1).values[:, : len(rows) - self.num_malicious - 2].sum(1)
        return scores.argsort(stable=True)[:count]

    def mean_of(self, rows: Rows, chosen: Tensor) -> Tensor:
        """(d,) the mean of some rows."""
        return rows.weighted(torch.zeros(len(rows), dtype=torch.float64).index_fill_(0, chosen, 1 / len(chosen)))


@final
@dataclass(frozen=True)
class Krum(_ByScore):
    """The update with the least score."""

    def combine(self, rows: Rows, last: Tensor | None = None) -> Tensor:
        """(d,)."""
        return self.mean_of(rows, self.best(rows, 1))


@final
@dataclass(frozen=True)
class MultiKrum(_ByScore):
    """The mean of the updates with the least scores.

    Args:
        chosen: m, how many, at most n - f; 0: n - f.
    """

    chosen: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("chosen", self.chosen, 0)

    @property
    def least(self) -> int:  # type: ignore[override]
        """2 f + 3, and m + f."""
        return max(2 * self.num_malicious + 3, self.chosen + self.num_malicious)

    def combine(self, rows: Rows, last: Tensor | None = None) -> Tensor:
        """(d,)."""
        return self.mean_of(rows, self.best(rows, self.chosen or len(rows) - self.num_malicious))


@final
@dataclass(frozen=True)
class CentredClipping(_Robust):
    """v <- v + the mean of (x_i - v) min(1, tau / |x_i - v|), from last round's v, which is the last mean update.

    Args:
        tau: radius within which updates are trusted, a length of updates.
        steps: how often in a round.
    """

    tau: float = 1.0
    steps: int = 1
    keeps: ClassVar[tuple[str, ...]] = ("last",)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("steps", self.steps, 1)
        if not self.tau > 0:
            raise UsageError("tau", self.tau, "a number above 0")

    def combine(self, rows: Rows, last: Tensor | None = None) -> Tensor:
        """(d,)."""
        centre = rows.empty().zero_() if last is None else last.clone()
        for _ in range(self.steps):
            squares = torch.zeros(len(rows), dtype=torch.float64)
            for place, values in rows.blocks():
                squares += torch.linalg.vector_norm(values - centre[place], dim=1).square_()
            factors = self.tau / squares.sqrt_().clamp_(min=self.tau) / len(rows)
            for place, values in rows.blocks():
                centre[place] += factors @ (values - centre[place])
        return centre


@final
@dataclass(frozen=True)
class ClippedMean(Aggregator):
    """The mean of updates that are cut to a length.

    Args:
        most: the largest length of an update; longer ones are scaled to it.
        weighting: "examples" or "uniform".
    """

    most: float = 1.0
    weighting: str = "examples"
    takes: ClassVar[tuple[str, ...] | None] = ("update",)

    def __post_init__(self) -> None:
        if not 0 < self.most < math.inf:
            raise UsageError("most", self.most, "a number above 0")
        if self.weighting not in ("examples", "uniform"):
            raise one_of("weighting", self.weighting, ("examples", "uniform"))

    def __call__(self, replies: Iterator[Reply], state: ServerState, context: Context, runtime: Runtime) -> Groups:
        """Cut and add up."""
        within = 2.0 ** (math.ceil(math.log2(self.most)) + 1)  # lengths are rounded
        sums = ExactSum(lambda _: within, context.max_weight if self.weighting == "examples" else context.num_clients)
        for reply in replies:
            length = reply.pieces["update"].length
            factor = min(1.0, self.most / length) if length else 1.0
            sums.add({"update": reply.pieces["update"]}, self.weight(reply), factor)
        return sums.mean(runtime)

    def weight(self, reply: Reply) -> int:
        """n_k, or 1."""
        return reply.weight if self.weighting == "examples" else 1

    def limit(self, group: str) -> float:
        """None: what is long is cut."""
        return math.inf
