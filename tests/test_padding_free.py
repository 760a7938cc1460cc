"""Without padding a network computes what it computes with it: logits, gradients, attention, for every family of the paper."""

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

CONFIGS = {name: TINY[name] for name in ("bert", "distilbert", "albert")} | {
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
LENGTHS = ([9, 2, 1, 12, 5, 12, 7], [4, 4, 4], [1], [32, 32], [31, 8, 32, 2])  # fewer tokens than 64, as many, more


def batch_of(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Random ids, in the padding too."""
    ids = torch.randint(5, 40, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(lengths)) % 3}


def module_of(name: str, tmp_path: Any, **options: Any) -> Any:
    """Weights so large that attention is far from uniform."""
    torch.manual_seed(0)
    transformers.AutoModel.from_config(CONFIGS[name]).save_pretrained(tmp_path)
    module = fedtune.build_classifier(str(tmp_path), 3, **({"dropout": 0.0} | options))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(15 if parameter.ndim > 1 else 1)
    return module


def result_of(module: Any, batch: dict[str, Tensor], padding_free: bool) -> tuple[Tensor, dict[str, Tensor]]:
    module.hparams["padding_free"] = padding_free
    module.zero_grad()
    logits = module(batch["input_ids"], batch["attention_mask"])
    F.cross_entropy(logits.float(), batch["labels"]).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Gradients, each to a ten-thousandth of its length; those of key biases should vanish."""
    assert one.keys() == other.keys()
    longest = max(float(gradient.norm()) for gradient in other.values())
    for name, gradient in other.items():
        error = float((one[name] - gradient).norm())
        assert error <= 1e-4 * float(gradient.norm()) + 1e-6 * longest, name


def test_every_family_of_the_paper_is_computed_without_padding() -> None:
    assert set(FORWARD) == {family.model_class for name, family in FAMILIES.items() if name not in ("roberta", "modernbert")}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("block", [1, 2**18])
def test_logits_and_gradients_are_those_of_the_padded_network(
    name: str, lengths: list[int], block: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "_BLOCK", block)
    module, batch = module_of(name, tmp_path), batch_of(lengths)
    (logits, gradients), (expected, slopes) = (result_of(module, batch, free) for free in (True, False))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert_alike(gradients, slopes)
    if max(lengths) > 2:  # else a test of attention would be none
        largest = max(float(slope.norm()) for slope in slopes.values())
        asked = [slope for parameter, slope in slopes.items() if "query.weight" in parameter or "q_lin.weight" in parameter]
        assert asked
        assert max(float(slope.norm()) for slope in asked) > 1e-3 * largest


@pytest.mark.parametrize("name", CONFIGS)
def test_in_bf16_it_is_as_near_to_fp32_as_the_padded_network(name: str, tmp_path: Any) -> None:
    module, batch = module_of(name, tmp_path), batch_of([20, 17, 31, 5, 28, 11, 9, 30])
    true = result_of(module, batch, False)[1]
    errors = []
    for free in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            found = result_of(module, batch, free)[1]
        errors.append(torch.cat([(found[parameter] - true[parameter]).flatten() for parameter in true]).norm())
    assert 0 < errors[0] < 2 * errors[1]


def test_projections_of_different_types_are_brought_together_under_autocast(tmp_path: Any) -> None:
    module, batch = module_of("bert", tmp_path), batch_of(LENGTHS[0])
    for layer in module.layers():
        layer.attention.self.key = torch.nn.Sequential(layer.attention.self.key, torch.nn.LayerNorm(16).float())
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients = result_of(module, batch, True)
    assert logits.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_stands_in_the_same_places(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a dropout that only shrinks, in each place by another factor, both ways give one result; in evaluation none."""
    module, batch = module_of(name, tmp_path), batch_of(LENGTHS[0])
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: x * (1 - p) if training else x)
    for number, part in enumerate(part for part in module.modules() if isinstance(part, torch.nn.Dropout)):
        part.p = 0.05 + 0.03 * number
    (logits, gradients), (expected, slopes) = (result_of(module, batch, free) for free in (True, False))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert_alike(gradients, slopes)
    module.eval()
    with torch.inference_mode():
        still = []
        for free in (True, False):
            module.hparams["padding_free"] = free
            still.append(module(batch["input_ids"], batch["attention_mask"]))
    torch.testing.assert_close(*still, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(still[0], logits, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_stands_in_the_padding_changes_nothing(name: str, tmp_path: Any) -> None:
    module, batch = module_of(name, tmp_path), batch_of(LENGTHS[0])
    other = batch | {"input_ids": torch.where(batch["attention_mask"].bool(), batch["input_ids"], 0)}
    assert torch.equal(result_of(module, batch, True)[0], result_of(module, other, True)[0])


def test_frozen_layers_have_no_gradients_and_the_others_have_theirs(tmp_path: Any) -> None:
    module, batch = module_of("bert", tmp_path, freeze_embeddings=True, freeze_layers=1), batch_of(LENGTHS[0])
    gradients, slopes = (result_of(module, batch, free)[1] for free in (True, False))
    assert gradients.keys() == slopes.keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    assert_alike(gradients, slopes)


@pytest.mark.parametrize("first_only", [False, True])
def test_gradients_of_attention_with_dropout_are_its_slopes(first_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences, in float64, with masks that do not change between calls, over several blocks."""
    monkeypatch.setattr(packed, "_BLOCK", 40)
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


@pytest.mark.parametrize(
    "case", ["left", "off", "no mask", "compiled", "a compiled part", "checkpoints", "another class", "decoder"]
)
def test_what_asks_for_something_else_is_left_to_the_network(case: str, tmp_path: Any) -> None:
    module, batch = module_of("bert", tmp_path), batch_of([6, 6, 6])
    called: list[int] = []
    module.network.register_forward_hook(lambda *_: called.append(1))
    mask = batch["attention_mask"]
    if case == "left":
        mask[1, :2] = 0
    elif case == "compiled":
        module.network.compile(backend="eager")
    elif case == "a compiled part":
        module.layers()[0].intermediate.compile(backend="eager")
    elif case == "checkpoints":
        name = "activation" if hasattr(module.network, "activation_checkpointing_enable") else "gradient"  # its older name
        getattr(module.network, f"{name}_checkpointing_enable")()
    elif case == "decoder":
        module.network.config.is_decoder = True
    elif case == "another class":
        module.network = type("Another", (type(module.network),), {})(module.network.config)
        module.network.register_forward_hook(lambda *_: called.append(1))
    module.hparams["padding_free"] = case != "off"
    with torch.compiler.set_stance("force_eager"):  # what is compiled need not run compiled here
        logits = module(batch["input_ids"], None if case == "no mask" else mask)
        expected = module.network(input_ids=batch["input_ids"], attention_mask=mask).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert len(called) == 2


def test_a_gap_in_a_text_is_no_part_of_it(tmp_path: Any) -> None:
    module, batch = module_of("bert", tmp_path), batch_of([6, 6, 6])
    batch["attention_mask"][1, 2:4] = 0
    module.network.register_forward_hook(lambda *_: called.append(1))
    called: list[int] = []
    free, padded = (result_of(module, batch, free) for free in (True, False))
    torch.testing.assert_close(free[0], padded[0], rtol=1e-4, atol=1e-4)
    assert_alike(free[1], padded[1])
    assert len(called) == 1


def test_a_federation_ends_with_the_weights_of_the_padded_one(make_data: Callable[..., Any], make_module: Any) -> None:
    ends = []
    for free in (True, False):
        module = make_module(dropout=0.0, padding_free=free)
        history = make_loop().fit(module, make_data())
        ends.append((history[-1].loss_nats, torch.cat([parameter.detach().flatten() for parameter in module.parameters()])))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-3, atol=1e-4)
