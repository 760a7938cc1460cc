from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.data.skews import small_authors_said
from fedtune.data.splits import DEFAULTS, SPLITS, WHOLE, Columns, by_author, check_options, divide, entropy_bits
from fedtune.errors import UsageError


@st.composite
def problems(draw: st.DrawFn) -> tuple[Columns, int, int]:
    texts = draw(st.integers(2, 200))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels, authors, lengths = (rng.integers(draw(st.integers(1, most)), size=texts) for most in (5, 12, 30))
    return Columns(labels, authors, lengths), draw(st.integers(1, min(texts, 20))), draw(st.integers(0, 1000))


OPTIONS = {
    "by_author": {"skew": 0.5},
    "dirichlet": {"alpha": 0.7},
    "shards": {"shards_per_client": 2},
    "quantity": {"exponent": 1.0},
    "by_length": {"skew": 0.5},
    "by_author_and_label": {"skew": 0.5, "alpha": 0.3},
}
CHECKED = [name for name in SPLITS if not name.startswith("hilmkil")]
SHARED = [name for name in CHECKED if name != "natural"]  # for any number of clients


def contents(columns: Columns, parts: list[np.ndarray]) -> list[list[tuple[int, ...]]]:
    """For each client the labels, authors and lengths of its texts, in no order."""
    table = np.stack([column for column in columns if column is not None], axis=1)
    return [sorted(map(tuple, table[part].tolist())) for part in parts]


@pytest.mark.parametrize("name", CHECKED)
@given(problem=problems())
@settings(deadline=None, max_examples=60)
def test_every_split_gives_each_text_to_exactly_one_client_and_leaves_none_empty(
    name: str, problem: tuple[Columns, int, int]
) -> None:
    columns, clients, seed = problem
    clients = len(np.unique(columns.authors)) if name == "natural" else clients
    clients = min(clients, len(columns.labels) // 2) if name == "shards" else clients
    options = OPTIONS.get(name, {})
    parts = SPLITS[name](columns, clients, seed, **options)
    assert len(parts) == clients
    assert all(map(len, parts))
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(columns.labels)))
    again = divide(name, columns, clients, seed, **options)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


