"""Gradients of single examples, by the package opacus, of a module as it is: hooks are put into it for a while.

Legend: B examples of a batch.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedtune.errors import UsageError

_FIRING = "Full backward hook is firing"  # torch, of a first layer: its input needs no gradient, and what is wanted is there


def check_opacus() -> None:
    """Raise `UsageError` where the package is missing."""
    _hooks()


@contextlib.contextmanager
def apart(module: pl.LightningModule) -> Iterator[None]:
    """Inside the block a module that has `apart`, see `PretrainedModule`, keeps the examples of a batch apart."""
    knows: Any = module if hasattr(module, "apart") else SimpleNamespace()
    knows.apart = True
    try:
        yield
    finally:
        knows.apart = False


@contextlib.contextmanager
def hooked(module: pl.LightningModule) -> Iterator[None]:
    """Inside the block a backward pass leaves a gradient for each example, for `take`.

    Where tensors of a module's layers don't begin with the examples, its `by_example` brings them into that shape.

    Raises:
        UsageError: examples of a batch share something in a layer, as opacus knows, or its hooks cannot follow.
    """
    check_layers(module)
    try:
        hooks = _hooks()(module, getattr(module, "by_example", _as_it_is))
    except (NotImplementedError, ValueError) as error:
        raise _refused(module, str(error)) from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _FIRING)
            yield
    finally:
        hooks.cleanup()


def take(parameter: nn.Parameter) -> Tensor | None:
    """(B, ...) the gradients of a parameter by example, of the backward pass just made, in fp32 at least; None where there are
    none. They are gone afterwards."""
    found: Any = parameter.grad_sample  # type: ignore[attr-defined]  # opacus puts it there
    parameter.grad_sample, parameter.grad = None, None  # type: ignore[attr-defined]
    if isinstance(found, list):
        found = torch.cat(found)
    return None if found is None else found.to(torch.promote_types(found.dtype, torch.float32))


def check_layers(module: pl.LightningModule) -> None:
    """Raise `UsageError` for layers in which examples share something, or which are computed again or compiled."""
    from opacus.validators import ModuleValidator

    was = module.training
    module.training = True  # of the parts it asks nothing
    try:
        errors = [str(error) for error in ModuleValidator.validate(module, strict=False)]
    finally:
        module.training = was
    for part in module.modules():
        if part._compiled_call_impl is not None:
            errors.append("one is compiled")
        if getattr(part, "gradient_checkpointing", False):
            errors.append("gradient_checkpointing computes them twice")
    if errors:
        raise _refused(module, errors[0])


def _refused(module: nn.Module, why: str) -> UsageError:
    return UsageError("module", type(module).__name__, f"with privacy of examples, layers that opacus can follow ({why})")


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@functools.cache
def _hooks() -> Callable[..., Any]:
    """The hooks of opacus, for tensors that need not begin with the examples."""
    try:
        from opacus.grad_sample.grad_sample_module import GradSampleHooks
        from opacus.utils.tensor_utils import sum_over_all_but_batch_and_last_n
    except ImportError as error:
        raise UsageError(
            "privacy", "no package opacus", "after: pip install 'fedtune[privacy]' (the package opacus)"
        ) from error

    of_norm, of_embedding = (GradSampleHooks.GRAD_SAMPLERS[kind] for kind in (nn.LayerNorm, nn.Embedding))

    def of_any_norm(layer: nn.LayerNorm, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        if layer.bias is not None:
            found: dict[nn.Parameter, Tensor] = of_norm(layer, activations, backprops)
            return found
        normed = F.layer_norm(activations[0], layer.normalized_shape, eps=layer.eps)  # without a bias opacus' own fails
        return {layer.weight: sum_over_all_but_batch_and_last_n(normed * backprops, layer.weight.dim())}

    def of_any_embedding(layer: nn.Embedding, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        found: dict[nn.Parameter, Tensor] = of_embedding(layer, activations, backprops)
        if layer.padding_idx is not None:
            for rows in found.values():
                rows[:, layer.padding_idx] = 0  # torch trains no padding, also where it is read as text
        return found

    class Hooks(GradSampleHooks):
        GRAD_SAMPLERS = GradSampleHooks.GRAD_SAMPLERS | {nn.LayerNorm: of_any_norm, nn.Embedding: of_any_embedding}

        def __init__(self, module: nn.Module, by_example: Callable[[Tensor], Tensor]) -> None:
            super().__init__(module, loss_reduction="mean")
            self._by_example = by_example

        def rearrange_grad_samples(self, *, module: Any, backprops: Tensor, **more: Any) -> Any:
            backprops = self._by_example(backprops)
            module.activations[-1] = [self._by_example(one) for one in module.activations[-1]]
            module.max_batch_len = len(backprops)  # else it would be that of packed rows
            return super().rearrange_grad_samples(module=module, backprops=backprops, **more)

    return Hooks
