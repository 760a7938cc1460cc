"""What this machine can do."""

from __future__ import annotations

import resource
import sys
from typing import Literal, cast

import torch
from lightning_fabric import Fabric

from fedtune.errors import UsageError, one_of

Resolved = Literal["32-true", "bf16-mixed"]
PRECISIONS = ("auto", "32-true", "bf16-mixed")


def resolve_precision(precision: str, accelerator: str = "auto") -> Resolved:
    """Turn "auto" into "bf16-mixed" where the hardware multiplies bfloat16 natively, else into "32-true".

    Natively means a GPU with bf16, or a CPU with AMX or AVX512-BF16 instructions (docs/performance.md has the ratio).

    Raises:
        UsageError: none of "auto", "32-true", "bf16-mixed". Half precision needs a loss scaler, whose state would pass
            from client to client.
    """
    if precision not in PRECISIONS:
        raise one_of("precision", precision, PRECISIONS)
    if precision != "auto":
        return cast(Resolved, precision)
    if accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()  # every CPU with AMX has these instructions, too
    return "bf16-mixed" if native else "32-true"


def fabric_of(accelerator: str, precision: Resolved) -> Fabric:
    """Lightning's Fabric on one device. Raises `UsageError` where the machine lacks the accelerator."""
    try:
        return Fabric(accelerator=accelerator, devices=1, precision=precision)
    except (ValueError, RuntimeError) as error:
        raise UsageError("accelerator", accelerator, f"one that this machine has: auto, cpu ({error})") from error


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory use so far: allocated on the device where it is a GPU, else resident memory of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
