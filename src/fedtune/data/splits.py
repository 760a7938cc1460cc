"""How texts are divided among clients: pure functions of (columns, num_clients, seed), and the registry `SPLITS`."""

from __future__ import annotations

import heapq
import math
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from fedtune.data.contract import IntArray, whole
from fedtune.errors import UsageError, at_least, one_of
from fedtune.randomness import stream

_DRAWS = 100  # attempts of a Dirichlet split before it is given up


class Columns(NamedTuple):
    """What a split may look at: (N,) labels and (N,) authors, or None where the task names no authors."""

    labels: IntArray
    authors: IntArray | None = None


Split = Callable[..., list[IntArray]]


def iid(columns: Columns, num_clients: int, seed: int) -> list[IntArray]:
    """Every text goes to a random client; sizes differ by at most one."""
    order = stream(seed, "split/iid").permutation(len(columns.labels))
    return [np.sort(part) for part in np.array_split(order, num_clients)]


def by_label(columns: Columns, num_clients: int, seed: int) -> list[IntArray]:
    """Sorted by label and cut into blocks of equal size (McMahan et al. 2017, section 3, with one shard a client)."""
    shuffled = stream(seed, "split/by_label").permutation(len(columns.labels))
    order = shuffled[np.argsort(columns.labels[shuffled], kind="stable")]
    return [np.sort(part) for part in np.array_split(order, num_clients)]


def by_author(columns: Columns, num_clients: int, seed: int, skew: float = 1.0) -> list[IntArray]:
    """Every author has a home client; each text goes home with probability `skew`, else to a uniformly drawn client.

    Skew 0 is IID; skew 1 keeps every author whole. Authors are dealt out, largest first, each to the client with the
    fewest texts, so sizes stay as even as whole authors allow. With more clients than authors every client is home to
    one author, authors with more texts have more home clients, and these share the author's texts evenly.

    Raises:
        UsageError: the task names no authors, or skew is outside 0 .. 1.
    """
    if columns.authors is None:
        raise UsageError("split", "by_author", "a task that names its authors (this one does not): iid, by_label, dirichlet")
    if not isinstance(skew, numbers.Real) or not 0 <= skew <= 1:
        raise UsageError("skew", skew, "a probability between 0 and 1")
    rng = stream(seed, "split/by_author")
    client = np.empty(len(columns.labels), dtype=np.int64)
    names, places = np.unique(columns.authors, return_inverse=True)
    rows_of = dict(zip(names.tolist(), _groups(places, len(names)), strict=True))
    for author, homes in _homes(columns.authors, num_clients).items():
        rows = rng.permutation(rows_of[author])
        client[rows] = np.resize(homes, len(rows))
    away = rng.random(len(client)) >= skew
    client[away] = rng.integers(num_clients, size=int(away.sum()))
    return _groups(client, num_clients)


def _groups(values: IntArray, count: int) -> list[IntArray]:
    """For each number below `count` the places where it stands, in order."""
    sizes = np.bincount(values, minlength=count)
    return np.split(np.argsort(values, kind="stable"), np.cumsum(sizes)[:-1])


def _homes(authors: IntArray, num_clients: int) -> dict[int, list[int]]:
    """Home clients of every author."""
    names, counts = np.unique(authors, return_counts=True)
    largest_first = np.argsort(-counts, kind="stable")
    homes: dict[int, list[int]] = {int(name): [] for name in names}
    if num_clients <= len(names):
        load = np.zeros(num_clients, dtype=np.int64)
        for i in largest_first:
            client = int(load.argmin())  # an empty client, as long as there is one
            homes[int(names[i])].append(client)
            load[client] += counts[i]
        return homes
    fullest = [(-counts[i] / 1e-9, place, int(names[i])) for place, i in enumerate(largest_first)]  # sorted, so it is a heap
    for client in range(num_clients):  # the author whose home clients are the fullest gets one more
        _, place, name = fullest[0]
        homes[name].append(client)
        heapq.heapreplace(fullest, (-counts[largest_first[place]] / len(homes[name]), place, name))
    return homes


