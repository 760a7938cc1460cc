"""Exact sums: what they give, bit for bit, in any order; the judge computes with fractions."""

from __future__ import annotations

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.algorithms.fedavg import Mean
from fedtune.errors import RunError, UsageError
from fedtune.federated.agreement import RunningAgreement
from fedtune.federated.pieces import Pieces, moved
from fedtune.federated.sums import ExactSum, grid_bits

MOST = 4_000
VALUES = st.lists(st.floats(-8, 8, width=32), min_size=3, max_size=3)
CONTRIBUTIONS = st.lists(st.tuples(VALUES, st.integers(1, 500)), min_size=1, max_size=8)
Contribution = tuple[list[float], int]


def update(tensors: dict[str, torch.Tensor]) -> dict[str, Pieces]:
    return {"update": Pieces(tensors)}


def mean_of(contributions: list[Contribution], limit: float = 8.0, most: int = MOST) -> torch.Tensor:
    """The new fp32 weights of a server whose weights are zero."""
    total = ExactSum(lambda group: limit, most)
    for values, weight in contributions:
        total.add(update({"w": torch.tensor(values)}), weight)
    return moved({"w": torch.zeros(len(contributions[0][0]))}, Pieces(total.mean()["update"]))["w"]


def exact_mean(contributions: list[Contribution], place: int, bits: int) -> Fraction:
    on_grid = [round(Fraction(values[place]) * 2**bits) for values, _ in contributions]  # ties to even
    total = sum(weight for _, weight in contributions)
    return Fraction(sum(value * weight for value, (_, weight) in zip(on_grid, contributions, strict=True)), total * 2**bits)


def nearest(exact: Fraction) -> np.float32:
    """The fp32 number nearest to a fraction; of two, the even one."""
    guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(side), dtype=np.float32) for side in (-np.inf, np.inf)]
    return min([guess, *near], key=lambda one: (abs(Fraction(float(one)) - exact), int(one.view(np.uint32)) & 1))


@given(CONTRIBUTIONS)
@settings(deadline=None)
def test_the_mean_is_the_correctly_rounded_one(contributions: list[Contribution]) -> None:
    found = mean_of(contributions)
    for place in range(3):
        assert found[place].item() == nearest(exact_mean(contributions, place, grid_bits(8.0, MOST)))


