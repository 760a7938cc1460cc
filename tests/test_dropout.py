"""Cheap masks have the distribution of torch's own: rate, scale, independence, gradients, seeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import make_loop
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fedtune.federated.dropout import FastDropout

N = 400_000


def kept(p: float, size: int = N) -> torch.Tensor:
    with FastDropout():
        return F.dropout(torch.ones(size), p) != 0


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_rate_is_p_within_five_standard_errors(p: float) -> None:
    torch.manual_seed(0)
    error = (p * (1 - p) / N) ** 0.5
    assert abs(float((~kept(p)).double().mean()) - p) < 5 * error + 1 / 131_072  # half a step of the 16 bits


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 5, 64])
def test_elements_are_dropped_independently_of_their_neighbours(distance: int) -> None:
    """Four neighbours share one random number; a pair at each distance is dropped together as often as chance has it."""
    torch.manual_seed(1)
    dropped = (~kept(0.1)).double()
    together = float((dropped[distance:] * dropped[:-distance]).mean())
    assert abs(together - 0.01) < 5 * (0.01 * 0.99 / N) ** 0.5


def test_each_of_the_four_places_in_a_word_has_the_same_rate() -> None:
    torch.manual_seed(2)
    rates = (~kept(0.1)).double().view(-1, 4).mean(0)
    assert (rates - 0.1).abs().max() < 5 * (0.09 / (N / 4)) ** 0.5


def test_kept_elements_are_scaled_so_that_the_expectation_is_exact() -> None:
    with FastDropout():
        values = F.dropout(torch.ones(1000), 0.1).unique().tolist()
    assert values == [0.0, pytest.approx(65_536 / (65_536 - 6_554), rel=1e-7)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_passes_where_the_value_passed(dtype: torch.dtype) -> None:
    given = torch.ones(33, 7, dtype=dtype, requires_grad=True)  # no multiple of four
    with FastDropout():
        result = F.dropout(given, 0.3)
    result.sum().backward()
    assert result.dtype == dtype
    assert given.grad is not None
    assert torch.equal(given.grad, result.detach())


def test_a_seed_fixes_the_mask_and_the_module_uses_it_too() -> None:
    module, ones = torch.nn.Dropout(0.5), torch.ones(100)
    torch.manual_seed(3)
    with FastDropout():
        first, other = module(ones), module(ones)
    torch.manual_seed(3)
    plain = module(ones)
    torch.manual_seed(3)
    with FastDropout():
        again = module(ones)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, plain)


def test_activation_checkpoints_draw_a_mask_again() -> None:
    module, gradients = torch.nn.Dropout(0.5), []
    for again in (False, True):
        torch.manual_seed(4)
        given = torch.linspace(-1, 1, 64, requires_grad=True)
        with FastDropout():
            block = lambda x: module(x.sin()).square()  # noqa: E731
            result = checkpoint(block, given, use_reentrant=False) if again else block(given)
            result.sum().backward()
        gradients.append(given.grad)
    assert torch.equal(*gradients)


def test_what_it_cannot_do_better_is_left_to_torch() -> None:
    ones = torch.ones(8)
    with FastDropout():
        assert torch.equal(F.dropout(ones, 0.5, training=False), ones)
        assert torch.equal(F.dropout(ones, 0.0), ones)
        assert torch.equal(F.dropout(ones, 1.0), torch.zeros(8))
        written = ones.clone()
        assert F.dropout(written, 0.5, inplace=True) is written
        with pytest.raises(ValueError, match="between 0 and 1"):
            F.dropout(ones, 1.5)


@pytest.mark.parametrize(("dropout", "same"), [(0.3, False), (0.0, True)])
def test_the_loop_draws_cheap_masks_where_it_is_asked_to(dropout: float, same: bool, make_data: Any, make_module: Any) -> None:
    trained = []
    for fast in (True, False):
        module = make_module(dropout=dropout)
        make_loop(max_rounds=1, fast_dropout=fast).fit(module, make_data())
        trained.append(torch.cat([parameter.detach().flatten() for parameter in module.parameters()]))
    assert torch.equal(*trained) == same
