"""Steps without gradients: an algorithm asks for the loss of a batch, as often as it wants, and moves the weights itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from fedtune.errors import UsageError

Loss = Callable[[], float | None]
Walk = Callable[[Loss], None]  # one step
_OF_GRADIENTS = (
    *("on_before_zero_grad", "optimizer_zero_grad", "on_before_backward", "backward", "on_after_backward"),
    *("on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step"),
)


@torch.no_grad()
def walked(walk: Walk, forward: Callable[[], Tensor | None], device: torch.device) -> Tensor | None:
    """Do one step, and return the mean of the losses that it asked for; None where the module skips the batch.

    Every loss is of the same random numbers of torch (so of the same dropout), and no gradient is kept for any.

    Args:
        forward: the module's loss of the batch, with the weights as they are then.
        device: on which it is found.
    """
    on_device = [device] if device.type == "cuda" else []
    begin = torch.get_rng_state(), [torch.cuda.get_rng_state(one) for one in on_device]
    found: list[float] = []

    def loss() -> float | None:
        torch.set_rng_state(begin[0])
        for one, state in zip(on_device, begin[1], strict=True):
            torch.cuda.set_rng_state(state, one)
        value = forward()
        if value is None:
            return None
        found.append(float(value))
        return found[-1]

    walk(loss)
    return torch.tensor(sum(found) / len(found), dtype=torch.float64) if found else None


def check_walk(module: pl.LightningModule, who: str, clip: Any, accumulated: int) -> None:
    """Raise `UsageError` for what needs gradients, where `who` makes none.

    Args:
        clip: to what gradients would be clipped.
        accumulated: batches whose gradients would be added up.
    """
    if clip:
        raise UsageError("gradient_clip_val", clip, f"for {who}, none: it has no gradients")
    if accumulated != 1:
        raise UsageError("accumulate_grad_batches", accumulated, f"for {who}, 1: it has no gradients")
    for hook in _OF_GRADIENTS:
        if is_overridden(hook, module):
            name = type(module).__name__
            raise UsageError("module", name, f"for {who}, one that does not override {hook}, as it has no gradients")
