"""Algorithms on quadratics f_i(w) = a_i / 2 (w - b_i)^2, full batch, whose fixed points are known. The optimum is 7.5."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedtune.algorithms.adaptive import fedadagrad, fedadam, fedyogi
from fedtune.algorithms.ditto import ditto
from fedtune.algorithms.fedavg import fedavg
from fedtune.algorithms.feddyn import feddyn
from fedtune.algorithms.fednova import Path as PathOf
from fedtune.algorithms.fednova import fednova
from fedtune.algorithms.fedprox import fedprox
from fedtune.algorithms.qfedavg import qfedavg
from fedtune.algorithms.scaffold import scaffold
from fedtune.algorithms.torch_optim import fedopt
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm
from fedtune.testing import QUADRATICS, quadratics

START, OPTIMUM = 5.0, 7.5
FOUR = ((1.0, 0.0), (3.0, 10.0), (2.0, 4.0), (0.5, -3.0))
UNIFORM = "uniform"
# steps of the clients, and rounds: as many as bring the weight within 1e-10 of where it ends
FIXED_POINTS: dict[str, tuple[Any, tuple[int, int], int, float]] = {
    "fedavg, 10 steps": (fedavg(UNIFORM), (10, 10), 30, 6.668325804777),
    "fedavg, 2 and 20 steps": (fedavg(UNIFORM), (2, 20), 40, 9.079094425286),
    "fednova, 2 and 20 steps": (fednova(0.0, UNIFORM), (2, 20), 30, 4.964468434305),
    "fedprox, mu 1, 10 steps": (fedprox(1.0, UNIFORM), (10, 10), 40, 6.727455376649),
    "scaffold, option 2": (scaffold(2), (2, 20), 40, OPTIMUM),
    "scaffold, option 1": (scaffold(1), (2, 20), 60, OPTIMUM),
    "feddyn, 10 steps": (feddyn(1.0), (10, 10), 80, OPTIMUM),
    "feddyn, 2 and 20 steps": (feddyn(1.0), (2, 20), 200, OPTIMUM),
}


@pytest.mark.parametrize("name", FIXED_POINTS)
def test_the_fixed_point_is_the_known_one(name: str) -> None:
    algorithm, counts, rounds, expected = FIXED_POINTS[name]
    assert quadratics(algorithm, counts, rounds)[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("algorithm", "rate", "steps", "rounds", "expected"),
    [
        (fedprox(0.1, UNIFORM), 0.3, 80, 8, 5.15625),
        (fedprox(1.0, UNIFORM), 0.2, 60, 25, 6.0),
        (fedprox(10.0, UNIFORM), 0.07, 20, 150, 7.173913043478),
        (feddyn(1.0), 0.2, 60, 35, OPTIMUM),
    ],
)
def test_the_fixed_point_with_exact_local_minima(
    algorithm: Algorithm, rate: float, steps: int, rounds: int, expected: float
) -> None:
    assert quadratics(algorithm, (steps, steps), rounds, rate)[0] == pytest.approx(expected, abs=1e-9)


def test_fednova_nears_the_optimum_with_the_rate() -> None:
    # a step of a round is 11 x 5e-5 of the way, on average, so it begins near the end
    for algorithm, w in ((fednova(0.0, UNIFORM), 7.49737), (fedavg(UNIFORM), 9.67698)):
        assert quadratics(algorithm, (2, 20), 1, 5e-5, start=w)[0] == pytest.approx(w, abs=2e-8)  # five digits are known


def test_scaffolds_control_variates_are_the_gradients_at_the_optimum() -> None:
    for option in (1, 2):
        _, state, memory = quadratics(scaffold(option), (2, 20), 60)
        mine = [memory.load(client, 999)["control"]["w"].item() for client in (0, 1)]
        assert mine == pytest.approx([7.5, -7.5], abs=1e-9)
        assert state.memory["Control"]["control"]["w"].item() == pytest.approx(0, abs=1e-9)


def test_scaffolds_control_variate_is_the_mean_of_all_clients_with_partial_cohorts() -> None:
    cohorts = [(0, 1), (2,), (1, 3), (0, 2, 3)]
    for rounds in (1, 2, 3, 5, 8):
        _, state, memory = quadratics(scaffold(), (2, 5, 3, 4), rounds, cohorts=cohorts, functions=FOUR)
        kept = [memory.load(client, 999).get("control", {"w": torch.zeros(1)})["w"].item() for client in range(4)]
        assert state.memory["Control"]["control"]["w"].item() == pytest.approx(sum(kept) / 4, abs=1e-12)
    assert quadratics(scaffold(), (2, 5, 3, 4), 100, cohorts=cohorts, functions=FOUR)[0] == pytest.approx(
        (30 + 8 - 1.5) / 6.5, abs=1e-9
    )


def test_feddyn_ends_where_the_gradients_sum_to_nothing() -> None:
    _, state, memory = quadratics(feddyn(1.0), (10, 10), 80)
    linear = [memory.load(client, 999)["linear"]["w"].item() for client in (0, 1)]
    assert linear == pytest.approx([7.5, -7.5], abs=1e-9)
    assert state.memory["Drift"]["drift"]["w"].item() == pytest.approx(0, abs=1e-9)  # h


@pytest.mark.parametrize(
    ("make", "expected"),
    [(fedadam, (0.09802, -0.09608)), (fedadagrad, (0.0998, -0.0996))],
)
def test_the_first_step_of_an_adaptive_server_has_no_correction_of_bias(make: Any, expected: tuple[float, float]) -> None:
    step = make(learning_rate=0.1).server[0]
    groups = {"update": {"w": torch.tensor([0.5, -0.25], dtype=torch.float64)}}
    moved, _ = step(groups, {}, Context(0, 1, 1, (0,), 1))
    assert moved["update"]["w"].tolist() == pytest.approx(expected, abs=5e-6)


def test_yogis_second_moment_moves_by_its_sign() -> None:
    step, groups = fedyogi(learning_rate=0.1, tau=0.1).server[0], {"update": {"w": torch.tensor([0.5, 0.05]).double()}}
    _, memory = step(groups, {}, Context(0, 1, 1, (0,), 1))
    # v = 0.01: the first square is above, the second below
    assert memory["second"]["w"].tolist() == pytest.approx([0.01 + 0.01 * 0.25, 0.01 - 0.01 * 0.0025])


def test_fednovas_normalisers() -> None:
    with_momentum, with_mu, both_schedules = PathOf(0.0), PathOf(1.0), PathOf(0.0)
    for _ in range(3):
        with_momentum.step(1.0, momentum=0.9)
    assert with_momentum.length == pytest.approx(5.61)
    for _ in range(10):
        with_mu.step(0.05)
    assert with_mu.length / 0.05 == pytest.approx(8.0252612, abs=5e-8)
    for rate in (0.3, 0.2, 0.1):
        both_schedules.step(rate)
    assert both_schedules.length == pytest.approx(0.6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_fednovas_normaliser_is_how_far_an_optimizer_goes_with_gradients_of_one(nesterov: bool) -> None:
    weight, path, settings = nn.Parameter(torch.zeros(1).double()), PathOf(0.0), {"momentum": 0.8, "nesterov": nesterov}
    optimizer = torch.optim.SGD([weight], 0.1, weight_decay=0.3, **settings)
    for _ in range(6):
        weight.grad = -torch.ones(1).double()
        optimizer.step()
        path.step(0.1, weight_decay=0.3, **settings)
    assert path.length == pytest.approx(weight.item())


def test_fednova_with_momentum_and_equal_steps_is_fedavg() -> None:
    one, other = (quadratics(algorithm, (5, 5), 7, momentum=0.9)[0] for algorithm in (fednova(0.0, UNIFORM), fedavg(UNIFORM)))
    assert one == pytest.approx(other, abs=1e-9)


def test_q_fedavg_is_its_formula() -> None:
    q, rate, updates, losses = 2.0, 0.05, [], []
    for a, b in QUADRATICS:
        w = START
        losses.append(a / 2 * (w - b) ** 2)
        for _ in range(4):
            w -= rate * a * (w - b)
        updates.append(w - START)
    top = sum(loss**q * update / rate for loss, update in zip(losses, updates, strict=True))
    bottom = sum(q * f ** (q - 1) * (u / rate) ** 2 + f**q / rate for f, u in zip(losses, updates, strict=True))
    found = quadratics(qfedavg(q), (4, 4), 1, rate, update_limit=2.0**20)[0]
    assert found == pytest.approx(START + top / bottom, abs=1e-9)


def test_dittos_own_models_are_between_the_shared_and_the_local_optimum() -> None:
    strength = 1.0
    shared, _, memory = quadratics(ditto(strength, 0, UNIFORM), (10, 10), 30)
    assert shared == pytest.approx(6.668325804777, abs=1e-9)
    for client, (a, b) in enumerate(QUADRATICS):
        own = memory.load(client, 999)["personal"]["w"].item()
        assert own == pytest.approx((a * b + strength * shared) / (a + strength), abs=1e-9)


def test_any_optimizer_of_torch_at_the_server_is_that_optimizer() -> None:
    weight = torch.tensor([START], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.8, 0.95), weight_decay=0.1)
    for _ in range(5):
        w = weight.item()
        ends = [b + (w - b) * (1 - 0.05 * a) ** 3 for a, b in QUADRATICS]
        weight.grad = torch.tensor([w - sum(ends) / 2], dtype=torch.float64)
        optimizer.step()
    settings = {"betas": [0.8, 0.95], "weight_decay": 0.1}
    found = quadratics(fedopt("AdamW", 0.1, settings, UNIFORM), (3, 3), 5)[0]  # type: ignore[arg-type]
    assert found == pytest.approx(weight.item(), abs=1e-9)
