from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.splits import SPLITS, Columns, by_author, divide, entropy_bits
from fedtune.errors import UsageError


@st.composite
def problems(draw: st.DrawFn) -> tuple[Columns, int, int]:
    texts = draw(st.integers(2, 200))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    columns = Columns(rng.integers(draw(st.integers(1, 5)), size=texts), rng.integers(draw(st.integers(1, 12)), size=texts))
    return columns, draw(st.integers(1, min(texts, 20))), draw(st.integers(0, 1000))


OPTIONS = {"by_author": {"skew": 0.5}, "dirichlet": {"alpha": 0.7}}


@pytest.mark.parametrize("name", [name for name in SPLITS if not name.startswith("hilmkil")])
@given(problem=problems())
@settings(deadline=None, max_examples=60)
def test_every_split_gives_each_text_to_exactly_one_client(name: str, problem: tuple[Columns, int, int]) -> None:
    columns, clients, seed = problem
    try:
        parts = SPLITS[name](columns, clients, seed, **OPTIONS.get(name, {}))
    except UsageError as error:
        if name == "dirichlet" and "left one empty" in str(error):  # the only split that may not find one
            return
        raise
    assert len(parts) == clients
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(columns.labels)))


@pytest.mark.parametrize("name", [name for name in SPLITS if not name.startswith("hilmkil")])
def test_same_seed_same_parts_and_another_seed_other_parts(name: str) -> None:
    rng = np.random.default_rng(0)
    columns = Columns(rng.integers(4, size=300), rng.integers(9, size=300))
    one, same, other = (SPLITS[name](columns, 5, seed, **OPTIONS.get(name, {})) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@given(problem=problems())
@settings(deadline=None, max_examples=60)
def test_split_by_author_keeps_each_author_whole_at_full_skew(problem: tuple[Columns, int, int]) -> None:
    columns, clients, seed = problem
    assert columns.authors is not None
    clients = min(clients, len(np.unique(columns.authors)))
    parts = by_author(columns, clients, seed, skew=1.0)
    homes = [set(columns.authors[part]) for part in parts]
    assert all(homes)  # nobody is left empty
    assert sum(map(len, homes)) == len(set().union(*homes))


def test_split_by_author_at_skew_zero_is_iid() -> None:
    columns = Columns(np.zeros(8000, dtype=int), np.repeat(np.arange(8), 1000))
    for part in by_author(columns, 4, seed=0, skew=0.0):
        shares = np.bincount(columns.authors[part], minlength=8) / len(part)
        assert abs(len(part) - 2000) < 200  # five standard deviations
        assert np.abs(shares - 1 / 8).max() < 0.04


def test_skew_is_the_probability_of_going_home() -> None:
    columns = Columns(np.zeros(8000, dtype=int), np.repeat(np.arange(4), 2000))
    parts = by_author(columns, 4, seed=1, skew=0.6)
    homes = [np.bincount(columns.authors[part], minlength=4).max() for part in parts]
    assert abs(sum(homes) / 8000 - (0.6 + 0.4 / 4)) < 0.03


def test_author_sizes_stay_as_even_as_whole_authors_allow() -> None:
    columns = Columns(np.zeros(210, dtype=int), np.repeat(np.arange(6), [60, 50, 40, 30, 20, 10]))
    assert sorted(map(len, by_author(columns, 3, seed=0))) == [70, 70, 70]


def test_more_clients_than_authors_share_an_author_evenly() -> None:
    columns = Columns(np.zeros(300, dtype=int), np.repeat(np.arange(2), [200, 100]))
    parts = by_author(columns, 6, seed=0)
    assert sorted(map(len, parts)) == [50] * 6
    assert all(len(set(columns.authors[part])) == 1 for part in parts)


def test_by_label_cuts_the_sorted_labels_into_blocks() -> None:
    columns = Columns(np.random.default_rng(0).permutation(np.repeat(np.arange(4), 25)))
    assert [set(columns.labels[part]) for part in divide("by_label", columns, 4, seed=0)] == [{0}, {1}, {2}, {3}]


def test_dirichlet_is_skewed_for_small_alpha_and_even_for_large() -> None:
    columns = Columns(np.repeat(np.arange(4), 500))

    def entropy(alpha: float) -> float:
        return float(np.mean([entropy_bits(columns.labels[p]) for p in divide("dirichlet", columns, 5, 0, alpha=alpha)]))

    assert entropy(0.2) < 1.5 < 1.95 < entropy(100.0)


def test_a_callable_is_a_split() -> None:
    columns = Columns(np.zeros(6, dtype=int))
    parts = divide(lambda columns, clients, seed: np.split(np.arange(6), clients), columns, 2, 0)
    assert [part.tolist() for part in parts] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "by_autor"}, "by_author (nearest)"),
        ({"num_clients": 0}, "num_clients: got 0; allowed: 1 or more"),
        ({"num_clients": 11}, "at most the number of training texts, 10"),
        ({"split": "by_author", "skew": 1.5}, "skew: got 1.5; allowed: a probability between 0 and 1"),
        ({"split": "dirichlet", "alpha": 0.0}, "alpha: got 0.0; allowed: a number above 0"),
        ({"split": lambda columns, clients, seed: [np.arange(10), np.arange(0)]}, "empty: [1]"),
        ({"split": lambda columns, clients, seed: [np.arange(6), np.arange(5, 10)]}, "no text to two clients"),
        ({"split": lambda columns, clients, seed: [np.arange(10)]}, "it made 1"),
    ],
)
def test_a_split_that_cannot_be_says_what_came_and_what_is_allowed(options: dict, said: str) -> None:
    columns = Columns(np.arange(10) % 2, np.arange(10) % 3)
    arguments = {"split": "iid", "num_clients": 2, "seed": 0, "skew": 1.0, "alpha": 0.5} | options
    with pytest.raises(UsageError) as caught:
        divide(columns=columns, **arguments)
    assert said in str(caught.value)


