"""Without padding a network computes what it computes with it: logits, gradients, attention, for every family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from conftest import make_loop
from test_families import SHARED, TINY
from torch import Tensor
from torch.nn import functional as F

import fedtune
from fedtune.models import FAMILIES, packed
from fedtune.models.packed import PackedBatch
from fedtune.models.padding_free import FORWARD

CONFIGS = TINY | {
    "albert in groups": transformers.AlbertConfig(
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=5,
        num_hidden_groups=2,
        inner_group_num=2,
        num_attention_heads=2,
        intermediate_size=32,
        **SHARED,
    )
}
LENGTHS = ([9, 2, 1, 12, 5, 12, 7], [4, 4, 4], [1])


def batch_of(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Random ids, in the padding too."""
    ids = torch.randint(5, 40, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(lengths)) % 3}


def module_of(name: str, tmp_path: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    transformers.AutoModel.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    return fedtune.build_classifier(str(tmp_path), 3, **({"dropout": 0.0} | options))


def result_of(module: Any, batch: dict[str, Tensor], padding_free: bool) -> tuple[Tensor, dict[str, Tensor]]:
    module.hparams["padding_free"] = padding_free
    module.zero_grad()
    logits = module(batch["input_ids"], batch["attention_mask"])
    F.cross_entropy(logits, batch["labels"]).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_every_family_is_computed_without_padding() -> None:
    assert set(FORWARD) == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("block", [1, 2**18])
def test_logits_and_gradients_are_those_of_the_padded_network(
    name: str, lengths: list[int], block: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_WEIGHTS", block)
    module, batch = module_of(name, tmp_path), batch_of(lengths)
    (logits, gradients), (expected, slopes) = (result_of(module, batch, free) for free in (True, False))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == slopes.keys()
    for parameter, slope in slopes.items():
        torch.testing.assert_close(gradients[parameter], slope, rtol=1e-4, atol=1e-6, msg=parameter)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_stands_in_the_padding_changes_nothing(name: str, tmp_path: Any) -> None:
    module, batch = module_of(name, tmp_path), batch_of(LENGTHS[0])
    other = batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 0)}
    assert torch.equal(result_of(module, batch, True)[0], result_of(module, other, True)[0])


def test_frozen_layers_have_no_gradients_and_the_others_have_theirs(tmp_path: Any) -> None:
    module, batch = module_of("bert", tmp_path, freeze_embeddings=True, freeze_layers=1), batch_of(LENGTHS[0])
    gradients, slopes = (result_of(module, batch, free)[1] for free in (True, False))
    assert gradients.keys() == slopes.keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    for parameter, slope in slopes.items():
        torch.testing.assert_close(gradients[parameter], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first_only", [False, True])
def test_gradients_of_attention_with_dropout_are_its_slopes(first_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences, in float64, with masks that do not change between calls, over several blocks."""
    monkeypatch.setattr(packed, "_WEIGHTS", 40)
    packing = PackedBatch(*(batch_of([3, 1, 4, 2])[name] for name in ("input_ids", "attention_mask")))
    draw = torch.Generator().manual_seed(0)
    masks = torch.rand(4096, generator=draw, dtype=torch.float64) < 0.7
    rows = len(packing.ids_T)
    inputs = [torch.randn(count, 4, generator=draw, dtype=torch.float64) for count in (4 if first_only else rows, rows, rows)]

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        dropout: Any = lambda weights: weights * masks[: weights.numel()].view_as(weights) / 0.7  # noqa: E731
        context = packing.attend(query, key, value, 2, dropout)
        return context if first_only else context[:10]  # what comes of spare rows is not used

    assert torch.autograd.gradcheck(attention, [tensor.requires_grad_() for tensor in inputs])


def test_dropout_is_drawn_in_every_place(tmp_path: Any) -> None:
    module, batch = module_of("bert", tmp_path), batch_of(LENGTHS[0])
    drops = [part for part in module.modules() if isinstance(part, torch.nn.Dropout)]
    still = result_of(module, batch, True)[0]
    for drop in drops:
        drop.p = 0.5
        assert not torch.equal(result_of(module, batch, True)[0], still)
        drop.p = 0.0
    assert torch.equal(result_of(module, batch, True)[0], still)


@pytest.mark.parametrize("case", ["left", "gap", "off", "no mask", "compiled"])
def test_a_mask_it_does_not_know_and_a_compiled_network_are_left_to_the_network(case: str, tmp_path: Any) -> None:
    module, batch = module_of("bert", tmp_path), batch_of([6, 6, 6])
    called: list[int] = []
    module.network.register_forward_hook(lambda *_: called.append(1))
    mask = batch["attention_mask"]
    if case == "left":
        mask[1, :2] = 0
    elif case == "gap":  # known, too: as if the gap were not there, with the positions of the others
        mask[1, 2:4] = 0
    elif case == "compiled":
        module.network.compile(backend="eager")
    module.hparams["padding_free"] = case != "off"
    logits = module(batch["input_ids"], None if case == "no mask" else mask)
    expected = module.network(input_ids=batch["input_ids"], attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert len(called) == (1 if case == "gap" else 2)


def test_a_federation_ends_with_the_weights_of_the_padded_one(make_data: Callable[..., Any], make_module: Any) -> None:
    ends = []
    for free in (True, False):
        module = make_module(dropout=0.0, padding_free=free)
        history = make_loop().fit(module, make_data())
        ends.append((history[-1].loss_nats, torch.cat([parameter.detach().flatten() for parameter in module.parameters()])))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-3, atol=1e-4)
