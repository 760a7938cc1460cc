"""What splits are made of: the columns that they see, checks of their parameters, and ways to deal texts to clients."""

from __future__ import annotations

import heapq
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fedtune.data.contract import IntArray, whole_at_least
from fedtune.errors import UsageError, one_of

SMALL_AUTHORS = ("drop", "pool")


class Columns(NamedTuple):
    """What a split may look at: (N,) labels; (N,) authors, or None where the task names no authors; (N,) lengths in
    characters, of both texts of a pair together, or None where nobody has counted them."""

    labels: IntArray
    authors: IntArray | None = None
    lengths: IntArray | None = None


Split = Callable[..., list[IntArray]]


def check_option(name: str, value: Any) -> None:
    """Raise `UsageError` for a value that the parameter of a split cannot have."""
    number = float(value) if isinstance(value, numbers.Real) else math.nan
    if name == "skew" and not 0 <= number <= 1:
        raise UsageError("skew", value, "a probability between 0 and 1")
    if name == "alpha" and not 0 < number < math.inf:
        raise UsageError("alpha", value, "a number above 0")
    if name == "exponent" and (isinstance(value, bool) or not -10 <= number <= 10):
        raise UsageError("exponent", value, "a number between -10 and 10")
    if name in ("shards_per_client", "min_size"):
        whole_at_least(name, value, 1)
    if name == "small_authors" and value not in SMALL_AUTHORS:
        raise one_of("small_authors", value, SMALL_AUTHORS)


def authors_for(split: str, columns: Columns) -> IntArray:
    """The (N,) authors; `UsageError` where the task names none."""
    if columns.authors is None:
        allowed = "a task that names its authors (this one does not): iid, by_label, shards, dirichlet, quantity, by_length"
        raise UsageError("split", split, allowed)
    return columns.authors


def groups(values: IntArray, count: int) -> list[IntArray]:
    """For each number below `count` the places where it stands, in order."""
    sizes = np.bincount(values, minlength=count)
    return np.split(np.argsort(values, kind="stable"), np.cumsum(sizes)[:-1])


def at_home(authors: IntArray, num_clients: int, rng: np.random.Generator) -> IntArray:
    """(N,) the client at which each text is at home: authors stay whole, or share their home clients evenly."""
    client = np.empty(len(authors), dtype=np.int64)
    names, places = np.unique(authors, return_inverse=True)
    rows_of = dict(zip(names.tolist(), groups(places, len(names)), strict=True))
    for author, homes in _homes(authors, num_clients).items():
        rows = rng.permutation(rows_of[author])
        client[rows] = homes[0] if len(homes) == 1 else np.resize(homes, len(rows))
    return client


def _homes(authors: IntArray, num_clients: int) -> dict[int, list[int]]:
    """Home clients of every author."""
    names, counts = np.unique(authors, return_counts=True)
    largest_first = np.argsort(-counts, kind="stable")
    homes: dict[int, list[int]] = {int(name): [] for name in names}
    if num_clients <= len(names):
        load = [(0, client) for client in range(num_clients)]  # sorted, so it is a heap; an empty client comes first
        for name, count in zip(names[largest_first].tolist(), counts[largest_first].tolist(), strict=True):
            texts, client = load[0]
            homes[name].append(client)
            heapq.heapreplace(load, (texts + count, client))
        return homes
    fullest = [(-counts[i] / 1e-9, place, int(names[i])) for place, i in enumerate(largest_first)]  # sorted, so it is a heap
    for client in range(num_clients):  # the author whose home clients are the fullest gets one more
        _, place, name = fullest[0]
        homes[name].append(client)
        heapq.heapreplace(fullest, (-counts[largest_first[place]] / len(homes[name]), place, name))
    return homes


def by_shares(
    labels: IntArray, num_clients: int, alpha: float, rng: np.random.Generator, offset: float | None = None
) -> IntArray:
    """(N,) clients: the texts of every class are shared out, at random, by proportions from Dirichlet(alpha).

    Args:
        offset: where the first of a class's n texts lies in the first n-th of the proportions; drawn for each class by default,
            so that on average a client gets its exact proportion also of a class with fewer texts than there are clients.
    """
    client = np.empty(len(labels), dtype=np.int64)
    names, places = np.unique(labels, return_inverse=True)
    for of_class in groups(places, len(names)):
        rows = rng.permutation(of_class)
        shares = np.cumsum(rng.dirichlet(np.full(num_clients, alpha)))
        if not abs(shares[-1] - 1) < 1e-6:
            raise UsageError(
                "alpha", alpha, "a number whose Dirichlet distribution floating-point numbers can hold, as 1e-3 .. 1e6"
            )
        first = rng.random() if offset is None else offset
        bounds = np.searchsorted((np.arange(len(rows)) + first) / len(rows), shares[:-1], side="right")
        client[rows] = np.repeat(np.arange(num_clients), np.diff(bounds, prepend=0, append=len(rows)))
    return client


def none_empty(client: IntArray, num_clients: int, rng: np.random.Generator) -> IntArray:
    """(N,) clients of which none is empty: each that is gets a text, drawn from those of the client that has most by then.

    Where none is empty, nothing is drawn.
    """
    sizes = np.bincount(client, minlength=num_clients)
    empty = np.flatnonzero(sizes == 0)
    if not len(empty):
        return client
    fullest = [(-size, number) for number, size in enumerate(sizes.tolist())]
    heapq.heapify(fullest)
    given = np.zeros(num_clients, dtype=np.int64)
    for _ in empty:
        size, number = fullest[0]
        given[number] += 1
        heapq.heapreplace(fullest, (size + 1, number))
    order = rng.permutation(len(client))
    order = order[np.argsort(client[order], kind="stable")]
    rank = np.arange(len(client)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    found = client.copy()
    found[order[rank < given[client[order]]]] = empty
    return found
