"""Every random draw has an address: (seed, purpose, round, client).

Two draws with different addresses are independent, and a draw does not depend on what was drawn before it. So the
order in which clients are trained changes nothing, a resumed run repeats nothing, and a new seed changes everything.
"""

from __future__ import annotations

import random
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
    """Inside the block the global generators of torch (CPU and current GPU), NumPy and Python start at one address.

    Afterwards they are as before.

    Dropout, random samplers, fresh layers and data sets read the global generators, which is why they are set and not passed.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    start, others = stream(seed, purpose, round, client), (random.getstate(), np.random.get_state())  # noqa: NPY002 - users' data sets draw from it
    with torch.random.fork_rng(devices=devices):
        _seed_torch(int(start.integers(2**63)))
        random.seed(int(start.integers(2**63)))
        np.random.seed(int(start.integers(2**32)))  # noqa: NPY002 - as above
        try:
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])  # noqa: NPY002 - as above


def _seed_torch(seed: int) -> None:
    """As `torch.manual_seed`, which without a GPU writes the callers' stack down each time: a tiny client trains faster."""
    (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(seed)
