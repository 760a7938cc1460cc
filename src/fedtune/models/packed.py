"""A batch without padding: its texts end to end, from the shortest to the longest, padded for attention alone.

Legend: B texts of a batch, L their padded length, T tokens in all, with spare rows up to a round number; R rows that a layer
computes (T, or B in the last one); H hidden size, A attention heads, D = H / A; b, t, r and l: the same of a block of texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_BLOCK = 2**18  # attention weights that are worked on together: more take memory, and no less time
_ROUND = 64  # rows: of few sizes, freed memory can be used again for the next batch


@dataclass(frozen=True)
class _Rows:
    """Where some rows of a block stand.

    Args:
        span: the rows of the packed (R, H) matrix.
        padded: (b A, l) for each row of the padded (b A, l, D) tensor its row of the packed matrix cut into heads, (R A, D);
            the last row where there is padding.
        packed: (r A,) for each row of the span, cut into heads, its row of the padded tensor.
    """

    span: slice
    padded: Tensor
    packed: Tensor


@dataclass(frozen=True)
class _Block:
    """Consecutive texts of a batch: all their tokens, their first tokens, and (b, 1, l) 0 where there is text, else -inf."""

    tokens: _Rows
    first: _Rows
    bias_b1l: Tensor


class PackedBatch:
    """A padded batch, packed.

    Args:
        ids_BL: (B, L) token ids.
        mask_BL: (B, L), 1 where there is text; every text has its first token.
        types_BL: (B, L) token types, where there are any.

    Attributes:
        ids_T, positions_T, types_T: ids, positions and types of the T tokens. At least the last row is spare: padding is read
            from it, and nothing that comes of it is used. Without types_BL, types_T is None.
        first_B: the row of each text's first token, from the shortest text to the longest.
        back_B: for each text of the padded batch its place in that order.
    """

    def __init__(self, ids_BL: Tensor, mask_BL: Tensor, types_BL: Tensor | None = None) -> None:
        text_BL = mask_BL.bool()
        lengths_B, order_B = _lengths(text_BL).sort(stable=True)
        self._lengths, self.back_B = lengths_B.tolist(), order_B.argsort()
        self._text_BL, ids_BL = text_BL[order_B], ids_BL[order_B]
        places = self._text_BL.flatten().nonzero().squeeze(1)
        places_T = F.pad(places, (0, _ROUND - len(places) % _ROUND))  # spare rows are copies of the first token
        self.ids_T, self.positions_T = ids_BL.flatten()[places_T], places_T % ids_BL.shape[1]
        self.types_T = None if types_BL is None else types_BL[order_B].flatten()[places_T]
        rows = torch.full((ids_BL.numel(),), len(places_T) - 1)
        rows[places] = torch.arange(len(places))
        self._rows_BL = rows.view(ids_BL.shape)
        self.first_B = self._rows_BL[:, 0]
        self._blocks: dict[int, list[_Block]] = {}

    def attend(self, query_RH: Tensor, key_TH: Tensor, value_TH: Tensor, heads: int, dropout: nn.Dropout) -> Tensor:
        """Scaled dot-product attention within each text (Vaswani et al. 2017, equation 1).

        Args:
            query_RH: of all rows, or of the first tokens.
            heads: A.
            dropout: of the attention weights.

        Returns:
            (R, H).
        """
        if heads not in self._blocks:
            self._blocks[heads] = self._divided(heads)
        cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value_TH.dtype
        projected = (tensor.to(cast) for tensor in (query_RH, key_TH, value_TH))  # for the backward pass, which casts nothing
        context_RH: Tensor = _Attention.apply(*projected, self._blocks[heads], heads, dropout)
        return context_RH

    def by_text(self, tensor: Tensor) -> Tensor:
        """(B, L, ...) of (T, ...) or (1, T, ...), 0 where there is padding, the texts from the shortest to the longest.

        Another tensor, as (B, H), comes back as it is.
        """
        total = len(self.ids_T)
        if tensor.shape[:2] == (1, total) and (tensor.ndim > 2 or not tensor.is_floating_point()):
            tensor = tensor[0]
        if len(tensor) != total:
            return tensor
        found = tensor.index_select(0, self._rows_BL.flatten()).view(*self._rows_BL.shape, *tensor.shape[1:])
        return found.masked_fill_(~self._text_BL.view(*self._text_BL.shape, *[1] * (tensor.ndim - 1)), 0)

    def _divided(self, heads: int) -> list[_Block]:
        """The batch in blocks of at most `_BLOCK` attention weights, or of a single text."""
        blocks, start = [], 0
        for number, length in enumerate(self._lengths):
            if number > start and (number + 1 - start) * heads * length**2 > _BLOCK:
                blocks.append(self._block(start, number, heads))
                start = number
        return [*blocks, self._block(start, len(self._lengths), heads)]

    def _block(self, start: int, stop: int, heads: int) -> _Block:
        longest = self._lengths[stop - 1]
        rows_bl, text_bl = self._rows_BL[start:stop, :longest], self._text_BL[start:stop, :longest]
        numbers_A = torch.arange(heads)
        text, position = text_bl.nonzero(as_tuple=True)
        tokens = _Rows(
            slice(int(rows_bl[0, 0]), int(rows_bl[0, 0]) + len(text)),
            (rows_bl[:, None] * heads + numbers_A[:, None]).view(-1, longest),
            ((text[:, None] * heads + numbers_A) * longest + position[:, None]).flatten(),
        )
        first = _Rows(
            slice(start, stop), torch.arange(start * heads, stop * heads)[:, None], torch.arange((stop - start) * heads)
        )
        return _Block(tokens, first, torch.zeros(text_bl.shape).masked_fill_(~text_bl, float("-inf"))[:, None])


def from_shortest(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with its texts from the shortest to the longest, as a `PackedBatch` has them; without a mask as it is."""
    if "attention_mask" not in batch:
        return batch
    order_B = _lengths(batch["attention_mask"].bool()).argsort(stable=True)
    return {name: tensor[order_B] for name, tensor in batch.items()}


