"""What clients remember from one round to another that they take part in.

    clients/000012/0007.safetensors     what client 12 remembers since round 7

A client reads its newest file below its round. So a round that is done again, since its checkpoint was lost, reads what it read
the first time and ends with the same bits.
"""

from __future__ import annotations

import abc
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedtune.errors import RunError
from fedtune.files import regular, replaced
from fedtune.tensors import Groups, joined, mapped, num_bytes, parted


class ClientMemory(abc.ABC):
    """Groups of tensors for each client and round, on the CPU."""

    def load(self, client: int, round: int) -> Groups:
        """What a client remembers when it takes part in a round; nothing when it never did.

        Raises:
            RunError: its file cannot be read.
        """
        known = [number for number in self._rounds(client) if number < round]
        return self._read(client, max(known)) if known else {}

    def save(self, client: int, round: int, groups: Groups) -> None:
        """Keep what a client remembers after a round, as a copy; without groups nothing is kept.

        Raises:
            RunError: the disk has no room for all clients, or cannot be written.
        """
        if groups:
            self._write(client, round, mapped(groups, lambda _, tensor: tensor.detach().cpu().clone()))

    def discard(self, round: int, clients: Iterable[int]) -> None:
        """Forget what clients have kept of a round, as their replies do not count."""
        for client in clients:
            self._remove(client, [number for number in self._rounds(client) if number == round])

    def prune(self, round: int, clients: Iterable[int]) -> None:
        """Forget what no round after `round` can read any more, of some clients."""
        for client in clients:
            self._remove(client, sorted(number for number in self._rounds(client) if number <= round)[:-1])

    def rewind(self, round: int) -> None:
        """Forget all that is newer than a round: the run goes on from there."""
        for client in self._clients():
            self._remove(client, [number for number in self._rounds(client) if number > round])

    @abc.abstractmethod
    def _clients(self) -> list[int]:
        """The clients that have kept something."""

    @abc.abstractmethod
    def _rounds(self, client: int) -> list[int]:
        """The rounds of which a client has kept something."""

    @abc.abstractmethod
    def _read(self, client: int, round: int) -> Groups: ...

    @abc.abstractmethod
    def _write(self, client: int, round: int, groups: Groups) -> None: ...

    @abc.abstractmethod
    def _remove(self, client: int, rounds: list[int]) -> None: ...


@final
class MemoryInRam(ClientMemory):
    """Grows with the number of clients; for runs that write nothing."""

    def __init__(self) -> None:
        self._kept: dict[int, dict[int, Groups]] = {}

    def _clients(self) -> list[int]:
        return list(self._kept)

    def _rounds(self, client: int) -> list[int]:
        return list(self._kept.get(client, {}))

    def _read(self, client: int, round: int) -> Groups:
        return mapped(self._kept[client][round], lambda _, tensor: tensor.clone())

    def _write(self, client: int, round: int, groups: Groups) -> None:
        self._kept.setdefault(client, {})[round] = groups

    def _remove(self, client: int, rounds: list[int]) -> None:
        for number in rounds:
            del self._kept[client][number]


@final
class MemoryOnDisk(ClientMemory):
    """A file for each client and round.

    Args:
        folder: made when the first client has something to remember.
        num_clients: how many will have, to know in time whether the disk has room for all.
    """

    def __init__(self, folder: Path, num_clients: int) -> None:
        self._folder, self._num_clients, self._has_room = folder, num_clients, False

    def _clients(self) -> list[int]:
        return [int(folder.name) for folder in self._folder.glob("[0-9]*")]

    def _rounds(self, client: int) -> list[int]:
        return [int(file.stem) for file in self._file(client, 0).parent.glob("[0-9]*.safetensors")]

    def _read(self, client: int, round: int) -> Groups:
        file = self._file(client, round)
        try:
            regular(file)
            return parted(load_file(file))
        except (OSError, SafetensorError) as error:
            raise RunError(f"{file} cannot be read: {error}") from error

    def _write(self, client: int, round: int, groups: Groups) -> None:
        file = self._file(client, round)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._check_room(sum(map(num_bytes, groups.values())))
            with replaced(file) as temporary:
                save_file(joined(groups), temporary)
        except (OSError, SafetensorError) as error:
            raise RunError(f"round {round}, client {client}: its memory could not be written to {file} ({error})") from error

    def _remove(self, client: int, rounds: list[int]) -> None:
        for number in rounds:
            self._file(client, number).unlink(missing_ok=True)

    def _file(self, client: int, round: int) -> Path:
        return self._folder / f"{client:06d}" / f"{round:04d}.safetensors"

    def _check_room(self, size: int) -> None:
        """Once, from the size of the first memory: that of all clients, and one that is being replaced."""
        if self._has_room:
            return
        needed, free = size * (self._num_clients + 1), shutil.disk_usage(self._folder).free
        if needed > free:
            raise RunError(
                f"what {self._num_clients:,} clients remember takes {needed / 1e9:,.1f} GB ({size / 1e6:,.3f} MB each); "
                f"{self._folder} has {free / 1e9:,.1f} GB left"
            )
        self._has_room = True