def test_by_author_without_authors_is_refused() -> None:
    with pytest.raises(UsageError, match="names its authors"):
        divide("by_author", Columns(np.arange(10) % 2), 2, 0, skew=1.0, alpha=0.5)


def test_entropy_is_in_bits() -> None:
    assert entropy_bits(np.array([3, 3, 3])) == 0.0
    assert entropy_bits(np.arange(8)) == pytest.approx(3.0)


@pytest.mark.parametrize("name", ["hilmkil_iid", "hilmkil_sorted"])
def test_the_papers_splits_give_equal_shares_and_drop_the_rest(name: str) -> None:
    labels = np.random.default_rng(0).integers(3, size=103)
    parts = divide(name, Columns(labels), 4, seed=0)
    assert [len(part) for part in parts] == [25] * 4
    assert all(np.array_equal(a, b) for a, b in zip(parts, divide(name, Columns(labels), 4, seed=9), strict=True))
    in_order = np.concatenate(parts)
    if name == "hilmkil_sorted":
        assert (np.diff(labels[in_order]) >= 0).all()
    else:
        subset = torch.utils.data.Subset(range(103), range(100))
        expected = torch.utils.data.random_split(subset, [25] * 4, generator=torch.Generator())
        assert [part.tolist() for part in parts] == [list(part) for part in expected]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([[0, 1], [2, -1]], "a split into rows 0 .. 5"),
        ([[0, 1], [2, 6]], "a split into rows 0 .. 5 (it gave 0 .. 6)"),
        ([[0.5, 1.5], [2.0, 3.0]], "a split into rows that are whole numbers"),
        ([np.arange(6) < 3, np.arange(6) >= 3], "a split into rows that are whole numbers"),
    ],
)
def test_rows_that_a_split_gives_are_row_numbers(parts: list, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        divide(lambda *_: parts, Columns(np.arange(6) % 2), 2, 0)
    assert said in str(caught.value)


@pytest.mark.parametrize("option", [{"skew": "1"}, {"skew": float("nan")}, {"alpha": "1"}, {"alpha": float("inf")}])
def test_options_of_splits_are_numbers(option: dict) -> None:
    (name,) = option
    with pytest.raises(UsageError, match=f"{name}: got"):
        divide({"skew": "by_author", "alpha": "dirichlet"}[name], Columns(np.arange(6) % 2, np.arange(6) % 3), 2, 0, **option)
