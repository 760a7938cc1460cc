"""The study of experiments/question: its design, its heads, and what is read out of its records."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_tiny_bert

from fedtune.errors import UsageError
from fedtune.randomness import seeded

FOLDER = Path(__file__).parent.parent / "experiments" / "question"


@pytest.fixture(scope="module", autouse=True)
def _found() -> Any:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture
def design() -> Any:
    return importlib.import_module("design")


@pytest.fixture
def records() -> Any:
    return importlib.import_module("records")


@pytest.fixture
def fits() -> Any:
    return importlib.import_module("fits")


@pytest.fixture
def laws() -> Any:
    return importlib.import_module("laws")


def test_every_run_has_a_name_of_its_own(design: Any) -> None:
    cells = [cell for part in design.PARTS.values() for cell in part()]
    assert {cell.part for cell in cells} == set(design.PARTS) - {"fixed_budget"}  # these are remedies, too
    assert len({cell.name for cell in cells}) == len(set(cells)) == len(cells)
    assert {cell.seed for cell in cells} == {0, 1}
    own = [(cell.client_steps, design.STEPS // cell.clients) for cell in cells]  # of a round, and of an epoch
    assert all(steps <= epoch or steps % epoch == 0 for steps, epoch in own)


def test_no_effect_of_the_screening_is_that_of_another_factor_or_of_two(design: Any, fits: Any) -> None:
    runs = [vars(cell) for cell in design.screening() if cell.task == "authors" and cell.seed == 0]
    signs = np.array([[2 * of(run) - 1 for of in fits.FACTORS.values()] for run in runs])
    assert signs.shape == (16, 8)
    assert (signs.T @ signs == 16 * np.eye(8)).all()
    pairs = [signs[:, i] * signs[:, j] for i, j in itertools.combinations(range(8), 2)]
    assert not (np.array(pairs) @ signs).any()  # resolution IV


def test_a_law_is_found_in_runs_of_which_some_did_not_end(fits: Any) -> None:
    rng = np.random.default_rng(0)
    doses = rng.uniform(0, 3, 60)
    times = np.exp(1 + 0.7 * doses + rng.normal(0, 0.2, 60))
    runs = [{"dose": dose, "left": time if time < 12 else None, "last": 12.0} for dose, time in zip(doses, times, strict=True)]
    fit = fits.Fit(runs, {"dose": lambda run: run["dose"]})
    assert fit.seen < 45
    assert fit.value["dose"] == pytest.approx(0.7, abs=0.1)
    assert abs(fit.value["dose"] - 0.7) < fit.half["dose"] < 0.15
    assert fit.sigma == pytest.approx(0.2, abs=0.06)
    plain = np.polyfit(doses[times < 12], np.log(times[times < 12]), 1)[0]
    assert plain < fit.value["dose"] - 0.02  # what leaves them out is too flat


def test_as_many_coefficients_as_runs_have_no_interval(fits: Any) -> None:
    runs = [{"many": many, "left": left, "last": 90.0} for many, left in ((0, 48.0), (1, 49.0))]
    assert fits.Fit(runs, {"many": lambda run: run["many"]}).said("many", power=True) == "1.02 (too few runs for an interval)"


def test_leaving_chance_is_read_from_a_curve(records: Any, tmp_path: Path) -> None:
    guess = math.log(3)
    losses, accuracies = [guess, guess - 0.02, guess - 0.07, guess - 0.2], [0.40, 0.50, 0.42, 0.55]
    evaluated = [
        {"round": number, "accuracy": accuracy, "loss_nats": loss}
        for number, (accuracy, loss) in enumerate(zip(accuracies, losses, strict=True), 1)
    ]
    run = {"task": "spooky_author", "entropy": guess, "majority": 0.4, "steps": 10, "clients": 1, "rounds_evaluated": evaluated}
    (tmp_path / "runs.jsonl").write_text(f"{json.dumps(run)}\n{json.dumps(run | {'rounds_evaluated': evaluated[:2]})}\n")
    left, stayed = records.read(tmp_path / "runs.jsonl")
    assert left["left"] == pytest.approx(20 + 10 * 0.03 / 0.05)  # on the line between 0.02 and 0.07
    assert left["left_by_accuracy"] == 40  # the second evaluation was above, but it did not stay
    assert (stayed["left"], stayed["last"]) == (None, 20)


@pytest.mark.parametrize("head", ["pooler", "tanh", "saturated", "trained", "relu", "none"])
def test_a_head_reads_what_it_says_and_gamma_scales_it(head: str, tmp_path: Path) -> None:
    heads, name = importlib.import_module("heads"), save_tiny_bert(tmp_path)
    weights, found = torch.nn.Linear(16, 16).state_dict(), {}
    torch.save({f"dense.{name}": value for name, value in weights.items()}, tmp_path / "pooler.pt")
    given = {"pooler": str(tmp_path / "pooler.pt")} if head == "trained" else {}
    for gamma in (1.0, 2.0):
        with seeded(0, "model"):
            module = heads.Bert(name, 3, head=head, gamma=gamma, **given).eval()
        with torch.no_grad():
            ids = torch.tensor([[2, 6, 7, 3]])
            first = module.network.bert(ids).last_hidden_state[:, 0]
            logits = module(ids, torch.ones_like(ids))
        layer, dense = module.network.classifier, getattr(module.network.bert.pooler, "dense", None)
        act = {"relu": torch.relu, "none": lambda given: given}.get(head, torch.tanh)
        read = act(first if dense is None else dense(first))
        assert torch.allclose(logits, gamma * read @ layer.weight.T + layer.bias, atol=1e-5)
        found[gamma] = logits - layer.bias
    assert torch.allclose(2 * found[1.0], found[2.0], atol=1e-5)
    if head == "trained":
        assert torch.equal(dense.weight, weights["weight"])
    with pytest.raises(UsageError, match="head: got 'sigmoid'; allowed: pooler, tanh, saturated, trained, relu, none"):
        heads.Bert(name, 3, head="sigmoid")


def test_a_mean_of_each_seed_is_no_part_of_a_slope(fits: Any) -> None:
    rng = np.random.default_rng(3)
    runs = [
        {"seed": seed, "dose": dose, "left": math.exp(1 + 0.7 * dose + seed + rng.normal(0, 0.05)), "last": 1e9}
        for seed, doses in ((0, np.linspace(0, 2, 20)), (1, np.linspace(1, 3, 20)))
        for dose in doses
    ]
    fit = fits.Fit(runs, {"dose": lambda run: run["dose"]})
    assert fit.value["dose"] == pytest.approx(0.7, abs=0.03)
    assert fit.value["seed"] == pytest.approx(1, abs=0.06)


def test_the_speed_that_a_budget_needs_is_the_power_laws(laws: Any) -> None:
    rng = np.random.default_rng(1)
    runs = [
        {"gamma": 1.0, "rate": 0.1, "speed": speed, "left": 10 * 0.2 * speed**-0.6 * math.exp(rng.normal(0, 0.1)), "last": 1e9}
        for speed in np.geomspace(0.003, 0.3, 40)
    ]
    (value, low, high), (less, *_) = laws.Power(runs).speed_needed([2.0, 4.0])
    assert value == pytest.approx((2.0 / 0.2) ** (-1 / 0.6), rel=0.1)
    assert low < value < high
    assert (high / low) ** (0.6 / 2 / 1.96) == pytest.approx(math.exp(0.1), rel=0.05)  # one model from another
    assert less < value


def growing(laws: Any, k: float, noise: float = 0.0) -> list[dict[str, Any]]:
    """Runs in which last layer and features grow together, as equations of two scalars have it."""
    rng, runs = np.random.default_rng(2), []
    for gamma, speed, rate in itertools.product((0.5, 1.0, 2.0, 4.0), (0.01, 0.1), (0.01, 0.1)):
        learned, step = 0.0, 1e-3  # of rate x steps; the derivative of what is learned begins with the speed
        time = 0.0
        while learned * 0.65 < laws.NATS:
            learned += step * gamma**2 * speed * math.cosh(2 * k * gamma * time)
            time += step
        left = time / rate * math.exp(rng.normal(0, noise))
        runs.append({"gamma": gamma, "rate": rate, "speed": speed, "residual": 0.65, "left": left, "last": 1e9})
    return runs


def test_growth_is_found_in_runs_that_grow(laws: Any) -> None:
    runs = growing(laws, 0.4, noise=0.05)
    law = laws.Growth(runs)
    assert law.k == pytest.approx(0.4, rel=0.1)
    assert law.sigma == pytest.approx(0.05, abs=0.02)
    other = growing(laws, 0.4)
    assert all(law.dose(run) == pytest.approx(run["rate"] * run["left"], rel=0.1) for run in other)
    for run in (run for run in other if run["gamma"] == 1):  # read backwards, it is the speed that was given
        value, low, high = laws.Growth(other).speed_needed([run["rate"] * run["left"]], residual=0.65)[0]
        assert low <= value <= high
        assert value == pytest.approx(run["speed"], rel=0.05)
    alone = {"trained": "last", "residual": 0.65, "gamma": 2.0, "last_speed": 0.02}
    assert law.dose(alone) == pytest.approx(laws.NATS / (0.65 * 4 * 0.02))  # features that do not learn do not grow


def test_runs_are_compared_with_a_law_of_other_runs(laws: Any) -> None:
    runs = growing(laws, 0.4)
    law = laws.Growth(runs)
    later = [run | {"left": run["left"] * factor} for run, factor in zip(runs, itertools.cycle((1.2, 1.4)), strict=False)]
    off = laws.against(later, law)
    assert math.exp(off.value["constant"]) == pytest.approx(math.sqrt(1.2 * 1.4), rel=0.03)
    assert off.seen == off.runs == 16


def test_an_epoch_of_many_clients_has_few_steps(fits: Any, records: Any) -> None:
    runs = [{"clients": clients, "left": 48.0 + extra, "last": 90.0} for clients in (1, 4, 16, 32) for extra in (-1, 1)]
    fit = fits.Fit([records.in_epochs(run) for run in runs], {"log K": records.log_of("clients")})
    assert fit.value["log K"] == pytest.approx(1, abs=1e-3)
    assert math.exp(fit.value["constant"]) == pytest.approx(48 / 64, rel=1e-2)
