"""Privacy of the examples of each client: gradients of single examples, the noisy step, the accounting, runs and refusals."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import transformers
from conftest import GivenLoaders, assert_equal, data_maker, make_loop, make_task, module_maker, weights_of, without_times
from decoders import make_chats, save_decoder
from test_families import TINY, save_tokenizer
from test_torchrun import ranks
from torch.utils.data import DataLoader

import fedtune
from fedtune.algorithms.fedavg import Mean
from fedtune.errors import RunError, UsageError
from fedtune.federated.agreement import Agreement
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.state import RoundResult, ServerState
from fedtune.privacy import gradients
from fedtune.privacy.accountant import epsilon_by
from fedtune.privacy.examples import ExamplePlan, example_plan
from fedtune.privacy.gradients import apart, hooked
from fedtune.privacy.mechanisms import ExampleGaussian, privacy_of
from fedtune.privacy.sampling import Sampling
from fedtune.privacy.steps import NoisySum
from fedtune.privacy.trial import _places
from fedtune.runs.flags import resolve
from fedtune.storage.records import read_rounds
from fedtune.tensors import Groups, sha256
from fedtune.testing import TinyData, TinyModule

accounting = pytest.importorskip("dp_accounting")
pytest.importorskip("opacus")
Make = Callable[..., Any]
Gradients = dict[str, torch.Tensor]
LORA = {"rank": 2, "alpha": 4}

# ---------------------------------------------------------------- gradients of single examples

CASES = {
    f"{family}, {how}, {way}": (family, how, way)
    for family in ("bert", "distilbert", "albert")
    for how in ("full", "lora")
    for way in ("packed", "padded")
}
CASES |= {
    f"{family}, {how}, padded": (family, how, "padded") for family in ("roberta", "modernbert") for how in ("full", "lora")
}
DECODERS = ("llama", "qwen2", "gpt2")
CASES |= {f"{family}, lora, padded": (family, "lora", "padded") for family in DECODERS}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {family: save_decoder(tmp_path_factory.mktemp(family), family) for family in DECODERS}
    for family in TINY:
        path = tmp_path_factory.mktemp("family") / family
        torch.manual_seed(0)
        transformers.AutoModel.from_config(TINY[family]).save_pretrained(path)
        save_tokenizer(path)
        found[family] = str(path)
    return found


def made(folders: dict[str, str], family: str, how: str, way: str) -> tuple[Any, Any]:
    """A module without dropout, whose weights are not at their start, and a batch of seven texts of different lengths."""
    lora = LORA if how == "lora" else None
    if family in DECODERS:
        module: Any = fedtune.CausalLM(folders[family], lora=lora, dropout=0.0 if family == "gpt2" else None)
        data = fedtune.FederatedDataModule(make_chats(), folders[family], num_clients=1, batch_size=7, max_length=64)
    else:
        more = {"dropout": 0.0, "lora": lora, "padding_free": way == "packed"}
        module = fedtune.build_classifier(folders[family], 3, **more)
        data = fedtune.FederatedDataModule(make_task(), folders[family], num_clients=1, batch_size=7, max_length=24)
    torch.manual_seed(3)
    with torch.no_grad():
        for one in module.parameters():
            one.add_(torch.randn_like(one), alpha=0.2)
    module.log = lambda *_, **__: None
    return module, next(iter(data.client_dataloader(0)))


def rows_of(batch: dict[str, torch.Tensor], rows: list[int]) -> dict[str, torch.Tensor]:
    return {name: tensor[rows] for name, tensor in batch.items()}


def by_hand(module: Any, batch: dict[str, torch.Tensor]) -> list[Gradients]:
    """The gradient of each example, found alone, by ordinary means."""
    named, found = {name: one for name, one in module.named_parameters() if one.requires_grad}, []
    for row in range(len(batch["labels"])):
        grads = torch.autograd.grad(module.training_step(rows_of(batch, [row]), 0), list(named.values()), allow_unused=True)
        zipped = zip(named.items(), grads, strict=True)
        found.append({name: torch.zeros_like(one) if grad is None else grad for (name, one), grad in zipped})
    return found


def noisy(module: Any, batch: Any, clip: float, noise: float = 0.0, denominator: float = 1.0, seed: int = 0) -> Gradients:
    """What a step's gradients become."""
    made_sum = NoisySum(module, clip, noise, denominator, np.random.default_rng(seed))
    made_sum.expected.append(1)
    with apart(module), hooked(module):
        module.training_step(batch, 0).backward()
        made_sum.add(len(batch["labels"]))
        made_sum.finish()
    found = {name: one.grad.clone() for name, one in module.named_parameters() if one.requires_grad}
    module.zero_grad()
    return found


