from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedtune.algorithms.fedavg import RunningMean
from fedtune.errors import RunError
from fedtune.federated.agreement import RunningAgreement
from fedtune.federated.cohorts import cohort
from fedtune.tensors import assign_, distance, num_bytes, snapshot, travelling


def random_weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(4, 3, generator=generator), "b": torch.randn(5, generator=generator)}


def mean_of(weights: list[dict[str, torch.Tensor]], counts: list[float]) -> dict[str, torch.Tensor]:
    running = RunningMean()
    for one, count in zip(weights, counts, strict=True):
        running.add(one, count)
    return running.result()


@given(counts=st.lists(st.integers(0, 1000), min_size=1, max_size=8).filter(any))
@settings(deadline=None, max_examples=50)
def test_the_running_mean_is_the_weighted_mean(counts: list[int]) -> None:
    weights = [random_weights(seed) for seed in range(len(counts))]
    got = mean_of(weights, counts)
    for name in got:
        direct = sum(count * one[name].double() for count, one in zip(counts, weights, strict=True)) / sum(counts)
        torch.testing.assert_close(got[name], direct.float(), rtol=1e-5, atol=1e-6)


def test_the_order_of_clients_changes_nothing_beyond_rounding() -> None:
    weights, counts = [random_weights(seed) for seed in range(4)], [10, 1, 500, 37]
    first = mean_of(weights, counts)
    for order in itertools.permutations(range(4)):
        again = mean_of([weights[i] for i in order], [counts[i] for i in order])
        for name in first:
            torch.testing.assert_close(first[name], again[name], rtol=1e-5, atol=1e-6)


def test_only_the_ratio_of_the_counts_matters() -> None:
    weights = [random_weights(0), random_weights(1)]
    ones, sevens = mean_of(weights, [1, 1]), mean_of(weights, [7, 7])
    assert all(torch.equal(ones[name], sevens[name]) for name in ones)


def test_the_mean_of_one_or_of_equals_is_exact() -> None:
    one = random_weights(0)
    for count in (1, 3):
        got = mean_of([one] * count, [3.0, 7.0, 11.0][:count])
        assert all(torch.equal(got[name], one[name]) for name in one)


@pytest.mark.parametrize("counts", [[], [0], [0, 0]])
def test_nothing_to_average_raises_and_never_gives_zeros(counts: list[int]) -> None:
    with pytest.raises(RunError, match="nothing to average"):
        mean_of([random_weights(i) for i in range(len(counts))], counts)


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_a_weight_that_is_no_count_is_refused(weight: float) -> None:
    with pytest.raises(RunError, match="allowed: 0 or more"):
        RunningMean().add(random_weights(0), weight)


def test_the_mean_is_a_copy() -> None:
    one = random_weights(0)
    got = mean_of([one], [1])
    one["a"].zero_()
    assert got["a"].abs().sum() > 0


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = nn.Linear(2, 3), nn.Linear(2, 3).requires_grad_(False)
        self.norm = nn.BatchNorm1d(3)
        self.tied = self.trained
        self.register_buffer("scratch", torch.zeros(7), persistent=False)


def test_trainable_parameters_and_persistent_float_buffers_travel() -> None:
    names = set(travelling(Mixed()))
    assert names == {"trained.weight", "trained.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"}


def test_travelling_tensors_are_live_and_a_snapshot_is_not() -> None:
    module = Mixed()
    live, copy = travelling(module), snapshot(travelling(module))
    assign_(live, {name: torch.ones_like(tensor) for name, tensor in live.items()})
    assert (module.trained.weight == 1).all()
    assert not (copy["trained.weight"] == 1).all()


def test_distance_and_bytes() -> None:
    one, other = {"a": torch.zeros(2), "b": torch.zeros(1)}, {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    assert distance(one, other) == 5.0
    assert num_bytes(one) == 12


def test_a_cohort_is_drawn_without_replacement_and_anew_each_round() -> None:
    drawn = [cohort(0, number, 20, 5) for number in range(30)]
    assert all(len(set(clients)) == 5 for clients in drawn)
    assert set().union(*drawn) == set(range(20))
    assert drawn[0] != drawn[1]
    assert cohort(1, 0, 20, 5) != drawn[0]
    assert cohort(0, 0, 20, 5) == drawn[0]
    assert cohort(0, 3, 4, None) == [0, 1, 2, 3]


@pytest.mark.parametrize("block", [3, 2**19])
def test_agreement_is_what_a_direct_computation_over_all_clients_gives(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.tensors._BLOCK", block)
    server, clients, counts = random_weights(9), [random_weights(seed) for seed in range(4)], [3.0, 1.0, 8.0, 2.0]
    running = RunningAgreement(server)
    norms = [running.add(weights, count) for weights, count in zip(clients, counts, strict=True)]
    mean = mean_of(clients, counts)
    got = running.result(mean)
    updates = [torch.cat([(weights[name] - server[name]).flatten() for name in server]) for weights in clients]
    assert norms == pytest.approx([float(update.norm()) for update in updates], rel=1e-6)
    pairs = itertools.combinations(updates, 2)
    cosines = [float(torch.cosine_similarity(one, other, dim=0)) for one, other in pairs]
    assert got.update_cosine == pytest.approx(sum(cosines) / len(cosines), rel=1e-5)
    step = torch.cat([(mean[name] - server[name]).flatten() for name in server])
    assert got.update_norm == pytest.approx(float(step.norm()), rel=1e-5)
    assert set(got.drift) == {"a", "b"}
    for name in server:
        squares = [float((weights[name] - mean[name]).square().sum()) for weights in clients]
        direct = sum(count * square for count, square in zip(counts, squares, strict=True)) / sum(counts)
        assert got.drift[name] == pytest.approx(direct, rel=1e-4)


def test_a_single_client_has_no_pairs_and_no_drift() -> None:
    server, client = random_weights(0), random_weights(1)
    running = RunningAgreement(server)
    running.add(client, 5)
    got = running.result(client)
    assert got.update_cosine is None
    assert all(value < 1e-5 for value in got.drift.values())
