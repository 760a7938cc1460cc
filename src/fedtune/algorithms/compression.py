"""Smaller messages: what becomes of a tensor v of d elements on its way, up or down.

    HalfPrecision   v in bf16 or fp16
    Quantise        s / L times L v / s, rounded up with the probability of its fraction, s = max |v|: unbiased, below s / L off
    QSGD            the same with s = |v|, for each bucket: unbiased, E|C(v) - v|^2 <= min(d / L^2, sqrt(d) / L) |v|^2
                    (Alistarh et al. 2017, "QSGD", 3.1; L levels on either side of 0)
    Sign            |v|_1 / d times the sign of v: |C(v) - v|^2 = |v|^2 - |v|_1^2 / d
                    (Seide et al. 2014, "1-Bit SGD"; Karimireddy et al. 2019, "Error Feedback Fixes SignSGD", Algorithm 1)
    TopK            the k largest: |C(v) - v|^2 <= (1 - k / d) |v|^2
                    (Stich et al. 2018, "Sparsified SGD with Memory"; Aji and Heafield 2017)
    PowerSGD        M = v as a matrix: P = M Q, orthonormalised; Q = M^T P; send P and Q for P Q^T; the next round begins with Q
                    (Vogels et al. 2019, "PowerSGD", Algorithms 1 and 2)

`feedback` adds to a message what earlier ones lack (`federated.feedback`); without, Sign, TopK and PowerSGD may not converge.
PowerSGD's paper averages P and Q of all workers, in two messages a step; here a client sends both of its own matrix in one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from fedtune.errors import UsageError
from fedtune.federated.channel import Channel, Parts, header, numbers_in, packed, rounded, shape_in, unpacked

KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SCALE, _SHAPE, _INDEX, _RIGHT = "scale", "shape", "index", "right"


def _levels(bits: int) -> int:
    """On either side of 0."""
    return 2 ** (bits - 1) - 1


def _one_of(argument: str, value: object, allowed: tuple[int, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise UsageError(argument, value, f"{', '.join(map(str, allowed[:-1]))} or {allowed[-1]}")


@final
@dataclass(frozen=True)
class HalfPrecision(Channel):
    """Two bytes an element, rounded to nearest.

    Args:
        kind: "bf16", or "fp16": finer, but what is beyond 65,504 becomes infinite, and what is below 3e-8 zero.
    """

    kind: str = "bf16"
    feedback: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError("kind", self.kind, " or ".join(KINDS))

    def parts(self, tensor: Tensor, rng: np.random.Generator, before: Parts) -> Parts:
        """One."""
        return {"": tensor.to(KINDS[self.kind])}

    def tensor(self, parts: Parts, shape: torch.Size) -> Tensor:
        """In fp32."""
        return parts[""].float() if parts[""].dtype in KINDS.values() else parts[""]


@final
@dataclass(frozen=True)
class Quantise(Channel):
    """Every tensor as whole numbers of some bits, and its scale in fp32.

    Args:
        bits: 8, or 4: two elements a byte.
        feedback: then numbers are rounded to nearest, so that no error is longer than what is sent: else, in a tensor of a few
            large elements and many small ones, errors would grow from message to message.
    """

    bits: int = 8
    feedback: bool = False
    extras: ClassVar[tuple[str, ...]] = (_SCALE, _SHAPE)

    def __post_init__(self) -> None:
        _one_of("bits", self.bits, (4, 8))

    def parts(self, tensor: Tensor, rng: np.random.Generator, before: Parts) -> Parts:
        """The numbers, the scale, and, where numbers share a byte, the shape."""
        scale = torch.linalg.vector_norm(tensor, ord=float("inf")).float()
        numbers = rounded(tensor, scale, _levels(self.bits), None if self.feedback else rng)
        if self.bits == 8:
            return {"": numbers, _SCALE: scale}
        return {"": packed(numbers.view(-1) + _levels(self.bits), self.bits), _SCALE: scale, _SHAPE: header(tensor)}

    def tensor(self, parts: Parts, shape: torch.Size) -> Tensor:
        """In fp32."""
        numbers, levels = parts[""], _levels(self.bits)
        if self.bits < 8:
            shape = shape_in(parts[_SHAPE])
            numbers = (unpacked(numbers, self.bits, math.prod(shape)).to(torch.int8) - levels).view(shape)
        if numbers.dtype != torch.int8:
            raise ValueError(f"{numbers.dtype}, where int8 belongs")
        return numbers.float().div_(levels).mul_(numbers_in(parts[_SCALE], ()))


@final
@dataclass(frozen=True)
class QSGD(Channel):
    """Every bucket of elements as whole numbers of some bits, and its Euclidean length in fp32.

    Args:
        bits: 8, 4, or 2: the numbers -1, 0, 1.
        bucket: its elements; the paper's experiments have 512.
        feedback: refused where errors may be longer than what is sent, and so grow from message to message: with 4 bits a
            bucket has 48 elements at most, with 8 bits 16,128.
    """

    bits: int = 4
    bucket: int = 512
    feedback: bool = False
    extras: ClassVar[tuple[str, ...]] = (_SCALE, _SHAPE)

    def __post_init__(self) -> None:
        _one_of("bits", self.bits, (2, 4, 8))
        if isinstance(self.bucket, bool) or not isinstance(self.bucket, int) or self.bucket < 1:
            raise UsageError("bucket", self.bucket, "a whole number, 1 or more")
        most = _levels(self.bits) ** 2 - 1
        if self.feedback and self.bucket > most:
            raise UsageError(
                "bucket",
                self.bucket,
                f"for {self.bits} bits with feedback, up to {most}" if most else "no feedback with 2 bits",
            )

    def parts(self, tensor: Tensor, rng: np.random.Generator, before: Parts) -> Parts:
        """The numbers, the scales and the shape."""
        rows = self._rows(tensor.float())
        scales = torch.linalg.vector_norm(rows, dim=1)
        numbers = rounded(rows, scales[:, None], _levels(self.bits), rng).view(-1)[: tensor.numel()]
        return {"": packed(numbers + _levels(self.bits), self.bits), _SCALE: scales, _SHAPE: header(tensor)}

    def tensor(self, parts: Parts, shape: torch.Size) -> Tensor:
        """In fp32."""
        shape, levels = shape_in(parts[_SHAPE]), _levels(self.bits)
        count = math.prod(shape)
        numbers = unpacked(parts[""], self.bits, count).float().sub_(levels)
        scales = numbers_in(parts[_SCALE], (math.ceil(count / self.bucket),))
        return self._rows(numbers).div(levels).mul_(scales[:, None]).view(-1)[:count].view(shape)

    def _rows(self, values: Tensor) -> Tensor:
        """(buckets, elements), the last one filled with zeros."""
        flat = values.reshape(-1)
        return torch.nn.functional.pad(flat, (0, -len(flat) % self.bucket)).view(-1, self.bucket)


@final
@dataclass(frozen=True)
class Sign(Channel):
    """Every element as a bit, + or - (zero is +), and the mean absolute value of the tensor in fp32."""

    feedback: bool = True
    leads: ClassVar[bool] = True
    extras: ClassVar[tuple[str, ...]] = (_SCALE,)

    def parts(self, tensor: Tensor, rng: np.random.Generator, before: Parts) -> Parts:
        """The bits and the scale."""
        return {"": packed((tensor >= 0).view(-1), 1), _SCALE: tensor.abs().mean(dtype=torch.float64).float()}

    def tensor(self, parts: Parts, shape: torch.Size) -> Tensor:
        """In fp32."""
        signs = unpacked(parts[""], 1, math.prod(shape)).float().mul_(2).sub_(1)
        return signs.mul_(numbers_in(parts[_SCALE], ())).view(shape)


@final
@dataclass(frozen=True)
class TopK(Channel):
    """The elements of the largest absolute values, as they are, and their places in the flattened tensor in int32.

    Of equal ones the first count.

    Args:
        share: k / d, above 0 and up to 1; k is rounded to nearest, and at least 1.
    """

    share: float = 0.01
    feedback: bool = True
    leads: ClassVar[bool] = True
    extras: ClassVar[tuple[str, ...]] = (_INDEX,)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError("share", self.share, "above 0 and up to 1")

    def parts(self, tensor: Tensor, rng: np.random.Generator, before: Parts) -> Parts:
        """The values and their places, in the order of places."""
        count = max(1, round(self.share * tensor.numel()))
        sizes = tensor.reshape(-1).abs().nan_to_num(math.inf, math.inf)  # what is no number is large, so that it is not hidden
        least = sizes.topk(count).values[-1]
        above = (sizes > least).nonzero().view(-1)
        equal = (sizes == least).nonzero().view(-1)[: count - len(above)]
        index = torch.cat([above, equal]).sort().values
        return {"": tensor.reshape(-1)[index], _INDEX: index.to(torch.int32)}

    def tensor(self, parts: Parts, shape: torch.Size) -> Tensor:
        """In the type of the values; zeros elsewhere."""
        index, count = parts[_INDEX], math.prod(shape)
        if index.dtype != torch.int32 or index.ndim != 1 or len(index) > count:
            raise ValueError("no places")
        if len(index) and (int(index[0]) < 0 or int(index[-1]) >= count or bool((index[1:] <= index[:-1]).any())):
            raise ValueError(f"places that are not in order, or not below {count}")
        found = numbers_in(parts[""], index.shape).new_zeros(count)
        found[index.long()] = parts[""]
        return found.view(shape)


@final
@dataclass(frozen=True)
class PowerSGD(Channel):
    """Every matrix as two factors of a rank; a tensor of more axes is one of rows. What would not be smaller travels as it is.

    Args:
        rank: of the factors.
    """

    rank: int = 2
    feedback: bool = True
    leads: ClassVar[bool] = True
    extras: ClassVar[tuple[str, ...]] = (_RIGHT,)
    keeps: ClassVar[tuple[str, ...]] = (_RIGHT,)

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise UsageError("rank", self.rank, "a whole number, 1 or more")

    def parts(self, tensor: Tensor, rng: np.random.Generator, before: Parts) -> Parts:
        """P, orthonormal, and Q, of the last round's Q."""
        if tensor.ndim < 2 or self.rank * (len(tensor) + tensor[0].numel()) >= tensor.numel():
            return {}
        matrix = tensor.reshape(len(tensor), -1).to(torch.promote_types(tensor.dtype, torch.float32))
        size = matrix.shape[1], self.rank
        right = before.get(_RIGHT, torch.from_numpy(rng.standard_normal(size, dtype=np.float32))).to(matrix)
        left = torch.linalg.qr(matrix @ right).Q.contiguous()
        return {"": left, _RIGHT: matrix.T @ left}

    def tensor(self, parts: Parts, shape: torch.Size) -> Tensor:
        """P Q^T, added up column by column: so its bits depend on no library, and sender and receiver have the same."""
        rows, columns = shape[0], math.prod(shape[1:])
        left, right = numbers_in(parts[""], (rows, self.rank)), numbers_in(parts[_RIGHT], (columns, self.rank))
        found = left[:, :1] * right[:, 0]
        for place in range(1, self.rank):
            found += left[:, place, None] * right[:, place]
        return found.view(shape)
