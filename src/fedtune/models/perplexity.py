"""Perplexity: exp of the mean loss over all tokens, never a mean of exponentials."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

_WIDE = torch.float32 if torch.backends.mps.is_available() else torch.float64  # Apple's GPUs have no fp64


class Perplexity(Metric):
    """exp of the loss in nats over all tokens of an evaluation, each of which counts once, whatever the batches.

    >>> found = Perplexity()
    >>> found.update(torch.tensor([1.0, 3.0]))
    >>> found.update(torch.tensor([2.0]))
    >>> round(float(found.compute()), 3) == round(float(torch.tensor(2.0).exp()), 3)
    True
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    tokens: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("total", torch.zeros((), dtype=_WIDE), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss_A: Tensor) -> None:
        """Add the losses of some tokens, in nats."""
        self.total += loss_A.to(_WIDE).sum()
        self.tokens += loss_A.numel()

    def compute(self) -> Tensor:
        """The perplexity by now; no number before any token came."""
        return (self.total / self.tokens).exp()
