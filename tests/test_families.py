"""The families, from folders in hub format, and the three of the paper with their real sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SPECIAL, WORDS, make_loop, save_tokenizer

import fedtune
from fedtune.models import FAMILIES
from fedtune.models.pretrained import MODELS, locate

VOCABULARY = len(SPECIAL) + len(WORDS)
SHARED = {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
TINY = {
    "bert": transformers.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **SHARED),
    "distilbert": transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, **SHARED),
    "albert": transformers.AlbertConfig(
        embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **SHARED
    ),
    "roberta": transformers.RobertaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        **SHARED | {"max_position_embeddings": 34},
    ),
    "modernbert": transformers.ModernBertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        local_attention=4,
        pad_token_id=0,
        bos_token_id=2,
        cls_token_id=2,
        eos_token_id=3,
        sep_token_id=3,
        **SHARED,
    ),
}
# what the head consists of; a pretrained pooler belongs to the encoder
HEADS = {
    "bert": {"classifier.weight", "classifier.bias"},
    "distilbert": {"pre_classifier.weight", "pre_classifier.bias", "classifier.weight", "classifier.bias"},
    "albert": {"classifier.weight", "classifier.bias"},
    "roberta": {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")},
    "modernbert": {"head.dense.weight", "head.norm.weight", "classifier.weight", "classifier.bias"},
}
PARAMETERS = {"bert": 108_310_272, "distilbert": 65_190_912, "albert": 11_683_584}  # of the encoders, with pooler


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("family") / family
    torch.manual_seed(0)
    transformers.AutoModel.from_config(TINY[family]).save_pretrained(path)
    save_tokenizer(path)
    return str(path)


def test_every_family_has_its_case_here() -> None:
    assert set(FAMILIES) == set(TINY) == set(HEADS)


def test_the_family_is_read_from_the_configuration(family: str, folder: str) -> None:
    assert type(fedtune.build_classifier(folder, 3)) is FAMILIES[family]


def test_all_but_the_head_is_pretrained(family: str, folder: str) -> None:
    encoder = {name for name, _ in transformers.AutoModel.from_pretrained(folder).named_parameters()}
    ours = dict(fedtune.build_classifier(folder, 3).network.named_parameters())
    assert {name for name in ours if name.partition(".")[2] not in encoder} == HEADS[family]
    saved = dict(transformers.AutoModel.from_pretrained(folder).named_parameters())
    assert all(torch.equal(ours[name], saved[name.partition(".")[2]]) for name in ours if name not in HEADS[family])


def test_a_family_learns_and_its_result_opens_in_plain_transformers(
    folder: str, make_data: Callable[..., Any], tmp_path: Path
) -> None:
    module = fedtune.build_classifier(folder, 3, learning_rate=1e-2, dropout=0.0)
    history = make_loop(max_rounds=10).fit(module, make_data(model=folder))
    assert history[-1].train_loss_nats < 0.9 * history[0].train_loss_nats
    module.network.save_pretrained(tmp_path)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.randint(5, VOCABULARY, (2, 7))
    with torch.inference_mode():
        torch.testing.assert_close(plain(input_ids=ids).logits, module.eval()(ids))


def test_every_dropout_is_the_one_asked_for(folder: str) -> None:
    module = fedtune.build_classifier(folder, 3, dropout=0.0).train()
    ids = torch.randint(5, VOCABULARY, (2, 7))
    assert torch.equal(module(ids), module(ids))
    noisy = fedtune.build_classifier(folder, 3, dropout=0.4).train()
    assert not torch.equal(noisy(ids), noisy(ids))
    assert {part.p for part in noisy.modules() if isinstance(part, torch.nn.Dropout)} == {0.4}


def test_frozen_parts_do_not_travel(folder: str) -> None:
    module = fedtune.build_classifier(folder, 3, freeze_embeddings=True, freeze_layers=1)
    frozen = {id(p) for part in (module.embeddings(), module.layers()[0]) for p in part.parameters()}
    assert {id(p) for p in module.parameters() if not p.requires_grad} == frozen


def test_another_class_of_the_family_is_refused(family: str, folder: str) -> None:
    other = next(kind for name, kind in FAMILIES.items() if name != family)
    with pytest.raises(fedtune.UsageError, match=rf"\(this is '{family}'\)"):
        other(folder, 2)


@pytest.mark.parametrize("name", PARAMETERS)
def test_random_weights_have_the_real_sizes_without_the_hub(name: str) -> None:
    network = fedtune.build_classifier(name, 2, init="random").network
    encoder = getattr(network, network.base_model_prefix)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == PARAMETERS[name]


def test_with_random_weights_another_tokenizer_sets_the_vocabulary() -> None:
    module = fedtune.build_classifier("albert", 2, init="random", vocab_size=77)
    assert module.network.albert.embeddings.word_embeddings.num_embeddings == 77
    with pytest.raises(fedtune.UsageError, match="vocab_size: got 77; allowed: nothing, with pretrained weights"):
        fedtune.build_classifier("minilm", 2, vocab_size=77)


def test_the_known_sizes_of_minilm_are_those_of_its_folder() -> None:
    own = transformers.AutoConfig.from_pretrained(locate("minilm"))
    for name, value in MODELS["minilm"].sizes.items():
        assert getattr(own, name) == value


def test_minilm_in_the_architecture_of_distilbert_computes_the_same_hidden_states() -> None:
    bert, distil = (fedtune.build_classifier(name, 2).eval() for name in ("minilm", "minilm-distilbert"))
    ids = torch.randint(1000, 30000, (3, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    with torch.inference_mode():
        one = bert.network.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        other = distil.network.distilbert(input_ids=ids, attention_mask=mask).last_hidden_state
    difference = ((one - other) * mask[..., None]).abs().max()
    assert difference < 1e-5


def test_an_unsupported_family_is_refused_with_the_supported_ones(tmp_path: Path) -> None:
    transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8).save_pretrained(tmp_path)
    with pytest.raises(fedtune.UsageError, match=r"families bert, distilbert, albert, roberta, modernbert \(this is 'gpt2'\)"):
        fedtune.build_classifier(str(tmp_path), 2)
