"""Dropout whose masks cost less on a CPU, for any module that calls `torch.nn.functional.dropout`.

torch draws a number per element through a general Bernoulli generator, one after the other. Here a 64-bit number of NumPy's
fastest generator serves four elements: one is dropped where its 16 bits are below p * 65,536. So a probability is rounded to a
multiple of 1 / 65,536, and the kept elements are scaled by what that leaves, so the expectation is kept up to the rounding of
the input's type, as in torch. Same independence, same distribution, other draws.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_STEPS = 65_536  # values of 16 bits
_ONE = int(torch.ones((), dtype=torch.bfloat16).view(torch.int16))  # the bits of 1.0
_USUAL = F.dropout


class FastDropout(contextlib.AbstractContextManager[None]):
    """Within this context `torch.nn.functional.dropout` (and so `torch.nn.Dropout`) draws cheap masks for tensors on the CPU.

    Each draw is seeded by torch's global generator, so seeding works as ever. The function itself is replaced for the time, and
    not seen through a `TorchFunctionMode`, which a backward pass leaves: there activation checkpoints draw their masks again.
    On a GPU, and in a compiled network, torch's own dropout stays.
    """

    def __enter__(self) -> None:
        self._before = F.dropout
        F.dropout = _dropout

    def __exit__(self, *_: Any) -> None:
        F.dropout = self._before


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    dropped = round(p * _STEPS)
    usual = not training or inplace or input.device.type != "cpu" or torch.compiler.is_compiling()
    if usual or not 0 < dropped < _STEPS:
        return _USUAL(input, p, training, inplace)
    generator = np.random.Generator(np.random.SFC64(int(torch.randint(2**63 - 1, (), device="cpu"))))
    words = generator.integers(0, 2**64, size=-(-input.numel() // 4), dtype=np.uint64)
    bits = torch.from_numpy(words.view(np.int16)[: input.numel()]).view(input.shape)
    kept = bits.ge_(dropped - _STEPS // 2).mul_(_ONE).view(torch.bfloat16)  # in place on 16 bits: no conversion
    return (input * kept.to(torch.promote_types(input.dtype, kept.dtype))).to(input.dtype).mul_(_STEPS / (_STEPS - dropped))
