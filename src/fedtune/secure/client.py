"""A client in the protocol of Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning".

Client u has two key pairs, for sealed shares and for pairwise masks, of the secrets c_u and s_u, and the secret of its own
mask, b_u. It sends y_u, all modulo 2^64:

    y_u = x_u + PRG(b_u) + sum over v > u of PRG(s_uv) - sum over v < u of PRG(s_uv)        s_uv agreed on by u and v

s_u and b_u are shared among the clients of the round. The server needs one of them to take away what the sum has of u's masks,
and with both it could uncover x_u. So a client hands out its share of one of the two for each peer, and never of the other.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from fedtune.errors import RunError
from fedtune.secure.keys import PUBLIC, SECRET, add_masks, agreed_key, key_of, opened, private_key, public_key, sealed
from fedtune.secure.sharing import shares_of

PAIR, OWN = "pairwise masks", "own mask"  # the kinds of secrets that are shared: s_u and b_u
_HEAD = struct.Struct(">II")  # of a sealed share: from whom, for whom


@dataclass(frozen=True, repr=False)
class Secrets:
    """What only the client knows, 16 bytes each: c_u, s_u and b_u."""

    channel: bytes
    pair: bytes
    own: bytes

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> Secrets:
        """In a simulation they come from an address of the run's seed, so that a round can be done again bit for bit; who
        knows the seed knows them all. Elsewhere they come from the system's generator."""
        return cls(*(rng.bytes(SECRET) for _ in range(3)))


@final
class Client:
    """One client of one round; its methods are the stages, in their order.

    Args:
        number: u.
        secrets: fresh for each round.
        threshold: t, how many clients must stay to the end.
    """

    def __init__(self, number: int, secrets: Secrets, threshold: int) -> None:
        self._number, self._secrets, self._threshold = number, secrets, threshold
        self._channel, self._pair = private_key(secrets.channel), private_key(secrets.pair)
        self._keys: dict[int, bytes] = {}
        self._shares: dict[int, dict[str, bytes]] = {}  # of each peer that shared its secrets, and of this client itself
        self._revealed: dict[int, str] = {}  # which kind was handed out

    def advertise(self) -> bytes:
        """Stage 0: both public keys, 64 bytes."""
        return public_key(self._channel) + public_key(self._pair)

    def share(self, keys: Mapping[int, bytes]) -> dict[int, bytes]:
        """Stage 1: the sealed shares for each peer.

        Args:
            keys: what all clients have advertised, this one among them.

        Raises:
            RunError: they are fewer than t, some are alike, or this client's are others.
        """
        self._enough(keys, "advertised keys")
        if keys.get(self._number) != self.advertise() or len(set(keys.values())) < len(keys):
            raise RunError(f"client {self._number}: the server sent keys of which some are alike, or others in place of mine")
        self._keys = dict(sorted(keys.items()))
        size = len(self._keys)
        pair, own = (shares_of(one, self._threshold, size) for one in (self._secrets.pair, self._secrets.own))
        found = {}
        for place, peer in enumerate(self._keys, start=1):
            if peer == self._number:
                self._shares[peer] = {PAIR: pair[place], OWN: own[place]}
            else:
                found[peer] = sealed(self._of_channel(self._number, peer), self._head(peer) + pair[place] + own[place])
        return found

    def receive(self, sealed_shares: Mapping[int, bytes]) -> None:
        """Stage 1, the answer: the shares of the peers that sent some.

        Raises:
            RunError: they are fewer than t, or one cannot be opened, or is from or for another client.
        """
        self._enough([*sealed_shares, self._number], "shared secrets")
        for peer, message in sealed_shares.items():
            text = opened(self._of_channel(peer, self._number), message)
            if _HEAD.unpack(text[: _HEAD.size]) != (peer, self._number):
                raise RunError(f"client {self._number}: a share that came as client {peer}'s is not that")
            shares = text[_HEAD.size :]
            self._shares[peer] = {PAIR: shares[:SECRET], OWN: shares[SECRET:]}

    def mask(self, numbers: np.ndarray) -> None:
        """Stage 2: (d,) int64 numbers become y_u, in place."""
        add_masks(numbers, [(own_mask(self._secrets.own), 1), *pair_masks(self._number, self._secrets.pair, self._peers())])

    def reveal(self, survivors: Collection[int], dropped: Collection[int]) -> dict[int, bytes]:
        """Stage 4: a share for each client of stage 1: of b_u where y_u came, of s_u where it did not.

        Raises:
            RunError: survivors are fewer than t, a client is among both, or unknown, or the other kind was handed out before.
        """
        self._enough(survivors, "sent masked numbers")
        asked = [(peer, OWN) for peer in survivors] + [(peer, PAIR) for peer in dropped]
        for peer, kind in asked:
            if peer not in self._shares:
                raise RunError(f"client {self._number}: the server asks for a share of client {peer}, who shared nothing")
            if self._revealed.setdefault(peer, kind) != kind:
                raise RunError(
                    f"client {self._number}: the server asks for shares of the {kind} and of the {self._revealed[peer]} of "
                    f"client {peer}, which together would uncover what it sent; refused"
                )
        return {peer: self._shares[peer][kind] for peer, kind in asked}

    def _peers(self) -> dict[int, bytes]:
        return {peer: self._keys[peer][PUBLIC:] for peer in self._shares if peer != self._number}

    def _of_channel(self, sender: int, receiver: int) -> bytes:
        peer = receiver if sender == self._number else sender
        return agreed_key(self._channel, self._keys[peer][:PUBLIC], f"shares from {sender} to {receiver}")

    def _head(self, receiver: int) -> bytes:
        return _HEAD.pack(self._number, receiver)

    def _enough(self, clients: Collection[int], have: str) -> None:
        if len(set(clients)) < self._threshold:
            raise RunError(f"client {self._number}: {len(set(clients))} clients {have}, the threshold is {self._threshold}")


def own_mask(secret: bytes) -> bytes:
    """The key of PRG(b_u)."""
    return key_of(secret, OWN)


def pair_masks(number: int, secret: bytes, peers: Mapping[int, bytes]) -> list[tuple[bytes, int]]:
    """The keys of PRG(s_uv), with the signs that they have in y_u.

    Args:
        number, secret: u, and s_u.
        peers: v -> its public key for pairwise masks.
    """
    private = private_key(secret)
    return [(agreed_key(private, public, PAIR), 1 if peer > number else -1) for peer, public in peers.items()]
