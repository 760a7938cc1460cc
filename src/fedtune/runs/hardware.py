"""What this machine can do."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from typing import Literal, cast

import torch
from lightning_fabric import Fabric
from lightning_utilities.core import rank_zero

from fedtune.errors import UsageError, one_of, unsaid
from fedtune.runtimes.environment import Place

Resolved = Literal["32-true", "bf16-mixed"]
PRECISIONS = ("auto", "32-true", "bf16-mixed")
_ALIASES: dict[str | int, str] = {32: "32-true", "32": "32-true", "bf16": "bf16-mixed"}
_SCALER = "half precision needs a loss scaler, whose state would pass from client to client"
_WHOLE = "all weights in 16 bits would lose the small updates that are averaged"
_REFUSED: dict[str | int, str] = {
    **dict.fromkeys((16, "16", "16-mixed"), _SCALER),
    **dict.fromkeys(("16-true", "bf16-true"), _WHOLE),
    **dict.fromkeys((64, "64", "64-true"), "checkpoints and messages are in fp32"),
}
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # parameters of mallopt, in malloc.h


def resolve_precision(precision: str | int, accelerator: str = "auto") -> Resolved:
    """Turn "auto" into "bf16-mixed" where the hardware multiplies bfloat16 natively, else into "32-true".

    Natively means a GPU with bf16, or a CPU with AMX or AVX512-BF16 instructions (docs/performance.md has the ratio).

    Raises:
        UsageError: none of "auto", "32-true" (or 32), "bf16-mixed".
    """
    known = _ALIASES.get(precision, precision) if isinstance(precision, (str, int)) else precision
    if isinstance(known, str | int) and known in _REFUSED:
        raise UsageError("precision", precision, f"{', '.join(PRECISIONS)}; {_REFUSED[known]}")
    if not isinstance(known, str) or known not in PRECISIONS:
        raise one_of("precision", precision, PRECISIONS)
    if known != "auto":
        return cast(Resolved, known)
    if accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported()  # every CPU with AMX has these instructions, too
    return "bf16-mixed" if native else "32-true"


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool | str | None) -> Iterator[None]:
    """Inside the block torch uses deterministic algorithms, as a `Trainer` with `deterministic` does; "warn" only warns."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=wanted == "warn")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def fabric_of(accelerator: str, precision: Resolved, place: Place | None = None) -> Fabric:
    """Lightning's Fabric on one device, with several GPUs on that of this rank.

    Raises:
        UsageError: the machine lacks the accelerator, or has fewer GPUs than ranks.
    """
    devices: int | list[int] = 1
    if place is not None and accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if count > 1 and place.local_rank >= count:
            raise UsageError("accelerator", accelerator, f"at most {count} ranks on this machine, a GPU each; or cpu")
        devices = [place.local_rank if count > 1 else 0]  # Slurm may show each rank its own GPU alone
    try:
        with unsaid(rank_zero.log, "Using bfloat16 Automatic Mixed Precision"):  # `said_of` says it in words
            return Fabric(accelerator=accelerator, devices=devices, precision=precision)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UsageError("accelerator", accelerator, f"one that this machine has: auto, cpu ({error})") from error


def said_of(precision: str | int, fabric: Fabric) -> str:
    """What was chosen where the precision is "auto", in a line; nothing where it is fp32, or was not to be chosen."""
    if precision != "auto" or fabric._precision.precision != "bf16-mixed":
        return ""
    where = "GPU" if fabric.device.type == "cuda" else "CPU"
    return f"precision: matrix products in bfloat16, which this {where} is made for, weights in fp32 (32-true: all in fp32)"


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory use so far: allocated on the device where it is a GPU, else resident memory of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside the block glibc keeps what is freed for the next allocation; at its end all of that goes back to the system.

    Otherwise each training step on a CPU gives memory back and asks for it again page by page, which costs it some 10 %; the
    highest memory use is the same. Does nothing with another C library, or where the user has set malloc's options.
    """
    libc = ctypes.CDLL(None)
    chosen = any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ)
    if chosen or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:  # what glibc's own settings grow to
        libc.mallopt(_MMAP_MAX, 2**16)
        libc.mallopt(_MMAP_THRESHOLD, 2**25)
        libc.mallopt(_TRIM_THRESHOLD, 2**26)
        libc.malloc_trim(0)