@given(problem=problems(), alpha=st.floats(1e-300, 1e6), skew=st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_no_strength_of_skew_leaves_a_client_empty(problem: tuple[Columns, int, int], alpha: float, skew: float) -> None:
    columns, clients, seed = problem
    for name in ("dirichlet", "by_author", "by_author_and_label", "by_length"):
        parts = divide(name, columns, clients, seed, skew=skew, alpha=alpha)
        assert sum(map(len, parts)) == len(columns.labels)


@pytest.mark.parametrize("name", SHARED)
def test_same_seed_same_parts_and_another_seed_other_parts(name: str) -> None:
    rng = np.random.default_rng(0)
    columns = Columns(*(rng.integers(most, size=300) for most in (4, 9, 40)))
    one, same, other = (SPLITS[name](columns, 5, seed, **OPTIONS.get(name, {})) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", SHARED)
def test_a_single_client_has_all_texts_in_their_order(name: str) -> None:
    assert name in WHOLE
    columns = Columns(*(np.random.default_rng(0).integers(most, size=30) for most in (4, 9, 40)))
    (part,) = divide(name, columns, 1, 0)
    np.testing.assert_array_equal(part, np.arange(30))


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


@given(problem=problems(), each=st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_a_client_has_no_more_labels_than_its_shards_can_cross(problem: tuple[Columns, int, int], each: int) -> None:
    columns, clients, seed = problem
    clients = min(clients, len(columns.labels) // each) or 1
    each = min(each, len(columns.labels) // clients)
    parts = divide("shards", columns, clients, seed, shards_per_client=each)
    assert max(map(len, parts)) - min(map(len, parts)) <= each
    changes = sum(len(np.unique(columns.labels[part])) for part in parts) - clients * each
    assert changes <= len(np.unique(columns.labels)) - 1  # a shard has one label, but for the places where one ends


def test_with_one_shard_a_client_has_a_block_of_by_label() -> None:
    columns = Columns(np.random.default_rng(0).permutation(np.repeat(np.arange(4), 25)))
    shards, blocks = (contents(columns, divide(name, columns, 10, 0, shards_per_client=1)) for name in ("shards", "by_label"))
    assert sorted(shards) == sorted(blocks)
    assert shards != blocks  # dealt at random


def test_with_a_shard_for_each_text_shards_are_iid() -> None:
    columns = Columns(np.repeat(np.arange(4), 2000))
    for part in divide("shards", columns, 8, 0, shards_per_client=1000):
        assert np.abs(np.bincount(columns.labels[part], minlength=4) - 250).max() < 70


@given(problem=problems(), exponent=st.floats(-10, 10), least=st.integers(1, 10))
@settings(deadline=None, max_examples=100)
def test_sizes_by_a_power_law_are_what_was_promised(problem: tuple[Columns, int, int], exponent: float, least: int) -> None:
    columns, clients, seed = problem
    least = min(least, len(columns.labels) // clients)
    sizes = np.array([len(part) for part in divide("quantity", columns, clients, seed, exponent=exponent, min_size=least)])
    shares = np.arange(1, clients + 1) ** -exponent
    wanted = least + shares / shares.sum() * (len(columns.labels) - clients * least)
    assert sizes.sum() == len(columns.labels)
    assert sizes.min() >= least
    assert np.abs(sizes - wanted).max() < 1 + 1e-9


def test_the_exponents_that_have_names() -> None:
    def sizes(exponent: float, texts: int, clients: int) -> list[int]:
        columns = Columns(np.zeros(texts + clients, dtype=int))  # one more for each is the least size
        return [len(part) - 1 for part in divide("quantity", columns, clients, 0, exponent=exponent)]

    assert sizes(0, 12, 4) == [3, 3, 3, 3]
    assert sizes(1, 1100, 3) == [600, 300, 200]  # Zipf
    assert sizes(-1, 10, 4) == [1, 2, 3, 4]  # linear
    assert sizes(-2, 30, 4) == [1, 4, 9, 16]  # square


def test_labels_are_iid_whatever_the_sizes() -> None:
    columns = Columns(np.repeat(np.arange(2), 5000))
    first, *_ = divide("quantity", columns, 4, 0, exponent=1.0)
    assert abs(columns.labels[first].mean() - 0.5) < 0.04


@given(problem=problems(), least=st.integers(1, 25), what=st.sampled_from(["drop", "pool"]))
@settings(deadline=None, max_examples=100)
def test_naturally_an_author_is_a_client(problem: tuple[Columns, int, int], least: int, what: str) -> None:
    columns, _, seed = problem
    names, counts = np.unique(columns.authors, return_counts=True)
    large = names[counts >= least]
    pooled = what == "pool" and len(large) < len(names)
    options = {"min_size": least, "small_authors": what}
    said = small_authors_said(columns.authors, **options)
    assert bool(said) == (len(large) < len(names))
    if not len(large):
        with pytest.raises(UsageError, match=f"min_size: got {least}; allowed: at most {counts.max()}, the texts"):
            divide("natural", columns, 1, seed, **options)
        return
    clients = len(large) + pooled
    parts = divide("natural", columns, clients, seed, **options)
    assert [set(columns.authors[part]) for part in parts[: len(large)]] == [{name} for name in large]
    assert sum(map(len, parts)) == (len(columns.labels) if pooled else counts[counts >= least].sum())
    if pooled:
        assert set(columns.authors[parts[-1]]) == set(names[counts < least])
    if clients < len(columns.labels):
        with pytest.raises(UsageError, match=f"num_clients: got {clients + 1}; allowed: {clients} with the split natural"):
            divide("natural", columns, clients + 1, seed, **options)


@pytest.mark.parametrize(
    ("least", "what", "said"),
    [
        (1, "drop", ""),
        (2, "drop", "split natural: 1 of 3 authors has fewer than 2 texts: 1 of 6 texts is left out"),
        (3, "pool", "split natural: 2 of 3 authors have fewer than 3 texts: 3 of 6 texts are the last client's"),
    ],
)
def test_what_becomes_of_small_authors_is_said(least: int, what: str, said: str) -> None:
    assert small_authors_said(np.array([0, 0, 0, 1, 1, 2]), least, what) == said


@given(problem=problems(), skew=st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_by_length_has_equal_sizes_and_is_sorted_at_full_skew(problem: tuple[Columns, int, int], skew: float) -> None:
    columns, clients, seed = problem
    sizes = [len(part) for part in divide("by_length", columns, clients, seed, skew=skew)]
    assert max(sizes) - min(sizes) <= 1
    assert columns.lengths is not None
    lengths = [columns.lengths[part] for part in divide("by_length", columns, clients, seed, skew=1.0)]
    assert all(one.max() <= other.min() for one, other in itertools.pairwise(lengths))


def test_by_length_goes_from_iid_to_sorted() -> None:
    columns = Columns(np.zeros(8000, dtype=int), None, np.random.default_rng(1).permutation(8000))

    def means(skew: float) -> np.ndarray:
        return np.array([columns.lengths[part].mean() for part in divide("by_length", columns, 4, 0, skew=skew)])

    assert np.abs(means(0.0) - 3999.5).max() < 200  # four standard errors
    assert np.abs(means(1.0) - [999.5, 2999.5, 4999.5, 6999.5]).max() == 0
    assert np.abs(means(0.5) - [2499.5, 3499.5, 4499.5, 5499.5]).max() < 200


@pytest.mark.parametrize("name", ["shards", "by_label", "by_length", "quantity", "natural"])
def test_the_order_of_rows_does_not_matter_where_texts_are_sorted(name: str) -> None:
    rng = np.random.default_rng(0)
    labels, lengths = np.repeat(np.arange(6), 20), np.arange(120)
    options = {"shards_per_client": 1, "skew": 1.0}
    found = []
    for order in (np.arange(120), rng.permutation(120)):
        columns = Columns(labels[order], labels[order], lengths[order] if name == "by_length" else None)
        found.append(contents(columns, divide(name, columns, 6, 0, **options)))
    if name == "quantity":
        assert [len(one) for one in found[0]] == [len(one) for one in found[1]]
    else:
        assert found[0] == found[1]


@given(problem=problems())
@settings(deadline=None, max_examples=60)
def test_author_and_label_together_are_by_author_at_full_skew(problem: tuple[Columns, int, int]) -> None:
    columns, clients, seed = problem
    clients = min(clients, len(np.unique(columns.authors)))
    one, other = (divide(name, columns, clients, seed, skew=1.0, alpha=0.1) for name in ("by_author_and_label", "by_author"))
    assert contents(columns, one) == contents(columns, other)


def test_author_and_label_together_have_each_strength() -> None:
    rng = np.random.default_rng(0)
    columns = Columns(rng.integers(4, size=20_000), np.repeat(np.arange(5), 4000))

    def held(skew: float, alpha: float) -> tuple[float, float]:
        """The share of texts that are at home, and the mean entropy of labels in bits."""
        parts = divide("by_author_and_label", columns, 5, 0, skew=skew, alpha=alpha)
        home = sum(np.bincount(columns.authors[part], minlength=5).max() for part in parts) / 20_000
        return home, float(np.mean([entropy_bits(columns.labels[part]) for part in parts]))

    assert held(0.0, 1e6) == pytest.approx((0.2, 2.0), abs=0.02)
    assert held(0.6, 1e6) == pytest.approx((0.6 + 0.4 / 5, 2.0), abs=0.02)
    home, entropy = held(0.0, 0.1)
    assert entropy < 1.2
    assert home < 0.3
    assert entropy < held(0.5, 0.1)[1] < 1.95


def test_away_from_home_small_classes_go_to_all_clients() -> None:
    columns = Columns(np.repeat(np.arange(200), 10), np.zeros(2000, dtype=int))
    sizes = [len(part) for part in divide("by_author_and_label", columns, 40, 0, skew=0.0, alpha=1e6)]
    assert min(sizes) > 10  # with the same ten clients in each class thirty would have one text


def test_an_empty_client_gets_a_text_of_the_fullest() -> None:
    columns = Columns(np.zeros(40, dtype=int))
    parts = divide("dirichlet", columns, 5, 0, alpha=1e-9)
    assert sorted(map(len, parts)) == [1, 1, 1, 1, 36]


def test_a_hopeless_dirichlet_draw_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.data import splits

    drawn = []
    by_shares = splits.by_shares
    monkeypatch.setattr(splits, "by_shares", lambda *given, **named: drawn.append(1) or by_shares(*given, **named))
    for clients, draws in ((32, 1), (30, 100)):
        drawn.clear()
        divide("dirichlet", Columns(np.zeros(100, dtype=int)), clients, 0, alpha=1e-9)
        assert len(drawn) == draws


def test_what_is_empty_is_named_in_one_short_line() -> None:
    columns = Columns(np.zeros(20_000, dtype=int))
    with pytest.raises(UsageError) as caught:
        divide(lambda *_: [np.arange(20_000), *[np.arange(0)] * 9999], columns, 10_000, 0)
    assert str(caught.value).endswith("(empty: [1, 2, 3, 4, 5, ... 9999 in all]); use fewer clients")


@pytest.mark.parametrize(
    ("split", "options", "said"),
    [
        ("shards", {"shards_per_client": 6}, "shards_per_client: got 6; allowed: at most 5, with 10 texts for 2 clients"),
        ("shards", {"shards_per_client": 0}, "shards_per_client: got 0; allowed: 1 or more"),
        ("shards", {"shards_per_client": 1.5}, "shards_per_client: got 1.5; allowed: a whole number, 1 or more"),
        ("quantity", {"min_size": 6}, "min_size: got 6; allowed: at most 5, with 10 texts for 2 clients"),
        ("quantity", {"min_size": True}, "min_size: got True; allowed: a whole number, 1 or more"),
        ("quantity", {"exponent": float("nan")}, "exponent: got nan; allowed: a number between -10 and 10"),
        ("quantity", {"exponent": "1"}, "exponent: got '1'; allowed: a number between -10 and 10"),
        ("natural", {}, "num_clients: got 2; allowed: 3 with the split natural: one for each author"),
        (
            "natural",
            {"min_size": 4, "small_authors": "pool", "num_clients": 3},
            "num_clients: got 3; allowed: 2 with the split",
        ),
        ("natural", {"small_authors": "keep"}, "small_authors: got 'keep'; allowed: drop, pool"),
        ("by_length", {"skew": -0.1}, "skew: got -0.1; allowed: a probability between 0 and 1"),
        ("by_length", {"lengths": None}, "split: got 'by_length'; allowed: columns with lengths"),
        ("by_author_and_label", {"alpha": 0}, "alpha: got 0; allowed: a number above 0"),
        ("by_author_and_label", {"skew": 2}, "skew: got 2; allowed: a probability between 0 and 1"),
        ("by_author_and_label", {"skew": 0, "alpha": 1e308}, "alpha: got 1e+308; allowed: a number whose Dirichlet"),
        ("natural", {"authors": None}, "split: got 'natural'; allowed: a task that names its authors"),
        ("by_author_and_label", {"authors": None}, "split: got 'by_author_and_label'; allowed: a task that names its authors"),
    ],
)
def test_a_skew_that_cannot_be_is_refused_in_one_line(split: str, options: dict, said: str) -> None:
    given = {"authors": np.arange(10) % 3, "lengths": np.arange(10), "num_clients": 2} | options
    columns = Columns(np.arange(10) % 2, given.pop("authors"), given.pop("lengths"))
    with pytest.raises(UsageError) as caught:
        divide(split, columns, seed=0, **given)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_an_option_that_the_split_does_not_take_is_said() -> None:
    assert check_options("iid", DEFAULTS) == []
    assert check_options("by_length", {"skew": 0.3}) == []
    assert check_options("iid", {"alpha": 0.3, "min_size": 2}) == [
        "alpha 0.3 has no effect with the split iid: it is for dirichlet, by_author_and_label",
        "min_size 2 has no effect with the split iid: it is for quantity, natural",
    ]
    (line,) = check_options(lambda columns, clients, seed: [], {"shards_per_client": 2})
    assert "it is for shards" in line
    with pytest.raises(UsageError, match="small_authors: got 'pol'"):
        check_options("natural", {"small_authors": "pol"})
