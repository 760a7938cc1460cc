"""What masks are made of, by the package cryptography.

key agreement    X25519 (RFC 7748)
keys             HKDF with SHA-256 (RFC 5869), of secrets of 16 bytes and of what was agreed on
masks            AES-256 in counter mode: the generator that stretches a key to a vector
sealed shares    AES-256-GCM
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedtune.errors import RunError

SECRET = 16  # bytes of a secret
PUBLIC = 32  # bytes of a public key
_NONCE = 12
_BLOCK = 2**16  # numbers of a piece, which stays in a core's cache while all masks are added


def key_of(secret: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose."""
    return HKDF(SHA256(), length=32, salt=None, info=f"fedtune secure sums: {purpose}".encode()).derive(secret)


def private_key(secret: bytes) -> X25519PrivateKey:
    """The private key that a secret stands for."""
    return X25519PrivateKey.from_private_bytes(key_of(secret, "private key"))


def public_key(private: X25519PrivateKey) -> bytes:
    """(32,) bytes of the public key that belongs to a private one."""
    return private.public_key().public_bytes_raw()


def agreed_key(private: X25519PrivateKey, public: bytes, purpose: str) -> bytes:
    """The key that both owners come to, each from its private key and the other's public one."""
    return key_of(private.exchange(X25519PublicKey.from_public_bytes(public)), purpose)


def sealed(key: bytes, text: bytes) -> bytes:
    """A text that only who has the key can read, or change: nonce, text, tag."""
    nonce = os.urandom(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, text, None)


def opened(key: bytes, message: bytes) -> bytes:
    """What was sealed.

    Raises:
        RunError: it was changed on its way, or sealed with another key.
    """
    try:
        return AESGCM(key).decrypt(message[:_NONCE], message[_NONCE:], None)
    except InvalidTag as error:
        raise RunError("a sealed share cannot be opened: it was changed on its way, or is for another client") from error


def add_masks(numbers: np.ndarray, masks: Sequence[tuple[bytes, int]]) -> None:
    """Add the streams of some keys to (d,) int64 numbers, in place, modulo 2^64.

    Args:
        masks: a key, which must be used for one vector alone, and 1 or -1, by which its stream is multiplied.
    """
    streams = [(Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor(), sign) for key, sign in masks]
    zeros, room = memoryview(bytes(8 * _BLOCK)), np.empty(_BLOCK + 2, "<i8")  # the cipher asks for more room than it fills
    for start in range(0, len(numbers), _BLOCK):
        piece = numbers[start : start + _BLOCK]
        mask = room[: len(piece)]
        for stream, sign in streams:
            stream.update_into(zeros[: 8 * len(piece)], room.view(np.uint8).data)
            (np.add if sign > 0 else np.subtract)(piece, mask, out=piece)  # whole numbers in arrays wrap around
