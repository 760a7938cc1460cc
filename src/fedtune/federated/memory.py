"""What clients remember from one round to another that they take part in.

    clients/000012/0007.safetensors     what client 12 remembers since round 7

A client reads its newest file below its round. So a round that is done again, since its checkpoint was lost, reads what it read
the first time and ends with the same bits. A file says whose it is, and has a checksum of its tensors, which is checked when
it is read; and a checkpoint says which files there are, so that no client begins afresh because its file is lost.
"""

from __future__ import annotations

import abc
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import final

from safetensors import SafetensorError
from safetensors.torch import save_file

from fedtune.errors import RunError
from fedtune.federated.ranks import ALONE, Ranks
from fedtune.files import clear, entries, is_folder, replaced, said
from fedtune.tensors import Groups, Tensors, checksum, joined, mapped, num_bytes, parted, read_file

_CLIENT = re.compile("[0-9]{6}|[1-9][0-9]{6,}", re.ASCII)
_FILE = re.compile(r"([0-9]{4}|[1-9][0-9]{4,})\.safetensors", re.ASCII)
_CURE = "put back what the run has written, or start again in a new run directory"


class ClientMemory(abc.ABC):
    """Groups of tensors for each client and round, on the CPU."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self._ranks = ranks
        self._newest: dict[int, int] | None = None  # client -> round, as far as rounds are complete; None: nobody knows
        self._written: set[int] = set()  # clients that have kept something since, in this process

    def load(self, client: int, round: int) -> Groups:
        """What a client remembers when it takes part in a round; nothing when it never did.

        Raises:
            RunError: its file is missing, damaged, or cannot be read.
        """
        newest = round if self._newest is None else self._newest.get(client, 0)
        if newest >= round:
            newest = max((number for number in self._rounds(client) if number < round), default=0)
        return self._read(client, newest) if newest else {}

    def after(self, client: int, round: int) -> Groups:
        """What a client remembers once a round is done, complete or not yet; as `load`."""
        self.settle()
        return self._read(client, round) if self._has(client, round) else self.load(client, round)

    @property
    def newest(self) -> dict[int, int] | None:
        """As for `expect`."""
        return self._newest

    def expect(self, newest: Mapping[int, int] | None) -> None:
        """Be told of which round each client has kept something last; None where nobody knows, as in an older run.

        Raises:
            RunError: some of it is not there.
        """
        self.settle()
        missing = sorted(client for client, round in (newest or {}).items() if not self._confirm(client, round))
        if newest and missing:
            where = self._where(missing[0], newest[missing[0]])
            raise RunError(f"{where} is missing, what {len(missing)} of {len(newest)} clients remember is lost; {_CURE}")
        self._newest = None if newest is None else dict(newest)

    def completed(self, round: int, clients: Iterable[int]) -> dict[int, int] | None:
        """Take a round of these clients for complete.

        Returns:
            for `expect`: the last round of which each client has kept something.
        """
        self.settle()
        own = [client for client in clients if client in self._written and self._has(client, round)]
        self._written.clear()
        kept = self._ranks.gather(own)  # who has written it knows; a network's folder may show it to others later
        if self._newest is not None:
            self._newest |= dict.fromkeys(sorted(kept), round)
        return self._newest

    def save(self, client: int, round: int, groups: Groups) -> None:
        """Keep what a client remembers after a round, as a copy; without groups nothing is kept.

        It may still be on its way to the disk when this returns: `settle` waits for that, as does whatever looks at it.

        Raises:
            RunError: the disk has no room for all clients, or cannot be written.
        """
        if groups:
            self._written.add(client)
            self._write(client, round, mapped(groups, lambda _, tensor: tensor.detach().cpu().clone()))

    def discard(self, round: int, clients: Iterable[int]) -> None:
        """Forget what clients have kept of a round, as their replies do not count.

        Raises:
            RunError: something could not be kept, of any client.
        """
        self.settle()
        for client in clients:
            self._remove(client, [number for number in self._rounds(client) if number == round])

    def prune(self, round: int, clients: Iterable[int]) -> None:
        """Forget what no round after `round` can read any more, of some clients."""
        self.settle()
        for client in clients:
            self._remove(client, sorted(number for number in self._rounds(client) if number <= round)[:-1])

    def rewind(self, round: int) -> None:
        """Forget all that is newer than a round, and what is half-written: the run goes on from there."""
        self.settle()
        for client in self._clients():
            self._tidy(client)
            self._remove(client, [number for number in self._rounds(client) if number > round])

    def settle(self) -> None:  # noqa: B027 - most need not
        """Wait until all that was saved is kept."""

    @abc.abstractmethod
    def _clients(self) -> list[int]:
        """The clients that have kept something."""

    @abc.abstractmethod
    def _rounds(self, client: int) -> list[int]:
        """The rounds of which a client has kept something."""

    @abc.abstractmethod
    def _has(self, client: int, round: int) -> bool:
        """Whether a client has kept something of a round."""

    @abc.abstractmethod
    def _confirm(self, client: int, round: int) -> bool:
        """Whether what a client has kept of a round, in an earlier start, is still there."""

    @abc.abstractmethod
    def _where(self, client: int, round: int) -> str:
        """What a client has kept of a round, for a message."""

    @abc.abstractmethod
    def _tidy(self, client: int) -> None:
        """Remove what a process has left half-written that was killed."""

    @abc.abstractmethod
    def _read(self, client: int, round: int) -> Groups: ...

    @abc.abstractmethod
    def _write(self, client: int, round: int, groups: Groups) -> None: ...

    @abc.abstractmethod
    def _remove(self, client: int, rounds: list[int]) -> None: ...


@final
class MemoryInRam(ClientMemory):
    """Grows with the number of clients; for runs of one process that write nothing."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        super().__init__(ranks)
        self._kept: dict[int, dict[int, Groups]] = {}

    def _clients(self) -> list[int]:
        return list(self._kept)

    def _rounds(self, client: int) -> list[int]:
        return list(self._kept.get(client, {}))

    def _has(self, client: int, round: int) -> bool:
        return round in self._kept.get(client, {})

    def _confirm(self, client: int, round: int) -> bool:
        return self._has(client, round)

    def _where(self, client: int, round: int) -> str:
        return f"what client {client} remembers since round {round}"

    def _tidy(self, client: int) -> None:
        """Nothing: it is whole, or not there."""

    def _read(self, client: int, round: int) -> Groups:
        return mapped(self._kept[client][round], lambda _, tensor: tensor.clone())

    def _write(self, client: int, round: int, groups: Groups) -> None:
        if self._ranks.size > 1:
            raise RunError(
                f"round {round}, client {client}: it has something to remember, and the next time another rank may train it; "
                "allowed: a run_dir, in a folder that all ranks see"
            )
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
        ranks: who writes to the folder: each process what its own clients remember.
    """

    def __init__(self, folder: Path, num_clients: int, ranks: Ranks = ALONE) -> None:
        super().__init__(ranks)
        self._folder, self._num_clients, self._has_room = folder, num_clients, False
        self._writer = ThreadPoolExecutor(1, "client memory")
        self._writing: dict[int, Future[None]] = {}  # client -> what it remembers, on its way to the disk

    def settle(self) -> None:
        """Wait until all that was saved is on the disk.

        Raises:
            RunError: some of it could not be written.
        """
        for client in list(self._writing):
            self._writing.pop(client).result()

    def _clients(self) -> list[int]:
        return [int(name) for name in entries(self._folder) if _CLIENT.fullmatch(name)]

    def _rounds(self, client: int) -> list[int]:
        if client in self._writing:
            self.settle()
        names = entries(self._file(client, 0).parent)
        if not names:
            is_folder(self._folder)  # else that says what is wrong
        return [int(name.partition(".")[0]) for name in names if _FILE.fullmatch(name)]

    def _has(self, client: int, round: int) -> bool:
        return os.path.lexists(self._file(client, round))

    def _confirm(self, client: int, round: int) -> bool:
        return round in self._rounds(client)

    def _where(self, client: int, round: int) -> str:
        return str(self._file(client, round))

    def _tidy(self, client: int) -> None:
        clear(self._file(client, 0).parent)

    def _read(self, client: int, round: int) -> Groups:
        file = self._file(client, round)
        try:
            found, noted = read_file(file)
            if noted != _notes(client, round, found):
                raise ValueError("its content is not what was written")
            return parted(found)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise RunError(f"{file} cannot be read: {said(error)}; {_CURE}") from error

    def _write(self, client: int, round: int, groups: Groups) -> None:
        self.settle()  # so that at most one is on its way
        self._writing[client] = self._writer.submit(self._store, client, round, groups)

    def _store(self, client: int, round: int, groups: Groups) -> None:
        file = self._file(client, round)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._check_room(sum(map(num_bytes, groups.values())))
            tensors = joined(groups)
            with replaced(file) as temporary:
                save_file(tensors, temporary, metadata=_notes(client, round, tensors))
        except (OSError, SafetensorError) as error:
            raise RunError(f"round {round}, client {client}: its memory could not be written to {file} ({error})") from error

    def _remove(self, client: int, rounds: list[int]) -> None:
        for number in rounds:
            try:
                self._file(client, number).unlink(missing_ok=True)
            except OSError as error:
                raise RunError(f"{self._file(client, number)} cannot be removed: {said(error)}") from error

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


def _notes(client: int, round: int, tensors: Tensors) -> dict[str, str]:
    """What a file says of itself; one entry, as safetensors writes several in any order."""
    return {"content": f"client {client}, round {round}, crc32 {checksum(tensors)}"}
