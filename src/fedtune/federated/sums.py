"""Exact weighted sums: the same bits in whatever order clients answer, and on however many workers.

A value is put on a fixed grid (whole multiples of 2^-bits), multiplied by its integer weight and added as int64, which does not
round. Only the mean at the end is rounded, to fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fedtune.errors import RunError
from fedtune.federated.pieces import Pieces, Place, blocks, row_pieces
from fedtune.tensors import Groups, Tensors

Value = TypeVar("Value")
Key = tuple[str, str]  # group, name
MANTISSA_64, MANTISSA_32 = 51, 22  # bits of a value on the grid that one addition in fp64, in fp32, can put there
_WORD = 62  # bits of a sum
BUFFER_LIMIT = 2.0**32  # the running variance of a batch norm may change by much more than a weight does


class Workers(Protocol):
    """Processes that work on one round."""

    def add_up_(self, tensors: list[Tensor]) -> None:
        """Make whole numbers the sums over all workers, in place."""

    def gather(self, values: list[Value]) -> list[Value]:
        """The values of all workers."""


class Note(NamedTuple):
    """What workers tell each other of a sum."""

    shape: torch.Size
    device: str
    mantissa: int
    everywhere: int
    has_rows: bool


class Total:
    """Whole numbers of a tensor's shape, to which values on a grid are added.

    Between 2^52 and 2^53 the numbers of fp64 are the whole ones, and their bits count up: so one addition to an anchor there
    rounds a value (ties to even), and the bits of the result, less those of the anchor, are the whole number. For fp32 the same
    holds between 2^23 and 2^24.

    Args:
        like: a tensor of the shape, on the device.
        mantissa: bits of a value on the grid: 51, as int64 by way of fp64, or 22, as int32 by way of fp32.
    """

    def __init__(self, like: Tensor, mantissa: int = MANTISSA_64) -> None:
        self._mantissa = mantissa
        exact, whole = (torch.float64, torch.int64) if mantissa == MANTISSA_64 else (torch.float32, torch.int32)
        self.numbers = torch.zeros(like.shape, dtype=whole, device=like.device)
        self._anchor = torch.tensor(3.0 * 2**mantissa, dtype=exact, device=like.device)
        self.everywhere = 0  # how many times something was added to all numbers: so many anchors are still in them
        self.rows: Tensor | None = None  # (rows,) whether something was added to some rows only, and to which

    def add(self, place: Place, values: Tensor, scale: float, times: int = 1) -> None:
        """Add the whole numbers nearest to values * scale at a place of `Pieces`, so many times."""
        found = values.to(self._anchor.dtype)
        found = torch.add(self._anchor.expand(found.shape), found, alpha=scale, out=None if found is values else found)
        bits, anchor = found.view(self.numbers.dtype), self._anchor.view(self.numbers.dtype)
        if isinstance(place, slice):
            self.numbers.view(-1)[place].add_(bits, alpha=times)
            self.everywhere += times if place.start == 0 else 0
        else:
            self.numbers[place] = self.numbers[place].add_(bits.sub_(anchor), alpha=times)  # no row is there twice
            self.rows = torch.zeros_like(self.numbers[:, 0], dtype=torch.bool) if self.rows is None else self.rows
            self.rows[place] = True

    def whole(self) -> Tensor:
        """The whole numbers."""
        return self.numbers - self._anchor.view(self.numbers.dtype) * self.everywhere

    def notes(self) -> Note:
        """What others need to know to add theirs."""
        return Note(self.numbers.shape, self.numbers.device.type, self._mantissa, self.everywhere, self.rows is not None)

    def pieces(self) -> Iterator[tuple[Place, Tensor]]:
        """Places and whole numbers; where nothing was added they are zeros, and left out if those are rows."""
        if self.rows is not None and not self.everywhere:
            for rows in row_pieces(self.rows.nonzero().view(-1), self.numbers):
                yield rows, self.numbers[rows]
            return
        anchors = self._anchor.view(self.numbers.dtype) * self.everywhere  # wraps around, as the sums have
        flat = self.numbers.view(-1)
        for place in blocks(self.numbers):
            yield place, flat[place] - anchors


def join(totals: dict[Key, Total], workers: Workers) -> None:
    """Make sums those of all workers, also of those to which no client fell: in one message, but for small ones.

    Args:
        totals: of this worker, by name; those that only others have are added.
    """
    notes = workers.gather([{key: total.notes() for key, total in totals.items()}])
    if len(notes) == 1:
        return
    for key, note in ((key, note) for one in notes for key, note in one.items()):
        if key not in totals:
            totals[key] = Total(torch.empty(note.shape, device=note.device), note.mantissa)
    added, rows = [], {}
    for key in sorted(totals):
        known = [one[key] for one in notes if key in one]
        totals[key].everywhere = sum(note.everywhere for note in known)
        added.append(totals[key].numbers)
        if any(note.has_rows for note in known):
            found = totals[key].rows
            numbers = totals[key].numbers
            rows[key] = torch.zeros_like(numbers[:, 0]) if found is None else found.to(numbers.dtype)
    workers.add_up_([*added, *rows.values()])
    for key, counts in rows.items():
        totals[key].rows = counts > 0


class ExactSum:
    """Weighted sums of groups of tensors.

    Args:
        limit: group -> the largest absolute value that is added, a power of two.
        max_weight: the largest total of the weights. With the limit it decides a group's grid, the same on all workers.
    """

    def __init__(self, limit: Callable[[str], float], max_weight: int) -> None:
        self._limit, self._max_weight, self._weight = limit, max_weight, 0
        self._totals: dict[Key, Total] = {}

    @torch.no_grad()
    def add(self, groups: Mapping[str, Pieces], weight: int, factor: float = 1.0, client: int | None = None) -> None:
        """Take in one contribution, its values times a factor, `weight` times.

        The caller sees to it that values are finite and within the limit. Whose it is makes no difference here.

        Raises:
            RunError: the weight is no count, or takes the total beyond `max_weight`.
        """
        if isinstance(weight, bool) or not isinstance(weight, int) or weight < 0:
            raise RunError(f"a contribution to a sum has weight {weight!r}; allowed: a whole number, 0 or more")
        self._weight += weight
        if self._weight > self._max_weight:
            raise RunError(f"contributions to a sum weigh {self._weight}; its grid was made for {self._max_weight} at most")
        for group, pieces in groups.items():
            scale = 2.0 ** self._bits(group)
            for name, tensor in pieces.tensors.items():
                if (group, name) not in self._totals:
                    self._totals[group, name] = Total(tensor)
            for name, place, values in pieces:
                self._totals[group, name].add(place, values if factor == 1.0 else values * factor, scale, weight)

    def numbers(self) -> dict[Key, Tensor]:
        """The sums as the whole numbers that they are, int64, of this worker."""
        return {key: total.whole() for key, total in self._totals.items()}

    def take(self, numbers: Mapping[Key, Tensor], weight: int) -> None:
        """Whole numbers as from `numbers`, of contributions that weigh so much together, in place of what was added.

        Raises:
            RunError: they weigh more than `max_weight`.
        """
        self._weight, self._totals = 0, {}
        self.add({}, weight)
        for key, whole in numbers.items():
            self._totals[key] = Total(whole)
            self._totals[key].numbers = whole

    @property
    def any(self) -> bool:
        """Whether there is anything to average, of this worker."""
        return self._weight > 0

    @torch.no_grad()
    def mean(self, workers: Workers | None = None, over: float | None = None) -> Groups:
        """The weighted mean of all contributions, fp64, in the memory of the sums.

        Args:
            workers: whose sums are one; None where there is only this one.
            over: what the sums are divided by in place of the total weight; then there may be none.

        Raises:
            RunError: there is nothing to average: an empty round must not become zeros.
        """
        if workers is not None:
            self._join(workers)
        if not self._weight and over is None:
            raise RunError("no client contributed an example to this round; there is nothing to average")
        found: Groups = {}
        for (group, name), total in self._totals.items():
            mean, divisor = total.numbers.view(torch.float64), (over or self._weight) * 2.0 ** self._bits(group)
            for place, numbers in total.pieces():
                if isinstance(place, slice):
                    mean.view(-1)[place] = numbers.double().div_(divisor)
                else:
                    mean[place] = numbers.double().div_(divisor)
            found.setdefault(group, {})[name] = mean
        self._totals = {}
        return found

    def _bits(self, group: str) -> int:
        return grid_bits(self._limit(group), self._max_weight)

    def _join(self, workers: Workers) -> None:
        """Make the sums those of all workers, also of those to which no client fell."""
        join(self._totals, workers)
        self._weight = sum(workers.gather([self._weight]))


class Sum(Protocol):
    """What is added up over the clients of a round: `ExactSum`, or one that takes its place."""

    def add(self, groups: Mapping[str, Pieces], weight: int, factor: float = 1.0, client: int | None = None) -> None:
        """As of `ExactSum`; `client` is whose contribution it is."""

    def mean(self, workers: Workers | None = None, over: float | None = None) -> Groups:
        """As of `ExactSum`."""


class BufferSum:
    """Exact sums of buffers, of values up to 2^32 and very small ones: on a coarse grid, what is left on a finer one, …

    The last step is below 2^-126, the least normal number of fp32.
    """

    def __init__(self, max_weight: int) -> None:
        self._limits = [BUFFER_LIMIT]
        while self._step(-1, max_weight) > 2.0**-126:
            self._limits.append(self._step(-1, max_weight))
        self._steps = [self._step(place, max_weight) for place in range(len(self._limits))]
        self._sums = ExactSum(lambda group: self._limits[int(group)], max_weight)

    def _step(self, place: int, max_weight: int) -> float:
        return 2.0 ** -grid_bits(self._limits[place], max_weight)

    def add(self, buffers: Tensors, weight: int) -> None:
        """Take in one client's."""
        left = {name: tensor.double() for name, tensor in buffers.items()}
        groups: dict[str, Pieces] = {}
        for place, step in enumerate(self._steps):
            on_grid = {name: tensor.div(step).round_().mul_(step) for name, tensor in left.items()}
            left = {name: tensor - on_grid[name] for name, tensor in left.items()}
            groups[str(place)] = Pieces(on_grid)
        self._sums.add(groups, weight)

    def mean(self, workers: Workers) -> Groups:
        """Their mean."""
        found = self._sums.mean(workers)
        first, *rest = (found[str(place)] for place in range(len(self._steps)))
        return {"buffers": {name: sum((one[name] for one in rest), start=tensor) for name, tensor in first.items()}}


def is_limit(limit: float) -> bool:
    """Whether a limit can be that of a sum: a power of two."""
    return math.frexp(limit)[0] == 0.5


def grid_bits(limit: float, max_weight: int) -> int:
    """Bits behind the point of the finest grid on which values up to `limit` can be added `max_weight` times.

    >>> grid_bits(8.0, 30_000)
    44
    """
    return min(MANTISSA_64, _WORD - (max_weight - 1).bit_length()) - (math.frexp(limit)[1] - 1)
