"""Privacy of the examples of each client: gradients of single examples, the noisy step, the accounting, runs and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import GivenLoaders, assert_equal, data_maker, make_loop, make_task, module_maker, weights_of, without_times
from decoders import make_chats, save_decoder
from test_families import TINY, save_tokenizer
from test_torchrun import ranks
from torch.utils.data import DataLoader, TensorDataset

import fedtune
from fedtune.errors import RunError, UsageError
from fedtune.federated.messages import Context
from fedtune.privacy import gradients, steps
from fedtune.privacy.accountant import epsilon_by
from fedtune.privacy.examples import ExamplePlan, example_plan
from fedtune.privacy.gradients import apart, hooked
from fedtune.privacy.mechanisms import ExampleGaussian, privacy_of
from fedtune.privacy.sampling import Sampling
from fedtune.privacy.steps import NoisySum
from fedtune.tensors import sha256
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
} | {"llama, lora, padded": ("llama", "lora", "padded")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {"llama": save_decoder(tmp_path_factory.mktemp("llama"))}
    for family in ("bert", "distilbert", "albert"):
        path = tmp_path_factory.mktemp("family") / family
        torch.manual_seed(0)
        transformers.AutoModel.from_config(TINY[family]).save_pretrained(path)
        save_tokenizer(path)
        found[family] = str(path)
    return found


def made(folders: dict[str, str], family: str, how: str, way: str) -> tuple[Any, Any]:
    """A module without dropout, whose weights are not at their start, and a batch of seven texts of different lengths."""
    lora = LORA if how == "lora" else None
    if family == "llama":
        module: Any = fedtune.CausalLM(folders[family], lora=lora, dropout=None)
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
    if CASES[case][0] == "llama":  # its plain loss is the mean over all answer tokens, that of examples the mean of their means
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
