"""`fedtune.models.features`: what the last layer reads, and how steeply the loss falls at the start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_tiny_bert
from torch.nn import functional as F

import fedtune
from fedtune.errors import UsageError
from fedtune.models.features import EMBEDDINGS, ENCODER, HEAD, LAST, features
from fedtune.runs.speeds import show_speed


@pytest.fixture
def module(tmp_path: Any) -> fedtune.BertClassifier:
    return fedtune.BertClassifier(save_tiny_bert(tmp_path), num_labels=3, dropout=0.1)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 20, (12, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(12) % 3 * (torch.arange(12) > 1)}


class _Doubled(torch.nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return 2 * torch.tanh(hidden)


def _residual(module: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean of (frequencies - unit vector of the class) times logits: what a step of gradient descent makes smaller."""
    one_hot = F.one_hot(batch["labels"], 3).float()
    logits = module.network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return ((one_hot.mean(0) - one_hot) * logits).sum() / len(one_hot)


def test_the_speed_is_by_how_much_a_small_step_lowers_the_loss(module: Any, batch: dict[str, torch.Tensor]) -> None:
    found = features(module, [batch, batch])  # both halves the same texts, so that the product is a square
    module.eval()
    before = _residual(module, batch)
    before.backward()
    rate = 1e-4
    with torch.no_grad():
        for weight in module.parameters():
            weight -= rate * weight.grad
        frequency = F.one_hot(batch["labels"], 3).float().mean(0)
        fallen = (before - _residual(module, batch)) / rate / (1 - frequency.square().sum())
    assert sum(found.speed.values()) == pytest.approx(float(fallen), rel=0.02)


def test_the_parts_of_the_speed_are_those_of_the_network(module: Any, batch: dict[str, torch.Tensor]) -> None:
    whole = features(module, [batch, batch]).speed
    assert list(whole) == [LAST, HEAD, ENCODER, EMBEDDINGS]
    assert all(value > 0 for value in whole.values())
    module.network.bert.embeddings.requires_grad_(False)
    module.network.bert.pooler.requires_grad_(False)
    assert features(module, [batch, batch]).speed == pytest.approx(whole | {HEAD: 0.0, EMBEDDINGS: 0.0}, rel=1e-5)


def test_twice_the_features_are_four_times_the_speed_of_the_last_layer(module: Any, batch: dict[str, torch.Tensor]) -> None:
    plain = features(module, [batch, batch])
    module.network.bert.pooler.activation = _Doubled()
    scaled = features(module, [batch, batch])
    assert scaled.speed[LAST] == pytest.approx(4 * plain.speed[LAST], rel=1e-4)
    assert scaled.square == pytest.approx(4 * plain.square, rel=1e-4)


def test_texts_of_one_class_have_no_speed(module: Any, batch: dict[str, torch.Tensor]) -> None:
    alike = batch | {"labels": torch.zeros_like(batch["labels"])}
    with pytest.raises(UsageError, match="batches: got '24 texts of one class'; allowed: texts of two classes or more"):
        features(module, [alike, alike])


@pytest.mark.parametrize("place", [0, 1])
def test_a_half_of_one_class_has_no_speed(module: Any, batch: dict[str, torch.Tensor], place: int) -> None:
    given = [batch, batch]
    given[place] = batch | {"labels": torch.full_like(batch["labels"], 2)}
    said = r"batches: got '12 texts of one class in every second batch'; allowed: texts of two classes or more in each half"
    with pytest.raises(UsageError, match=said):
        features(module, given)
    assert len(features(module, [*given, *given[::-1]]).speed) == 4


def test_moments_are_those_of_what_the_last_layer_reads(module: Any, batch: dict[str, torch.Tensor]) -> None:
    found = features(module, [batch, {name: value[:8] for name, value in batch.items()}])
    module.eval()
    with torch.no_grad():
        pooled = module.network.bert(batch["input_ids"], batch["attention_mask"]).pooler_output.numpy()
    phi = np.concatenate([pooled, pooled[:8]])
    assert (found.texts, found.square) == (20, pytest.approx((phi**2).sum(1).mean(), rel=1e-4))
    assert found.variance == pytest.approx(phi.var(0).sum(), rel=1e-4)


def test_classes_that_differ_by_chance_alone_have_no_variance_between_them() -> None:
    from fedtune.models.features import _moments

    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(3, size=30000))
    noise = torch.from_numpy(rng.normal(size=(30000, 40)))
    assert abs(_moments(noise, labels)[2]) < 0.002  # 3 classes of 10,000: 40 x 2 / 30,000 = 0.0027 without the correction
    moved = noise + torch.eye(40, dtype=noise.dtype)[labels]
    assert _moments(moved, labels)[2] == pytest.approx(2 / 3, abs=0.05)


def test_a_module_stays_as_it_is(module: Any, batch: dict[str, torch.Tensor]) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    features(module.train(), [batch, batch])
    assert module.training
    assert all(weight.grad is None for weight in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_what_cannot_be_measured_is_one_line(module: Any, batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UsageError, match="batches: got 1; allowed: two or more"):
        features(module, [batch])
    with pytest.raises(UsageError, match="a classifier whose head ends in a linear layer"):
        features(object(), [batch, batch])


def test_the_command_shows_the_speed_of_a_classifier_and_refuses_what_has_none(
    make_data: Any, make_module: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data()
    data.setup()
    show_speed(make_module(), data)
    said = " ".join(capsys.readouterr().out.split())  # a narrow terminal breaks lines
    assert "training texts, before training" in said
    assert [part for part in (LAST, HEAD, ENCODER, EMBEDDINGS) if f"speed: {part}" not in said] == []
    assert "speed in all" in said
    with pytest.raises(UsageError, match="--features: got 'Linear'; allowed: a classifier of texts"):
        show_speed(torch.nn.Linear(2, 2), data)
    whole = make_data(num_clients=1, batch_size=100)
    whole.setup()
    with pytest.raises(UsageError, match=r"--data.batch_size: got 100; allowed: half of the training texts, or fewer"):
        show_speed(make_module(), whole)