def length(grads: Gradients) -> float:
    return math.sqrt(sum(float(one.double().square().sum()) for one in grads.values()))


@pytest.mark.parametrize("case", CASES)
def test_without_noise_and_with_a_huge_clip_the_step_is_the_plain_one(case: str, folders: dict[str, str]) -> None:
    module, batch = made(folders, *CASES[case])
    found = noisy(module, batch, clip=1e6, denominator=7)
    if (
        CASES[case][0] in DECODERS
    ):  # their plain loss is the mean over all answer tokens, that of examples the mean of their means
        alone = by_hand(module, batch)
        plain = {name: torch.stack([one[name] for one in alone]).mean(0) for name in found}
    else:
        module.training_step(batch, 0).backward()
        named = {name: one.grad for name, one in module.named_parameters() if one.requires_grad}
        plain = {name: torch.zeros_like(found[name]) if grad is None else grad for name, grad in named.items()}
    assert any("lora_A" in name for name in found) == (CASES[case][1] == "lora")
    assert all(float(plain[name].abs().max()) > 1e-6 for name in plain if "lora" in name)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name], rtol=2e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", CASES)
def test_each_example_counts_for_at_most_the_clip(case: str, folders: dict[str, str]) -> None:
    module, batch = made(folders, *CASES[case])
    alone = by_hand(module, batch)
    lengths = sorted(map(length, alone))
    clip = lengths[3]  # some are cut, some are not
    whole, count = noisy(module, batch, clip), len(alone)
    factors = [min(1.0, clip / length(one)) for one in alone]
    for name, total in whole.items():
        expected = sum(factor * one[name] for factor, one in zip(factors, alone, strict=True))
        torch.testing.assert_close(total, expected, rtol=1e-4, atol=2e-5 * clip)
    moved = []
    for row in range(count):
        less = noisy(module, rows_of(batch, [other for other in range(count) if other != row]), clip)
        moved.append(length({name: whole[name] - less[name] for name in whole}))
    assert max(moved) <= clip
    assert max(moved) > 0.999 * clip
    short = min(range(count), key=lambda row: length(alone[row]))
    assert moved[short] == pytest.approx(length(alone[short]), rel=1e-3)


