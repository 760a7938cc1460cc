"""What a model's folder must be like, where Transformers would pass over what is wrong with it in silence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.errors import shown
from fedtune.files import present, regular

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_READ = {".json", ".txt", ".model", ".jinja"}  # of files that say what a model and its tokenizer are
_CLASSES = 10**6  # more than any head has
_LONGEST = 64  # tokens of each
_WORDS = 100  # of a vocabulary, by which two tokenizers are compared


def check_kinds(folder: Path) -> None:
    """Check that what looks like a file in a folder can be read as one; for Transformers it would not be there.

    Raises:
        OSError: there is something else.
        RunError: there is a link that leads nowhere.
    """
    for file in sorted(folder.iterdir()):
        if file.suffix in _READ and present(file):
            regular(file)
            if not os.access(file, os.R_OK):
                raise PermissionError(f"{file} may not be read")


def check_content(folder: Path) -> None:
    """Check that config.json says what family it is of, and no more classes than there can be; nothing else is looked at.

    Raises:
        ValueError: it does not, or asks for code of its own to be run; or there is an adapter.
    """
    if present(folder / "adapter_config.json"):  # beside a model, peft would change it
        raise ValueError(f"{folder} has adapter_config.json, as adapters have: a run begins with one by model.lora.adapter")
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ValueError(f"{file} has no model_type, which names the family")
    classes = content.get("num_labels", 2)
    if type(classes) is not int or not 0 <= classes <= _CLASSES:  # Transformers makes a name for each
        raise ValueError(f"{file} says num_labels {shown(classes)}, which must be a whole number, at most {_CLASSES}")
    if content.get("auto_map"):
        raise ValueError(f"{file} asks for code of its own, which is not run: {shown(content['auto_map'])}")


def other_than_its_file(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str | None:
    """A text that tokenizer.json has other tokens for than the tokenizer that Transformers made of the folder, or None.

    Transformers makes it anew by the class that tokenizer_config.json names, or that goes with the family: of a vocabulary of
    cased words one that makes all words lower-case. And what is special there is cut out of every word.
    """
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    words = sorted(word for word in tokenizer.get_vocab() if word.isascii() and word.isalnum())
    words = words[:: 1 + len(words) // _WORDS]
    texts = [*words, *(word.capitalize() for word in words)]
    plain = Tokenizer.from_file(str(file))
    plain.no_padding()
    plain.enable_truncation(_LONGEST, direction=tokenizer.truncation_side)
    ours = tokenizer(texts, truncation=True, max_length=_LONGEST)["input_ids"] if texts else []
    theirs = [one.ids for one in plain.encode_batch(texts)]
    return next((text for text, one, other in zip(texts, ours, theirs, strict=True) if one != other), None)
