"""Client-level differential privacy: the accounting, the mechanisms, and what a run does and says with it."""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GivenLoaders, assert_equal, data_maker, make_loop, make_task, module_maker, weights_of, without_times
from test_torchrun import ranks

import fedtune
from fedtune.errors import RunError, UsageError
from fedtune.federated.messages import ClientReport, Context, Reply
from fedtune.federated.pieces import Pieces
from fedtune.federated.state import ServerState
from fedtune.federated.sums import ExactSum
from fedtune.privacy.accountant import Release, count_within, epsilon_by, noise_for, rdp_of
from fedtune.privacy.aggregation import PrivateMean, clipping, noise_of_sum
from fedtune.privacy.factorisation import bands, error, sensitivity
from fedtune.privacy.mechanisms import PRIVACY, AdaptiveGaussian, Banded, Gaussian, Mechanism, privacy_of
from fedtune.privacy.plan import PrivacyPlan, plan_of
from fedtune.runs.flags import resolve
from fedtune.runtimes.serial import Serial
from fedtune.tensors import Tensors, sha256
from fedtune.testing import TinyData, TinyModule

pytest.importorskip("dp_accounting")
Make = Callable[..., Any]
UNIFORM = {"aggregator": {"weighting": "uniform"}}
EIGHT = {"num_clients": 8, "batch_size": 4}

# ---------------------------------------------------------------- accounting


def then(release: Release, count: int, delta: float, integers: bool = False) -> float:
    """Epsilon as papers before 2020 had it: the least over orders of count * RDP + ln(1 / delta) / (order - 1)."""
    orders, divergences = (np.asarray(one) for one in rdp_of(release))
    kept = orders == np.round(orders) if integers else orders > 1
    return float(np.min(count * divergences[kept] + math.log(1 / delta) / (orders[kept] - 1)))


