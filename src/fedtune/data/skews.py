"""Splits that are skewed in one chosen way: in labels, in sizes, in lengths, by who wrote a text, or in two of them."""

from __future__ import annotations

import numpy as np

from fedtune.data.contract import IntArray
from fedtune.data.dealing import Columns, at_home, authors_for, by_shares, check_option, groups, none_empty
from fedtune.errors import UsageError
from fedtune.randomness import stream


def shards(columns: Columns, num_clients: int, seed: int, shards_per_client: int = 2) -> list[IntArray]:
    """Sorted by label, cut into shards of equal size, and so many of them dealt to each client at random (McMahan et al. 2017,
    section 3, with two shards a client).

    A client then has few labels: with one shard it is `by_label`, its blocks in random order. Sizes of shards differ by at
    most one, where they cannot be equal.

    Raises:
        UsageError: there are fewer texts than shards.
    """
    check_option("shards_per_client", shards_per_client)
    count, total = len(columns.labels), num_clients * shards_per_client
    if total > count:
        allowed = f"at most {count // num_clients}, with {count} texts for {num_clients} clients"
        raise UsageError("shards_per_client", shards_per_client, allowed)
    rng = stream(seed, "split/shards")
    owners = rng.permutation(total) // shards_per_client
    shuffled = rng.permutation(count)
    client = np.empty(count, dtype=np.int64)
    client[shuffled[np.argsort(columns.labels[shuffled], kind="stable")]] = np.repeat(owners, _even(count, total))
    return groups(client, num_clients)


def quantity(columns: Columns, num_clients: int, seed: int, exponent: float = 1.0, min_size: int = 1) -> list[IntArray]:
    """Sizes by a power law, labels IID: client k (from 0) has `min_size` texts, and of the others a share proportional to
    (k + 1) ** -exponent.

    Exponent 0 gives equal sizes and 1 Zipf's law, with the first client the largest; -1 and -2 are the sizes of the
    LinearPartitioner and the SquarePartitioner of Flower's datasets, with the last client the largest. That a power law
    comes on top of a least size is as in the data of FedProx (Li et al. 2020).

    Raises:
        UsageError: there are too few texts for `min_size` a client; an exponent outside of -10 .. 10.
    """
    check_option("exponent", exponent)
    check_option("min_size", min_size)
    count = len(columns.labels)
    if num_clients * min_size > count:
        raise UsageError("min_size", min_size, f"at most {count // num_clients}, with {count} texts for {num_clients} clients")
    powers = -exponent * np.log(np.arange(1, num_clients + 1))
    shares = np.exp(powers - powers.max())
    wanted = shares / shares.sum() * (count - num_clients * min_size)
    sizes = np.floor(wanted).astype(np.int64)
    largest_rests = np.argsort(sizes - wanted, kind="stable")[: count - num_clients * min_size - sizes.sum()]
    sizes[largest_rests] += 1
    order = stream(seed, "split/quantity").permutation(count)
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes + min_size)[:-1])]


def natural(columns: Columns, num_clients: int, seed: int, min_size: int = 1, small_authors: str = "drop") -> list[IntArray]:
    """One author, one client, in the order of the authors' numbers (as the users of LEAF, Caldas et al. 2018).

    Authors with fewer than `min_size` texts are left out ("drop"), or are the last client together ("pool"), which may have
    fewer texts, too. Nothing is drawn.

    Raises:
        UsageError: num_clients is not the number of clients that there are; no author has `min_size` texts; the task names no
            authors.
    """
    authors = authors_for("natural", columns)
    check_option("min_size", min_size)
    check_option("small_authors", small_authors)
    _, places, counts = np.unique(authors, return_inverse=True, return_counts=True)
    large = counts >= min_size
    if not large.any():
        raise UsageError("min_size", min_size, f"at most {counts.max()}, the texts of the author with the most")
    pool = small_authors == "pool" and not large.all()
    found = int(large.sum()) + pool
    if found != num_clients:
        least = f" with at least {min_size} texts" if min_size > 1 else ""
        others = " and one for all others" if pool else ""
        raise UsageError("num_clients", num_clients, f"{found} with the split natural: one for each author{least}{others}")
    client = np.where(large, np.cumsum(large) - 1, found - 1 if pool else -1)[places]
    kept = np.flatnonzero(client >= 0)
    return [kept[part] for part in groups(client[kept], found)]


def small_authors_said(authors: IntArray, min_size: int = 1, small_authors: str = "drop") -> str:
    """What `natural` does with the authors that have too few texts, in a line; empty where there are none.

    >>> small_authors_said(np.array([0, 0, 1, 2, 2]), 2)
    'split natural: 1 of 3 authors has fewer than 2 texts: 1 of 5 texts is left out'
    """
    counts = np.unique(authors, return_counts=True)[1]
    small = counts[counts < min_size]
    if not len(small):
        return ""
    verbs = ["has" if len(small) == 1 else "have", "is" if small.sum() == 1 else "are"]
    end = "left out" if small_authors == "drop" else "the last client's"
    return (
        f"split natural: {len(small):,} of {len(counts):,} authors {verbs[0]} fewer than {min_size:,} texts: "
        f"{small.sum():,} of {len(authors):,} texts {verbs[1]} {end}"
    )


def by_length(columns: Columns, num_clients: int, seed: int, skew: float = 1.0) -> list[IntArray]:
    """Sorted by length in characters, the shortest first, and cut into blocks of equal size; before that each text leaves its
    place with probability 1 - skew, and those that have left change places at random.

    Skew 0 is IID, skew 1 is sorted; sizes differ by at most one at any skew. (The ContinuousPartitioner of Flower's datasets
    sorts by a number, too; its strictness weighs it against noise, where skew is a share of texts.)

    Raises:
        UsageError: skew is outside 0 .. 1; there are no lengths.
    """
    check_option("skew", skew)
    if columns.lengths is None:
        raise UsageError("split", "by_length", "columns with lengths")
    rng = stream(seed, "split/by_length")
    shuffled = rng.permutation(len(columns.labels))
    order = shuffled[np.argsort(columns.lengths[shuffled], kind="stable")]
    away = np.flatnonzero(rng.random(len(order)) >= skew)
    order[away] = order[rng.permutation(away)]
    return [np.sort(part) for part in np.array_split(order, num_clients)]


def by_author_and_label(columns: Columns, num_clients: int, seed: int, skew: float = 1.0, alpha: float = 0.5) -> list[IntArray]:
    """Skewed in authors and in labels: each text goes to its author's home client (as in `by_author`) with probability `skew`;
    the others are shared out, class by class, by proportions from Dirichlet(alpha) (as in `dirichlet`).

    Skew 1 is `by_author`, skew 0 is `dirichlet`, each with draws of its own. A client that is left empty gets a text of the
    client that has most.

    Raises:
        UsageError: skew is outside 0 .. 1; alpha is not positive; the task names no authors.
    """
    authors = authors_for("by_author_and_label", columns)
    check_option("skew", skew)
    check_option("alpha", alpha)
    rng = stream(seed, "split/by_author_and_label")
    client = at_home(authors, num_clients, rng)
    away = np.flatnonzero(rng.random(len(client)) >= skew)
    client[away] = by_shares(columns.labels[away], num_clients, alpha, rng)
    return groups(none_empty(client, num_clients, rng), num_clients)


def _even(count: int, parts: int) -> IntArray:
    """(parts,) sizes that differ by at most one, of `count` in all."""
    return count // parts + (np.arange(parts) < count % parts)
