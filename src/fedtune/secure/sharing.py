"""Shamir's secret sharing (1979) over GF(2^128), by the package pycryptodome: t shares are the secret, fewer say nothing."""

from __future__ import annotations

from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir


def shares_of(secret: bytes, threshold: int, places: int) -> dict[int, bytes]:
    """The shares of a secret of 16 bytes, 16 bytes each, for the places from 1.

    The coefficients of the polynomial come from the system's generator: nothing that is computed from t shares depends on them.
    """
    return dict(Shamir.split(threshold, places, secret, ssss=False))


def secret_of(shares: Mapping[int, bytes]) -> bytes:
    """The secret, of exactly t of its shares by place."""
    return bytes(Shamir.combine(list(shares.items()), ssss=False))
