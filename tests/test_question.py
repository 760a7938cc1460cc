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
def study() -> Any:
    return importlib.import_module("study")


@pytest.fixture
def laws() -> Any:
    return importlib.import_module("laws")


def test_every_run_has_a_name_of_its_own(study: Any) -> None:
    cells = [cell for part in study.PARTS.values() for cell in part()]
    assert {cell.part for cell in cells} == set(study.PARTS)
    assert len({cell.name for cell in cells}) == len(set(cells)) == len(cells)
    assert {cell.seed for cell in cells} == {0, 1}
    own = [(cell.client_steps, study.STEPS // cell.clients) for cell in cells]  # of a round, and of an epoch
    assert all(steps <= epoch or steps % epoch == 0 for steps, epoch in own)


def test_no_effect_of_the_screening_is_that_of_another_factor_or_of_two(study: Any, laws: Any) -> None:
    runs = [vars(cell) for cell in study.screening() if cell.task == "authors" and cell.seed == 0]
    signs = np.array([[2 * of(run) - 1 for of in laws.FACTORS.values()] for run in runs])
    assert signs.shape == (16, 8)
    assert (signs.T @ signs == 16 * np.eye(8)).all()
    pairs = [signs[:, i] * signs[:, j] for i, j in itertools.combinations(range(8), 2)]
    assert not (np.array(pairs) @ signs).any()  # resolution IV


def test_a_law_is_found_in_runs_of_which_some_did_not_end(laws: Any) -> None:
    rng = np.random.default_rng(0)
    doses = rng.uniform(0, 3, 60)
    times = np.exp(1 + 0.7 * doses + rng.normal(0, 0.2, 60))
    runs = [{"dose": dose, "left": time if time < 12 else None, "last": 12.0} for dose, time in zip(doses, times, strict=True)]
    fit = laws.Fit(runs, {"dose": lambda run: run["dose"]})
    assert fit.seen < 45
    assert fit.value["dose"] == pytest.approx(0.7, abs=0.1)
    assert abs(fit.value["dose"] - 0.7) < fit.half["dose"] < 0.15
    assert fit.sigma == pytest.approx(0.2, abs=0.06)
    plain = np.polyfit(doses[times < 12], np.log(times[times < 12]), 1)[0]
    assert plain < fit.value["dose"] - 0.02  # what leaves them out is too flat


def test_as_many_coefficients_as_runs_have_no_interval(laws: Any) -> None:
    runs = [{"many": many, "left": left, "last": 90.0} for many, left in ((0, 48.0), (1, 49.0))]
    assert laws.Fit(runs, {"many": lambda run: run["many"]}).said("many", power=True) == "1.02 (too few runs for an interval)"


def test_leaving_chance_is_read_from_a_curve(laws: Any, tmp_path: Path) -> None:
    guess = math.log(3)
    losses, accuracies = [guess, guess - 0.02, guess - 0.07, guess - 0.2], [0.40, 0.50, 0.42, 0.55]
    evaluated = [
        {"round": number, "accuracy": accuracy, "loss_nats": loss}
        for number, (accuracy, loss) in enumerate(zip(accuracies, losses, strict=True), 1)
    ]
    run = {"task": "spooky_author", "entropy": guess, "majority": 0.4, "steps": 10, "clients": 1, "rounds_evaluated": evaluated}
    (tmp_path / "runs.jsonl").write_text(f"{json.dumps(run)}\n{json.dumps(run | {'rounds_evaluated': evaluated[:2]})}\n")
    left, stayed = laws.read(tmp_path / "runs.jsonl")
    assert left["left"] == pytest.approx(20 + 10 * 0.03 / 0.05)  # on the line between 0.02 and 0.07
    assert left["left_by_accuracy"] == 40  # the second evaluation was above, but it did not stay
    assert (stayed["left"], stayed["last"]) == (None, 20)


@pytest.mark.parametrize("head", ["pooler", "tanh", "relu", "none"])
def test_a_head_reads_what_it_says_and_gamma_scales_it(head: str, tmp_path: Path) -> None:
    heads, name = importlib.import_module("heads"), save_tiny_bert(tmp_path)
    found = {}
    for gamma in (1.0, 2.0):
        with seeded(0, "model"):
            module = heads.Bert(name, 3, head=head, gamma=gamma).eval()
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
    with pytest.raises(UsageError, match="head: got 'sigmoid'; allowed: pooler, tanh, relu, none"):
        heads.Bert(name, 3, head="sigmoid")


def test_the_speed_that_a_budget_needs_is_the_laws(laws: Any) -> None:
    rng = np.random.default_rng(1)
    speeds = {str(number): speed for number, speed in enumerate(np.geomspace(0.003, 0.3, 40))}
    runs = [
        {"head": head, "gamma": 1.0, "rate": 0.1, "left": 10 * 0.2 * speed**-0.6 * math.exp(rng.normal(0, 0.1)), "last": 1e9}
        for head, speed in speeds.items()
    ]
    (value, low, high), (less, *_) = laws.speed_needed(laws.law(runs, speeds), [2.0, 4.0])
    assert value == pytest.approx((2.0 / 0.2) ** (-1 / 0.6), rel=0.1)
    assert low < value < high
    assert (high / low) ** (0.6 / 2 / 1.96) == pytest.approx(math.exp(0.1), rel=0.05)  # one model from another
    assert less < value


def test_runs_are_compared_with_a_law_of_other_runs(laws: Any) -> None:
    runs = [
        {"head": head, "gamma": gamma, "rate": rate, "left": 0.3 / rate * (gamma**2 * laws.SPEED[head]) ** -0.6, "last": 1e9}
        for head, gamma, rate in itertools.product(laws.SPEED, (0.5, 2.0), (0.01, 0.1))
    ]
    fit = laws.law(runs)
    assert fit.value["log size"] == pytest.approx(-0.6, abs=1e-3)
    later = [run | {"left": run["left"] * factor} for run, factor in zip(runs, itertools.cycle((1.2, 1.4)), strict=False)]
    off = laws.by_the_law(later, fit)
    assert math.exp(off.value["constant"]) == pytest.approx(math.sqrt(1.2 * 1.4), rel=1e-3)
    assert off.seen == off.runs == 24


def test_an_epoch_of_many_clients_has_few_steps(laws: Any) -> None:
    runs = [{"clients": clients, "left": 48.0 + extra, "last": 90.0} for clients in (1, 4, 16, 32) for extra in (-1, 1)]
    fit = laws.epochs(runs, {"log K": laws.log_of("clients")})
    assert fit.value["log K"] == pytest.approx(1, abs=1e-3)
    assert math.exp(fit.value["constant"]) == pytest.approx(48 / 64, rel=1e-2)