@given(CONTRIBUTIONS, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_any_order_gives_the_same_bits(contributions: list[Contribution], random: Any) -> None:
    shuffled = random.sample(contributions, len(contributions))
    assert torch.equal(mean_of(contributions), mean_of(shuffled))


class Together:
    """Workers as threads: one sees what all have brought."""

    def __init__(self, count: int) -> None:
        self._barrier, self._brought, self.count = threading.Barrier(count), {}, count

    def _all(self, worker: int, brought: Any) -> list[Any]:
        self._barrier.wait()
        self._brought[worker] = brought
        self._barrier.wait()
        return [self._brought[number] for number in range(self.count)]

    def worker(self, number: int) -> Any:
        def gather(values: list[Any]) -> list[Any]:
            return [value for values_ in self._all(number, values) for value in values_]

        def add_up_(tensors: list[torch.Tensor]) -> None:
            everybody = self._all(number, [tensor.clone() for tensor in tensors])
            for tensor, *shares in zip(tensors, *everybody, strict=True):
                tensor.copy_(torch.stack(shares).sum(0))

        return SimpleNamespace(gather=gather, add_up_=add_up_)


def mean_over_workers(sums: list[ExactSum]) -> Any:
    together = Together(len(sums))
    with ThreadPoolExecutor(len(sums)) as threads:
        one, *others = threads.map(lambda number: sums[number].mean(together.worker(number)), range(len(sums)))
    assert all(torch.equal(one["update"]["w"], other["update"]["w"]) for other in others)
    return one


@given(CONTRIBUTIONS, st.lists(st.integers(0, 3), min_size=8, max_size=8))
@settings(deadline=None)
def test_any_grouping_into_workers_gives_the_same_bits(contributions: list[Contribution], workers: list[int]) -> None:
    sums = [ExactSum(lambda group: 8.0, MOST) for _ in range(4)]
    for contribution, worker in zip(contributions, workers, strict=False):
        sums[worker].add(update({"w": torch.tensor(contribution[0])}), contribution[1])
    found = moved({"w": torch.zeros(3)}, Pieces(mean_over_workers(sums)["update"]))["w"]
    assert torch.equal(found, mean_of(contributions))


@given(VALUES, st.lists(st.integers(1, 500), min_size=1, max_size=8))
@settings(deadline=None)
def test_a_lone_contribution_and_equal_ones_come_back_exactly(values: list[float], weights: list[int]) -> None:
    bits = grid_bits(8.0, MOST)
    on_grid = [float(round(Fraction(value) * 2**bits)) / 2**bits for value in values]
    found = mean_of([(values, weight) for weight in weights])
    assert torch.equal(found, torch.tensor(on_grid))
    for value, exact in zip(values, on_grid, strict=True):
        assert value == exact or abs(value - exact) <= 2.0 ** -(bits + 1) < 1e-13
        assert value == exact or abs(value) < 2.0 ** (24 - bits)  # all larger fp32 numbers are on the grid


@given(CONTRIBUTIONS, st.integers(2, 8))
@settings(deadline=None)
def test_only_the_ratio_of_the_weights_matters(contributions: list[Contribution], factor: int) -> None:
    multiplied = [(values, weight * factor) for values, weight in contributions]
    assert torch.equal(mean_of(contributions, most=32_000), mean_of(multiplied, most=32_000))


def test_the_largest_values_do_not_overflow_however_heavy_they_are() -> None:
    for most in (1, 2, 3, 1000, 2**24):
        assert mean_of([([8.0, -8.0, 0.0], most)], most=most).tolist() == [8.0, -8.0, 0.0]
    assert mean_of([([64.0, -64.0, 1e-3], 7)], limit=64.0, most=7).tolist() == pytest.approx([64.0, -64.0, 1e-3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_other_types_are_added_in_fp64(dtype: torch.dtype) -> None:
    total = ExactSum(lambda group: 8.0, 3)
    for value, weight in ((0.75, 1), (-0.5, 2)):
        total.add(update({"w": torch.tensor([value], dtype=dtype)}), weight)
    mean = total.mean()["update"]["w"]
    assert (mean.dtype, mean.item()) == (torch.float64, -1 / 12)


def embedding(seed: int, rows: int = 3) -> torch.Tensor:
    """(40, 5) with few rows that are not zeros."""
    rng = np.random.default_rng(seed)
    found = torch.zeros(40, 5)
    found[rng.permutation(40)[:rows].tolist()] = torch.from_numpy(rng.normal(size=(rows, 5)).astype(np.float32))
    return found


@pytest.mark.parametrize("block", [3, 7, 2**17])
@pytest.mark.parametrize("tall", [1, 2**20])
def test_pieces_of_any_size_with_and_without_rows_of_zeros_give_the_same(
    monkeypatch: pytest.MonkeyPatch, block: int, tall: int
) -> None:
    tensors = [{"a": embedding(seed), "b": torch.randn(11), "c": embedding(seed, 30)} for seed in range(4)]

    def results() -> tuple[Any, Any, Any]:
        total, agreement, squares = ExactSum(lambda group: 8.0, 99), RunningAgreement(4), []
        for client, changed in enumerate(tensors):
            groups = update(changed)
            squares.append(groups["update"].squares)
            agreement.add(client, groups["update"], client + 1)
            total.add(groups, client + 1)
        mean = total.mean()["update"]
        return mean, agreement.result(Pieces(mean)), squares

    (plain, agreed, squares) = results()
    monkeypatch.setattr("fedtune.federated.pieces._BLOCK", block)
    monkeypatch.setattr("fedtune.federated.pieces._TALL", tall)
    (mean, agreed_again, squares_again) = results()
    assert all(torch.equal(mean[name], plain[name]) for name in plain)
    assert agreed_again.update_cosine == pytest.approx(agreed.update_cosine, abs=1e-6)  # lengths are sums in fp32
    for one, other in zip(squares, squares_again, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_rows_of_zeros_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.federated.pieces._TALL", 1)
    for rows, expected in ((3, 15), (30, 200)):
        assert sum(values.numel() for _, _, values in Pieces({"a": embedding(0, rows)})) == expected


def test_who_watches_sees_every_piece_once_whoever_goes_through_them() -> None:
    seen: list[str] = []
    pieces = Pieces({"a": torch.ones(2), "b": torch.ones(3)})
    for finish_first in (True, False):
        pieces.watched_by(lambda name, place, values: seen.append(name))
        if finish_first:
            pieces.finish()
        list(pieces)
        pieces.finish()
        assert seen == ["a", "b"]
        seen.clear()


@pytest.mark.parametrize("tall", [1, 2**20])
def test_a_difference_is_made_in_place_together_with_its_length(monkeypatch: pytest.MonkeyPatch, tall: int) -> None:
    monkeypatch.setattr("fedtune.federated.pieces._TALL", tall)
    monkeypatch.setattr("fedtune.federated.pieces._BLOCK", 7)
    weights = {"a": torch.randn(40, 5), "b": torch.randn(3, 4).t(), "c": torch.randn(9), "d": torch.tensor(2.0)}
    server = {name: torch.randn_like(tensor) for name, tensor in weights.items()}
    weights["a"][4:] = server["a"][4:]
    expected = {name: tensor - server[name] for name, tensor in weights.items()}
    pieces = Pieces(weights, minus=server)
    for name, difference in expected.items():
        assert torch.equal(weights[name], difference)
        assert pieces.squares[name] == pytest.approx(float(difference.double().square().sum()), rel=1e-5)
        seen = torch.cat([values.flatten() for of, _, values in pieces if of == name])
        assert torch.equal(seen[seen != 0].sort().values, difference[difference != 0].flatten().sort().values)
    assert pieces.length == pytest.approx(math.sqrt(sum(pieces.squares.values())))


def test_pieces_notice_that_their_tensors_have_changed() -> None:
    tensors = {"a": torch.ones(3), "b": torch.ones(2)}
    pieces = Pieces(tensors)
    assert pieces.are(tensors)
    assert not pieces.are(dict(tensors))
    tensors["b"].add_(1)
    assert not pieces.are(tensors)


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
def test_nothing_to_average_raises_and_never_gives_zeros(counts: list[int]) -> None:
    total = ExactSum(lambda group: 8.0, 10)
    for count in counts:
        total.add(update({"w": torch.ones(2)}), count)
    with pytest.raises(RunError, match="nothing to average"):
        total.mean()


@pytest.mark.parametrize("weight", [-1, 0.5, float("nan"), True])
def test_a_weight_that_is_no_count_is_refused(weight: Any) -> None:
    with pytest.raises(RunError, match="allowed: a whole number, 0 or more"):
        ExactSum(lambda group: 8.0, 10).add(update({"w": torch.ones(2)}), weight)


def test_more_weight_than_the_grid_was_made_for_is_refused() -> None:
    total = ExactSum(lambda group: 8.0, 10)
    total.add(update({"w": torch.ones(2)}), 10)
    with pytest.raises(RunError, match="weigh 11; its grid was made for 10"):
        total.add(update({"w": torch.ones(2)}), 1)


@pytest.mark.parametrize("limit", [0.0, 5.0, -8.0, float("inf")])
def test_a_limit_that_is_no_power_of_two_is_refused(limit: float) -> None:
    with pytest.raises(UsageError, match=r"update_limit: got .*; allowed: a power of two"):
        Mean(update_limit=limit)


def test_what_is_moved_is_new_and_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.federated.pieces._BLOCK", 2)
    weights = {"w": torch.tensor([[1.0, 1.0, 1.0], [2.0, 3.0, 4.0]]).t()}  # not contiguous
    step = {"w": torch.full((3, 2), 2.0**-25 + 2.0**-30, dtype=torch.float64)}
    found = moved(weights, Pieces(step))["w"]
    assert torch.equal(found, (weights["w"].double() + step["w"]).float())
    assert (weights["w"][:, 0] == 1).all()


def random_update(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(4, 3, generator=generator), "b": torch.randn(5, generator=generator)}


def agreement_of(updates: list[dict[str, torch.Tensor]], weights: list[int], order: tuple[int, ...]) -> Any:
    total, agreement = ExactSum(lambda group: 8.0, 100), RunningAgreement(len(updates))
    for client in order:
        groups = update(updates[client])
        agreement.add(client, groups["update"], weights[client])
        total.add(groups, weights[client])
    return agreement.result(Pieces(total.mean()["update"]))


def test_agreement_is_what_a_direct_computation_over_all_clients_gives() -> None:
    updates, weights = [random_update(seed) for seed in range(4)], [3, 1, 8, 2]
    got = agreement_of(updates, weights, (0, 1, 2, 3))
    flat = [torch.cat([tensor.flatten() for tensor in one.values()]) for one in updates]
    cosines = [float(torch.cosine_similarity(one, other, dim=0)) for one, other in itertools.combinations(flat, 2)]
    assert got.update_cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-6)
    mean = {name: sum(w * u[name] for w, u in zip(weights, updates, strict=True)) / sum(weights) for name in updates[0]}
    length = float(torch.cat([tensor.flatten() for tensor in mean.values()]).norm())
    assert got.mean_update_norm == pytest.approx(length, rel=1e-5)
    assert set(got.drift) == {"a", "b"}
    for name, center in mean.items():
        squares = [float((one[name] - center).square().sum()) for one in updates]
        direct = sum(weight * square for weight, square in zip(weights, squares, strict=True)) / sum(weights)
        assert got.drift[name] == pytest.approx(direct, rel=1e-4)


def test_agreement_has_the_same_bits_in_any_order() -> None:
    updates, weights = [random_update(seed) for seed in range(4)], [3, 1, 8, 2]
    for order in itertools.permutations(range(4)):
        assert agreement_of(updates, weights, order) == agreement_of(updates, weights, (0, 1, 2, 3))


def test_a_single_client_has_no_pairs_and_no_drift_and_one_that_stands_still_has_no_direction() -> None:
    alone = agreement_of([random_update(0)], [5], (0,))
    assert alone.update_cosine is None
    assert all(value < 1e-5 for value in alone.drift.values())
    still = {name: torch.zeros_like(tensor) for name, tensor in random_update(0).items()}
    two = agreement_of([random_update(0), random_update(1)], [1, 1], (0, 1))
    three = agreement_of([random_update(0), random_update(1), still], [1, 1, 1], (0, 1, 2))
    assert three.update_cosine == pytest.approx(two.update_cosine, abs=1e-6)
