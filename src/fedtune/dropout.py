"""Dropout whose masks cost less on a CPU, for any module that calls `torch.nn.functional.dropout`.

torch draws a number per element through a general Bernoulli generator. Here a 64-bit number serves four elements: an element
is dropped where its 16 bits are below p * 65,536. So a probability is rounded to a multiple of 1 / 65,536, and the kept
elements are scaled by what that leaves, so the expectation is kept up to the rounding of the input's type, as in torch. Same
independence, same distribution, other draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_STEPS = 65_536  # values of 16 bits


class FastDropout(TorchFunctionMode):
    """Within this context `torch.nn.functional.dropout` (and so `torch.nn.Dropout`) draws cheap masks for tensors on the CPU.

    The draws come from torch's global generator, so seeding works as ever. On a GPU, and in a compiled network,
    torch's own dropout stays.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace dropout, pass on everything else."""
        return (_dropout if func is F.dropout else func)(*args, **(kwargs or {}))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    dropped = round(p * _STEPS)
    usual = not training or inplace or input.device.type != "cpu" or torch.compiler.is_compiling()
    if usual or not 0 < dropped < _STEPS:
        return F.dropout(input, p, training, inplace)
    words = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # None: up to the largest
    bits = words.view(torch.int16)[: input.numel()].view(input.shape)
    return input * (bits >= dropped - _STEPS // 2).to(input.dtype).mul_(_STEPS / (_STEPS - dropped))