def dirichlet(columns: Columns, num_clients: int, seed: int, alpha: float = 0.5) -> list[IntArray]:
    """The texts of every class are shared out by proportions from Dirichlet(alpha) (Hsu et al. 2019, by class).

    A small alpha gives each client few classes, a large one is IID. A draw that leaves a client empty is drawn again.

    Raises:
        UsageError: alpha is not positive, or 100 draws in a row left a client empty.
    """
    if not isinstance(alpha, numbers.Real) or not 0 < alpha < math.inf:
        raise UsageError("alpha", alpha, "a number above 0")
    rng = stream(seed, "split/dirichlet")
    for _ in range(_DRAWS):
        client = np.empty(len(columns.labels), dtype=np.int64)
        for label in np.unique(columns.labels):
            rows = rng.permutation(np.flatnonzero(columns.labels == label))
            shares = rng.dirichlet(np.full(num_clients, alpha))
            client[rows] = np.searchsorted(np.cumsum(shares)[:-1], (np.arange(len(rows)) + 0.5) / len(rows))
        parts = _groups(client, num_clients)
        if all(len(part) for part in parts):
            return parts
    raise UsageError(
        "alpha", alpha, f"a larger alpha or fewer clients ({_DRAWS} draws for {num_clients} clients left one empty)"
    )


def hilmkil_iid(columns: Columns, num_clients: int, seed: int) -> list[IntArray]:
    """As the code of Hilmkil et al. 2021 does it: the first K * (N // K) texts, drawn in random order from torch's generator
    in its constant first state, cut in K. The seed has no influence, the order within a client is kept, the rest is dropped."""
    size = len(columns.labels) // num_clients
    order = torch.randperm(size * num_clients, generator=torch.Generator()).numpy()
    return list(order.reshape(num_clients, size))


def hilmkil_sorted(columns: Columns, num_clients: int, seed: int) -> list[IntArray]:
    """As the code of Hilmkil et al. 2021 does it: sorted by label, cut in K blocks of N // K; the rest is dropped."""
    size = len(columns.labels) // num_clients
    order = torch.argsort(torch.from_numpy(np.asarray(columns.labels))).numpy()[: size * num_clients]
    return list(order.reshape(num_clients, size))


SPLITS: dict[str, Split] = {
    "iid": iid,
    "by_label": by_label,
    "by_author": by_author,
    "dirichlet": dirichlet,
    "hilmkil_iid": hilmkil_iid,
    "hilmkil_sorted": hilmkil_sorted,
}
_OPTIONS = {"by_author": ("skew",), "dirichlet": ("alpha",)}  # what each registered split takes beyond the three


def divide(split: str | Split, columns: Columns, num_clients: int, seed: int, **options: Any) -> list[IntArray]:
    """Apply a split by name, or any callable (columns, num_clients, seed) -> list of row arrays, and check its result.

    Args:
        options: `skew` and `alpha`; handed to the registered split that takes them.

    Returns:
        `num_clients` arrays of row numbers, disjoint, none empty.

    Raises:
        UsageError: no such split, too many clients, a client without examples, a row given to two clients.
    """
    at_least("num_clients", num_clients, 1)
    if num_clients > len(columns.labels):
        raise UsageError("num_clients", num_clients, f"at most the number of training texts, {len(columns.labels)}")
    if callable(split):
        function, chosen = split, {}
    elif split in SPLITS:
        function, chosen = SPLITS[split], {key: options[key] for key in _OPTIONS.get(split, ())}
    else:
        raise one_of("split", split, SPLITS, also=", or a callable (columns, num_clients, seed) -> row arrays")
    parts = [whole("split", split, "a split into rows", part) for part in function(columns, num_clients, seed, **chosen)]
    if len(parts) != num_clients:
        raise UsageError("split", split, f"a split into {num_clients} clients (it made {len(parts)})")
    empty = [client for client, part in enumerate(parts) if not len(part)]
    if empty:
        raise UsageError("split", split, f"a split that leaves no client without examples (empty: {empty}); use fewer clients")
    rows = np.concatenate(parts)
    if rows.min() < 0 or rows.max() >= len(columns.labels):
        raise UsageError(
            "split", split, f"a split into rows 0 .. {len(columns.labels) - 1} (it gave {rows.min()} .. {rows.max()})"
        )
    if len(np.unique(rows)) != len(rows):
        raise UsageError("split", split, "a split that gives no text to two clients")
    return parts


def entropy_bits(labels: IntArray) -> float:
    """Entropy of a client's label distribution, in bits: 0 with one label, log2 C with C equally frequent ones."""
    shares = np.unique(labels, return_counts=True)[1] / max(len(labels), 1)
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # + 0.0 turns -0.0 into 0.0
