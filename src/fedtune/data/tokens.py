"""Texts tokenised once into one flat array; a batch is a slice of it.

Legend: N texts, T tokens in all, B texts of a batch, L its padded length.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedtune.data import token_cache
from fedtune.errors import UsageError, warn
from fedtune.tensors import Tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS, _CHARACTERS = 10_000, 2**18  # handed to the tokenizer at once: it needs some 200 bytes a character while it works
_AMPLE = 8  # characters that a token hardly ever has
NO_LABEL = -100  # of tokens without a loss, as torch's and Transformers' losses have it
_UNKNOWN, _MANY = 0.8, 0.2  # shares of unknown tokens: at most, and from which on a warning says so


@dataclass(frozen=True)
class TokenStore:
    """N token sequences, end to end.

    Args:
        ids_T: (T,) int32 token ids, special tokens included.
        offsets: (N + 1,) int64; text i is ids_T[offsets[i] : offsets[i + 1]].
        pad_id: the id that fills a batch.
        types_T: (T,) int8, 0 in the first text of a pair and 1 in the second; None where the tokenizer has no such types, and
            for single texts, whose types are all 0.
        answers_T: (T,) int8, 1 for the tokens of answers, of conversations; else None.
    """

    ids_T: Tensor
    offsets: Tensor
    pad_id: int
    types_T: Tensor | None = None
    answers_T: Tensor | None = None

    def to(self, device: torch.device) -> TokenStore:
        """The same sequences on a device: their batches are made there, of rows that are there."""
        more = (None if one is None else one.to(device) for one in (self.types_T, self.answers_T))
        return TokenStore(self.ids_T.to(device), self.offsets.to(device), self.pad_id, *more)

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens of each text."""
        return self.offsets.diff()

    @property
    def answers(self) -> Tensor:
        """(N,) tokens of answers of each conversation; 0 for texts."""
        if self.answers_T is None:
            return torch.zeros_like(self.offsets[1:])
        sums = torch.cat([torch.zeros(1, dtype=torch.int64), self.answers_T.cumsum(0, dtype=torch.int64)])
        return sums[self.offsets].diff()

    def lengths_of(self, rows: Tensor) -> Tensor:
        """(B,) tokens of some texts."""
        return self.offsets[rows + 1] - self.offsets[rows]

    def batch(self, rows: Tensor, pad_to: int | None = None) -> dict[str, Tensor]:
        """Padded ids, mask and types of some texts.

        Args:
            rows: (B,) row numbers.
            pad_to: padded length L; the longest of the rows by default.

        Returns:
            "input_ids" and "attention_mask", each (B, L) int64; the mask is 1 where there is text. Of pairs also
            "token_type_ids", 0 where there is padding; of conversations "labels", the ids of answers and -100 elsewhere.
        """
        starts, lengths = self.offsets[rows], self.lengths_of(rows)
        steps_L = torch.arange(pad_to or int(lengths.max()), device=rows.device)
        mask_BL = steps_L < lengths[:, None]
        places_BL = (starts[:, None] + steps_L).clamp_(max=len(self.ids_T) - 1)
        ids_BL = self.ids_T[places_BL].long().masked_fill_(~mask_BL, self.pad_id)
        batch = {"input_ids": ids_BL, "attention_mask": mask_BL.long()}
        if self.types_T is not None:
            batch["token_type_ids"] = self.types_T[places_BL].long().masked_fill_(~mask_BL, 0)
        if self.answers_T is not None:
            batch["labels"] = ids_BL.masked_fill(~(mask_BL & (self.answers_T[places_BL] > 0)), NO_LABEL)
        return batch


def tokenise(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, second_texts: Sequence[str] | None = None
) -> TokenStore:
    """Tokenise all texts, cut at `max_length` tokens (special ones included), or read the result from the cache.

    They are what tokenizer(texts, second_texts, truncation="longest_first", max_length=max_length) gives.
    The cache (folder `FEDTUNE_CACHE`, by default ~/.cache/fedtune) is keyed by the content of the texts and by all of the
    tokenizer that decides its tokens; a damaged entry is made anew, and a folder that cannot be written only costs time.

    Args:
        second_texts: the second text of each pair, where texts come in pairs.

    Raises:
        UsageError: texts and second texts differ in number, or special tokens alone fill `max_length`.
    """
    if second_texts is not None and len(second_texts) != len(texts):
        raise UsageError("second_texts", len(second_texts), f"as many as there are texts, {len(texts)}")
    least = tokenizer.num_special_tokens_to_add(pair=second_texts is not None) + (1 if second_texts is None else 2)
    if max_length < least:
        raise UsageError("max_length", max_length, f"at least {least}, a token of each text and the special ones")
    types = second_texts is not None and "token_type_ids" in tokenizer.model_input_names
    path = token_cache.entry_of(texts, second_texts, tokenizer, max_length)
    found = None if path is None else token_cache.read(path, len(texts), types, vocabulary_size(tokenizer))
    if found is None:
        found = _tokenise(texts, second_texts, tokenizer, max_length, path)
    return TokenStore(found["ids"], found["offsets"], int(tokenizer.pad_token_id or 0), found.get("types"))


