"""What a model folder may hold, and what is said in one line where it cannot be used; data and modules that belong together."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import transformers
from conftest import SPECIAL, WORDS, data_maker, make_loop, make_task, save_tiny_bert, save_tokenizer
from safetensors.torch import load_file, save_file

import fedtune
from fedtune.data import tokens
from fedtune.data.tokens import tokenise
from fedtune.models.agreement import tokenizer_for
from fedtune.models.pretrained import load_config, load_tokenizer, max_tokens

Make = Callable[..., Any]
Run = Callable[..., tuple[int, str, str]]
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORD_COUNT = len(SPECIAL) + len(WORDS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one's own of the tiny BERT."""
    save_tiny_bert(tmp_path / "model")
    return tmp_path / "model"


def refused(act: Callable[[], Any], *said: str) -> None:
    with pytest.raises(fedtune.UsageError) as caught:
        act()
    text = str(caught.value)
    for part in said:
        assert part in text
    assert "\n" not in text
    assert len(text) < 800


def tokenizer_files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if "token" in file.name]


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    content |= values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# tokenizers


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert", "roberta"])
def test_a_folder_without_tokenizer_files_is_refused(family: str, tmp_path: Path) -> None:
    kind = transformers.CONFIG_MAPPING[family]
    sizes = {"distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 8}}.get(family, BERT)
    kind(**sizes).save_pretrained(tmp_path)
    refused(lambda: load_tokenizer(str(tmp_path)), "no tokenizer files")
    data = fedtune.FederatedDataModule(make_task(), str(tmp_path), num_clients=2, max_length=12)
    refused(lambda: data.tokens, "no tokenizer files")


@pytest.mark.parametrize("content", ["", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"])
def test_an_empty_vocabulary_is_refused(folder: Path, content: str) -> None:
    for file in tokenizer_files(folder):
        file.unlink()
    (folder / "vocab.txt").write_text(content)
    refused(lambda: load_tokenizer(str(folder)), "model: got")


def test_a_tokenizer_far_smaller_than_the_embeddings_is_refused(tmp_path: Path) -> None:
    transformers.BertConfig(vocab_size=3000, max_position_embeddings=32, **BERT).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    data = data_maker(str(tmp_path), make_task())()
    refused(lambda: data.tokens, "45 tokens for 3000 embeddings")


def test_embeddings_rounded_up_to_a_multiple_are_fine(tmp_path: Path) -> None:
    transformers.BertConfig(vocab_size=64, max_position_embeddings=32, **BERT).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert len(data_maker(str(tmp_path), make_task())().tokens.lengths) == 144


def test_a_tokenizer_with_ids_beyond_the_embeddings_is_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["brandnew"])
    tokenizer.save_pretrained(folder)
    refused(lambda: data_maker(str(folder), make_task())().tokens, "ids up to 45", "45 embeddings")


def test_texts_of_unknown_tokens_are_refused_before_training(tiny_bert: str) -> None:
    task = make_task()
    strange = fedtune.TextTask("strange", ["quite other words"] * 144, task.labels, task.label_names, task.parts)
    refused(lambda: data_maker(tiny_bert, strange)().tokens, "100% of their tokens are [UNK]")


@pytest.mark.parametrize(
    ("family", "positions", "padding", "allowed"),
    [
        ("roberta", 514, 1, 512),
        ("camembert", 514, 1, 512),
        ("xlm-roberta", 130, 1, 128),
        ("mpnet", 514, 1, 512),
        ("bert", 512, 0, 512),
    ],
)
def test_positions_behind_that_of_padding_are_not_counted(family: str, positions: int, padding: int, allowed: int) -> None:
    config = transformers.CONFIG_MAPPING[family](max_position_embeddings=positions, pad_token_id=padding)
    assert max_tokens(config) == allowed


def test_a_roberta_takes_as_many_tokens_as_it_says_and_no_more(tmp_path: Path) -> None:
    config = transformers.RobertaConfig(vocab_size=WORD_COUNT, max_position_embeddings=14, pad_token_id=1, **BERT)
    config.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    network = transformers.AutoModel.from_config(config).eval()
    most = max_tokens(config)
    network(torch.full((1, most), 7))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        network(torch.full((1, most + 1), 7))
    tokenizer_for(str(tmp_path), None, most)
    refused(lambda: tokenizer_for(str(tmp_path), None, most + 1), "max_length: got 13; allowed: at most 12")


# data and modules that belong together


def other_vocabulary(folder: Path) -> str:
    """The tiny BERT with its words in another order."""
    save_tiny_bert(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    content["model"]["vocab"] = {word: number if word in SPECIAL else 49 - number for word, number in words.items()}
    file.write_text(json.dumps(content))
    return str(folder)


def test_data_tokenised_for_a_model_of_another_vocabulary_are_refused(tiny_bert: str, tmp_path: Path) -> None:
    other = other_vocabulary(tmp_path / "other")
    module = fedtune.BertClassifier(tiny_bert, 3)
    for data in (data_maker(other, make_task())(), data_maker(tiny_bert, make_task())(tokenizer=other)):
        refused(lambda: module.check_data(data), "tokenizer: got", f"the tokens that {tiny_bert} was pretrained with", "word")  # noqa: B023
    fedtune.BertClassifier(tiny_bert, 3, init="random").check_data(data)  # weights that mean nothing yet


def test_data_with_ids_beyond_the_embeddings_of_the_module_are_refused(tiny_bert: str) -> None:
    task = fedtune.TextTask("t", ["the sun"] * 4, np.array([0, 1] * 2), ("a", "b"), parts())
    data = fedtune.FederatedDataModule(task, "minilm", num_clients=1, batch_size=1, max_length=16)
    refused(lambda: fedtune.BertClassifier(tiny_bert, 2).check_data(data), "one of at most 45 tokens", "the data have the id")


def parts() -> dict[str, Any]:
    return {"train": np.arange(2), "validation": np.arange(0), "test": np.arange(2, 4)}


def test_models_that_share_a_tokenizer_share_data() -> None:
    task = fedtune.TextTask("t", ["the sun shines"] * 4, np.array([0, 1] * 2), ("a", "b"), parts())
    data = fedtune.FederatedDataModule(task, "minilm", num_clients=1, batch_size=1)
    module = fedtune.build_classifier("minilm-distilbert", 2)
    module.check_data(data)
    assert module.network.config.id2label == {0: "a", 1: "b"}


def test_other_lengths_and_classes_are_refused(tiny_bert: str, tmp_path: Path) -> None:
    save_tiny_bert(tmp_path / "short")
    data = data_maker(tiny_bert, make_task())()
    config = transformers.BertConfig(vocab_size=WORD_COUNT, max_position_embeddings=20, **BERT)
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(tmp_path / "short")
    refused(lambda: fedtune.BertClassifier(str(tmp_path / "short"), 3).check_data(data), "max_length: got 24", "at most 20")
    refused(lambda: fedtune.BertClassifier(tiny_bert, 2).check_data(data), "num_labels: got 2; allowed: 3")
    named = fedtune.BertClassifier(tiny_bert, 3, label_names=["label 1", "label 0", "label 2"])
    refused(lambda: named.check_data(data), "label_names: got", "in their order")


def test_a_trainer_checks_its_data_module_before_it_trains(tiny_bert: str, tmp_path: Path) -> None:
    other = other_vocabulary(tmp_path / "other")
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(fedtune.UsageError, match="was pretrained with"):
        trainer.fit(fedtune.BertClassifier(tiny_bert, 3), datamodule=data_maker(other, make_task())())


def test_data_of_another_kind_are_left_alone(tiny_bert: str) -> None:
    fedtune.BertClassifier(tiny_bert, 3).check_data(pl.LightningDataModule())


# pairs of texts


def pairs_task() -> Any:
    """A task as `TextTask`, with second texts."""
    task = make_task()
    object.__setattr__(task, "second_texts", [*task.texts[1:], "word1 word2"])
    return task


@pytest.fixture(scope="module", params=["bert", "albert", "distilbert"])
def paired(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder whose tokenizer marks the second text of a pair where the model has token types."""
    from test_families import TINY

    path = tmp_path_factory.mktemp("pairs") / request.param
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(TINY[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)  # so that types matter
    model.save_pretrained(path)
    vocabulary = path / "vocab.txt"
    vocabulary.write_text("\n".join(SPECIAL + WORDS))
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if request.param != "distilbert" else [])
    transformers.BertTokenizer(str(vocabulary), model_input_names=names).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("padding_free", [True, False])
def test_pairs_have_the_logits_that_transformers_gives_them(paired: str, padding_free: bool) -> None:
    task = pairs_task()
    data = data_maker(paired, task)(max_length=20)
    module = fedtune.build_classifier(paired, 3, padding_free=padding_free).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(paired)
    rows = data.client_indices[0]
    batches = list(data.client_dataloader(0))
    typed = "distilbert" not in paired
    assert all(("token_type_ids" in batch) == typed for batch in batches)
    store = data.tokens
    batch = store.batch(torch.from_numpy(rows))
    texts, others = [task.texts[row] for row in rows], [task.second_texts[row] for row in rows]
    expected = tokenizer(texts, others, truncation="longest_first", max_length=20, padding=True, return_tensors="pt")
    assert ("token_type_ids" in expected) == typed
    with torch.inference_mode():
        theirs = module.network(**expected).logits
        ours = module._logits(batch)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        if typed:
            without = module._logits({name: batch[name] for name in ("input_ids", "attention_mask")})
            assert (without - theirs).abs().max() > 1e-3


def test_a_federation_trains_on_pairs_and_reads_them_back_from_the_cache(
    paired: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    first = data_maker(paired, pairs_task())()
    make_loop(max_rounds=1).fit(fedtune.build_classifier(paired, 3), first)
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "_tokenise", lambda *_: pytest.fail("tokenised again"))
        again = data_maker(paired, pairs_task())()
        assert again.digest == first.digest
    single = data_maker(paired, make_task())()
    assert "token_type_ids" not in next(iter(single.test_dataloader()))
    assert single.digest != first.digest


def test_other_second_texts_are_another_cache_entry(tiny_bert: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path))
    texts = ["word1 word2", "word3"]
    for seconds in (None, ["word4", "word5"], ["word5", "word4"], ["word4 word5", ""]):
        tokenise(texts, load_tokenizer(tiny_bert), 12, second_texts=seconds)
    assert len(list(tmp_path.glob("tokens-*"))) == 4


# the head


def test_the_head_is_fresh_also_where_the_folder_has_one_that_fits(folder: Path, tmp_path: Path) -> None:
    trained = fedtune.BertClassifier(str(folder), 3, seed=7)
    trained.network.save_pretrained(tmp_path / "with")
    from_base = fedtune.BertClassifier(str(folder), 3, seed=1).network
    from_head = fedtune.BertClassifier(str(tmp_path / "with"), 3, seed=1)
    assert torch.equal(from_base.classifier.weight, from_head.network.classifier.weight)
    assert not torch.equal(trained.network.classifier.weight, from_head.network.classifier.weight)
    assert "network.classifier.weight" not in from_head.from_files


def test_a_head_is_kept_when_asked_for(folder: Path, tmp_path: Path) -> None:
    trained = fedtune.BertClassifier(str(folder), 3, seed=7, label_names=["no", "maybe", "yes"])
    trained.network.save_pretrained(tmp_path / "with")
    kept = fedtune.BertClassifier(str(tmp_path / "with"), 3, keep_head=True, label_names=["No", "Maybe", "Yes"])
    assert torch.equal(kept.network.classifier.weight, trained.network.classifier.weight)
    assert "network.classifier.weight" in kept.from_files
    refused(
        lambda: fedtune.BertClassifier(str(tmp_path / "with"), 2, keep_head=True),
        "keep_head: got True; allowed: False, or a model with a head for 2 classes",
        "has 3",
    )
    swapped = ["yes", "maybe", "no"]
    refused(
        lambda: fedtune.BertClassifier(str(tmp_path / "with"), 3, keep_head=True, label_names=swapped), "keep_head", "maybe"
    )
    refused(lambda: fedtune.BertClassifier(str(folder), 2, keep_head=True), "keep_head", "lacks classifier")
    refused(lambda: fedtune.BertClassifier(str(folder), 2, keep_head=True, init="random"), "keep_head", "with random weights")
    refused(lambda: fedtune.build_classifier("minilm-distilbert", 2, keep_head=True), "keep_head")


def test_a_kept_head_is_for_the_classes_of_the_data(folder: Path, tmp_path: Path, make_data: Make) -> None:
    for names in (["label 0", "label 1", "label 2"], ["label 1", "label 0", "label 2"], None):
        fedtune.BertClassifier(str(folder), 3, label_names=names).network.save_pretrained(tmp_path / "with")
        save_tokenizer(tmp_path / "with")
        module = fedtune.BertClassifier(str(tmp_path / "with"), 3, keep_head=True)
        if names is not None and names[0] == "label 1":
            refused(lambda: module.check_data(make_data()), "keep_head", "those of the task ['label 0', 'label 1', 'label 2']")  # noqa: B023
        else:
            module.check_data(make_data())


def test_problem_type_and_names_come_from_the_task_not_from_the_folder(folder: Path, make_data: Make) -> None:
    names = {"0": "negative", "1": "neutral", "2": "positive"}
    change(
        folder / "config.json", problem_type="regression", id2label=names, label2id={"negative": 0, "neutral": 1, "positive": 2}
    )
    module = fedtune.BertClassifier(str(folder), 3)
    assert module.network.config.problem_type == "single_label_classification"
    assert module.network.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    module.check_data(make_data())
    assert module.network.config.label2id == {"label 0": 0, "label 1": 1, "label 2": 2}
    refused(
        lambda: fedtune.BertClassifier(str(folder), 3, label_names=["a", "b"]), "label_names: got ['a', 'b']", "3 different"
    )
    refused(lambda: fedtune.BertClassifier(str(folder), 3, label_names=["a", "b", "a"]), "3 different names")


@pytest.mark.parametrize("padding_free", [True, False])
def test_outputs_have_names_and_layers_are_whole_whatever_the_folder_says(folder: Path, padding_free: bool) -> None:
    ids, mask = torch.tensor([[2, 6, 7, 8, 3]] * 2), torch.ones(2, 5, dtype=torch.long)
    plain = fedtune.BertClassifier(str(folder), 3, padding_free=padding_free).eval()
    change(folder / "config.json", return_dict=False, chunk_size_feed_forward=2)
    module = fedtune.BertClassifier(str(folder), 3, padding_free=padding_free).eval()
    assert torch.equal(module(ids, mask), plain(ids, mask))
    module.network.save_pretrained(folder)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert torch.allclose(again(ids, mask).logits, plain(ids, mask), atol=1e-6)


# files that cannot be used


def spoilt(folder: Path, what: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    if what == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif what == "no weights":
        weights.unlink()
    elif what == "empty weights":
        weights.write_bytes(b"")
    elif what in ("nan", "inf"):
        change_weights(folder, lambda w: w["encoder.layer.1.output.dense.weight"].view(-1)[5].fill_(float(what)))
    elif what == "a layer less":
        change_weights(folder, lambda w: [w.pop(name) for name in list(w) if name.startswith("encoder.layer.1.")])
    elif what == "another size":
        change(config, intermediate_size=64)
    elif what == "no family":
        change(config, model_type=None)
    elif what == "an unknown family":
        change(config, model_type="mine")
    elif what == "no JSON":
        config.write_text("{hidden")
    elif what == "a list":
        config.write_text("[]")
    elif what == "no configuration":
        config.unlink()
    elif what == "whole numbers":
        change_weights(folder, lambda w: w.update({"pooler.dense.weight": torch.ones(16, 16, dtype=torch.int8)}))
    elif what == "heads that do not fit":
        change(config, num_attention_heads=3)
    elif what == "a word for a number":
        change(config, hidden_size="wide")


FAULTS = {
    "truncated": "model.safetensors: ",
    "no weights": "there is no model.safetensors in",
    "empty weights": "model.safetensors: ",
    "nan": "encoder.layer.1.output.dense.weight has NaN",
    "inf": "encoder.layer.1.output.dense.weight has NaN or infinite",
    "a layer less": "these lack bert.encoder.layer.1.",
    "another size": "these lack bert.encoder.layer.0.",
    "no family": "has no model_type",
    "an unknown family": "mine",
    "no JSON": "config.json is not JSON",
    "a list": "has no model_type",
    "no configuration": "has no config.json",
    "whole numbers": "pooler.dense.weight is torch.int8",
    "heads that do not fit": "not a multiple of the number of attention",
    "a word for a number": "hidden_size",
}


@pytest.mark.parametrize("what", FAULTS)
def test_files_that_cannot_be_used_are_named_with_the_cause_in_one_line(folder: Path, what: str) -> None:
    spoilt(folder, what)
    refused(lambda: fedtune.build_classifier(str(folder), 3), FAULTS[what])


def test_pickled_weights_are_named_with_what_to_do(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(lambda: fedtune.BertClassifier(str(folder), 3), "there is only pytorch_model.bin; save it once as safetensors")


def test_weights_beyond_the_configuration_are_named(folder: Path) -> None:
    change(folder / "config.json", num_hidden_layers=1)
    with pytest.warns(UserWarning, match=r"weights that its configuration does not use: .*layer\.1\..* and 13 more"):
        fedtune.BertClassifier(str(folder), 3)


def test_weights_in_several_files_are_read(folder: Path) -> None:
    whole = fedtune.BertClassifier(str(folder), 3)
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    index = {}
    for number, chosen in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in chosen}, folder / f"part-{number}.safetensors", metadata={"format": "pt"})
        index |= dict.fromkeys(chosen, f"part-{number}.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    again = fedtune.BertClassifier(str(folder), 3)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))
    (folder / "part-1.safetensors").unlink()
    refused(lambda: fedtune.BertClassifier(str(folder), 3), "part-1.safetensors")


def test_weights_of_full_precision_are_not_rounded_to_the_type_that_the_configuration_names(folder: Path) -> None:
    before = fedtune.BertClassifier(str(folder), 3).network.bert.pooler.dense.weight
    change(folder / "config.json", dtype="float16")
    assert torch.equal(fedtune.BertClassifier(str(folder), 3).network.bert.pooler.dense.weight, before)


CODE = (
    "from pathlib import Path\nPath(__file__).with_name('ran').write_text('ran')\nfrom transformers import BertConfig as Evil\n"
)


@pytest.mark.parametrize("family", ["bert", "mine"])
def test_code_in_a_model_folder_is_neither_run_nor_asked_about(
    folder: Path, family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (folder / "evil.py").write_text(CODE)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    change(folder / "config.json", model_type=family, auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})
    for act in (load_config, lambda name: fedtune.build_classifier(name, 3)):
        refused(lambda: act(str(folder)), "code of its own")  # noqa: B023
    assert not list(tmp_path.rglob("ran"))


def test_code_of_a_tokenizer_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (folder / "evil.py").write_text(CODE)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    change(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    refused(lambda: load_tokenizer(str(folder)), "model: got")
    assert not list(tmp_path.rglob("ran"))


def test_a_package_that_a_tokenizer_needs_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in tokenizer_files(folder):
        file.unlink()
    (folder / "spiece.model").write_bytes(b"pieces")
    find = importlib_find()
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "sentencepiece" else find(name, *rest))
    refused(lambda: load_tokenizer(str(folder)), "spiece.model", "pip install sentencepiece")


def importlib_find() -> Any:
    import importlib.util

    return importlib.util.find_spec


def test_a_damaged_tokenizer_file_is_one_line(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3')
    refused(lambda: load_tokenizer(str(folder)), "model: got")


def test_a_hub_out_of_reach_is_one_line() -> None:
    for act in (load_config, load_tokenizer, lambda name: fedtune.build_classifier(name, 2)):
        refused(lambda: act("nobody/nothing-at-all"), "model: got 'nobody/nothing-at-all'", "connect")  # noqa: B023


# cheap checks first


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.name={gpt2}"], "--model.name: got"),
        (["--model.name={none}"], "--model.name: got"),
        (["--model.name={tiny}", "--model.learning_rate=-1"], "--model.learning_rate: got -1.0"),
        (["--model.name={tiny}", "--model.optimizer=adam"], "--model.optimizer: got 'adam'"),
        (["--model.name={tiny}", "--data.max_length=33"], "--data.max_length: got 33; allowed: at most 32"),
        (["--model.name={cut}"], "--model.name: got"),
        (["--model.name={tiny}", "--data.tokenizer={none}"], "--data.tokenizer: got"),
    ],
)
def test_what_is_cheap_to_check_is_checked_before_a_text_is_read(
    command: Run, tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], said: str
) -> None:
    transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8).save_pretrained(tmp_path / "gpt2")
    shutil.copytree(tiny_bert, tmp_path / "cut")
    spoilt(tmp_path / "cut", "truncated")
    monkeypatch.setattr(fedtune.FederatedDataModule, "task", property(lambda _: pytest.fail("a text was read")))
    places = {"gpt2": tmp_path / "gpt2", "none": tmp_path / "none", "tiny": tiny_bert, "cut": tmp_path / "cut"}
    length = [] if any("max_length" in flag for flag in flags) else ["--data.max_length=16"]
    code, _, error = command("run", "--data.task=authors", *length, *(flag.format(**places) for flag in flags))
    assert code == 2
    assert said in error
    assert error.count("\n") == 1


def test_what_needs_the_classes_is_checked_before_texts_are_tokenised(
    command: Run, tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "data.csv"
    file.write_text("text,label\n" + "".join(f"word{i % 9} word{i % 5},{'ab'[i % 2]}\n" for i in range(80)))
    monkeypatch.setattr(tokens, "_tokenise", lambda *_: pytest.fail("tokenised"))
    flags = ["--data.task=csv", f"--data.task_options={json.dumps({'path': str(file)})}", "--data.max_length=8"]
    code, _, error = command("run", *flags, f"--model.name={tiny_bert}", "--model.freeze_layers=3")
    assert (code, error.count("\n")) == (2, 1)
    assert "--model.freeze_layers: got 3; allowed: at most 2" in error


def test_a_whole_number_beside_the_network_is_left_alone(tiny_bert: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"lm.counter": torch.tensor(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    plain, other = (fedtune.BertClassifier(name, 3) for name in (tiny_bert, str(folder)))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])


# numbers and names that Transformers takes as they are


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps is -1.0"),
        ({"hidden_dropout_prob": float("nan")}, "hidden_dropout_prob is nan"),
        ({"initializer_range": float("inf")}, "initializer_range is inf"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"num_attention_heads": -2}, "num_attention_heads is -2"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
        ({"intermediate_size": 10**6}, "numbers, the files have"),
        ({"num_labels": 10**9}, "num_labels 1000000000"),
        ({"id2label": {"x": "a"}}, "name: got"),
    ],
)
def test_numbers_that_no_network_has_are_refused_before_one_is_made(folder: Path, values: dict[str, Any], said: str) -> None:
    change(folder / "config.json", **values)
    refused(lambda: fedtune.build_classifier(str(folder), 3), said if said != "name: got" else "allowed")


def test_random_weights_must_fit_into_memory(folder: Path) -> None:
    change(folder / "config.json", hidden_size=2**17, intermediate_size=2**20, num_hidden_layers=1000)
    refused(lambda: fedtune.build_classifier(str(folder), 3, init="random"), "GiB of memory")


@pytest.mark.parametrize("key", ["pooler.dense.weight", "pooler.dense.bias"])
@pytest.mark.parametrize("way", ["gone", "misspelt", "shape"])
def test_half_a_pooler_is_refused_not_made_afresh(folder: Path, key: str, way: str) -> None:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        tensor = weights.pop(key)
        if way != "gone":
            weights[key.replace("pooler.dense", "pooler.danse") if way == "misspelt" else key] = tensor[:-1].clone()

    change_weights(folder, spoil)
    refused(lambda: fedtune.BertClassifier(str(folder), 3), f"these lack bert.{key}")


def test_a_model_without_a_pooler_gets_a_fresh_one(folder: Path) -> None:
    change_weights(folder, lambda weights: [weights.pop(key) for key in list(weights) if "pooler" in key])
    module = fedtune.BertClassifier(str(folder), 3)
    assert "network.bert.pooler.dense.weight" not in module.from_files


@pytest.mark.parametrize("other", ["bert.embeddings.LayerNorm.weight", "embeddings.LayerNorm.gamma"])
def test_two_tensors_for_one_place_are_refused(folder: Path, other: str) -> None:
    def add(value: float) -> None:
        change_weights(folder, lambda weights: weights.update({other: weights["embeddings.LayerNorm.weight"] + value}))

    add(0.0)
    fedtune.BertClassifier(str(folder), 3)
    add(1.0)
    refused(lambda: fedtune.BertClassifier(str(folder), 3), "each of its tensors once", other)


@pytest.mark.parametrize("part", ["../elsewhere.safetensors", "/dev/zero", "config.json", 5, None])
def test_an_index_names_files_beside_it_alone(folder: Path, part: Any) -> None:
    (folder / "model.safetensors").rename(folder.with_name("elsewhere.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": part}}))
    refused(lambda: fedtune.BertClassifier(str(folder), 3), "index.json names", "no safetensors file beside it")
    refused(lambda: fedtune.models.check_classifier(str(folder), {"init": "pretrained"} | OPTIONS), "index.json names")


OPTIONS = {"warmup_steps": 0, "seed": 0, "freeze_layers": 0, "weight_decay": 0, "learning_rate": 1, "label_smoothing": 0}
OPTIONS |= {"dropout": None, "optimizer": "sgd", "vocab_size": None, "keep_head": False}


def test_a_tensor_in_two_files_of_an_index_is_refused(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(lambda: fedtune.BertClassifier(str(folder), 3), "is in another file, too")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "config.json"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "dangling", "device"])
def test_what_is_no_file_is_not_passed_over(folder: Path, name: str, kind: str) -> None:
    file = folder / name
    file.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    for act in (load_tokenizer, load_config):
        with pytest.raises((fedtune.UsageError, fedtune.RunError), match=name):
            act(str(folder))


def test_names_of_a_kept_head_may_be_numbers(folder: Path) -> None:
    fedtune.BertClassifier(str(folder), 3).network.save_pretrained(folder)
    change(folder / "config.json", id2label={"0": 1, "1": 2, "2": 3}, label2id=None)
    fedtune.BertClassifier(str(folder), 3, keep_head=True, label_names=["1", "2", "3"])
    refused(lambda: fedtune.BertClassifier(str(folder), 3, keep_head=True, label_names=["a", "b", "c"]), "keep_head")


def test_outputs_beside_the_logits_are_not_asked_for(folder: Path) -> None:
    change(folder / "config.json", output_hidden_states=True, output_attentions=True)
    module = fedtune.BertClassifier(str(folder), 3, padding_free=False)
    assert module.network(torch.tensor([[2, 3]])).hidden_states is None


def test_a_tokenizer_that_cannot_tokenise_every_text_is_refused(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["unk_token"] = "[NONE]"
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refused(lambda: load_tokenizer(str(folder)), "Missing [UNK] token")


def test_a_tokenizer_that_is_not_that_of_its_file_is_named(folder: Path) -> None:
    load_tokenizer(str(folder))
    (folder / "tokenizer_config.json").unlink()
    with pytest.warns(UserWarning, match=r"BertTokenizer that Transformers makes of .* has other tokens for 'Word\d*' than"):
        load_tokenizer(str(folder))


def test_types_of_python_are_not_in_the_message(folder: Path) -> None:
    change(folder / "tokenizer_config.json", cls_token=5)
    with pytest.raises(fedtune.UsageError, match="got: int") as caught:
        load_tokenizer(str(folder))
    assert "<class" not in str(caught.value)
