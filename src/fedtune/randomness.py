"""Every random draw has an address: (seed, purpose, round, client).

Two draws with different addresses are independent, and a draw does not depend on what was drawn before it. So the
order in which clients are trained changes nothing, a resumed run repeats nothing, and a new seed changes everything.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream(seed: int, purpose: str, round: int = 0, client: int = 0) -> np.random.Generator:
    """An independent NumPy generator for one address.

    >>> bool(stream(0, "cohort", 1).integers(9**9) == stream(0, "cohort", 1).integers(9**9))
    True
    >>> bool(stream(0, "cohort", 1).integers(9**9) == stream(0, "cohort", 2).integers(9**9))
    False
    """
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), round, client])


@contextmanager
def seeded(seed: int, purpose: str, round: int = 0, client: int = 0) -> Iterator[None]:
    """Inside the block torch's global generators (CPU and current GPU) start at one address; afterwards they are as before.

    Dropout, random samplers and fresh layers read the global generators, which is why they are set and not passed.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(stream(seed, purpose, round, client).integers(2**63)))
        yield
