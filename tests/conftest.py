"""Tiny things that behave like the real ones: a two-layer BERT in hub format, and a task with authors."""

from __future__ import annotations

import dataclasses
import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the hub
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning_fabric.fabric
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import fedtune
from fedtune import cli
from fedtune.runs import conclusion
from fedtune.runs.figures import plot_run

torch.set_num_threads(1)  # the models here are too small to share a step between cores
os.fsync = lambda handle: None  # no test cuts the power, and a disk makes them wait for a third of their time
# every `Fabric` reads the metadata of all packages for callbacks; there is one of them in each run, and runs are short here
lightning_fabric.fabric._load_external_callbacks = functools.cache(lightning_fabric.fabric._load_external_callbacks)
conclusion.plot_run = lambda *of_a_run: None  # a picture takes as long as the rounds of a tiny run: see `pictures`

WORDS = [f"word{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def pictures() -> Iterator[None]:
    """Runs draw their curves.png, which else they do in processes of their own alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conclusion, "plot_run", plot_run)
        yield


def save_tokenizer(folder: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)


def save_tiny_bert(folder: Path) -> str:
    """A folder in hub format: two layers, hidden size 16, at most 32 tokens."""
    config = transformers.BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny-bert")


def make_task(texts_per_author: int = 24, authors: int = 6, labels: int = 3, seed: int = 0) -> fedtune.TextTask:
    """Authors with favourite words; the label is the author modulo the number of labels; lengths from 3 to 20 words."""
    rng = np.random.default_rng(seed)
    numbers = np.repeat(np.arange(authors), texts_per_author)
    texts = []
    for author in numbers:
        words = rng.integers(len(WORDS), size=rng.integers(3, 21))
        favourite = rng.random(len(words)) < 0.5
        texts.append(
            " ".join(WORDS[author * 5 + word % 5] if own else WORDS[word] for word, own in zip(words, favourite, strict=True))
        )
    order = rng.permutation(len(texts))
    cuts = [int(len(texts) * 0.7), int(len(texts) * 0.85)]
    parts = dict(zip(("train", "validation", "test"), np.split(order, cuts), strict=True))
    return fedtune.TextTask(
        "tiny",
        texts,
        labels=numbers % labels,
        label_names=tuple(f"label {i}" for i in range(labels)),
        parts=parts,
        authors=numbers,
        author_names=tuple(f"author {i}" for i in range(authors)),
    )


@pytest.fixture(scope="session")
def task() -> fedtune.TextTask:
    return make_task()


def data_maker(model: str, task: fedtune.TextTask) -> Callable[..., fedtune.FederatedDataModule]:
    """Makes data modules of a task for three clients, or with other options."""

    def make(**changes: Any) -> fedtune.FederatedDataModule:
        options = {"task": task, "model": model, "num_clients": 3, "batch_size": 8, "max_length": 24}
        return fedtune.FederatedDataModule(**(options | changes))

    return make


def module_maker(model: str) -> Callable[..., fedtune.BertClassifier]:
    """Makes classifiers of three classes, all with the same first weights."""

    def make(**changes: Any) -> fedtune.BertClassifier:
        return fedtune.BertClassifier(model, **({"num_labels": 3, "learning_rate": 5e-3} | changes))

    return make


@pytest.fixture
def make_data(tiny_bert: str, task: fedtune.TextTask) -> Callable[..., fedtune.FederatedDataModule]:
    return data_maker(tiny_bert, task)


@pytest.fixture
def make_module(tiny_bert: str) -> Callable[..., fedtune.BertClassifier]:
    return module_maker(tiny_bert)


def make_loop(**changes: Any) -> fedtune.FederatedLoop:
    """A quiet loop in fp32 without baselines; fields of `RunOptions` may be given with the others."""
    names = {item.name for item in dataclasses.fields(fedtune.RunOptions)}
    details = {"progress": False} | {name: changes.pop(name) for name in names & set(changes)}
    options = {"max_rounds": 2, "precision": "32-true", "accelerator": "cpu", "baselines": ()}
    return fedtune.FederatedLoop(**(options | changes), options=fedtune.RunOptions(**details))


class GivenLoaders(pl.LightningDataModule):
    """Clients' loaders as they are, for modules and data that are not ours."""

    def __init__(self, clients: list[Any], validation: Any) -> None:
        super().__init__()
        self._clients, self._validation = clients, validation
        self.num_clients = len(clients)

    def client_dataloader(self, client: int) -> Any:
        return self._clients[client]

    def train_dataloader(self) -> Any:
        return self._clients[0]

    def val_dataloader(self) -> Any:
        return self._validation


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """To rounding."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


def without_times(records: list[fedtune.RoundRecord]) -> list[dict[str, Any]]:
    """Records as dictionaries, without what a clock says."""

    def strip(flat: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in flat.items() if not key.startswith("seconds")}

    return [strip(r.to_dict()) | {"clients": [strip(c) for c in r.to_dict()["clients"]]} for r in records]


class Noted(fedtune.FederatedCallback):
    """Knows how many rounds it has seen."""

    def __init__(self) -> None:
        self.count = 0

    def on_round_end(self, run: Any, module: Any, record: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line: exit code, standard output and standard error."""

    def command(*arguments: str) -> tuple[int, str, str]:
        try:
            cli.main(arguments)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command
