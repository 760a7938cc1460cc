"""How texts are divided among clients: pure functions of (columns, num_clients, seed), and the registry `SPLITS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedtune.data.contract import IntArray, whole
from fedtune.data.dealing import Columns as Columns
from fedtune.data.dealing import Split as Split
from fedtune.data.dealing import at_home, authors_for, by_shares, check_option, groups, none_empty
from fedtune.data.skews import by_author_and_label, by_length, natural, quantity, shards
from fedtune.errors import UsageError, at_least, one_of, shown
from fedtune.randomness import stream

_DRAWS = 100  # attempts of a Dirichlet split
_HOPELESS = 30  # empty clients in one draw; where there are so many, the chance that none is in a later one is nil


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
    one author, authors with more texts have more home clients, and these share the author's texts evenly. A client that is
    left empty gets a text of the client that has most.

    Raises:
        UsageError: the task names no authors, or skew is outside 0 .. 1.
    """
    authors = authors_for("by_author", columns)
    check_option("skew", skew)
    rng = stream(seed, "split/by_author")
    client = at_home(authors, num_clients, rng)
    away = rng.random(len(client)) >= skew
    client[away] = rng.integers(num_clients, size=int(away.sum()))
    return groups(none_empty(client, num_clients, rng), num_clients)


def dirichlet(columns: Columns, num_clients: int, seed: int, alpha: float = 0.5) -> list[IntArray]:
    """The texts of every class are shared out by proportions from Dirichlet(alpha) (Hsu et al. 2019, by class).

    A small alpha gives each client few classes, a large one is IID where classes have more texts than there are clients (of
    smaller classes each gives its texts to much the same clients). A draw that leaves a client empty is drawn again, up to
    100 times, or until a draw leaves more than 30 empty; in the last draw each client that is empty gets a text of the
    client that has most.

    Raises:
        UsageError: alpha is not positive.
    """
    check_option("alpha", alpha)
    rng = stream(seed, "split/dirichlet")
    for _ in range(_DRAWS):
        client = by_shares(columns.labels, num_clients, alpha, rng, offset=0.5)
        empty = num_clients - np.count_nonzero(np.bincount(client))
        if not empty or empty > _HOPELESS:
            break
    return groups(none_empty(client, num_clients, rng), num_clients)


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
    "shards": shards,
    "dirichlet": dirichlet,
    "quantity": quantity,
    "by_author": by_author,
    "natural": natural,
    "by_author_and_label": by_author_and_label,
    "by_length": by_length,
    "hilmkil_iid": hilmkil_iid,
    "hilmkil_sorted": hilmkil_sorted,
}
# what each registered split takes beyond the three
_OPTIONS = {
    "shards": ("shards_per_client",),
    "dirichlet": ("alpha",),
    "quantity": ("exponent", "min_size"),
    "by_author": ("skew",),
    "natural": ("min_size", "small_authors"),
    "by_author_and_label": ("skew", "alpha"),
    "by_length": ("skew",),
}
# the options of all splits; with None the split's own default
DEFAULTS: dict[str, Any] = {
    "skew": 1.0,
    "alpha": 0.5,
    "shards_per_client": None,
    "exponent": None,
    "min_size": None,
    "small_authors": None,
}
# splits that look at labels
OF_LABELS = ("by_label", "shards", "dirichlet", "by_author_and_label", "hilmkil_sorted")
# splits that give a single client all texts, in one order
WHOLE = ("iid", "by_label", "shards", "dirichlet", "quantity", "by_author", "by_author_and_label", "by_length")


def options_of(split: str | Split, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of some options those that a split takes, where they are given."""
    taken = _OPTIONS.get(split, ()) if isinstance(split, str) else ()
    return {name: options[name] for name in taken if options.get(name) is not None}


def check_options(split: str | Split, options: Mapping[str, Any]) -> list[str]:
    """Check the options that a split takes.

    Returns:
        a line for each option that has another value than its default, and that the split does not take.

    Raises:
        UsageError: a value that an option cannot have.
    """
    taken = options_of(split, options)
    given = {name: options.get(name) for name in DEFAULTS}
    for name, value in taken.items():
        check_option(name, value)
    named = shown(split).strip("'") if isinstance(split, str) else getattr(split, "__name__", "of your own")
    return [
        f"{name} {shown(value)} has no effect with the split {named}: it is for "
        + ", ".join(other for other in SPLITS if name in _OPTIONS.get(other, ()))
        for name, value in given.items()
        if name not in taken and value is not None and value != DEFAULTS[name]
    ]


def divide(split: str | Split, columns: Columns, num_clients: int, seed: int, **options: Any) -> list[IntArray]:
    """Apply a split by name, or any callable (columns, num_clients, seed) -> list of row arrays, and check its result.

    Args:
        options: what registered splits take beyond the three, by name; each is handed those that it takes.

    Returns:
        `num_clients` arrays of row numbers, disjoint, none empty.

    Raises:
        UsageError: no such split, too many clients, a client without examples, a row given to two clients.
    """
    at_least("num_clients", num_clients, 1)
    if num_clients > len(columns.labels):
        raise UsageError("num_clients", num_clients, f"at most the number of training texts, {len(columns.labels)}")
    if not callable(split) and split not in SPLITS:
        raise one_of("split", split, SPLITS, also=", or a callable (columns, num_clients, seed) -> row arrays")
    function = split if callable(split) else SPLITS[split]
    found = function(columns, num_clients, seed, **options_of(split, options))
    return _checked(
        split, [whole("split", split, "a split into rows", part) for part in found], num_clients, len(columns.labels)
    )


def _checked(split: str | Split, parts: list[IntArray], num_clients: int, count: int) -> list[IntArray]:
    """The parts of `count` texts; `UsageError` where they are not what a split has to give."""
    if len(parts) != num_clients:
        raise UsageError("split", split, f"a split into {num_clients} clients (it made {len(parts)})")
    empty = [client for client, part in enumerate(parts) if not len(part)]
    if empty:
        listed = f"{shown(empty[:5])[:-1]}, ... {len(empty)} in all]" if len(empty) > 5 else shown(empty)
        raise UsageError("split", split, f"a split that leaves no client without examples (empty: {listed}); use fewer clients")
    rows = np.concatenate(parts)
    if rows.min() < 0 or rows.max() >= count:
        raise UsageError("split", split, f"a split into rows 0 .. {count - 1} (it gave {rows.min()} .. {rows.max()})")
    if len(np.unique(rows)) != len(rows):
        raise UsageError("split", split, "a split that gives no text to two clients")
    return parts


def entropy_bits(labels: IntArray) -> float:
    """Entropy of a client's label distribution, in bits: 0 with one label, log2 C with C equally frequent ones."""
    shares = np.unique(labels, return_counts=True)[1] / max(len(labels), 1)
    return float(-(shares * np.log2(shares)).sum()) + 0.0  # + 0.0 turns -0.0 into 0.0
