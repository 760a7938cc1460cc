"""A folder of a model after some accidents: what Transformers reads of it, or one line that says what is wrong."""

from __future__ import annotations

import collections
import json
import random
import re
import resource
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accidents import accident
from cases import FIRST, outcome, share
from conftest import SPECIAL, WORDS, save_tokenizer
from safetensors.torch import load_file
from test_families import TINY
from test_folders import bounded
from tokenizers import Tokenizer

import fedtune
from fedtune.models.weights import quiet

TEXTS = ["word1 word7 word30", "word12 other", "Word3 word4 word5 word6 word3 word3", "word39"]
NAMES = ("no", "maybe", "yes")
PARTS = {"train": np.arange(8), "validation": np.arange(8, 10), "test": np.arange(10, 12)}
OURS = (
    "metadata",
    "item assignment",
    "attn_implementation",
    "FlashAttention",
    "attention implementation",
)  # what we decide ourselves, or need not
MOST = 500_000  # kilobytes that a case may need
ROOM = 12_000_000_000  # bytes of addresses: what asks for more fails, and says so
TASK = fedtune.TextTask("few", TEXTS * 3, np.arange(12) % 3, NAMES, PARTS)


def save(name: str, folder: Path) -> None:
    """A good folder: of a family, with a vocabulary of words, with a head, or in several files."""
    torch.manual_seed(0)
    family = name.partition("-")[0]
    other = transformers.XLMRobertaConfig(**(TINY["bert"].to_diff_dict() | {"model_type": "xlm-roberta", "pad_token_id": 0}))
    config = {**TINY, "xlm": other}[family]
    kind = transformers.AutoModelForSequenceClassification if name.endswith("head") else transformers.AutoModel
    model = kind.from_config(config)
    if name.endswith("head"):
        model = fedtune.BertClassifier(str(folder.with_name("bert")), 3, label_names=NAMES).network
    model.save_pretrained(folder, max_shard_size="12KB" if name.endswith("parts") else "1GB")
    save_tokenizer(folder)
    if name.endswith("words"):
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
        (folder / "vocab.txt").write_text("\n".join(SPECIAL + WORDS))
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        (folder / "special_tokens_map.json").write_text(json.dumps(special))


