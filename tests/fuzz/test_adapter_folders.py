"""A folder of adapters after accidents: a run begins with what peft makes of it, or is refused in one line."""

from __future__ import annotations

import collections
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accidents import accident, change_json, change_tensors
from cases import FIRST, share
from conftest import save_tiny_bert

import fedtune
from fedtune.models.weights import quiet

peft = pytest.importorskip("peft", reason="the extra fedtune[lora] is not installed")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and an adapter of it that peft has saved."""
    place = tmp_path_factory.mktemp("adapters")
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_tiny_bert(place / "model")
        config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=False)
        peft.get_peft_model(base(place), config).save_pretrained(place / "good")
    return place


def base(place: Path) -> Any:
    torch.manual_seed(0)
    kind = transformers.AutoModelForSequenceClassification
    return kind.from_pretrained(place / "model", num_labels=3, attn_implementation="eager")


def case(number: int, place: Path) -> tuple[str, str]:
    """Do one; what happened to the folder, and "0", "2" or what is wrong."""
    rng, folder, victim = random.Random(f"adapter/{number}"), place / "case", place / "victim"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place / "good", folder)
    victim.write_text("mine")
    happened = []
    for _ in range(rng.choice([1, 1, 2])):
        way = rng.random()
        if way < 0.5:
            happened.append(change_json(folder / "adapter_config.json", rng))
        elif way < 0.75 and (folder / "adapter_model.safetensors").is_file():
            happened.append(change_tensors(folder / "adapter_model.safetensors", rng))
        else:
            happened.append(accident(rng, folder, victim))
    try:
        module = fedtune.build_classifier(str(place / "model"), 3, lora={"adapter": str(folder)}, dropout=0.0)
    except (fedtune.UsageError, fedtune.RunError) as error:
        clear = len(str(error)) < 1500 and not any(word in str(error) for word in ("\n", "<class '", "NoneType"))
        return str(happened), "2" if clear and isinstance(error, fedtune.UsageError) else f"unclear line: {str(error)[:300]!r}"
    except Exception as error:  # whatever it is, it is wrong
        return str(happened), f"{type(error).__name__}: {str(error)[:200]}"
    return str(happened), wrong(module, place) or "0"


def wrong(module: Any, place: Path) -> str:
    """What peft has in another way; nothing where all is alike."""
    ids = torch.arange(5, 21).view(2, 8)
    try:
        theirs = peft.PeftModel.from_pretrained(base(place), place / "case").eval()
    except Exception:  # it trips over what says nothing of the product of two matrices: a dropout that is a word
        return ""
    with torch.inference_mode():
        ours, expected = module.eval().network(input_ids=ids).logits, theirs(input_ids=ids).logits
    if not any("classifier" in name for name in fedtune.models.adapter_files._tensors_of(str(place / "case"))):
        return ""  # of each a fresh head of its own
    return "" if torch.allclose(ours, expected, rtol=1e-4, atol=1e-5, equal_nan=True) else "other logits than those of peft"


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_adapter_is_what_peft_makes_of_it_or_refused_in_one_line(place: Path) -> None:
    found: collections.Counter[str] = collections.Counter()
    with quiet():
        for number in range(FIRST, FIRST + share(0.05)):
            what, kind = case(number, place)
            found[kind] += 1
            if kind not in ("0", "2"):
                print(number, what, "=>", kind)
    print(found)
    assert set(found) <= {"0", "2"}, found
    assert found["0"] > 0
    assert found["2"] > 0
    assert (place / "victim").read_text() == "mine"