def tokens_of(task: Callable[[], Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenStore:
    """The texts of a task, or its pairs of texts, as tokens; the task is read when the tokenizer is there.

    Raises:
        UsageError: the tokenizer knows next to nothing of them, and what the task refuses.
    """
    found = task()
    store = tokenise(found.texts, tokenizer, max_length, getattr(found, "second_texts", None))
    check_known(store, tokenizer)
    return store


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id of a tokenizer."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def check_known(store: TokenStore, tokenizer: PreTrainedTokenizerBase) -> None:
    """Texts of which a tokenizer knows next to nothing train on nothing; where it knows too little, a warning says so.

    Raises:
        UsageError: nearly all tokens are the one for what is unknown.
    """
    special = set(tokenizer.all_special_ids)
    empty = int((store.lengths <= tokenizer.num_special_tokens_to_add(pair=False)).sum())
    if empty:
        warn(f"{empty} texts have no tokens for {tokenizer.name_or_path} but special ones")
    unknown = tokenizer.unk_token_id
    if unknown is None:
        return
    others = sum(int((store.ids_T == number).sum()) for number in special - {unknown})
    share = int((store.ids_T == unknown).sum()) / max(1, len(store.ids_T) - others)
    if share > _UNKNOWN:
        allowed = f"a tokenizer that knows the texts ({share:.0%} of their tokens are {tokenizer.unk_token})"
        raise UsageError("tokenizer", tokenizer.name_or_path, allowed)
    if share > _MANY:
        warn(f"{share:.0%} of the tokens are {tokenizer.unk_token}: {tokenizer.name_or_path} may not suit")


def _tokenise(
    texts: Sequence[str], seconds: Sequence[str] | None, tokenizer: PreTrainedTokenizerBase, most: int, path: Path | None
) -> Tensors:
    pieces: dict[str, list[NDArray[Any]]] = {"ids": [], "types": []}
    lengths: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
    for piece, others in _pieces(texts, seconds, tokenizer, most):
        ids, types = _encode(piece, others, tokenizer, most)
        lengths.append(np.fromiter(map(len, ids), np.int64, len(ids)))
        pieces["ids"].append(_flat(ids, np.int32))
        if types is not None:
            pieces["types"].append(_flat(types, np.int8))
    found = {name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in pieces.items() if arrays}
    found["offsets"] = torch.from_numpy(np.concatenate(lengths).cumsum())
    if path is not None:
        token_cache.write(path, found)
    return found


def _pieces(
    texts: Sequence[str], seconds: Sequence[str] | None, tokenizer: PreTrainedTokenizerBase, most: int
) -> Iterator[tuple[list[str], list[str] | None]]:
    """Texts, and their second texts, in pieces of at most so many texts and characters, or of a single text."""
    piece: list[str] = []
    others: list[str] | None = None if seconds is None else []
    characters = 0
    for number, text in enumerate(texts):
        given = _enough(text, tokenizer, most) if seconds is None else text
        size = len(given) + (0 if seconds is None else len(seconds[number]))
        if piece and (len(piece) == _TEXTS or characters + size > _CHARACTERS):
            yield piece, others
            piece, others, characters = [], None if seconds is None else [], 0
        piece.append(given)
        if others is not None and seconds is not None:
            others.append(seconds[number])
        characters += size
    yield piece, others


def _enough(text: str, tokenizer: PreTrainedTokenizerBase, most: int) -> str:
    """As much of a long text as its tokens are made of: what is cut off anyhow need not be tokenised.

    It is enough when half of it has the same tokens: then the place where it ends lies far behind the last one.
    """
    size, last = _AMPLE * most, tokenizer.truncation_side == "left"
    while 8 * size < len(text):
        half, whole = (_part(text, length, last) for length in (size, 2 * size))
        (one, other), _ = _encode([half, whole], None, tokenizer, most)
        if len(one) == most and one == other:
            return whole
        size *= 4
    return text


def _part(text: str, length: int, last: bool) -> str:
    """The first (last) so many characters of a text, to a blank where there is one."""
    if last:
        blank = text.find(" ", len(text) - length)
        return text[len(text) - length if blank < 0 else blank :]
    blank = text.rfind(" ", 0, length)
    return text[: length if blank < 0 else blank]


def _flat(lists: Sequence[Sequence[int]], kind: type[np.integer[Any]]) -> NDArray[Any]:
    return np.fromiter(itertools.chain.from_iterable(lists), dtype=kind)


def _encode(
    texts: Sequence[str], seconds: Sequence[str] | None, tokenizer: PreTrainedTokenizerBase, most: int
) -> tuple[list[list[int]], list[list[int]] | None]:
    """The ids and, of pairs, the types that a call of the tokenizer gives, without the masks and offsets that it also makes."""
    types = seconds is not None and "token_type_ids" in tokenizer.model_input_names
    pairs = None if seconds is None else list(seconds)
    backend = _backend(tokenizer)
    if backend is None:
        with _silent():  # a line for each pair that is cut
            found = tokenizer(list(texts), pairs, truncation="longest_first", max_length=most, return_token_type_ids=types)
        return found["input_ids"], found["token_type_ids"] if types else None
    backend.no_padding()
    backend.enable_truncation(most, strategy="longest_first", direction=tokenizer.truncation_side)
    backend.encode_special_tokens = tokenizer.split_special_tokens
    given = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
    encoded = backend.encode_batch_fast(given)
    return [one.ids for one in encoded], [one.type_ids for one in encoded] if types else None


def encode_plain(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The ids of texts that have their special tokens in them: none is added, nothing is cut."""
    backend = _backend(tokenizer)
    if backend is None:
        with _silent():  # a line for each text that is longer than the model takes
            return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The backend of a tokenizer that does nothing but call it; None where Python code of its own has a say."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    plain = all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus"))
    return tokenizer.backend_tokenizer if isinstance(tokenizer, PreTrainedTokenizerFast) and plain else None
