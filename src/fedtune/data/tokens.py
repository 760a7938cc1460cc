"""Texts tokenised once into one flat array; a batch is a slice of it.

Legend: N texts, T tokens in all, B texts of a batch, L its padded length.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 10_000  # texts handed to the tokenizer at once: bounds the memory of Python lists


@dataclass(frozen=True)
class TokenStore:
    """N token sequences, end to end.

    Args:
        ids_T: (T,) int32 token ids, special tokens included.
        offsets: (N + 1,) int64; text i is ids_T[offsets[i] : offsets[i + 1]].
        pad_id: the id that fills a batch.
    """

    ids_T: Tensor
    offsets: Tensor
    pad_id: int

    def to(self, device: torch.device) -> TokenStore:
        """The same sequences on a device: their batches are made there, of rows that are there."""
        return TokenStore(self.ids_T.to(device), self.offsets.to(device), self.pad_id)

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens of each text."""
        return self.offsets.diff()

    def lengths_of(self, rows: Tensor) -> Tensor:
        """(B,) tokens of some texts."""
        return self.offsets[rows + 1] - self.offsets[rows]

    def batch(self, rows: Tensor, pad_to: int | None = None) -> dict[str, Tensor]:
        """Padded ids and mask of some texts.

        Args:
            rows: (B,) row numbers.
            pad_to: padded length L; the longest of the rows by default.

        Returns:
            "input_ids" and "attention_mask", each (B, L) int64; the mask is 1 where there is text.
        """
        starts, lengths = self.offsets[rows], self.lengths_of(rows)
        steps_L = torch.arange(pad_to or int(lengths.max()), device=rows.device)
        mask_BL = steps_L < lengths[:, None]
        places_BL = (starts[:, None] + steps_L).clamp_(max=len(self.ids_T) - 1)
        ids_BL = self.ids_T[places_BL].long().masked_fill_(~mask_BL, self.pad_id)
        return {"input_ids": ids_BL, "attention_mask": mask_BL.long()}


def tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenStore:
    """Tokenise all texts, cut at `max_length` tokens (special ones included), or read the result from the cache.

    The cache (folder `FEDTUNE_CACHE`, by default ~/.cache/fedtune) is keyed by the content of the texts and of the
    tokenizer; a damaged entry is made anew, and a folder that cannot be written only costs time.
    """
    path = cache_folder() / f"tokens-{_key(texts, tokenizer, max_length)}.safetensors"
    ids_T, offsets = _read(path) or _tokenise(texts, tokenizer, max_length, path)
    return TokenStore(ids_T, offsets, pad_id=int(tokenizer.pad_token_id or 0))


def cache_folder() -> Path:
    """Where tokenised texts are kept between runs."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fedtune"
    return Path(os.environ.get("FEDTUNE_CACHE", default))


def _key(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    digest = hashlib.sha256(f"1 {max_length} {type(tokenizer).__name__}".encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    digest.update((backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))).encode())
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()[:32]


def _read(path: Path) -> tuple[Tensor, Tensor] | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
        return found["ids"], found["offsets"]
    except (OSError, SafetensorError, KeyError):
        return None


def _tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, most: int, path: Path) -> tuple[Tensor, Tensor]:
    pieces: list[NDArray[np.int32]] = []
    lengths: list[int] = []
    for start in range(0, len(texts), _CHUNK):
        encoded = _encode(list(texts[start : start + _CHUNK]), tokenizer, most)
        lengths += map(len, encoded)
        pieces.append(np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.int32))
    ids_T = torch.from_numpy(np.concatenate(pieces))
    offsets = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int64))
    _write(path, {"ids": ids_T, "offsets": offsets})
    return ids_T, offsets


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, most: int) -> list[list[int]]:
    """What tokenizer(texts, truncation=True, max_length=most)["input_ids"] is, without the masks and offsets it also makes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=most)["input_ids"]
        return ids
    backend.no_padding()
    backend.enable_truncation(most, direction=tokenizer.truncation_side)
    return [encoding.ids for encoding in backend.encode_batch_fast(texts)]


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        os.close(handle)
        save_file(tensors, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        warnings.warn(f"tokens were not cached, the next start tokenises again: {error}", stacklevel=2)
