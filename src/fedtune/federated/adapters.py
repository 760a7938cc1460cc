"""Layers with an adapter (LoRA): which there are in a module, and what a client of a lower rank has of them.

Legend: s B A is added to the weight W (out, in) of a layer; A (r, in), B (out, r), s the scale, alpha / r or alpha / sqrt(r).

A client of rank r_k has the first r_k rows of A and columns of B, and the scale s_k. In messages, and at the server, B is
B s_k / s, so that with the module's own s all products mean the same, whatever the rank.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedtune.errors import UsageError
from fedtune.randomness import stream
from fedtune.tensors import Tensors


@dataclass(frozen=True)
class Layer:
    """One of them.

    Args:
        path, key: of the layer in the module, and of the adapter in the layer.
        a, b, base: names of the tensors A, B and W.
        rank, inputs, outputs: the sizes.
        scale: s.
        rooted: whether s is alpha / sqrt(r).
        transposed: whether W lies there as (in, out).
    """

    path: str
    key: str
    a: str
    b: str
    base: str
    rank: int
    inputs: int
    outputs: int
    scale: float
    rooted: bool = False
    transposed: bool = False

    def ratio(self, rank: int) -> float:
        """s_k / s of a client of a rank."""
        found = self.rank / min(rank, self.rank)
        return math.sqrt(found) if self.rooted else found


@dataclass(frozen=True)
class Adapters:
    """Those of a module.

    Args:
        layers: each with one adapter that is trained, in the order of the module.
        strange: paths of layers whose adapter is no product of two matrices (a convolution, an embedding, DoRA).
        ranks: of each client, where they differ.
    """

    layers: tuple[Layer, ...] = ()
    strange: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()

    def rank_of(self, client: int) -> int | None:
        """The rank of a client; None: that of the module."""
        return self.ranks[client] if self.ranks else None

    def narrowed(self, tensors: Tensors, rank: int | None) -> Tensors:
        """Tensors as a client of a rank has them, views."""
        if rank is None:
            return tensors
        cut = {layer.a: tensors[layer.a][:rank] for layer in self.layers if layer.a in tensors}
        return tensors | cut | {layer.b: tensors[layer.b][:, :rank] for layer in self.layers if layer.b in tensors}

    def widened(self, tensors: Tensors, rank: int | None) -> Tensors:
        """What `narrowed` has cut, with zeros in the place of what is not there."""
        if rank is None:
            return tensors
        found = dict(tensors)
        for layer in self.layers:
            for name, size in ((layer.a, (layer.rank, layer.inputs)), (layer.b, (layer.outputs, layer.rank))):
                if name in tensors:
                    rows, columns = tensors[name].shape
                    found[name] = tensors[name].new_zeros(size)
                    found[name][:rows, :columns] = tensors[name]
        return found

    def received(self, weights: Tensors, rank: int | None) -> Tensors:
        """What a client of a rank makes of the weights in a message."""
        return self._scaled(self.widened(weights, rank), rank, up=False)

    def sent(self, update: Tensors, rank: int | None) -> Tensors:
        """What it puts into a message."""
        return self._scaled(self.narrowed(update, rank), rank, up=True)

    def _scaled(self, tensors: Tensors, rank: int | None, up: bool) -> Tensors:
        found = dict(tensors)
        if rank is None:
            return tensors
        for layer in self.layers:
            ratio = layer.ratio(rank)
            if layer.b in tensors and ratio != 1:
                found[layer.b] = tensors[layer.b] * ratio if up else tensors[layer.b] / ratio
        return found

    @contextlib.contextmanager
    def at_rank(self, module: nn.Module, rank: int | None) -> Iterator[None]:
        """Inside the block the layers of the module have the scale of a client of a rank."""
        if rank is None:
            yield
            return
        scalings: list[Any] = [module.get_submodule(layer.path).scaling for layer in self.layers]
        before = [scaling[layer.key] for scaling, layer in zip(scalings, self.layers, strict=True)]
        try:
            for scaling, layer in zip(scalings, self.layers, strict=True):
                scaling[layer.key] = layer.scale * layer.ratio(rank)
            yield
        finally:
            for scaling, layer, value in zip(scalings, self.layers, before, strict=True):
                scaling[layer.key] = value


def adapters_of(module: nn.Module) -> Adapters:
    """The adapters of a module that are trained, found by what their layers have: lora_A, lora_B, scaling and base_layer.

    Raises:
        UsageError: several adapters of a layer are trained.
    """
    layers: list[Layer] = []
    strange: list[str] = []
    for path, part in module.named_modules():
        if not all(hasattr(part, name) for name in ("lora_A", "lora_B", "scaling", "base_layer")):
            continue
        trained = [key for key in part.scaling if _trained(part, key)]
        if len(trained) > 1:
            raise UsageError("module", f"{path} with {len(trained)} adapters", "a module with one trained adapter a layer")
        for key in trained:
            layer = _layer(path, part, key)
            if layer is None:
                strange.append(path)
            else:
                layers.append(layer)
    return Adapters(tuple(layers), tuple(strange))


def _trained(part: Any, key: str) -> bool:
    pairs = [getattr(part, name, {}) for name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")]
    found = [pair[key] for pair in pairs if key in pair]
    return any(one.requires_grad for each in found for one in (each.parameters() if isinstance(each, nn.Module) else [each]))


def _layer(path: str, part: Any, key: str) -> Layer | None:
    """The layer of a path; None where its adapter is no product of two matrices."""
    if key not in part.lora_A or key not in part.lora_B or key in (getattr(part, "lora_magnitude_vector", None) or {}):
        return None
    a, b = part.lora_A[key].weight, part.lora_B[key].weight
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
        return None
    names = (f"{path}.lora_A.{key}.weight", f"{path}.lora_B.{key}.weight", f"{path}.base_layer.weight")
    rooted = bool(getattr(part, "use_rslora", {}).get(key))
    sizes = len(a), a.shape[1], len(b)
    transposed = bool(getattr(part, "fan_in_fan_out", False))
    return Layer(path, key, *names, *sizes, scale=float(part.scaling[key]), rooted=rooted, transposed=transposed)


def dealt(ranks: Sequence[int], num_clients: int, seed: int) -> tuple[int, ...]:
    """The rank of each client: the given ones in turn, shuffled, so that each is as frequent as in the list.

    >>> sorted(dealt((2, 8), 5, seed=0))
    [2, 2, 2, 8, 8]
    """
    found = [ranks[client % len(ranks)] for client in range(num_clients)] if ranks else []
    stream(seed, "ranks").shuffle(found)
    return tuple(found)


def fresh(adapters: Adapters, rng: Any, weights: Tensors) -> Tensors:
    """A new A for each layer, uniform within 1 / sqrt(in), and B = 0, in the types of the weights."""
    found: Tensors = {}
    for layer in adapters.layers:
        most = 1 / math.sqrt(layer.inputs)
        drawn = torch.from_numpy(rng.uniform(-most, most, (layer.rank, layer.inputs)))
        found[layer.a] = drawn.to(weights[layer.a])
        found[layer.b] = torch.zeros_like(weights[layer.b])
    return found
