"""Tokenised texts kept on the disk between runs: an entry is named after all that decides the tokens, and checked when read.

An entry is a safetensors file with "ids" (T,) int32, "offsets" (N + 1,) int64 and, for pairs of texts, "types" (T,) int8, for
conversations "answers" (T,) int8 and "cuts" (2,) int64 (how many lack tokens before, and of, their answers); its metadata hold
the sha256 of its own name and of names, types, shapes and bytes. Legend: N texts, T tokens in all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedtune.errors import RunError, shown, warn
from fedtune.files import replaced, said
from fedtune.models.cache import cache_folder
from fedtune.tensors import Tensors, read_file, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TYPES = {"ids": torch.int32, "offsets": torch.int64}
_OF_PAIRS, _OF_ANSWERS = {"types": torch.int8}, {"answers": torch.int8, "cuts": torch.int64}
_PLAIN = (str, bytes, int, float, bool, type(None))
_ASIDE = {"name_or_path", "verbose", "deprecation_warnings", "files_loaded", "chat_template", "response_template"}  # no token


class Unreadable(ValueError):
    """A tokenizer whose settings cannot be read in full, so that nothing names its tokens."""


def entry_of(
    texts: Sequence[str], seconds: Sequence[str] | None, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Path | None:
    """The file for these texts, cut by this tokenizer at so many tokens; None, with a warning, where nothing can name it."""
    digest = hashlib.sha256(f"3 {max_length} {seconds is not None} ".encode())
    try:
        folder = cache_folder()
        for fact in _settings(tokenizer):
            _add(digest, fact)
    except (Unreadable, RunError) as error:
        warn(f"tokens were not cached, the next start tokenises again: {error}")
        return None
    for column in (texts, seconds or ()):
        for text in column:
            _add(digest, text)
    return folder / f"tokens-{digest.hexdigest()[:32]}.safetensors"


def digest_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Sixteen hexadecimal digits that name all that decides a tokenizer's tokens; None where nothing can name it."""
    digest = hashlib.sha256()
    try:
        for fact in _settings(tokenizer):
            _add(digest, fact)
    except Unreadable:
        return None
    return digest.hexdigest()[:16]


def _add(digest: Any, text: str) -> None:
    encoded = text.encode("utf-8", "surrogatepass")
    digest.update(len(encoded).to_bytes(8, "little") + encoded)


def _settings(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """All that decides what a tokenizer makes of a text, as texts, in one order.

    A backend of the package tokenizers writes itself down, but for how it pads and cuts, which every call sets, and what it
    makes of special tokens in a text. Of one in Python it is what its attributes hold, at any depth.

    Raises:
        Unreadable: a part cannot be written down, or the class is not of Transformers: its code may change unseen.
    """
    kind = type(tokenizer)
    if kind.__module__.partition(".")[0] != "transformers":
        raise Unreadable(f"{kind.__module__}.{kind.__qualname__} is not a tokenizer of Transformers, its code may change")
    yield f"{kind.__module__}.{kind.__qualname__}"
    for package in ("transformers", "tokenizers", "sentencepiece"):
        yield f"{package} {_version(package)}"
    yield f"{tokenizer.truncation_side} {tokenizer.split_special_tokens} {sorted(tokenizer.model_input_names)}"
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield from _facts(tokenizer, ())
        return
    backend.no_padding()
    backend.no_truncation()
    try:
        yield backend.to_str()
    except Exception as error:  # of the type Exception itself: a part that is written in Python
        raise Unreadable(f"a part of {kind.__qualname__} cannot be written down ({error})") from error


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def _facts(value: Any, above: tuple[int, ...]) -> Iterator[str]:
    """What a value holds, as texts in one order. `above` has the identities of the objects that it is part of."""
    kind = type(value)
    if isinstance(value, _PLAIN):
        yield repr(value)
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} in order"
        for one in value:
            yield from _facts(one, above)
    elif isinstance(value, (set, frozenset)):
        yield f"{sorted(map(repr, value))}"
    elif isinstance(value, Mapping):
        yield f"{len(value)} by name"
        for key in sorted(value, key=repr):
            if key not in _ASIDE:
                yield repr(key)
                yield from _facts(value[key], above)
    elif isinstance(value, re.Pattern):
        yield f"{value.pattern!r} {value.flags}"
    elif hasattr(value, "serialized_model_proto"):  # SentencePiece: its pieces, their scores, its normaliser
        yield hashlib.sha256(value.serialized_model_proto()).hexdigest()
    elif kind.__name__ == "AddedToken":
        yield repr(value)
    elif hasattr(value, "__qualname__") and hasattr(value, "__module__"):
        yield f"{value.__module__}.{value.__qualname__}"
    elif id(value) in above:
        yield f"the one {len(above) - above.index(id(value))} above"
    elif hasattr(value, "__dict__"):
        yield f"{kind.__module__}.{kind.__qualname__}"
        yield from _facts(vars(value), (*above, id(value)))
    else:
        raise Unreadable(f"a part of its tokenizer, {shown(value)}, cannot be written down")


def read(path: Path, texts: int, pairs: bool, vocabulary: int, answers: bool = False) -> Tensors | None:
    """The tensors of an entry, or None where there is none. A damaged one is named in a warning, and is none.

    Args:
        texts: N, as it must have.
        pairs: whether it must have "types".
        vocabulary: ids must be below.
        answers: whether it must have "answers" and "cuts".
    """
    from safetensors import SafetensorError

    kinds = _TYPES | (_OF_PAIRS if pairs else {}) | (_OF_ANSWERS if answers else {})
    try:
        found, metadata = read_file(path)
        right = metadata.get("sha256") == _notes(path, found)
        why = _fault(found, texts, kinds, vocabulary) if right else "its content is not what was written"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        why = said(error)
    if why is None:
        return found
    warn(f"{path} is damaged ({why}); these texts are tokenised again")
    return None


def _fault(found: Tensors, texts: int, expected: Mapping[str, torch.dtype], vocabulary: int) -> str | None:
    """What is wrong with the tensors of an entry."""
    kinds = {name: tensor.dtype for name, tensor in found.items() if tensor.ndim == 1}
    if kinds != expected or len(found) != len(expected):
        return f"it has {sorted(found)}"
    offsets, ids = found["offsets"], found["ids"]
    if len(offsets) != texts + 1 or offsets[0] != 0 or offsets[-1] != len(ids) or bool((offsets.diff() < 0).any()):
        return "its texts do not add up"
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < vocabulary):
        return f"it has ids beyond the vocabulary of {vocabulary}"
    for name, size in (("types", len(ids)), ("answers", len(ids)), ("cuts", 2)):
        if name in expected and len(found[name]) != size:
            return f"its {name} are not those of its tokens"
    return None


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Keep an entry, whole and on the disk. Where that is not possible, a warning says so."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as temporary:
            save_file(dict(tensors), temporary, metadata={"sha256": _notes(path, tensors)})
    except (OSError, SafetensorError) as error:
        warn(f"tokens were not cached, the next start tokenises again: {error}")


def _notes(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """What an entry says of its content and its name, so that one in the place of another is noticed."""
    return f"{path.stem} {sha256(tensors)}"
