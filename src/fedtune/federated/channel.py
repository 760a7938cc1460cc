"""Channels: stages that make smaller parts of one tensor after the other, and of the parts a tensor again.

A tensor w of the group "update" becomes w of "update", the first part, and w of "update.TopK.index", and so on: all of them are
tensors, so a message says its own size.
"""

from __future__ import annotations

import abc
import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fedtune.federated.messages import Context, Stage
from fedtune.tensors import Groups, Tensors

Parts = dict[str, Tensor]  # of one tensor, by name; the first one is named ""
_MOST_DIMENSIONS = 16


class Channel(Stage):
    """What happens to a tensor, whatever its place in a message. Whole numbers, and tensors without elements, are left alone.

    `extras` names the parts beside the first, `keeps` those that the sender finds again when next it sends this tensor.
    """

    extras: ClassVar[tuple[str, ...]] = ()
    keeps: ClassVar[tuple[str, ...]] = ()

    @abc.abstractmethod
    def parts(self, tensor: Tensor, rng: np.random.Generator, before: Parts) -> Parts:
        """The parts of a tensor; none where it travels as it is.

        Args:
            rng: for what is drawn.
            before: of `keeps`, what was sent the last time.
        """

    @abc.abstractmethod
    def tensor(self, parts: Parts, shape: torch.Size) -> Tensor:
        """The tensor again.

        Args:
            parts: what `parts` made, or whatever came in its place.
            shape: of the tensor, where the stage `leads`; else nobody knows, and it is ().

        Raises:
            ValueError, KeyError: they are no such parts.
        """

    @torch.no_grad()
    def encode(self, groups: Groups, context: Context) -> Groups:
        """The parts, a group each."""
        seed = context.rng(type(self).__name__.lower()).integers(2**63)
        rng, found = np.random.Generator(np.random.SFC64(seed)), Groups()
        for group in sorted(groups):  # names in order, so that no dictionary's order decides on a draw
            found[group] = {}
            for name in sorted(groups[group]):
                tensor, parts = groups[group][name], Parts()
                if self._takes(name, tensor, context):
                    parts = self.parts(tensor, rng, self._before(group, name, context))
                for part, values in (parts or {"": tensor}).items():
                    found.setdefault(self._key(group, part), {})[name] = values
            for part in self.keeps:
                key = self._key(group, part)
                context.memory[key] = context.memory.get(key, {}) | found.get(key, {})
        return found

    @torch.no_grad()
    def decode(self, groups: Groups, context: Context) -> Groups:
        """The groups, in fp32 where they were smaller."""
        endings = tuple(self._key("", part) for part in self.extras)
        return {
            group: {name: self._whole(group, name, groups, context.weights) for name in tensors}
            for group, tensors in groups.items()
            if not (endings and group.endswith(endings))
        }

    def _whole(self, group: str, name: str, groups: Groups, weights: Tensors) -> Tensor:
        parts = {part: groups.get(self._key(group, part), {}).get(name) for part in ("", *self.extras)}
        there = {part: values for part, values in parts.items() if values is not None}
        if self.extras and there.keys() == {""}:
            return there[""]
        return self.tensor(there, weights[name].shape if self.leads else torch.Size())

    def _takes(self, name: str, tensor: Tensor, context: Context) -> bool:
        if not tensor.is_floating_point() or not tensor.numel():
            return False
        return not self.leads or (name in context.weights and context.weights[name].shape == tensor.shape)

    def _before(self, group: str, name: str, context: Context) -> Parts:
        kept = {part: context.memory.get(self._key(group, part), {}).get(name) for part in self.keeps}
        return {part: values for part, values in kept.items() if values is not None}

    def _key(self, group: str, part: str) -> str:
        return f"{group}.{type(self).__name__}.{part}" if part else group


def rounded(values: Tensor, scales: Tensor, levels: int, rng: np.random.Generator | None) -> Tensor:
    """Numbers from -levels to levels, int8: levels x values / scales, rounded.

    Args:
        values: of absolute values up to their scales.
        scales: one, or one a row.
        rng: for rounding up with the probability of the fraction; None: to nearest.
    """
    found = (values.float() / scales).nan_to_num_(0.0).mul_(levels)  # all zeros: 0 / 0
    if rng is None:
        return found.add_(0.5).floor_().to(torch.int8)
    found += torch.from_numpy(rng.random(values.numel(), dtype=np.float32)).view(values.shape).to(values.device)
    return found.floor_().clamp_(-levels, levels).to(torch.int8)  # a sum just below the next one may have been rounded to it


def packed(numbers: Tensor, bits: int) -> Tensor:
    """(n,) whole numbers from 0 to 2^bits - 1, 8 / bits of them in a byte.

    >>> packed(torch.tensor([1, 2, 3]), 4)
    tensor([33,  3], dtype=torch.uint8)
    """
    each = 8 // bits
    rows = torch.nn.functional.pad(numbers.to(torch.uint8), (0, -len(numbers) % each)).view(-1, each)
    found = rows[:, 0].clone()
    for place in range(1, each):
        found |= rows[:, place] << place * bits
    return found


def unpacked(numbers: Tensor, bits: int, count: int) -> Tensor:
    """(count,) what `packed` was given.

    Raises:
        ValueError: they are not so many.
    """
    if numbers.dtype != torch.uint8 or numbers.shape != (math.ceil(count * bits / 8),):
        raise ValueError(f"{tuple(numbers.shape)} {numbers.dtype} are not {count} numbers of {bits} bits")
    each, most = 8 // bits, 2**bits - 1
    return torch.stack([(numbers >> place * bits) & most for place in range(each)], 1).view(-1)[:count]


def header(tensor: Tensor) -> Tensor:
    """The shape of a tensor as one that travels."""
    return torch.tensor(tensor.shape, dtype=torch.int32, device=tensor.device)


def shape_in(numbers: Tensor) -> torch.Size:
    """The shape in a header.

    Raises:
        ValueError: it is none.
    """
    if numbers.dtype != torch.int32 or numbers.ndim != 1 or len(numbers) > _MOST_DIMENSIONS or bool((numbers < 0).any()):
        raise ValueError("no shape")
    return torch.Size(numbers.tolist())


def numbers_in(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of fractions of this shape, as it is.

    Raises:
        ValueError: it is another one.
    """
    if tensor.shape != shape or not tensor.is_floating_point():
        raise ValueError(f"{tuple(tensor.shape)} {tensor.dtype}, where numbers of the shape {tuple(shape)} belong")
    return tensor