KINDS = (
    "bert",
    "bert-head",
    "bert-words",
    "bert-parts",
    "distilbert",
    "distilbert-words",
    "albert",
    "roberta",
    "modernbert",
    "xlm",
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("good")
    with quiet():
        for name in KINDS:
            save(name, place / name)
    return place


@pytest.fixture
def bounded_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def opened(folder: Path, rng: random.Random) -> tuple[Any, Any]:
    """The module and its data, as a run has them; no module of a family that has none."""
    data = fedtune.FederatedDataModule(TASK, str(folder), num_clients=2, batch_size=2, max_length=8)
    tokens = data.tokens
    assert tokens is not None
    if json.loads((folder / "config.json").read_text())["model_type"] == "xlm-roberta":
        return None, data
    head = {"keep_head": True} if "head" in folder.name or rng.random() < 0.05 else {}
    names = {"label_names": NAMES} if rng.random() < 0.3 else {}
    kind = {"init": "random"} if not head and rng.random() < 0.05 else {}
    module = fedtune.build_classifier(str(folder), 3, **head, **names, **kind)
    module.check_data(data)
    return module, data


def wrong(module: Any, data: Any, folder: Path) -> str:
    """What is not as the files have it; nothing where all is."""
    found = wrong_tokens(data, folder)
    return found or (wrong_module(module, data, folder) if module is not None else "")


def wrong_tokens(data: Any, folder: Path) -> str:
    with quiet():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        expected = tokenizer(list(TASK.texts), truncation=True, max_length=8)["input_ids"]
    ours = tokens_of(data)
    if ours != expected:
        return "other tokens than those of the tokenizer"
    lengths = {len(one) for one in ours}
    if max(lengths) > 8 or min(lengths) < 1:
        return "lengths"
    return ""


def anew(data: Any, folder: Path) -> str:
    """What is not as tokenizer.json has it, where that is read as it is."""
    if not (folder / "tokenizer.json").is_file():
        return ""
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.no_padding()
    plain.enable_truncation(8, direction=data.tokenizer.truncation_side)
    expected = [one.ids for one in plain.encode_batch(list(TASK.texts))]
    return "" if expected == tokens_of(data) else "other tokens than those of tokenizer.json, in silence"


def tokens_of(data: Any) -> list[list[int]]:
    store = data.tokens
    return [store.ids_T[start:end].tolist() for start, end in zip(store.offsets[:-1], store.offsets[1:], strict=True)]


def tensors_of(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of a folder by their names without the prefix of a family."""
    whole = folder / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(folder.glob("model-*.safetensors"))
    found = {}
    for file in files:
        for name, tensor in load_file(file).items():
            name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            key = re.sub(rf"^({prefix})+", "", name)
            if key in found and not torch.equal(found[key], tensor):
                return {}
            found[key] = tensor
    return found


def wrong_module(module: Any, data: Any, folder: Path) -> str:
    network = module.network
    state = network.state_dict()
    if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
        return "weights that are not finite"
    batch = next(iter(data.test_dataloader()))
    for mode in (True, False):
        module.train(mode)
        with torch.no_grad():
            logits = module(batch["input_ids"], batch["attention_mask"])
        large = any(bool((tensor.abs() > 1e30).any()) for tensor in state.values())
        if logits.shape != (len(batch["labels"]), 3) or not (large or bool(logits.isfinite().all())):
            return f"logits {tuple(logits.shape)} that are not finite or not three"
    if module.hparams["init"] == "random":
        return ""
    inner = network.base_model_prefix + "."
    files = tensors_of(folder, re.escape(inner))
    if not files:
        return "two tensors of one name"
    for name, tensor in state.items():
        key = name.removeprefix(inner)
        if name.startswith(inner) or module.hparams["keep_head"]:
            if key in files and torch.equal(files[key].float(), tensor):
                continue
            if "pooler" in key and not any("pooler" in one.lower() for one in files):
                continue
            return f"{name} is not that of the files"
    return wrong_states(network, batch, folder)


def wrong_states(network: Any, batch: Any, folder: Path) -> str:
    try:
        with quiet():
            options = {"dtype": torch.float32, "attn_implementation": "eager", "chunk_size_feed_forward": 0}
            options |= {"output_hidden_states": False, "output_attentions": False}
            plain = transformers.AutoModel.from_pretrained(folder, **options).eval()
    except Exception as error:
        if any(name in str(error) for name in OURS):
            return ""
        return f"Transformers refuses it: {type(error).__name__}: {str(error)[:100]}"
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        theirs, ours = plain(**given, return_dict=True).last_hidden_state, network.base_model(**given).last_hidden_state
        if not torch.allclose(ours, theirs, atol=1e-5, equal_nan=True):
            return "other hidden states than those of Transformers"
    return ""


def case(number: int, good: Path, place: Path) -> tuple[str, str]:
    """Do one; what happened to the folder, and "0", "2" or what is wrong."""
    rng = random.Random(f"hub/{number}")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    name = rng.choice(KINDS)
    folder, victim = place / name, place / "victim"
    victim.write_text("echo hello\n")
    shutil.copytree(good / name, folder)
    shutil.copy(good / "bert" / "model.safetensors", place / "elsewhere.safetensors")
    what = f"{name}: " + "; ".join(accident(rng, folder, victim) for _ in range(rng.choice([1, 1, 1, 2, 3])))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with bounded():
            kind = done(folder, rng)
    except fedtune.UsageError as error:
        kind = refusal(str(error))
    except fedtune.RunError as error:
        kind = refusal(str(error))
    except BaseException as error:  # whatever it is, it is wrong
        if isinstance(error, KeyboardInterrupt):
            raise
        kind = f"{type(error).__name__}: {str(error)[:200]}"
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > MOST:
        kind = f"too much memory; {kind}"
    if victim.read_text() != "echo hello\n" or victim.with_name("new").exists():
        kind = f"written through a link; {kind}"
    return what, kind


def refusal(said: str) -> str:
    if "\n" in said or len(said) > 1500 or "<class '" in said or "NoneType" in said:
        return f"unclear line: {said[:300]!r}"
    return f"too much memory: {said[:300]}" if "allocate" in said else "2"


def done(folder: Path, rng: random.Random) -> str:
    way = rng.random()
    if way < 0.1:
        return outcome("run", f"--model.name={folder}", "--print_config")
    if way < 0.14:
        table = folder.with_name("few.csv")
        table.write_text("text,label\n" + "".join(f"{text},{n % 2}\n" for n, text in enumerate(TEXTS * 6)))
        words = ["--data.task=csv", f"--data.task_options.path={table}", "--data.num_clients=2", "--data.max_length=8"]
        words += ["--loop.max_rounds=1", "--loop.accelerator=cpu", "--loop.baselines=[]", "--loop.precision=32-true"]
        return outcome("run", f"--model.name={folder}", *words, f"--run_dir={folder.with_name('run')}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module, data = opened(folder, rng)
    warned = any("than its tokenizer.json has" in str(one.message) for one in caught)
    return wrong(module, data, folder) or ("" if warned else anew(data, folder)) or "0"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("bounded_memory")
def test_a_model_folder_after_accidents_is_read_rightly_or_refused_in_one_line(good: Path, tmp_path: Path) -> None:
    for name in KINDS:
        module, data = opened(good / name, random.Random(0))
        assert wrong(module, data, good / name) == ""
    found: collections.Counter[str] = collections.Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(FIRST, FIRST + share(0.09)):
            what, kind = case(number, good, tmp_path / "case")
            found[kind] += 1
            if kind not in ("0", "2"):
                print(number, what, "=>", kind)
    print(found)
    assert set(found) <= {"0", "2"}, found
    assert found["0"] > 0
    assert found["2"] > 0
