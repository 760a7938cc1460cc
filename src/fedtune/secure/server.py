"""The server in the protocol of Bonawitz et al. 2017: it carries keys and sealed shares, adds up masked numbers, and takes the
masks that are left away from the sum.

Stage 3 of the paper, in which clients sign who is still there, is against a server that lies, and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from fedtune.errors import RunError
from fedtune.secure.client import own_mask, pair_masks
from fedtune.secure.keys import PUBLIC, add_masks, private_key, public_key
from fedtune.secure.sharing import secret_of


@dataclass(frozen=True)
class Unmasking:
    """What the server asks for in stage 4.

    Args:
        survivors: whose masked numbers came: of them the secrets of their own masks.
        dropped: who shared secrets and sent no numbers: of them the secrets of the pairwise masks.
    """

    survivors: tuple[int, ...]
    dropped: tuple[int, ...]


@final
class Server:
    """All that the server holds in a round: `keys`, `sealed`, the masked `total`, and at last the shares of one kind a client.

    Args:
        threshold: t.
        where: what an error names: the round.
    """

    def __init__(self, threshold: int, where: str) -> None:
        self._threshold, self._where = threshold, where
        self.keys: dict[int, bytes] = {}
        self.sealed: dict[int, dict[int, bytes]] = {}  # sender -> receiver -> shares
        self.total: np.ndarray | None = None
        self.senders: list[int] = []
        self.asked: Unmasking | None = None

    def take_keys(self, client: int, keys: bytes) -> None:
        """Stage 0: public keys of a client."""
        self.keys[client] = keys

    def all_keys(self) -> dict[int, bytes]:
        """Stage 0, the answer: the keys of all."""
        self._enough(len(self.keys), "0, keys")
        return dict(self.keys)

    def take_shares(self, client: int, shares: Mapping[int, bytes]) -> None:
        """Stage 1: a client's sealed shares for each peer."""
        self.sealed[client] = dict(shares)

    def shares_for(self, client: int) -> dict[int, bytes]:
        """Stage 1, the answer: what the peers have sealed for a client."""
        self._enough(len(self.sealed), "1, shares of secrets")
        return {sender: shares[client] for sender, shares in self.sealed.items() if sender != client}

    def take_masked(self, client: int, numbers: np.ndarray) -> None:
        """Stage 2: (d,) int64 masked numbers of a client, which are added up as they come.

        Raises:
            RunError: the client has shared no secrets, has sent numbers before, or sends another number of them.
        """
        if client not in self.sealed or client in self.senders:
            raise RunError(f"{self._where}: client {client} sent masked numbers twice, or without having shared secrets")
        if self.total is None:
            self.total = np.zeros_like(numbers)
        if self.total.shape != numbers.shape:
            raise RunError(f"{self._where}: client {client} sent {len(numbers)} masked numbers, others {len(self.total)}")
        np.add(self.total, numbers, out=self.total)  # modulo 2^64
        self.senders.append(client)

    def ask(self) -> Unmasking:
        """Stage 4: whose shares are wanted.

        Raises:
            RunError: fewer than t clients sent masked numbers: then nothing is asked for, and nothing is revealed.
        """
        self._enough(len(self.senders), "2, masked numbers")
        dropped = tuple(sorted(self.sealed.keys() - set(self.senders)))
        self.asked = Unmasking(tuple(sorted(self.senders)), dropped)
        return self.asked

    def unmasked(self, answers: Mapping[int, Mapping[int, bytes]]) -> np.ndarray:
        """Stage 4, the end: (d,) the sum of what the survivors had, before their masks.

        Args:
            answers: client -> peer -> share.

        Raises:
            RunError: fewer than t answered, or their shares do not make up a secret that fits its public key.
        """
        self._enough(len(answers), "4, unmasking")
        if self.asked is None or self.total is None:
            raise RunError(f"{self._where}: shares came before the server asked for them")
        chosen = sorted(answers)[: self._threshold]
        place = {client: number for number, client in enumerate(sorted(self.keys), start=1)}

        def secret(of: int) -> bytes:
            return secret_of({place[client]: answers[client][of] for client in chosen})

        masks = [(own_mask(secret(client)), -1) for client in self.asked.survivors]
        public = {client: self.keys[client][PUBLIC:] for client in self.asked.survivors}
        for client in self.asked.dropped:
            found = secret(client)
            if public_key(private_key(found)) != self.keys[client][PUBLIC:]:
                raise RunError(f"{self._where}: the shares of client {client} do not make up its secret")
            masks += pair_masks(client, found, public)  # in y_v it has the other sign: that takes it away
        add_masks(self.total, masks)
        return self.total

    def _enough(self, count: int, stage: str) -> None:
        if count < self._threshold:
            raise RunError(
                f"{self._where}: {count} clients are left in stage {stage}, secure sums need {self._threshold}; "
                "no mask was taken away, so nothing of any client was revealed"
            )
