"""A banded factor of the matrix of prefix sums, and what noise goes into a round by it.

Legend: T rounds, b bands. The weights after round t are prefix sums of the rounds' updates: A is the lower triangle of ones.
A = B C; what is made private is C x + z, so the noise in x is C^-1 z. The square root of A is the lower-triangular Toeplitz
matrix with 1, 1/2, 3/8, ... in its columns; C is its first b bands (Kalinin and Lampert 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def bands(count: int) -> list[float]:
    """(b,) the first column of C: binom(2k, k) / 4^k.

    >>> bands(4)
    [1.0, 0.5, 0.375, 0.3125]
    """
    found = [1.0]
    for k in range(1, count):
        found.append(found[-1] * (2 * k - 1) / (2 * k))
    return found


def sensitivity(column: Sequence[float]) -> float:
    """The Euclidean length of C's longest column: what a client that is in one round of b moves C x by, for a clip of 1."""
    return math.sqrt(sum(value * value for value in column))


def error(count: int, rounds: int) -> float:
    """The root of the mean squared error of the prefix sums, for noise 1 in units of the sensitivity.

    >>> error(1, 4) == math.sqrt((1 + 2 + 3 + 4) / 4)
    True
    """
    column = bands(count)
    inverse = [1.0]  # the first column of C^-1
    for t in range(1, rounds):
        inverse.append(-sum(column[k] * inverse[t - k] for k in range(1, min(t, count - 1) + 1)))
    summed = np.cumsum(inverse)  # the first column of B = A C^-1, a Toeplitz matrix
    return sensitivity(column) * math.sqrt(float(np.mean(np.cumsum(summed**2))))
