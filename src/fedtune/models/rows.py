"""Conversations packed into rows: several short ones to a row, so that little of a batch is padding.

Legend: B conversations of a batch, L their padded length, R rows, W the length of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.errors import UsageError
from fedtune.models.pretrained import cause

_FIRST, _SECOND = (1, 2, 3), (4, 1, 5, 2)  # tokens of two short texts
_SHARE = 0.1  # of the difference that attending across texts makes


@dataclass(frozen=True)
class Rows:
    """A batch in rows.

    Args:
        ids_RW: token ids, padded with one of them (some networks warn of tokens for padding without a mask).
        positions_RW: the place of each token in its conversation: it begins anew with each, and with the padding.
        row_B, first_B: the row of each conversation, and the place there where it begins.
    """

    ids_RW: Tensor
    positions_RW: Tensor
    row_B: Tensor
    first_B: Tensor

    @classmethod
    def of(cls, ids_BL: Tensor, mask_BL: Tensor | None, budget: int) -> Rows | None:
        """The conversations of a batch in rows of at most so many tokens; a longer one has a row to itself.

        None where nothing is saved, or where padding stands before a text.
        """
        count, length = ids_BL.shape
        mask_BL = torch.ones_like(ids_BL) if mask_BL is None else mask_BL
        lengths_B = mask_BL.sum(1)
        if not bool((mask_BL.bool() == (torch.arange(length, device=ids_BL.device) < lengths_B[:, None])).all()):
            return None
        lengths = lengths_B.tolist()
        rows = _filled(lengths, budget)
        width = max(sum(lengths[one] for one in row) for row in rows)
        if len(rows) * width >= count * length:
            return None
        ids = ids_BL[0, 0].repeat(len(rows), width)
        positions = torch.arange(width).repeat(len(rows), 1)
        row_B, first_B = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
        for number, row in enumerate(rows):
            place = 0
            for one in row:
                row_B[one], first_B[one] = number, place
                ids[number, place : place + lengths[one]] = ids_BL[one, : lengths[one]]
                place += lengths[one]
                positions[number, place:] -= positions[number, place].item() if place < width else 0
        device = ids_BL.device
        return cls(ids, positions.to(device), row_B.to(device), first_B.to(device))


def _filled(lengths: list[int], budget: int) -> list[list[int]]:
    """Which texts come into each row: the longest first, each into the first row that has room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for one in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        number = next((number for number, left in enumerate(room) if left >= lengths[one]), len(rows))
        if number == len(rows):
            rows.append([])
            room.append(budget)
        rows[number].append(one)
        room[number] -= lengths[one]
    return rows


def check_apart(network: Any, model_type: str, budget: int) -> None:
    """Check, by trying, that the texts of a row do not attend to each other in a network.

    Raises:
        UsageError: they do, or the network takes no positions.
    """
    parts = [torch.tensor([one], device=next(network.parameters()).device) for one in (_FIRST, _SECOND)]
    row = torch.cat(parts, dim=1)
    positions = torch.cat([torch.arange(one.shape[1], device=row.device) for one in parts])[None]

    def hidden(ids: Tensor, **more: Tensor) -> Tensor:
        found: Tensor = network.base_model(input_ids=ids, use_cache=False, **more).last_hidden_state
        return found.float()

    was = network.training
    network.eval()
    try:
        with torch.no_grad():
            apart, joined = hidden(parts[1]), hidden(row)[:, len(_FIRST) :]
            packed = hidden(row, position_ids=positions)[:, len(_FIRST) :]
        wrong, right = float((joined - apart).norm()), float((packed - apart).norm())
        why = "" if right <= _SHARE * wrong else "conversations of a row would attend to each other"
    except Exception as error:  # what a network raises that is called in a way it does not know is of any type
        why = cause(error)
    finally:
        network.train(was)
    if why:
        raise UsageError("packing", budget, f"nothing, with a model of the family {model_type} ({why})")


def makes_logits_alone(network: Any) -> bool:
    """Whether the logits of a network are its last hidden states through its output layer alone; tried, not guessed.

    Some families scale or bend their logits behind it, and others have no such layer.
    """
    base, head = network.base_model, network.get_output_embeddings()
    if base is network or head is None:
        return False
    kept: dict[str, Tensor] = {}

    def replaced(module: nn.Module, given: Any, output: Any) -> Any:
        noise = torch.randn(output.last_hidden_state.shape, generator=torch.Generator().manual_seed(0)) * 10
        kept["hidden"] = noise.to(output.last_hidden_state)
        output.last_hidden_state = kept["hidden"]
        return output

    was, hook = network.training, base.register_forward_hook(replaced)
    network.eval()
    try:
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([_FIRST], device=next(network.parameters()).device), use_cache=False).logits
            return torch.equal(logits, head(kept["hidden"]))
    except Exception:  # of any type; then the network is called as it is
        return False
    finally:
        hook.remove()
        network.train(was)
