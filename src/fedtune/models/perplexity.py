"""Perplexity: exp of the mean loss over all tokens, never a mean of exponentials."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

GRID = 2**24  # a loss counts in steps of 1 / GRID nats: whole numbers add up to the same in any order, on any number of ranks


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
    strange: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("total", "tokens", "strange"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss_A: Tensor) -> None:
        """Add the losses of some tokens, in nats."""
        known_A = loss_A[loss_A.isfinite()].float()
        self.total += (known_A * GRID).round().long().sum()  # a power of two: the product is exact
        self.tokens += loss_A.numel()
        self.strange += loss_A.numel() - known_A.numel()

    def compute(self) -> Tensor:
        """The perplexity by now; no number before any token came, or after a loss that is none."""
        nats, tokens = int(self.total) / GRID, int(self.tokens)
        mean = nats / tokens if tokens and not self.strange else math.nan
        return torch.tensor(mean, device=self.total.device).exp()
