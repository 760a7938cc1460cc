"""What the server knows of the memory of clients that are elsewhere: of which rounds each has kept something."""

from __future__ import annotations

from typing import final

from fedtune.errors import RunError
from fedtune.federated.memory import ClientMemory
from fedtune.tensors import Groups


@final
class MemoryAtSites(ClientMemory):
    """Notes alone. Each request says to its client what of its memory counts, so nothing has to be told between rounds."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[int, set[int]] = {}
        self._pruned: set[int] = set()

    def note(self, client: int, round: int) -> None:
        """A client has kept something of a round that is under way."""
        self._written.add(client)
        self._kept.setdefault(client, set()).add(round)

    def last(self, client: int, round: int) -> int:
        """The last round below this one of which a client has kept something that counts; 0: there is none."""
        return max((number for number in self._kept.get(client, ()) if number < round), default=0)

    def first(self, client: int) -> int:
        """The first round of which a client must still know something; 0: nobody has said so."""
        return min(self._kept.get(client, ()), default=0) if client in self._pruned else 0

    def _clients(self) -> list[int]:
        return list(self._kept)

    def _rounds(self, client: int) -> list[int]:
        return list(self._kept.get(client, ()))

    def _has(self, client: int, round: int) -> bool:
        return round in self._kept.get(client, ())

    def _confirm(self, client: int, round: int) -> bool:
        self._kept.setdefault(client, set()).add(round)  # where it is lost, the client says so
        return True

    def _where(self, client: int, round: int) -> str:
        return f"what client {client} remembers since round {round}, at its site,"

    def _tidy(self, client: int) -> None:
        """Nothing: each site does it."""

    def _read(self, client: int, round: int) -> Groups:
        raise RunError(f"{self._where(client, round)} stays there")

    def _write(self, client: int, round: int, groups: Groups) -> None:
        raise RunError(f"{self._where(client, round)} stays there")

    def _remove(self, client: int, rounds: list[int]) -> None:
        kept = self._kept.get(client, set())
        kept.difference_update(rounds)
        if rounds and kept and max(rounds) < min(kept):
            self._pruned.add(client)