def test_a_step_in_parts_is_the_step(folders: dict[str, str]) -> None:
    module, batch = made(folders, "bert", "full", "packed")
    whole = noisy(module, batch, 0.5, noise=1.0)
    parts = NoisySum(module, 0.5, 1.0, 1.0, np.random.default_rng(0))
    parts.expected.append(2)
    with apart(module), hooked(module):
        for rows in ([0, 1, 2], [3, 4, 5, 6]):
            module.training_step(rows_of(batch, rows), 0).backward()
            parts.add(len(rows))
        parts.finish()
    for name, one in module.named_parameters():
        torch.testing.assert_close(one.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_nothing_of_the_hooks_stays_in_the_module(folders: dict[str, str]) -> None:
    module, batch = made(folders, "bert", "lora", "packed")
    before = {name: set(vars(part)) for name, part in module.named_modules()}
    noisy(module, batch, 1.0)
    left = {name: set(vars(part)) - before[name] for name, part in module.named_modules()}
    assert {name: those for name, those in left.items() if those - {"apart", "activations", "_packed"}} == {}
    assert not module.apart
    assert not any(part._forward_hooks or part._backward_hooks for part in module.modules())
    assert not any(hasattr(one, "grad_sample") for one in module.parameters())
    torch.testing.assert_close(module.training_step(batch, 0), module.training_step(batch, 0))


# ---------------------------------------------------------------- noise and sampling


def linear(size: int) -> Any:
    return torch.nn.Linear(size, 1, bias=False)


def test_noise_has_the_deviation_that_is_accounted_for_also_in_a_step_without_examples() -> None:
    size, clip, noise, denominator = 400_000, 0.5, 1.3, 8
    module = linear(size)
    made_sum = NoisySum(module, clip, noise, denominator, np.random.default_rng(0))
    drawn = []
    for _ in range(2):
        made_sum.expected.append(0)
        made_sum.finish()
        drawn.append(module.weight.grad.double().numpy().copy())
    deviation = noise * clip / denominator
    for one in drawn:
        assert abs(one.mean()) < 4 * deviation / math.sqrt(size)
        assert abs(one.std() / deviation - 1) < 4 / math.sqrt(2 * size)
        within = [np.mean(np.abs(one) < k * deviation) for k in (1, 2, 3)]
        assert np.allclose(within, [0.682689, 0.954500, 0.997300], atol=3e-3)
    assert abs(np.corrcoef(drawn[0].ravel(), drawn[1].ravel())[0, 1]) < 4 / math.sqrt(size)


def test_noise_is_added_to_the_sum_and_does_not_depend_on_it(folders: dict[str, str]) -> None:
    module, batch = made(folders, "bert", "lora", "packed")
    alone, other = noisy(module, batch, 0.5, 1.0, 4), noisy(module, batch, 0.5, 1.0, 4, seed=1)
    plain = noisy(module, batch, 0.5, 0.0, 4)
    first = next(iter(plain))
    rng = np.random.default_rng(0)
    for name, gradient in plain.items():
        drawn = torch.from_numpy(rng.standard_normal(tuple(gradient.shape), dtype=np.float32))
        torch.testing.assert_close(alone[name], gradient + drawn * 0.5 / 4, rtol=1e-4, atol=1e-6)
    assert not torch.equal(alone[first], other[first])


class Noted(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Knows who was drawn."""

    def __init__(self, count: int) -> None:
        self.count, self.drawn = count, list[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.drawn.append(place)
        return torch.full((3,), float(place)) / self.count, torch.tensor(place % 2)


class Scores(pl.LightningModule):
    """A linear classifier of three numbers."""

    def __init__(self, reduction: str = "mean", normed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.BatchNorm1d(3, affine=False, track_running_stats=False) if normed else torch.nn.Identity()
        self.layer, self.reduction, self.sizes = torch.nn.Linear(3, 2), reduction, list[int]()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.sizes.append(len(batch[1]))
        return torch.nn.functional.cross_entropy(self.layer(self.norm(batch[0])), batch[1], reduction=self.reduction)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", (self.layer(self.norm(batch[0])).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loaders(counts: list[int], size: int, **more: Any) -> tuple[GivenLoaders, list[Noted]]:
    sets = [Noted(count) for count in counts]
    made_of = [DataLoader(one, batch_size=size, **more) for one in sets]
    return GivenLoaders(made_of, [(torch.rand(4, 3), torch.tensor([0, 1, 0, 1]))]), sets


SCORES = {"name": "ExampleGaussian", "noise": 1.0, "delta": 1e-4}


def test_examples_are_drawn_by_chance_at_their_rate_and_steps_without_any_are_made() -> None:
    data, sets = loaders([100], 5)
    module = Scores()
    loop = make_loop(max_rounds=20, privacy=SCORES, local_epochs=1)
    loop.fit(module, data)
    tried = 32 + 4 + 4  # of the trial: some looked at for their sizes, and four together, and each alone
    sizes, drawn = np.array(module.sizes[1 + 4 :]), np.bincount(sets[0].drawn[tried:], minlength=100)
    assert [record.num_steps for record in loop.history] == [20] * 20
    empty = 400 - len(sizes)  # a step without examples has no batch
    assert 0 < empty < 400 * 0.02  # (1 - 0.05)^100 = 0.006
    assert sizes.sum() / 400 == pytest.approx(5, abs=4 * math.sqrt(5 * 0.95 / 400))
    assert sizes.std() == pytest.approx(math.sqrt(5 * 0.95), rel=0.15)
    assert drawn.sum() == sizes.sum()
    assert drawn.min() > 3
    assert drawn.max() < 45
    assert {record.num_examples for record in loop.history} == {100}  # whoever was drawn
    other = Scores()
    make_loop(max_rounds=20, privacy=SCORES, seed=1).fit(other, loaders([100], 5)[0])
    assert other.sizes != module.sizes


def test_a_client_of_whom_nobody_was_drawn_has_noise_and_no_loss(tmp_path: Path) -> None:
    data, _ = loaders([4, 4], 1)
    loop = make_loop(max_rounds=6, privacy=SCORES, limit_train_batches=1, run_dir=str(tmp_path), seed=2)
    loop.fit(Scores(), data)
    silent = [one for record in loop.history for one in record.clients if math.isnan(one.train_loss_nats)]
    assert silent
    assert all(one.update_norm > 0 and one.num_examples == 1 for one in silent)
    assert any(math.isfinite(record.train_loss_nats) for record in loop.history)
    assert len(read_rounds(tmp_path / "rounds.jsonl")) == 6  # what was written is read again


# ---------------------------------------------------------------- accounting


def test_epsilon_is_that_of_the_accounting_library_for_the_steps_made() -> None:
    samplings = (Sampling(1000, 32, 32), Sampling(200, 32, 7), Sampling(20, 20, 1))
    plan = example_plan(ExampleGaussian(noise=1.1, delta=1e-5), samplings, 0, None, 2, 10)
    for client, one in enumerate(samplings):
        gaussian = accounting.dp_event.GaussianDpEvent(1.1)
        rate = min(1.0, 32 / one.examples)
        event = accounting.dp_event.PoissonSampledDpEvent(rate, gaussian) if rate < 1 else gaussian
        count = one.steps * 2 * 10
        for name, accountant in (("rdp", accounting.rdp.RdpAccountant()), ("pld", accounting.pld.PLDAccountant())):
            expected = accountant.compose(event, count).get_epsilon(1e-5)
            assert plan.epsilons(name, 10)[client] == pytest.approx(expected, rel=1e-9 if name == "rdp" else 1e-4)
    figures = plan.figures(10)
    assert figures["epsilon_pld"] == max(plan.epsilons("pld", 10))
    assert figures["epsilon_rdp_least"] == min(plan.epsilons("rdp", 10))
    assert figures["epsilon_pld"] < figures["epsilon_rdp"]
    assert figures["sampling_rate"] == 1.0
    assert figures["sampling_rate_least"] == 0.032


def test_noise_is_found_for_each_client_and_rounds_are_those_in_which_it_is_drawn() -> None:
    samplings = (Sampling(1000, 32, 32), Sampling(200, 32, 7), Sampling(100, 32, 4))
    mechanism = ExampleGaussian(epsilon=4.0, rounds=6)
    plan = example_plan(mechanism, samplings, 0, 2, 1, 6)
    each = plan.epsilons("pld", 6)
    assert len(set(plan.noises)) == 3
    assert all(3.99 < epsilon <= 4.0 for epsilon in each)
    assert plan.limit == 6
    drawn = sum(client in plan.cohort(0, number) for number in range(1, 7) for client in (0,))
    assert each[0] == pytest.approx(epsilon_by("pld", plan.release(0), drawn * 32, 1e-5), rel=5e-5)


def test_a_limit_is_that_of_the_client_whose_budget_is_used_up_first() -> None:
    samplings = (Sampling(1000, 32, 32), Sampling(100, 32, 4))
    plan = example_plan(ExampleGaussian(noise=2.0, epsilon=3.0), samplings, 0, None, 1, 1000)
    assert plan.limit is not None
    assert max(plan.epsilons("pld", plan.limit)) <= 3.0 < max(plan.epsilons("pld", plan.limit + 1))
    assert example_plan(ExampleGaussian(noise=2.0, epsilon=3.0), samplings, 0, None, 1, 2).limit is None
    with pytest.raises(UsageError, match=r"privacy\.epsilon: got 0\.01; allowed: .* which a round of client 1 needs"):
        example_plan(ExampleGaussian(noise=2.0, epsilon=0.01), samplings, 0, None, 1, 10)


# ---------------------------------------------------------------- runs

PRIVATE = {"name": "ExampleGaussian", "noise": 0.8, "clip": 0.5}
EIGHT = {"num_clients": 4, "batch_size": 4}


def run(make_data: Make, make_module: Make, rounds: int = 3, **options: Any) -> tuple[fedtune.FederatedLoop, Gradients]:
    module = make_module(**options.pop("model", {}))
    loop = make_loop(**({"max_rounds": rounds, "clients_per_round": 2, "privacy": PRIVATE} | options))
    loop.fit(module, make_data(**(EIGHT | options.pop("data", {}))))
    return loop, weights_of(module)


@pytest.mark.parametrize("how", ["full", "lora"])
def test_a_run_is_resumed_bit_for_bit_with_its_ledger(how: str, make_data: Make, make_module: Make, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": {"lora": LORA if how == "lora" else None}, "algorithm": "fedadam"}
    whole, weights = run(make_data, make_module, **options)
    folder = str(tmp_path / "run")
    run(make_data, make_module, rounds=1, run_dir=folder, **options)
    again, others = run(make_data, make_module, run_dir=folder, **options)
    assert_equal(weights, others)
    assert without_times(whole.history) == without_times(again.history)
    epsilons = [record.diagnostics["epsilon_rdp"] for record in again.history]
    assert epsilons == sorted(epsilons)
    assert isinstance(again.plan, ExamplePlan)
    assert epsilons[-1] == pytest.approx(again.summary["epsilon_rdp"], rel=1e-9)
    kept = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert kept["epsilon_pld_least"] <= kept["epsilon_pld"] < kept["epsilon_rdp"]
    for words in (
        "example-level differential privacy within each client after 3 rounds",
        "by RDP",
        "by PLD",
        "at delta 1e-05",
        "unit: an example of a client",
        "neighbours: the examples of a client with one more or less",
        "sampling: Poisson",
        "denominator: 4, whoever is drawn",
        "clip: 0.5",
        "noise: normal, standard deviation 0.8 clips",
        "not covered: how many examples a client has",
    ):
        assert words in kept["privacy"]
    assert "example-level differential privacy" in (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UsageError, match=r"loop\.privacy"):
        run(make_data, make_module, rounds=5, run_dir=folder, **(options | {"privacy": PRIVATE | {"noise": 0.9}}))


def test_a_clients_noise_does_not_depend_on_who_else_is_there(make_data: Make, make_module: Make) -> None:
    everyone, _ = run(make_data, make_module, rounds=1, clients_per_round=None)
    some, _ = run(make_data, make_module, rounds=1, clients_per_round=2)
    norms = {one.client: one.update_norm for one in everyone.history[0].clients}
    assert len(some.history[0].clients) == 2
    assert all(one.update_norm == norms[one.client] for one in some.history[0].clients)
    assert len(set(norms.values())) == 4


def test_a_ledger_of_other_noise_ends_the_run() -> None:
    samplings = (Sampling(100, 5, 20),)
    plans = [example_plan(ExampleGaussian(noise=noise), samplings, 0, None, 1, 9) for noise in (1.0, 1.1)]
    result = RoundResult(ServerState(1, {}), [], Agreement(0.0))
    after = plans[0].noted(result, ServerState(0, {}))
    assert after.state.memory["ExampleGaussian"]["ledger"]["rounds"].tolist() == [1]
    assert plans[0].noted(result, after.state).state.memory["ExampleGaussian"]["ledger"]["rounds"].tolist() == [2]
    with pytest.raises(RunError, match="the privacy ledger has another noise for the rounds before"):
        plans[1].noted(result, after.state)
    with pytest.raises(RunError, match="the privacy ledger has no rounds, where 3 were before"):
        plans[0].noted(result, ServerState(3, {}))


def test_a_run_ends_before_its_budget_is_passed(
    make_data: Make, make_module: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe, _ = run(make_data, make_module, rounds=1, clients_per_round=None)
    assert isinstance(probe.plan, ExamplePlan)
    budget = (max(probe.plan.epsilons("pld", 2)) + max(probe.plan.epsilons("pld", 3))) / 2
    options: dict[str, Any] = {"privacy": PRIVATE | {"epsilon": budget}, "clients_per_round": None}
    folder = str(tmp_path / "run")
    loop, _ = run(make_data, make_module, rounds=9, run_dir=folder, progress=True, **options)
    assert len(loop.history) == 2
    assert loop.summary["epsilon_pld"] <= budget
    assert "used up after round 2: the run ends there, not after 9" in capsys.readouterr().out
    again, _ = run(make_data, make_module, rounds=20, run_dir=folder, **options)
    assert len(again.history) == 2
    found: dict[str, Any] = {"privacy": {"name": "ExampleGaussian", "epsilon": 8.0, "clip": 0.5}, "clients_per_round": None}
    other, _ = run(make_data, make_module, rounds=2, **found)
    assert 7.99 < other.summary["epsilon_pld"] <= 8.0
    assert other.config["loop"]["privacy"]["rounds"] == 2


@pytest.mark.parametrize("algorithm", ["fedprox", "feddyn", {"name": "fedavg", "up": ["Quantise"]}, {"aggregator": "Median"}])
def test_what_comes_after_the_noise_costs_nothing_more(algorithm: Any, make_data: Make, make_module: Make) -> None:
    loop, _ = run(make_data, make_module, rounds=2, algorithm=algorithm)
    plain, _ = run(make_data, make_module, rounds=2)
    assert loop.summary["epsilon_rdp"] == plain.summary["epsilon_rdp"]
    assert loop.history[-1].mean_update_norm > 0


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "rolora", "fedsa_lora", "flora", "flexlora"])
def test_algorithms_of_adapters_train_with_noise(name: str, make_data: Make, make_module: Make) -> None:
    loop, weights = run(make_data, make_module, rounds=2, algorithm=name, model={"lora": LORA})
    assert all(torch.isfinite(one).all() for one in weights.values())
    assert loop.history[-1].diagnostics["epsilon_rdp"] > 0


@pytest.mark.parametrize("model", [{}, {"lora": LORA}, {"padding_free": False}], ids=["full", "lora", "padded"])
def test_training_in_bf16_has_the_same_noise_and_epsilon(model: Any, make_data: Make, make_module: Make) -> None:
    (half, rough), (exact, fine) = (
        run(make_data, make_module, rounds=1, precision=one, model=model, privacy=PRIVATE | {"noise": 0.1})
        for one in ("bf16-mixed", "32-true")
    )
    assert half.summary["epsilon_rdp"] == exact.summary["epsilon_rdp"]
    start = weights_of(make_module(**model))
    moved = length({name: fine[name] - start[name] for name in fine})
    assert 0 < length({name: rough[name] - fine[name] for name in fine}) < 0.3 * moved


def test_a_decoder_trains_by_adapters_with_noise(folders: dict[str, str]) -> None:
    data = fedtune.FederatedDataModule(make_chats(), folders["llama"], num_clients=2, batch_size=4, max_length=64)
    module = fedtune.CausalLM(folders["llama"], lora=LORA, packing=64)
    loop = make_loop(max_rounds=1, privacy=PRIVATE)
    loop.fit(module, data)
    assert loop.history[0].mean_update_norm > 0


def private_run(folder: Path, model: str) -> tuple[str, list[Any], float]:
    """Weights, records and epsilon of a run, of one rank or of all."""
    module, data = module_maker(model)(), data_maker(model, make_task())(**EIGHT)
    loop = make_loop(run_dir=str(folder), max_rounds=2, privacy=PRIVATE)
    loop.fit(module, data)
    return sha256(weights_of(module)), without_times(loop.history), loop.summary["epsilon_pld"]


def test_two_processes_have_the_bits_of_one(tmp_path: Path, tiny_bert: str) -> None:
    alone = private_run(tmp_path / "one", tiny_bert)
    assert ranks(2, private_run, tmp_path / "two", tiny_bert) == [alone, alone]


def uneven(privacy: dict[str, Any], counts: dict[str, int]) -> None:
    """A run for which each rank has another number of examples."""
    data, _ = loaders([20, counts[os.environ["RANK"]]], 5)
    make_loop(max_rounds=1, privacy=privacy).fit(Scores(), data)


@pytest.mark.parametrize("given", [{"noise": 1.0}, {"epsilon": 8.0}], ids=["noise", "epsilon"])
def test_ranks_that_come_to_different_plans_are_refused_by_name(given: dict[str, float]) -> None:
    privacy = {"name": "ExampleGaussian", "delta": 1e-3} | given
    assert ranks(2, uneven, privacy, {"0": 30, "1": 30}) == [None, None]
    _, (kind, says) = ranks(2, uneven, privacy, {"0": 30, "1": 40})
    assert kind == "UsageError"
    assert says.startswith("privacy.samplings on rank 1: got ")
    assert '"examples": 40' in says.partition("allowed: ")[0]
    assert '"examples": 30' in says.partition("allowed: ")[2]
    assert says.endswith("which rank 0 has: all ranks do one run")


# ---------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "scaffold": ({"algorithm": "scaffold", "model": {"optimizer": "sgd"}}, "sends its update alone"),
    "fednova": ({"algorithm": "fednova", "model": {"optimizer": "sgd"}}, "sends its update alone"),
    "qfedavg": ({"algorithm": "qfedavg"}, "sends its update alone"),
    "fedkseed": ({"algorithm": "fedkseed", "model": {"optimizer": "sgd"}}, "one that trains by gradients"),
    "ditto": ({"algorithm": "ditto"}, "one that trains once a round"),
    "fedrep": ({"algorithm": "fedrep"}, "one that trains once a round"),
    "accumulated": ({"accumulate_grad_batches": 2}, "accumulate_grad_batches: got 2; allowed: 1, with privacy of examples"),
    "delta": ({"privacy": {"delta": 0.05}}, r"privacy\.delta: got 0\.05; allowed: below 1 / the number of a client's examples"),
    "delta of none": ({"privacy": {"delta": 0.0}}, "below 1 / the number of a client's examples"),
    "classical": ({"privacy": {"accountant": "classical"}}, r"privacy\.accountant: got 'classical'; allowed: pld, rdp"),
    "nothing": ({"privacy": {"noise": 0.0}}, r"privacy\.noise: not given"),
    "sampling": ({"privacy": {"sampling": "fixed"}}, r"privacy\.sampling"),
    "clip": ({"privacy": {"clip": 0.0}}, r"privacy\.clip: got 0\.0"),
    "by length": ({"data": {"group_by_length": True}}, "a DataLoader with LengthGroupedBatches"),
    "without a mask": (
        {"data": {"mask": False}},
        r"data\.mask: got False; allowed: true, or padding max_length, with privacy of examples",
    ),
    "checkpoints": ({"model": {"gradient_checkpointing": True}}, "gradient_checkpointing computes them twice"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_accounting_is_not_true_of_is_refused_in_one_line(name: str, make_data: Make, make_module: Make) -> None:
    changes, says = REFUSED[name]
    module = make_module(**changes.get("model", {}))
    others = {key: value for key, value in changes.items() if key not in ("model", "data", "privacy")}
    data = make_data(**(EIGHT | changes.get("data", {})))
    with pytest.raises(UsageError, match=says) as caught:
        make_loop(max_rounds=2, privacy=PRIVATE | changes.get("privacy", {}), **others).fit(module, data)
    assert "\n" not in str(caught.value)


def test_what_an_algorithm_does_beyond_it_is_refused_before_there_are_data_with_all_else_that_is_wrong() -> None:
    with pytest.raises(UsageError, match=r"privacy\.clip: got 0\.0.*one that trains once a round") as caught:
        make_loop(algorithm="ditto", privacy=PRIVATE | {"clip": 0.0})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (Scores(reduction="sum"), "in a batch of 4 a gradient differs by 3"),
        (Scores(normed=True), r"a gradient differs|more than 1 value"),
    ],
    ids=["a sum over the batch", "statistics of the batch"],
)
def test_examples_that_depend_on_each_other_are_found_by_trying(module: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        make_loop(max_rounds=1, privacy=SCORES).fit(module, loaders([20], 5)[0])
    assert "one whose training loss is a mean over examples" in str(caught.value)
    assert "\n" not in str(caught.value)


class Unmasked(pl.LightningModule):
    """A classifier of the mean over a text's words, padding among them; counts its batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layer = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 2)
        self.register_buffer("batches", torch.tensor(0), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.batches += 1
        return torch.nn.functional.cross_entropy(self.layer(self.words(batch[0]).mean(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def padded(texts: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    words = torch.nn.utils.rnn.pad_sequence([text for text, _ in texts], batch_first=True)
    return words, torch.tensor([label for _, label in texts])


def of_lengths(*clients: list[int]) -> GivenLoaders:
    """Clients whose texts have so many words."""
    texts = [[(torch.arange(length) % 8 + 1, length % 2) for length in lengths] for lengths in clients]
    return GivenLoaders([DataLoader(one, batch_size=5, collate_fn=padded) for one in texts], [padded(texts[0][:4])])


@pytest.mark.parametrize("other", [3, 9], ids=["shorter", "longer"])
@pytest.mark.parametrize("place", [0, 5, 19])
def test_padding_that_is_read_as_text_is_found_whichever_client_and_text_shows_it(other: int, place: int) -> None:
    privacy = SCORES | {"delta": 1e-3}
    alike = of_lengths([6] * 20, [4] * 20)
    loop = make_loop(max_rounds=1, privacy=privacy)
    loop.fit(Unmasked(), alike)  # each client's texts have one length: none is padded
    assert len(loop.history) == 1
    odd = of_lengths([6] * 20, [6] * place + [other] + [6] * (19 - place))
    with pytest.raises(UsageError, match=r"none of which depends on another .*a gradient differs"):
        make_loop(max_rounds=1, privacy=privacy).fit(Unmasked(), odd)


def test_a_second_run_of_a_module_is_tried_with_its_own_data() -> None:
    privacy, module = SCORES | {"delta": 1e-3}, Unmasked()
    make_loop(max_rounds=1, privacy=privacy).fit(module, of_lengths([6] * 20))
    with pytest.raises(UsageError, match="none of which depends on another"):
        make_loop(max_rounds=1, privacy=privacy).fit(module, of_lengths([6, 3] * 10))


def test_the_trial_leaves_counters_as_they_were() -> None:
    counted = []

    class Counts(Unmasked):
        def on_train_start(self) -> None:
            counted.append(int(self.batches))

    make_loop(max_rounds=2, privacy=SCORES | {"delta": 1e-3}).fit(Counts(), of_lengths([6] * 20, [6] * 20))
    assert counted == [0, 0, 0, 0]


def test_padding_to_one_length_needs_no_mask(make_data: Make, make_module: Make) -> None:
    loop, _ = run(lambda **more: make_data(mask=False, padding="max_length", **more), make_module, rounds=1)
    assert loop.history[0].mean_update_norm > 0


def test_the_shortest_and_the_longest_text_are_tried(make_data: Make) -> None:
    data = make_data(**EIGHT)
    for client in range(4):
        loader = data.client_dataloader(client)
        lengths = loader.dataset.lengths
        for most in (2, 4):
            tried = lengths[_places(loader, most)]
            assert (len(tried), tried.min(), tried.max()) == (most, lengths.min(), lengths.max())


def test_batch_norms_and_buffers_are_refused() -> None:
    data = TinyData()
    given = GivenLoaders([data.client_dataloader(client) for client in range(4)], data.client_dataloader(2))
    with pytest.raises(UsageError, match="with privacy of examples, a DataLoader"):
        make_loop(privacy=SCORES).fit(TinyModule(), given)
    module = Scores()
    module.norm = torch.nn.BatchNorm1d(3)
    with pytest.raises(UsageError, match="as they are averaged without noise"):
        make_loop(max_rounds=1, privacy=SCORES).fit(module, loaders([20], 5)[0])


def test_layers_that_are_compiled_and_decoders_that_are_trained_whole_are_refused(folders: dict[str, str]) -> None:
    module = Scores()
    module.layer.compile(backend="eager")
    with pytest.raises(UsageError, match=r"layers that opacus can follow \(one is compiled\)"):
        make_loop(max_rounds=1, privacy=SCORES).fit(module, loaders([20], 5)[0])
    data = fedtune.FederatedDataModule(make_chats(), folders["llama"], num_clients=2, batch_size=4, max_length=64)
    with pytest.raises(UsageError, match="one whose training loss is a mean over examples") as caught:
        make_loop(max_rounds=1, privacy=PRIVATE).fit(fedtune.CausalLM(folders["llama"]), data)
    assert "\n" not in str(caught.value)


def test_an_optimizer_that_asks_for_the_gradients_again_is_refused() -> None:
    class Again(Scores):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(RunError, match="the gradients of each batch are made once"):
        make_loop(max_rounds=1, privacy=SCORES).fit(Again(), loaders([100], 5)[0])


def test_a_module_that_skips_batches_is_refused() -> None:
    class Skips(Scores):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 3 else super().training_step(batch, batch_idx)

    with pytest.raises(RunError, match="the gradients of each batch are made once"):
        make_loop(max_rounds=1, privacy=SCORES).fit(Skips(), loaders([100], 5)[0])


@dataclass(frozen=True)
class Twice(ClientUpdate):
    """Trains twice."""

    def __call__(self, client: Client) -> Groups:
        client.train()
        client.train()
        return {"update": client.update()}


@dataclass(frozen=True)
class Looks(ClientUpdate):
    """Looks at the loss without noise."""

    def __call__(self, client: Client) -> Groups:
        client.loss()
        client.train()
        return {"update": client.update()}


@dataclass(frozen=True)
class Walks(ClientUpdate):
    """Makes steps without gradients, which nobody could clip."""

    def __call__(self, client: Client) -> Groups:
        client.train(walk=lambda loss: None)
        return {"update": client.update()}


def test_a_client_part_that_trains_twice_or_without_gradients_or_looks_at_the_loss_is_refused() -> None:
    for part in (Twice(), Looks(), Walks()):
        algorithm = fedtune.Algorithm(client=part, aggregator=Mean())
        with pytest.raises(UsageError, match="one that trains once a round, by gradients, and asks for no loss"):
            make_loop(max_rounds=1, privacy=SCORES, algorithm=algorithm).fit(Scores(), loaders([20], 5)[0])


def test_without_the_package_the_line_says_how_to_get_it(
    make_data: Make, make_module: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients._hooks.cache_clear()
    monkeypatch.setitem(sys.modules, "opacus.grad_sample.grad_sample_module", None)
    with pytest.raises(UsageError, match=r"no package opacus.*pip install 'fedtune\[privacy\]'"):
        run(make_data, make_module)
    gradients._hooks.cache_clear()


def test_the_mechanism_is_found_by_name() -> None:
    assert privacy_of({"name": "ExampleGaussian", "noise": "1e-1"}) == ExampleGaussian(noise=0.1)
    assert fedtune.PRIVACY["ExampleGaussian"] is ExampleGaussian
    given = {"name": "ExampleGaussian", "epsilon": "8e0"}
    assert resolve({"loop": {"privacy": given}})["loop"]["privacy"] == given | {
        **{"noise": 0.0, "epsilon": 8.0, "delta": 1e-5, "rounds": 0, "clip": 1.0, "accountant": ""}
    }