def _lengths(text_BL: Tensor) -> Tensor:
    """(B,) to the last token."""
    return (text_BL * torch.arange(1, text_BL.shape[1] + 1, device=text_BL.device)).amax(1)


class _Attention(torch.autograd.Function):
    """Attention block by block. Rows are moved there and back by number, and no gradient is added up row by row."""

    @staticmethod
    def forward(
        ctx: Any, query_RH: Tensor, key_TH: Tensor, value_TH: Tensor, blocks: list[_Block], heads: int, dropout: nn.Dropout
    ) -> Tensor:
        whole, kept = len(query_RH) == len(key_TH), []
        ctx.heads, ctx.blocks = heads, [(block.tokens if whole else block.first, block.tokens) for block in blocks]
        context_RH = torch.zeros_like(query_RH)
        for (asking, asked), block in zip(ctx.blocks, blocks, strict=True):
            query, key, value = _three(query_RH, key_TH, value_TH, asking, asked, heads)
            scores = torch.bmm(query * query.shape[2] ** -0.5, key.transpose(1, 2))
            biased = scores.view(len(block.bias_b1l), -1, key.shape[1]) + block.bias_b1l
            weights = biased.softmax(-1).to(value.dtype).view_as(scores)
            dropped = dropout(weights)
            _put(context_RH, torch.bmm(dropped, value), asking)
            kept += [weights, dropped]
        ctx.save_for_backward(query_RH, key_TH, value_TH, context_RH, *kept)
        return context_RH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RH: Tensor) -> tuple[Tensor | None, ...]:
        query_RH, key_TH, value_TH, context_RH, *kept = ctx.saved_tensors
        heads, slopes = ctx.heads, [torch.zeros_like(tensor) for tensor in (query_RH, key_TH, value_TH)]
        wide = torch.promote_types(gradient_RH.dtype, torch.float32)
        products_RAD = (gradient_RH.to(wide) * context_RH).view(len(query_RH), heads, -1)
        mean_RA = products_RAD.sum(-1).to(value_TH.dtype)  # of the weights' gradients, under the weights
        for (asking, asked), weights, dropped in zip(ctx.blocks, kept[::2], kept[1::2], strict=True):
            query, key, value = _three(query_RH, key_TH, value_TH, asking, asked, heads)
            gradient, mean = _padded(gradient_RH, asking, heads), _padded(mean_RA, asking, heads)  # 0 in spare rows
            slope = torch.bmm(gradient, value.transpose(1, 2)).mul_(dropped).addcmul_(weights, mean, value=-1)  # of the scores
            slope.mul_(query.shape[2] ** -0.5)
            _put(slopes[0], torch.bmm(slope, key), asking)
            _put(slopes[1], torch.bmm(slope.transpose(1, 2), query), asked)
            _put(slopes[2], torch.bmm(dropped.transpose(1, 2), gradient), asked)
        return (*slopes, None, None, None)


def _three(
    query_RH: Tensor, key_TH: Tensor, value_TH: Tensor, asking: _Rows, asked: _Rows, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _padded(query_RH, asking, heads), _padded(key_TH, asked, heads), _padded(value_TH, asked, heads)


def _padded(packed_RH: Tensor, rows: _Rows, heads: int) -> Tensor:
    """(R, H) -> (b A, l, D)."""
    cut = packed_RH.reshape(len(packed_RH) * heads, -1)
    return cut.index_select(0, rows.padded.flatten()).view(*rows.padded.shape, -1)


def _put(packed_RH: Tensor, padded: Tensor, rows: _Rows) -> None:
    """(b A, l, D) into (R, H)."""
    cut = padded.view(-1, padded.shape[2]).index_select(0, rows.packed)
    packed_RH[rows.span] = cut.view(-1, packed_RH.shape[1])