PUBLISHED = {  # rate, noise, rounds, delta: as then, RDP, PLD; None where it is not known
    "Abadi 2016": (0.01, 4.0, 10_000, 1e-5, 1.2586, 1.0355, 0.9470),
    "McMahan 2018": (5000 / 763430, 1.0, 5000, 1e-9, 4.6338, 4.183, 3.899),
    "TF-Privacy, noise 1.12, 60 epochs": (256 / 6e4, 1.12, 14_062, 1e-5, 2.922, 2.519, None),
    "TF-Privacy, noise 0.6, 30 epochs": (256 / 6e4, 0.6, 7_031, 1e-5, 9.751, 8.771, None),
    "TF-Privacy, noise 1.2, 10 epochs": (256 / 6e4, 1.2, 2_343, 1e-5, 1.198, 0.9316, None),
    "everyone": (1.0, 10.0, 100, 1e-3, None, 3.5366, 3.13867),
    "one in a hundred": (0.01, 0.8, 1000, 1e-6, None, 4.2935, 3.7062),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_epsilon_is_that_of_published_settings(name: str) -> None:
    rate, noise, rounds, delta, as_then, rdp, pld = PUBLISHED[name]
    release = Release(rate, noise)
    assert epsilon_by("rdp", release, rounds, delta) == pytest.approx(rdp, rel=5e-3)
    if as_then is not None:
        assert then(release, rounds, delta, integers=name == "McMahan 2018") == pytest.approx(as_then, abs=0.01)
    if pld is not None:
        assert epsilon_by("pld", release, rounds, delta) == pytest.approx(pld, rel=5e-3)


def test_the_noise_for_an_epsilon_is_found_by_either_accountant() -> None:
    for accountant, noise in (("rdp", 0.88437), ("pld", 0.80049)):
        found = noise_for(lambda noise: Release(5000 / 1e6, noise), 1000, 1e-6, 2.0, accountant)
        assert found == pytest.approx(noise, rel=5e-4)
        assert epsilon_by(accountant, Release(5000 / 1e6, found), 1000, 1e-6) <= 2.0
    assert count_within(Release(5000 / 1e6, 0.88437), 1e-6, 2.0, "rdp") in (999, 1000)
    assert noise_for(lambda noise: Release(1.0, noise), 1, 1e-5, 0.5, "classical") == math.sqrt(2 * math.log(1.25e5)) / 0.5
    with pytest.raises(UsageError, match=r"privacy\.epsilon: got 10000"):
        noise_for(lambda noise: Release(0.01, noise), 1, 1e-5, 1e4, "rdp")


def test_one_run_in_five_wordings() -> None:
    def epsilon(accountant: str, **mechanism: Any) -> float:
        plan = plan_of(Gaussian(delta=1e-5, **mechanism), 10_000, mechanism.pop("size", 100))
        return float(plan.figures(1000)[f"epsilon_{accountant}"])

    assert epsilon("rdp", noise=1.0) == pytest.approx(2.10, abs=0.005)
    assert epsilon("pld", noise=1.0) == pytest.approx(1.83, abs=0.005)
    assert epsilon("rdp", noise=2.0, sampling="fixed") == pytest.approx(3.58, abs=0.005)  # 1 x (2 C)
    assert epsilon("rdp", noise=1.0, sampling="fixed") == pytest.approx(20.99, abs=0.005)
    everyone = epsilon_by("rdp", Release(1.0, 1.0), 1000, 1e-5)
    assert everyone == pytest.approx(654.9, rel=5e-3)


# ---------------------------------------------------------------- the mechanism


def reply(client: int, values: torch.Tensor) -> Reply:
    update = {"w": values}
    return Reply(client, 1, {"update": update}, ClientReport(client, 1, 1, 1, 0.0, 0.0), 0, {"update": Pieces(update)})


def mean(mechanism: Mechanism, noise: float, clients: int, size: int, like: Tensors) -> PrivateMean:
    return PrivateMean(mechanism, noise, size / clients, float(size), None, lambda state, context: like)


RUNTIME = Serial(None)  # type: ignore[arg-type]


def rounds_of(made: PrivateMean, replies: list[list[Reply]], seed: int = 0) -> list[dict[str, Tensors]]:
    """The groups of round after round."""
    state, found = ServerState(0, {}), []
    for number, those in enumerate(replies, start=1):
        context = Context(seed, number, 100, tuple(one.client for one in those), 100)
        groups = made(iter(those), state, context, RUNTIME)
        found.append(groups)
        state = ServerState(number, {}, memory={"PrivateMean": {name: groups[name] for name in made.keeps}})
    return found


def test_noise_is_normal_of_the_deviation_that_is_accounted_for() -> None:
    size, clip, noise, denominator = 1_000_000, 0.5, 1.3, 20
    like = {"w": torch.zeros(size)}
    (groups,) = rounds_of(mean(Gaussian(noise=noise, clip=clip), noise, 100, denominator, like), [[]])
    drawn = groups["update"]["w"].numpy()
    deviation = noise * clip / denominator
    assert drawn.dtype == np.float64
    assert abs(drawn.mean()) < 4 * deviation / math.sqrt(size)
    assert abs(drawn.std() / deviation - 1) < 4 / math.sqrt(2 * size)
    within = [np.mean(np.abs(drawn) < k * deviation) for k in (1, 2, 3)]
    assert np.allclose(within, [0.682689, 0.954500, 0.997300], atol=2e-3)
    other, again = (rounds_of(mean(Gaussian(noise=noise, clip=clip), noise, 100, 20, like), [[]], seed) for seed in (1, 0))
    assert not np.array_equal(other[0]["update"]["w"].numpy(), drawn)
    assert np.array_equal(again[0]["update"]["w"].numpy(), drawn)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_one_client_moves_the_sum_by_at_most_the_clip(kind: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    clip, clients = 0.7, 6
    updates = [torch.tensor(rng.normal(size=4_001) * scale, dtype=kind) for scale in (1e-4, 0.01, 0.011, 1.0, 1e6, 0.0)]
    exactly = torch.zeros(4_001, dtype=kind)
    exactly[0] = clip
    updates.append(exactly)
    made = mean(Gaussian(noise=1.0, clip=clip), 1e-300, clients, 1, {"w": torch.zeros(4_001)})

    def total(chosen: list[int]) -> torch.Tensor:
        (groups,) = rounds_of(made, [[reply(client, updates[client]) for client in chosen]])
        return groups["update"]["w"]

    everyone, moved = list(range(len(updates))), []
    whole = total(everyone)
    for left in everyone:
        moved.append(float((whole - total([client for client in everyone if client != left])).norm()))
    assert max(moved) <= clip
    assert max(moved) > 0.9 * clip  # it is used
    assert moved[0] == pytest.approx(float(updates[0].double().norm()), rel=1e-5)  # what is short stays as it is
    assert moved[5] == 0.0


def test_the_order_of_clients_and_what_they_weigh_change_nothing() -> None:
    replies = [reply(client, torch.randn(50, generator=torch.Generator().manual_seed(client))) for client in range(5)]
    heavy = [replace(one, weight=1000) for one in replies]
    made = mean(Gaussian(noise=1.0), 1.0, 10, 5, {"w": torch.zeros(50)})
    first, second, third = (rounds_of(made, [those])[0]["update"]["w"] for those in (replies, replies[::-1], heavy))
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_the_denominator_does_not_depend_on_who_answers() -> None:
    replies = [reply(client, torch.full((4,), 0.25)) for client in range(3)]
    made = mean(Gaussian(noise=1.0, clip=1.0), 1e-300, 10, 5, {"w": torch.zeros(4)})
    (groups,) = rounds_of(made, [replies])
    assert torch.allclose(groups["update"]["w"], torch.full((4,), 3 * 0.25 / 5, dtype=torch.float64))


def test_poisson_cohorts_have_their_rate_and_are_drawn_anew_each_round() -> None:
    plan = PrivacyPlan(Gaussian(noise=1.0), 200, 20, 1.0, None)
    drawn = [plan.cohort(0, number) for number in range(1, 501)]
    sizes = np.array([len(one) for one in drawn])
    assert sizes.mean() == pytest.approx(20, abs=4 * math.sqrt(200 * 0.1 * 0.9 / 500))
    assert sizes.std() == pytest.approx(math.sqrt(200 * 0.1 * 0.9), rel=0.15)
    times = np.bincount(np.concatenate(drawn), minlength=200)
    assert times.min() > 20
    assert times.max() < 85
    assert plan.cohort(0, 7) == drawn[6]
    assert plan.cohort(1, 7) != drawn[6]
    assert PrivacyPlan(Gaussian(noise=1.0), 5, 5, 1.0, None).cohort(0, 1) == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- adaptive clipping


@pytest.mark.parametrize("start", [0.5, 0.99, 2.0])
@pytest.mark.parametrize("noisy", [False, True])
def test_the_clip_comes_to_the_median_of_lengths(start: float, noisy: bool) -> None:
    lengths = np.exp(np.random.default_rng(0).normal(size=100) * 0.3)
    lengths *= 0.993 / np.median(lengths)
    mechanism = AdaptiveGaussian(noise=1.0, clip=start, count_noise=0.0 if noisy else 1e-9)
    made = mean(mechanism, 1e-12 if not noisy else 1.0, 100, 100, {"w": torch.zeros(4)})
    replies = [reply(client, torch.tensor([length, 0.0, 0.0, 0.0])) for client, length in enumerate(lengths)]
    clips = [float(groups["clip"]["clip"]) for groups in rounds_of(made, [replies] * 60)]
    assert clips[-1] == pytest.approx(0.993, abs=0.06 if noisy else 0.01)


def test_the_clip_follows_the_papers_equation() -> None:
    mechanism = AdaptiveGaussian(noise=1.0, clip=1.0, quantile=0.8, clip_rate=0.3, count_noise=1e-9)
    made = mean(mechanism, 1e-12, 10, 4, {"w": torch.zeros(1)})
    replies = [reply(client, torch.tensor([length])) for client, length in enumerate((0.2, 0.5, 3.0, 0.9))]
    (groups,) = rounds_of(made, [replies])
    assert float(groups["clip"]["clip"]) == pytest.approx(math.exp(-0.3 * (3 / 4 - 0.8)), rel=1e-6)


def test_noise_on_the_sum_makes_up_for_the_count() -> None:
    found = noise_of_sum(1.0, 5.0)
    assert found == pytest.approx((1 - 1 / 100) ** -0.5)
    assert found**-2 + (2 * 5.0) ** -2 == pytest.approx(1.0)  # both releases together are one of noise 1


# ---------------------------------------------------------------- banded matrices


@pytest.mark.parametrize("epsilon", [2.0, 4.0])
def test_an_epsilon_that_needs_more_noise_than_the_count_has_is_refused_with_both_numbers(epsilon: float) -> None:
    privacy = {"name": "AdaptiveGaussian", "epsilon": epsilon, "rounds": 20}
    needed = fedtune.plan_privacy(privacy | {"name": "Gaussian"}, 64, 8).noise
    says = rf"privacy\.epsilon: got {epsilon}; .* below twice count_noise, 0\.8 \(this one needs {needed:.4g}\)"
    with pytest.raises(UsageError, match=says) as caught:
        fedtune.plan_privacy(privacy, 64, 8)
    assert "\n" not in str(caught.value)
    assert fedtune.plan_privacy(privacy | {"count_noise": 2.0}, 64, 8).noise == needed


def test_a_run_for_an_epsilon_that_the_count_does_not_allow_ends_before_its_first_round(
    make_data: Make, make_module: Make, tmp_path: Path
) -> None:
    privacy = {"name": "AdaptiveGaussian", "epsilon": 1.0, "rounds": 2, "delta": 1e-3}
    with pytest.raises(UsageError, match="or a larger count_noise"):
        run(make_data, make_module, privacy=privacy, run_dir=str(tmp_path / "run"))
    loop, _ = run(make_data, make_module, rounds=1, privacy=privacy | {"count_noise": 3.0})
    assert math.isfinite(loop.history[0].mean_update_norm)


def test_banded_noise_is_the_inverse_of_the_band_matrix() -> None:
    count, rounds = 3, 7
    mechanism = Banded(noise=1.0, clip=2.0, bands=count)
    like = {"w": torch.zeros(5)}
    banded = rounds_of(mean(mechanism, 1.0, 12, 4, like), [[]] * rounds)
    plain = rounds_of(mean(Gaussian(noise=1.0, clip=2.0), 1.0, 12, 4, like), [[]] * rounds)
    column = [1.0, 0.5, 0.375]
    matrix = np.zeros((rounds, rounds))
    for row in range(rounds):
        for back in range(min(count, row + 1)):
            matrix[row, row - back] = column[back]
    fresh = np.stack([groups["update"]["w"].numpy() for groups in plain])
    expected = np.linalg.solve(matrix, fresh) * math.sqrt(sum(value**2 for value in column))
    assert np.allclose(np.stack([groups["update"]["w"].numpy() for groups in banded]), expected, atol=1e-12)
    single = rounds_of(mean(replace(mechanism, bands=1), 1.0, 12, 4, like), [[]] * rounds)
    for one, other in zip(single, plain, strict=True):
        assert torch.equal(one["update"]["w"], other["update"]["w"])


def test_a_client_moves_what_is_made_private_by_at_most_the_sensitivity_that_is_accounted_for() -> None:
    count, rounds, clients = 3, 11, 12
    plan = PrivacyPlan(Banded(noise=1.0, bands=count), clients, 4, 1.0, None)
    matrix = np.zeros((rounds, rounds))
    for row in range(rounds):
        for back, value in enumerate(bands(count)[: row + 1]):
            matrix[row, row - back] = value
    longest = sensitivity(bands(count))
    drawn = [plan.cohort(0, number) for number in range(1, rounds + 1)]
    assert plan.rate == 1.0  # everyone of a group, in its turn
    for client in range(clients):
        rows = [number for number, those in enumerate(drawn) if client in those]
        assert len(rows) <= plan.count(rounds)
        assert all(later - earlier >= count for earlier, later in itertools.pairwise(rows))
        moved = [matrix[:, row] for row in rows]
        assert all(np.linalg.norm(one) <= longest + 1e-12 for one in moved)
        for place, one in enumerate(moved):  # and the columns are orthogonal: so each is a release of its own
            assert all(abs(float(one @ other)) < 1e-12 for other in moved[place + 1 :])


def test_banded_prefix_sums_have_less_error_at_the_same_noise() -> None:
    errors = [error(count, 64) for count in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    rng, count = np.random.default_rng(0), 4
    column = [1.0, 0.5, 0.375, 0.3125]
    matrix = sum(np.diag([value] * (64 - back), -back) for back, value in enumerate(column))
    inverse = np.linalg.solve(matrix, rng.normal(size=(64, 20_000))) * np.linalg.norm(column)
    assert math.sqrt(float(np.mean(np.cumsum(inverse, 0) ** 2))) == pytest.approx(error(count, 64), rel=0.02)


# ---------------------------------------------------------------- runs


def run(make_data: Make, make_module: Make, rounds: int = 4, **options: Any) -> tuple[fedtune.FederatedLoop, Tensors]:
    module = make_module()
    loop = make_loop(**({"max_rounds": rounds, "clients_per_round": 2, "algorithm": UNIFORM} | options))
    loop.fit(module, make_data(**EIGHT))
    return loop, weights_of(module)


CASES = {
    "Gaussian": {"name": "Gaussian", "noise": 1.0, "clip": 0.1},
    "AdaptiveGaussian": {"name": "AdaptiveGaussian", "noise": 1.0, "count_noise": 1.0},
    "Banded": {"name": "Banded", "noise": 1.0, "clip": 0.1, "bands": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_resumed_bit_for_bit_with_its_ledger(name: str, make_data: Make, make_module: Make, tmp_path: Path) -> None:
    options = {"privacy": CASES[name], "algorithm": UNIFORM | {"server": ["Momentum"]}}
    whole, weights = run(make_data, make_module, **options)
    folder = str(tmp_path / "run")
    run(make_data, make_module, rounds=2, run_dir=folder, **options)
    again, others = run(make_data, make_module, run_dir=folder, **options)
    assert_equal(weights, others)
    assert without_times(whole.history) == without_times(again.history)
    epsilons = [record.diagnostics["epsilon_rdp"] for record in again.history]
    assert epsilons == sorted(epsilons)
    assert again.plan is not None
    assert epsilons[-1] == again.summary["epsilon_rdp"] == again.plan.figures(4)["epsilon_rdp"]
    assert again.summary["epsilon_pld"] <= again.summary["epsilon_rdp"]
    kept = json.loads((tmp_path / "run" / "summary.json").read_text())
    for words in (
        "by RDP",
        "by PLD",
        "at delta 1e-05",
        "unit: ",
        "neighbours: ",
        "sampling: Poisson",
        "denominator: 2",
        "clip: ",
    ):
        assert words in kept["privacy"]
    for words in ("noise: normal", "not covered: metrics", "after 4 rounds"):
        assert words in kept["privacy"]
    assert "client-level differential privacy" in (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UsageError, match=r"loop\.privacy"):
        run(make_data, make_module, rounds=5, run_dir=folder, **(options | {"privacy": CASES[name] | {"noise": 1.1}}))


def test_a_round_without_replies_has_noise_and_a_record(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    options = {"clients_per_round": 1, "privacy": CASES["Gaussian"], "seed": 3, "run_dir": folder}
    loop, _ = run(make_data, make_module, rounds=3, **options)
    empty = [record for record in loop.history if not record.cohort]
    assert [record.round for record in empty] == [2]  # as seed 3 draws
    for record in empty:
        assert math.isnan(record.train_loss_nats)
        assert record.mean_update_norm > 0
        assert record.diagnostics["epsilon_rdp"] > 0
    again, _ = run(make_data, make_module, rounds=4, **options)
    assert [record.cohort for record in again.history] == [[2], [], [2], [4]]


@pytest.mark.parametrize(("seed", "empty"), [(3, [2]), (0, [1, 2]), (9, [1, 2, 3])])  # as these seeds draw
def test_baselines_pass_over_rounds_without_replies(
    seed: int, empty: list[int], make_data: Make, make_module: Make, tmp_path: Path
) -> None:
    options = {"clients_per_round": 1, "privacy": CASES["Gaussian"], "seed": seed, "baselines": ("centralised", "local")}
    loop, _ = run(make_data, make_module, rounds=3, **options)
    pooled = loop.baseline_runs["centralised"]
    examples = [record.num_examples for record in loop.history]
    assert [record.num_examples for record in pooled] == examples
    for before, record in itertools.pairwise(pooled):
        assert (record.metrics == before.metrics) == (not record.num_examples)
    passed = [record for record in pooled if not record.num_examples]
    assert [record.round for record in passed] == empty
    assert all((one.clients, one.num_steps, one.mean_update_norm) == ([], 0, 0.0) for one in passed)
    assert all(math.isnan(one.train_loss_nats) for one in passed)
    assert len(loop.baseline_runs["local"]) == 8
    folder = options | {"run_dir": str(tmp_path / "run")}
    for rounds in (1, 2, 3):  # a start for each round, so that the baseline goes on from an empty one, too
        again, _ = run(make_data, make_module, rounds=rounds, **folder)
    assert without_times(again.baseline_runs["centralised"]) == without_times(pooled)


def test_learning_rates_of_a_round_without_replies_are_none(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    found = []
    for rounds in (2, 3):
        monitor = fedtune.LearningRateMonitor()
        options = {"clients_per_round": 1, "privacy": CASES["Gaussian"], "seed": 3, "run_dir": str(tmp_path / "run")}
        run(make_data, make_module, rounds=rounds, callbacks=[monitor], **options)
        found.append(monitor.rates)
    rate = {"lr-AdamW/pg1": 5e-3, "lr-AdamW/pg2": 5e-3}
    assert found[1] == [{"round": 1} | rate, {"round": 2}, {"round": 3} | rate]
    assert found[0] == found[1][:2]


def test_a_run_in_which_everybody_fails_goes_on(make_data: Make, make_module: Make) -> None:
    faults = [{"name": "NotFinite", "rate": 1.0}]
    loop, _ = run(make_data, make_module, rounds=2, privacy=CASES["Gaussian"], faults=faults, clients_per_round=None)
    assert [len(record.failures) for record in loop.history] == [8, 8]
    assert all(record.mean_update_norm > 0 for record in loop.history)


def test_a_run_ends_before_its_budget_is_passed(
    make_data: Make, make_module: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    release = Release(2 / 8, 4.0)
    budget = (epsilon_by("pld", release, 3, 1e-5) + epsilon_by("pld", release, 4, 1e-5)) / 2
    privacy = {"name": "Gaussian", "noise": 4.0, "epsilon": budget}
    loop, _ = run(make_data, make_module, rounds=9, privacy=privacy, run_dir=str(folder), progress=True)
    assert len(loop.history) == 3
    assert loop.summary["epsilon_pld"] <= budget < epsilon_by("pld", release, 4, 1e-5)
    assert "used up after round 3: the run ends there, not after 9" in capsys.readouterr().out
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())][-1] == "round-0003"
    again, _ = run(make_data, make_module, rounds=20, privacy=privacy, run_dir=str(folder))
    assert len(again.history) == 3
    found = privacy | {"noise": 0.0, "rounds": 2}
    other, _ = run(make_data, make_module, rounds=3, privacy=found)
    assert len(other.history) == 2
    assert other.summary["epsilon_pld"] == pytest.approx(budget, rel=1e-3)
    assert other.summary["epsilon_pld"] <= budget


def test_a_module_and_the_forecast_know_when_the_budget_ends_the_run(
    make_data: Make, tiny_bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Asks(fedtune.BertClassifier):
        def configure_optimizers(self) -> Any:
            told.append((self.trainer.max_epochs, self.trainer.estimated_stepping_batches))
            return super().configure_optimizers()

    def fit(rounds: int, folder: str, **options: Any) -> list[tuple[int, float]]:
        told.clear()
        more = {"algorithm": UNIFORM, "local_epochs": 2, "baselines": ("centralised",), "progress": True}
        loop = make_loop(max_rounds=rounds, run_dir=str(tmp_path / folder), **more, **options)
        loop.fit(Asks(tiny_bert, num_labels=3), make_data())
        assert [record.round for record in loop.history] == [1, 2]
        return list(told)

    told: list[tuple[int, float]] = []
    epsilon = epsilon_by("pld", Release(1.0, 1.0), 2, 1e-3) + 0.01
    ended = fit(100, "ended", privacy={"name": "Gaussian", "noise": 1.0, "delta": 1e-3, "epsilon": epsilon})
    said = capsys.readouterr().out
    assert "the run ends there, not after 100" in said
    assert "federated: 2 rounds of 3 clients; then the baselines: centralised (2 rounds of" in said
    assert json.loads((tmp_path / "ended" / "horizon.json").read_text()) == {"max_rounds": 2}
    assert {epochs for epochs, _ in ended} == {4}
    assert ended == fit(2, "two", privacy={"name": "Gaussian", "noise": 1.0, "delta": 1e-3})


def test_a_module_that_asks_too_early_for_the_end_is_told_what_it_was_told(
    make_data: Make, tiny_bert: str, capsys: pytest.CaptureFixture[str]
) -> None:
    class Asks(fedtune.BertClassifier):
        def setup(self, stage: str) -> None:
            self.length = self.trainer.max_epochs

    privacy = {"name": "Gaussian", "noise": 1.0, "delta": 1e-3, "rounds": 1}
    make_loop(max_rounds=9, algorithm=UNIFORM, privacy=privacy, progress=True).fit(Asks(tiny_bert, num_labels=3), make_data())
    assert "asked how long the run is before that was known, and was told: 9 rounds" in capsys.readouterr().out


def test_no_round_is_released_beyond_the_ledger() -> None:
    made = replace(mean(Gaussian(noise=1.0), 1.0, 10, 5, {"w": torch.zeros(2)}), limit_rounds=2)
    with pytest.raises(RunError, match="round 3: the privacy budget is used up after round 2"):
        rounds_of(made, [[], [], []])
    first = rounds_of(made, [[]])[0]
    state = ServerState(1, {}, memory={"PrivateMean": {"ledger": first["ledger"]}})
    with pytest.raises(RunError, match=r"ledger has noise 1\.0 for the rounds before, and now it is 2\.0"):
        replace(made, noise=2.0)(iter(()), state, Context(0, 2, 10, (), 1), RUNTIME)
    with pytest.raises(RunError, match="ledger has 1 rounds"):
        made(iter(()), state, Context(0, 5, 10, (), 1), RUNTIME)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "weighted": ({"algorithm": "fedavg"}, "weighting: got 'examples'; allowed: uniform, with privacy"),
    "median": ({"algorithm": {"aggregator": "Median"}}, "aggregator: got 'Median'; allowed: Mean"),
    "krum": ({"algorithm": {"aggregator": "Krum"}}, "aggregator: got 'Krum'; allowed: Mean"),
    "scaffold": ({"algorithm": "scaffold"}, "one that sends its update alone"),
    "feddyn": ({"algorithm": "feddyn"}, "how many clients answer"),
    "min_clients": ({"min_clients": 2}, "options.min_clients: got 2; allowed: nothing"),
    "classical": ({"privacy": {"epsilon": 2.0, "noise": 0.0, "rounds": 1, "accountant": "classical"}}, "epsilon up to 1 only"),
    "classical rounds": ({"privacy": {"epsilon": 0.5, "noise": 0.0, "rounds": 9, "accountant": "classical"}}, "rounds: 1"),
    "called Poisson": (
        {"privacy": {"sampling": "fixed", "neighbours": "add_or_remove_one", "rounds": 10}},
        "a fixed size is not Poisson sampling",
    ),
    "replaced": ({"privacy": {"neighbours": "replace_one"}}, "add_or_remove_one with sampling poisson"),
    "delta": ({"privacy": {"delta": 0.2}}, "privacy.delta: got 0.2; allowed: below 1 / num_clients, 0.125"),
    "bands": ({"privacy": {"name": "Banded", "bands": 5}}, "privacy.bands: got 5; allowed: at most"),
    "count noise": ({"privacy": {"name": "AdaptiveGaussian"}}, "below twice count_noise"),
    "fixed pld": ({"privacy": {"sampling": "fixed", "accountant": "pld"}}, "rdp, for cohorts of a fixed size"),
    "nothing": ({"privacy": {"noise": 0.0}}, "privacy.noise: not given; needed: noise .*; or epsilon and rounds"),
    "rounds": ({"privacy": {"noise": 0.0, "epsilon": 1.0}}, "privacy.rounds: not given; needed: the number of rounds"),
    "name": ({"privacy": {"name": "Gausian"}}, r"Gaussian \(nearest\)"),
    "parameter": ({"privacy": {"sigma": 1.0}}, "privacy.sigma"),
    "one round": ({"privacy": {"epsilon": 1e-4}}, "which the first round needs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_accounting_is_not_true_of_is_refused_in_one_line(name: str, make_data: Make, make_module: Make) -> None:
    changes, says = REFUSED[name]
    privacy = {"name": "Gaussian", "noise": 1.0} | changes.get("privacy", {})
    with pytest.raises(UsageError, match=says) as caught:
        run(make_data, make_module, **(changes | {"privacy": privacy}))
    assert "\n" not in str(caught.value)


def test_all_that_privacy_lacks_is_said_at_once_in_words_of_the_flags(command: Callable[..., tuple[int, str, str]]) -> None:
    code, _, said = command("run", "--loop.privacy", "Gaussian")
    assert (code, said.count("\n")) == (2, 1)
    assert "--loop.privacy.noise: not given; needed: noise (a multiple of the clip); or epsilon and rounds" in said
    assert "; also --loop.algorithm.aggregator.weighting: got 'examples'; allowed: uniform" in said
    assert "0.0" not in said
    more = [
        "--loop.privacy.epsilon",
        "8",
        "--loop.privacy.delta",
        "2",
        "--loop.privacy.clip",
        "0",
        "--loop.algorithm",
        "scaffold",
    ]
    _, _, said = command("run", "--loop.privacy", "Gaussian", *more)
    parts = (
        "--loop.privacy.rounds: not",
        "--loop.privacy.delta: got 2.0",
        "--loop.privacy.clip: got 0.0",
        "--loop.algorithm.client",
    )
    assert all(part in said for part in parts)
    assert said.count("\n") == 1


def test_what_only_the_number_of_clients_shows_is_said_at_once(make_data: Make, make_module: Make) -> None:
    privacy = {"name": "Banded", "noise": 1.0, "bands": 5, "delta": 0.2}
    with pytest.raises(
        UsageError, match=r"privacy\.delta: got 0\.2.*; also privacy\.bands: got 5.*; also options\.min_clients"
    ):
        run(make_data, make_module, privacy=privacy, min_clients=2)


def test_orders_that_cannot_be_computed_are_no_warnings_and_other_words_are(caplog: pytest.LogCaptureFixture) -> None:
    rdp_of.cache_clear()
    release = Release(0.05, 0.3)
    _, divergences = rdp_of(release)
    left_out = np.isinf(divergences)
    assert left_out.any()  # of these the package warns, each by a line
    assert not caplog.records
    epsilon_by("rdp", release, 1, 1e-5)
    logging.getLogger("absl").warning("something else")
    assert [record.message for record in caplog.records] == ["something else"]


def test_cohorts_of_a_fixed_size_are_offered_their_own_figure(make_data: Make, make_module: Make) -> None:
    called = {"name": "Gaussian", "noise": 1.0, "rounds": 10, "sampling": "fixed", "neighbours": "add_or_remove_one"}
    with pytest.raises(
        UsageError, match=r"replace_one with cohorts of a fixed size, whose epsilon is ([\d.]+) by RDP"
    ) as caught:
        run(make_data, make_module, privacy=called)
    loop, _ = run(make_data, make_module, rounds=10, privacy=called | {"neighbours": ""}, check_val_every_n_rounds=10)
    assert {len(record.cohort) for record in loop.history} == {2}
    assert f"{loop.summary['epsilon_rdp']:.4g} by RDP" in str(caught.value)
    assert loop.summary["epsilon_pld"] is None
    assert "2 of 8 clients, without replacement" in loop.summary["privacy"]


def test_buffers_that_travel_are_refused() -> None:
    data = TinyData()
    loaders = GivenLoaders([data.client_dataloader(client) for client in range(4)], data.client_dataloader(2))
    with pytest.raises(UsageError, match="as they are averaged without noise"):
        make_loop(algorithm=UNIFORM, privacy=CASES["Gaussian"]).fit(TinyModule(), loaders)


def test_mechanisms_are_parts_of_plain_values_and_found_by_name() -> None:
    assert set(PRIVACY) == {"Gaussian", "AdaptiveGaussian", "Banded", "ExampleGaussian"}
    assert privacy_of({"name": "Gaussian", "noise": "1e-1"}) == Gaussian(noise=0.1)
    assert privacy_of(None) is None
    with pytest.raises(UsageError, match="privacy: got 3"):
        privacy_of(3)


def test_sums_over_a_fixed_number_may_be_empty() -> None:
    assert ExactSum(lambda _: 1.0, 4).mean(over=3.0) == {}
    sums = ExactSum(lambda _: 1.0, 4)
    sums.add({"update": Pieces({"w": torch.tensor([0.5])})}, 1)
    assert sums.mean(over=4.0)["update"]["w"].tolist() == [0.125]


def test_a_length_is_that_of_fp64() -> None:
    assert clipping(Pieces({"w": torch.zeros(3)}), 1.0, 0.0) == 1.0
    assert clipping(Pieces({"w": torch.tensor([3.0, 4.0])}), 10.0, 0.0) == 1.0
    assert clipping(Pieces({"w": torch.tensor([3.0, 4.0], dtype=torch.float64)}), 1.0, 0.0) == pytest.approx(0.2, rel=1e-12)


def test_privacy_is_a_flag_with_values_of_its_own() -> None:
    given = {"name": "Gaussian", "noise": "8e-1", "rounds": 5}
    assert resolve({"loop": {"privacy": given, "algorithm": {"weighting": "uniform"}}})["loop"]["privacy"] == {
        **{"name": "Gaussian", "noise": 0.8, "epsilon": 0.0, "delta": 1e-5, "rounds": 5, "clip": 1.0},
        **{"accountant": "", "sampling": "poisson", "neighbours": ""},
    }
    assert resolve({})["loop"]["privacy"] is None
    with pytest.raises(UsageError, match=r"--loop\.privacy: got 'Gausian'; allowed: Gaussian \(nearest\)"):
        resolve({"loop": {"privacy": "Gausian"}})


PRIVATE = {"max_rounds": 3, "clients_per_round": 2, "algorithm": UNIFORM, "privacy": CASES["AdaptiveGaussian"]}


def private_run(folder: Path, model: str) -> tuple[str, list[Any], float]:
    """Weights, records and epsilon of a run, of one rank or of all."""
    module, data = module_maker(model)(), data_maker(model, make_task())(**EIGHT)
    loop = make_loop(run_dir=str(folder), **PRIVATE)
    loop.fit(module, data)
    return sha256(weights_of(module)), without_times(loop.history), loop.summary["epsilon_pld"]


def test_two_processes_have_the_bits_of_one(tmp_path: Path, tiny_bert: str) -> None:
    alone = private_run(tmp_path / "one", tiny_bert)
    assert ranks(2, private_run, tmp_path / "two", tiny_bert) == [alone, alone]


def test_next_to_no_noise_has_an_epsilon_without_filling_the_memory() -> None:
    """The losses of noise 0.005 go up to some 260,000: a billion intervals of the usual length."""
    bound, found = (epsilon_by(by, Release(0.5, 0.005), 12, 1e-5) for by in ("rdp", "pld"))
    assert 0.9 * bound < found < bound


WRONG: list[tuple[type[Mechanism], dict[str, Any], str]] = [
    (Gaussian, {"rounds": math.nan}, "a number (int)"),
    (Gaussian, {"rounds": math.inf}, "a number (int)"),
    (Gaussian, {"rounds": 2.5}, "a whole number"),
    (Gaussian, {"rounds": True}, "a whole number"),
    (Gaussian, {"rounds": -1}, "0 or more"),
    (Gaussian, {"noise": None}, "a number (float)"),
    (Gaussian, {"noise": True}, "a number"),
    (Gaussian, {"noise": 1e-9}, "0.0001 or more, or 0 where it is not given"),
    (Gaussian, {"noise": -1.0}, "0.0001 or more, or 0 where it is not given"),
    (Gaussian, {"noise": math.inf}, "0.0001 or more, or 0 where it is not given"),
    (Gaussian, {"epsilon": math.nan}, "a number above 0, or 0 where it is not given"),
    (Gaussian, {"epsilon": 10**400}, "a number (float)"),
    (Gaussian, {"delta": "x"}, "a number (float)"),
    (Gaussian, {"clip": [1.0]}, "a number (float)"),
    (Gaussian, {"clip": 1e31}, "a number above 0, 1e-30 to 1e30"),
    (Gaussian, {"sampling": 3}, "text"),
    (AdaptiveGaussian, {"clip_rate": "much"}, "a number (float)"),
    (AdaptiveGaussian, {"clip_rate": math.inf}, "a number from 0 to 10"),
    (AdaptiveGaussian, {"clip_rate": 5000.0}, "a number from 0 to 10"),
    (AdaptiveGaussian, {"clip_rate": -0.1}, "a number from 0 to 10"),
    (AdaptiveGaussian, {"count_noise": math.inf}, "a number above 0, or 0 where it is not given"),
    (AdaptiveGaussian, {"count_noise": math.nan}, "a number above 0, or 0 where it is not given"),
    (Banded, {"bands": math.nan}, "a number (int)"),
    (Banded, {"bands": 2.5}, "a whole number"),
]


@pytest.mark.parametrize(("kind", "values", "allowed"), WRONG, ids=[f"{kind.__name__} {one}" for kind, one, _ in WRONG])
def test_values_of_another_type_or_size_are_refused_in_one_line(
    kind: type[Mechanism], values: dict[str, Any], allowed: str
) -> None:
    (name,) = values
    with pytest.raises(UsageError, match=rf"^{name}: got .*; allowed: {re.escape(allowed)}$"):
        kind(**({"noise": 1.0} | values))
    with pytest.raises(UsageError, match=rf"^privacy\.{name}: got .*; allowed: {re.escape(allowed)}$"):
        privacy_of({"name": kind.__name__, "noise": 1.0} | values)


def test_several_values_of_another_type_are_said_at_once() -> None:
    with pytest.raises(UsageError, match=r"^noise: got None; .*; also rounds: got 2\.5; allowed: a whole number$"):
        Gaussian(noise=None, rounds=2.5)  # type: ignore[arg-type]


def test_numbers_as_files_and_numpy_have_them_are_taken() -> None:
    given = Gaussian(noise="1", rounds=np.int64(3), clip=1, delta=np.float64(1e-4))  # type: ignore[arg-type]
    assert given == Gaussian(noise=1.0, rounds=3, clip=1.0, delta=1e-4)
    assert {type(given.noise), type(given.rounds), type(given.clip), type(given.delta)} == {float, int}


@pytest.mark.parametrize(
    ("clients", "size", "says"),
    [
        (10.5, None, "num_clients: got 10.5; allowed: a whole number, 1 or more"),
        ("10", None, "num_clients: got '10'; allowed: a whole number, 1 or more"),
        (True, None, "num_clients: got True; allowed: a whole number, 1 or more"),
        (0, None, "num_clients: got 0; allowed: 1 or more"),
        (10, "5", "clients_per_round: got '5'; allowed: a whole number, 1 or more"),
        (10, 2.5, "clients_per_round: got 2.5; allowed: a whole number, 1 or more"),
        (10, 0, "clients_per_round: got 0; allowed: 1 or more"),
        (10, 11, "clients_per_round: got 11; allowed: 1 to 10, the number of clients"),
    ],
)
def test_a_plan_counts_in_whole_numbers(clients: Any, size: Any, says: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(says)}$"):
        fedtune.plan_privacy({"name": "Gaussian", "noise": 1.0, "delta": 1e-3}, clients, size)


@pytest.mark.parametrize("rounds", [-3, 2.5, "3"])
def test_figures_are_those_of_a_whole_number_of_rounds(rounds: Any) -> None:
    plan = fedtune.plan_privacy({"name": "Gaussian", "noise": 1.0, "delta": 1e-3}, 10, 5)
    for said in (plan.figures, plan.sentence):
        with pytest.raises(UsageError, match="rounds: got "):
            said(rounds)


def test_the_least_noise_has_an_epsilon_for_any_number_of_rounds() -> None:
    for rate, count in ((1.0, 10_000), (0.01, 10_000)):
        bound, found = (epsilon_by(by, Release(rate, 1e-4), count, 1e-5) for by in ("rdp", "pld"))
        assert found == bound > 1e10


def test_a_clip_that_runs_away_ends_the_run_in_one_line() -> None:
    mechanism = AdaptiveGaussian(noise=1.0, clip=1.0, clip_rate=10.0, count_noise=1e6)
    with pytest.raises(
        RunError, match=r"round 1: the clip moves to 1e[-\d]+; allowed: 1e-30 to 1e30; a smaller clip_rate \(10\)"
    ):
        rounds_of(mean(mechanism, 1.0, 10, 5, {"w": torch.zeros(2)}), [[]])


def test_a_plan_without_a_run_refuses_privacy_of_examples_by_its_name() -> None:
    with pytest.raises(UsageError, match=r"privacy: got 'ExampleGaussian'; allowed: .*Gaussian.*, Banded$"):
        fedtune.plan_privacy("ExampleGaussian", 100, 10)
