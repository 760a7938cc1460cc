from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fedtune
from fedtune.models.pretrained import MINILM_SHA256, minilm

Make = Callable[..., Any]


def test_a_uniform_classifier_scores_ln_c_nats(make_module: Make) -> None:
    module, logged = make_module(), {}
    torch.nn.init.zeros_(module.network.classifier.weight)
    torch.nn.init.zeros_(module.network.classifier.bias)
    module.log_dict = lambda values, **_: logged.update(values)
    module.validation_step({"input_ids": torch.ones(4, 5, dtype=torch.long), "labels": torch.tensor([0, 1, 2, 0])}, 0)
    assert logged["loss_nats"].item() == pytest.approx(math.log(3), rel=1e-6)


def test_pretrained_weights_are_loaded_and_the_head_is_fresh(tiny_bert: str, make_module: Make) -> None:
    pretrained = transformers.BertModel.from_pretrained(tiny_bert)
    ours = make_module().network.bert
    assert all(torch.equal(a, b) for a, b in zip(pretrained.parameters(), ours.parameters(), strict=True))
    heads = [fedtune.BertClassifier(tiny_bert, 3, seed=seed).network.classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_random_init_keeps_the_architecture_and_drops_the_weights(tiny_bert: str, make_module: Make) -> None:
    pretrained, random = make_module(), make_module(init="random")
    assert [p.shape for p in pretrained.parameters()] == [p.shape for p in random.parameters()]
    assert not torch.equal(next(pretrained.network.bert.parameters()), next(random.network.bert.parameters()))


def test_dropout_is_on_in_training_and_everywhere_the_one_asked_for(make_module: Make) -> None:
    module = make_module(dropout=0.3)
    layers = [part for part in module.modules() if isinstance(part, torch.nn.Dropout)]
    assert layers
    assert {layer.p for layer in layers} == {0.3}
    assert all(layer.training for layer in layers)
    assert module.network.config.attention_probs_dropout_prob == 0.3


def test_a_saved_result_opens_in_plain_transformers_with_equal_logits(make_module: Make, tmp_path: Path) -> None:
    module = make_module().eval()
    module.network.save_pretrained(tmp_path)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.randint(5, 40, (2, 7))
    with torch.inference_mode():
        torch.testing.assert_close(plain(input_ids=ids).logits, module(ids))


def test_a_folder_with_a_head_for_other_classes_gets_a_fresh_head(make_module: Make, tmp_path: Path) -> None:
    make_module(num_labels=7).network.save_pretrained(tmp_path)
    assert fedtune.BertClassifier(str(tmp_path), num_labels=3).network.classifier.out_features == 3


@pytest.mark.parametrize(("optimizer", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_biases_and_layer_norms_are_never_decayed(make_module: Make, optimizer: str, kind: type) -> None:
    module = make_module(optimizer=optimizer, weight_decay=0.1)
    found = module.configure_optimizers()["optimizer"]
    assert type(found) is kind
    decays = {id(p): group["weight_decay"] for group in found.param_groups for p in group["params"]}
    for name, parameter in module.named_parameters():
        assert decays[id(parameter)] == (0.0 if "bias" in name or "LayerNorm" in name else 0.1)


def test_label_smoothing_is_for_training_only(make_module: Make) -> None:
    batch = {"input_ids": torch.randint(5, 40, (4, 5)), "labels": torch.tensor([0, 1, 2, 0])}
    losses = []
    for smoothing in (0.0, 0.5):
        module, logged = make_module(label_smoothing=smoothing, dropout=0.0), {}
        module.log, module.log_dict = lambda *_, **__: None, lambda values, **_: logged.update(values)  # noqa: B023
        module.validation_step(batch, 0)
        losses.append((module.training_step(batch, 0).item(), logged["loss_nats"].item()))
    assert losses[0][0] != pytest.approx(losses[1][0])
    assert losses[0][1] == pytest.approx(losses[1][1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_labels": 1}, "num_labels: got 1; allowed: 2 or more"),
        ({"optimizer": "adam"}, "optimizer: got 'adam'; allowed: adamw (nearest), sgd"),
        ({"init": "pretraind"}, "pretrained (nearest), random"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0; allowed: a number above 0"),
        ({"dropout": 1.0}, "dropout: got 1.0; allowed: at least 0 and below 1"),
        ({"freeze_layers": 3}, "freeze_layers: got 3; allowed: at most 2"),
        ({"warmup_steps": -1}, "warmup_steps: got -1; allowed: 0 or more"),
    ],
)
def test_a_bad_value_of_the_model_is_refused(make_module: Make, options: dict, said: str) -> None:
    with pytest.raises(fedtune.UsageError) as caught:
        make_module(**options)
    assert said in str(caught.value)


def test_a_sequence_beyond_the_models_maximum_is_refused(make_module: Make) -> None:
    with pytest.raises(fedtune.UsageError, match="max_length: got 33; allowed: at most 32"):
        make_module()(torch.ones(1, 33, dtype=torch.long))


def test_minilm_is_the_model_we_know(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(MINILM_SHA256) == 64
    config = transformers.AutoConfig.from_pretrained(minilm())
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads, config.vocab_size) == (6, 384, 12, 30522)
    monkeypatch.setattr("fedtune.models.pretrained.MINILM_SHA256", "0" * 64)
    with pytest.raises(fedtune.RunError, match=r"has sha256 53aa51172d14.*, expected 0000"):
        minilm()
