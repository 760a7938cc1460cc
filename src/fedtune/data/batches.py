"""Batches of tokenised texts, made a batch at a time: no Python runs per text.

Legend: M texts of a loader, B texts of a batch, L its padded length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fedtune.data.tokens import TokenStore

_SORTED = 50  # batches that are sorted by length together, at most


class Texts(Dataset[dict[str, Tensor]]):
    """Some rows of a task; the loader asks for whole batches, so no Python runs per text.

    Args:
        tokens, labels: of the whole task, both on the device where batches are made; no labels where the tokens have their own.
        rows: (M,) row numbers, on the CPU.
        lengths: (M,) their tokens, on the CPU, so that a batch's length is known without waiting for a device.
        length_of: tokens of the longest text of a batch -> its padded length.
        mask: whether batches have an "attention_mask".
    """

    def __init__(
        self,
        tokens: TokenStore,
        labels: Tensor | None,
        rows: Tensor,
        lengths: Tensor,
        length_of: Callable[[int], int],
        mask: bool,
    ) -> None:
        self.tokens, self.labels, self.rows, self.lengths = tokens, labels, rows, lengths
        self.length_of, self.mask = length_of, mask

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: list[int]) -> dict[str, Tensor]:
        chosen = self.rows[places].to(self.tokens.ids_T.device, non_blocking=True)
        length = self.length_of(int(self.lengths[places].max()))
        batch = self.tokens.batch(chosen, length)
        if self.labels is not None:
            batch["labels"] = self.labels[chosen]
        if not self.mask:
            del batch["attention_mask"]
        return batch


class LengthGroupedBatches:
    """A batch sampler: random batches of texts of similar length, so that little is padding. Every text occurs once.

    The texts are divided at random into parts, and each part, sorted by length, into batches. As in Transformers'
    `LengthGroupedSampler` there are four parts or more: with fewer, an epoch's batches would be much like the last one's.
    So few batches are plain random ones. It draws from torch's global generator, like torch's own random sampler, so whoever
    seeds that gets the same batches.

    Args:
        lengths: (M,) lengths of the texts in tokens.
        batch_size: texts in a batch; one may be smaller.
        drop_last: leave out texts drawn at random, so that none is smaller.

    Yields:
        lists of places in `lengths`.
    """

    def __init__(self, lengths: Tensor, batch_size: int, drop_last: bool = False) -> None:
        self.lengths, self.batch_size = lengths, batch_size
        self.count = len(lengths) // batch_size * batch_size if drop_last else len(lengths)

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.lengths))[: self.count]
        together = max(1, min(len(self) // 4, _SORTED))
        batches: list[list[int]] = []
        for part in order.split(together * self.batch_size):
            by_length = part[self.lengths[part].argsort(stable=True)]
            batches += [batch.tolist() for batch in by_length.split(self.batch_size)]
        return iter([batches[i] for i in torch.randperm(len(batches)).tolist()])
