"""A module whose adapters an algorithm works with: checked, and frozen where the algorithm wants that, for a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytorch_lightning as pl
import torch
from torch import nn

from fedtune.errors import UsageError
from fedtune.federated.adapters import Adapters, adapters_of, dealt
from fedtune.federated.base import moving
from fedtune.federated.parts import Algorithm
from fedtune.federated.personal import personal_names
from fedtune.tensors import Tensors, frozen, trainable, travelling


@contextlib.contextmanager
def adapted(module: pl.LightningModule, algorithm: Algorithm, num_clients: int, seed: int) -> Iterator[Adapters]:
    """Inside the block is frozen what the algorithm wants frozen, and weights that it moves are fp32 at least.

    Returns:
        the adapters of the module, with the ranks of the clients.

    Raises:
        UsageError: the module has no adapters, or not such as the algorithm can work with.
    """
    adapters = adapters_of(module)
    names = trainable(module).keys()
    if algorithm.client.adapters or algorithm.aggregator.adapters or algorithm.client.ranks:
        _check(type(module).__name__, algorithm, adapters)
    still = personal_names(algorithm.frozen, names, "algorithm.frozen", "trained")
    parameters = {name: one for name, one in module.named_parameters() if name in still}
    personal = personal_names(algorithm.personal, travelling(module).keys() - still)
    if algorithm.aggregator.adapters:
        _check_factors(algorithm, adapters, names - still - personal)
    ranks = algorithm.client.ranks
    most = min((layer.rank for layer in adapters.layers), default=0)
    if ranks and max(ranks) > most:
        raise UsageError("algorithm.client.ranks", max(ranks), f"at most {most}, the rank of the module's adapters")
    for name in sorted(moving(algorithm, adapters)):
        _check_base(module, name)
    for one in parameters.values():
        one.requires_grad_(False)
    try:
        yield replace(adapters, ranks=dealt(ranks, num_clients, seed))
    finally:
        for one in parameters.values():
            one.requires_grad_(True)


def resting_factors(module: pl.LightningModule, adapters: Adapters) -> Tensors:
    """Those factors of the adapters that are frozen, live."""
    factors = {name for layer in adapters.layers for name in (layer.a, layer.b)}
    return {name: tensor for name, tensor in frozen(module).items() if name in factors}


def _check(name: str, algorithm: Algorithm, adapters: Adapters) -> None:
    part = type(algorithm.aggregator if algorithm.aggregator.adapters else algorithm.client).__name__
    if not adapters.layers and not adapters.strange:
        allowed = f"for {part}, a module with trained adapters (LoRA: --model.lora.rank 8)"
        raise UsageError("module", f"{name} without adapters", allowed)
    if adapters.strange and (algorithm.aggregator.adapters or algorithm.client.ranks):
        allowed = f"for {part}, adapters that are a product of two matrices (no convolution, no embedding, no DoRA)"
        raise UsageError("module", f"{name} with another adapter in {adapters.strange[0]}", allowed)


def _check_factors(algorithm: Algorithm, adapters: Adapters, travel: set[str]) -> None:
    part = type(algorithm.aggregator).__name__
    for name in (name for layer in adapters.layers for name in (layer.a, layer.b)):
        if name not in travel or algorithm.client.alternates:
            raise UsageError(
                "algorithm.aggregator", part, f"one that does not need {name}, which does not travel in each round"
            )


def _check_base(module: pl.LightningModule, name: str) -> None:
    """Make a weight that moves fp32, if it is of half precision.

    Raises:
        UsageError: it is quantised, trained, or tied to another.
    """
    owner = module.get_submodule(name.rpartition(".")[0])
    weight = owner._parameters.get("weight")
    places = [other for other, one in module.named_parameters(remove_duplicate=False) if one is weight]
    if weight is None or not weight.is_floating_point() or weight.ndim != 2 or weight.requires_grad or len(places) != 1:
        what = (
            "tied" if len(places) > 1 else "trained" if weight is not None and weight.requires_grad else "no matrix of numbers"
        )
        allowed = f"a weight that can be moved ({name} is {what})"
        raise UsageError("module", name, allowed)
    if weight.dtype in (torch.float16, torch.bfloat16):
        _exact(owner)


def _exact(owner: nn.Module) -> None:
    parameters: Mapping[str, nn.Parameter | None] = owner._parameters
    for parameter in (one for one in parameters.values() if one is not None):
        parameter.data = parameter.data.float()
