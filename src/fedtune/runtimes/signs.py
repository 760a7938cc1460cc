"""Where the ranks of a run meet, and how they know that the others are still there: a store of short texts at one address.

A rank that waits for the others looks at it again and again, asleep in between, however long that takes. Meanwhile every rank
gives signs: a thread does so, but for the times when the rank has to get on by itself (`watched`): then each batch that is done
is a sign. So a rank that was killed, stopped or hangs is known by its silence; one on the same machine that is gone at once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore

from fedtune.errors import Elsewhere, RunError
from fedtune.files import said
from fedtune.runtimes.environment import TIMEOUT, Place

_OFTEN = 1.0  # seconds between signs, and between looks at the others
_SHORT, _LONG = 2e-4, 0.05  # seconds that a rank sleeps which waits: at first, and at most
_LEAVING = 5.0  # seconds that the keeper of the meeting point waits for the others to leave


class Signs:
    """The meeting point, as one rank sees it.

    Args:
        place: of this rank.
        patience: seconds of silence after which a rank counts as lost.

    Raises:
        RunError: nobody answers at the address, or not all ranks come.
    """

    def __init__(self, place: Place, patience: float) -> None:
        self._place, self._patience, self._run = place, patience, 0
        self._keeps = place.rank == 0 and not place.hosted
        where = f"{place.address}:{place.port}"
        try:
            known = TCPStore(
                *(place.address, place.port, None, self._keeps), timeout=timedelta(seconds=patience), wait_for_workers=False
            )
        except RuntimeError as error:
            raise RunError(
                f"rank {place.rank}: the ranks of the run cannot meet at {where} ({said(error)}); "
                "MASTER_ADDR and MASTER_PORT name a free port of the machine of rank 0"
            ) from error
        self.store = PrefixStore(f"fedtune/{place.attempt}", known)
        self._count, self._stepped, self._looked = itertools.count(), 0.0, 0.0
        self._seen = [(b"", time.monotonic())] * place.size
        self.watched, self._ended = False, threading.Event()
        self._sign()
        with self._asked():
            self.store.set(f"who/{place.rank}", json.dumps([socket.gethostname(), os.getpid(), _machine()]))
        threading.Thread(target=self._keep_signing, daemon=True, name="signs of life").start()
        self._come()

    def begin(self) -> None:
        """A new run begins: of the one before no error is left."""
        self._run += 1

    def wait_for_all(self, name: str) -> None:
        """Return once all ranks are at a place of this name.

        Raises:
            Elsewhere: one of them had to stop.
            RunError: one of them is lost; it is named.
        """
        key, pause = f"at/{self._run}/{name}", _SHORT
        with self._asked():
            count = self.store.add(key, 1)
        while count < self._place.size:
            time.sleep(pause)
            pause = min(2 * pause, _LONG)
            self.step()
            self._look()
            with self._asked():
                count = self.store.add(key, 0)

    def forget(self, name: str) -> None:
        """A place that all have left."""
        with contextlib.suppress(RuntimeError):
            self.store.delete_key(f"at/{self._run}/{name}")

    def step(self) -> None:
        """Give a sign, at most one a second, and look whether another rank had to stop.

        Raises:
            Elsewhere: it had to.
        """
        if time.monotonic() - self._stepped < _OFTEN:
            return
        self._stepped = time.monotonic()  # of this thread alone: the other one signs, and does not look
        self._sign()
        for number in {0, self._run}:  # 0: before the first run began
            with self._asked():
                found = json.loads(self.store.get(f"error/{number}")) if self.store.check([f"error/{number}"]) else None
            if found and found[0] != self._place.rank:
                raise Elsewhere(*found)

    def fail(self, error: BaseException, code: int = 2) -> None:
        """Tell the others that this rank had to stop, where none has before."""
        if isinstance(error, Elsewhere):
            return
        text = "interrupted" if isinstance(error, KeyboardInterrupt) else said(error)
        with contextlib.suppress(RuntimeError):
            self.store.compare_set(f"error/{self._run}", "", json.dumps([self._place.rank, text, code]))

    def speaks(self, error: BaseException) -> bool:
        """Whether it is for this rank to say what went wrong: one does it for all, the one where it went wrong if it can."""
        key = f"said/{self._run}"
        try:
            until = time.monotonic() + (_LEAVING if isinstance(error, Elsewhere) else 0.0)
            while time.monotonic() < until and not self.store.check([key]):
                time.sleep(_LONG)
            return self.store.compare_set(key, "", str(self._place.rank)) == str(self._place.rank).encode()
        except RuntimeError:  # the meeting point is gone, and rank 0 with it
            return self._place.rank <= 1

    def leave(self) -> None:
        """No more signs; whoever keeps the meeting point is the last to go."""
        self._ended.set()
        with contextlib.suppress(RuntimeError):
            left, until = self.store.add("left", 1), time.monotonic() + _LEAVING
            while self._keeps and left < self._place.size and time.monotonic() < until:
                time.sleep(_LONG)
                left = self.store.add("left", 0)

    def _come(self) -> None:
        until = time.monotonic() + self._patience
        while True:
            with self._asked():
                missing = [rank for rank in range(self._place.size) if not self.store.check([f"who/{rank}"])]
            if not missing:
                return
            if time.monotonic() > until:
                raise RunError(f"rank {missing[0]} of {self._place.size} did not come within {self._patience:g} s ({TIMEOUT})")
            time.sleep(_LONG)

    def _sign(self) -> None:
        with self._asked():
            self.store.set(f"sign/{self._place.rank}", str(next(self._count)))

    def _keep_signing(self) -> None:
        while not self._ended.wait(_OFTEN):
            if self._place.starter and os.getppid() != self._place.starter:
                os._exit(1)  # nobody is left who could be told
            if not self.watched:
                with contextlib.suppress(RunError):  # who needs the others will see that they are gone
                    self._sign()

    def _look(self) -> None:
        """Raise `RunError` where a rank is lost."""
        now = time.monotonic()
        if now - self._looked < _OFTEN:
            return
        self._looked = now
        with self._asked():
            signs = self.store.multi_get([f"sign/{rank}" for rank in range(self._place.size)])
        for rank, sign in enumerate(signs):
            before, since = self._seen[rank]
            if sign != before:
                self._seen[rank] = sign, now
            elif rank != self._place.rank and (now - since > self._patience or self._is_gone(rank)):
                raise RunError(self._lost(rank, now - since))

    def _who(self, rank: int) -> tuple[str, int, str]:
        with self._asked():
            host, process, machine = json.loads(self.store.get(f"who/{rank}"))
        return host, process, machine

    def _is_gone(self, rank: int) -> bool:
        """Whether the process of a rank on this machine has ended."""
        _, process, machine = self._who(rank)
        if not machine or machine != _machine():
            return False
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        except OSError:
            pass
        return False

    def _lost(self, rank: int, seconds: float) -> str:
        host, process, _ = self._who(rank)
        why = "has ended" if self._is_gone(rank) else f"gives no sign for {seconds:.0f} s ({TIMEOUT} is {self._patience:g})"
        return f"rank {rank} (process {process} on {host}) {why}; the next start goes on from the last complete round"

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        """Inside the block an error of the store says that the meeting point is gone."""
        try:
            yield
        except RuntimeError as error:
            where, keeper = f"{self._place.address}:{self._place.port}", "who started the ranks"
            keeper = keeper if self._place.hosted else "rank 0"
            raise RunError(f"rank {self._place.rank}: {keeper}, where the ranks meet ({where}), is gone") from error


def _machine() -> str:
    """What tells the process numbers of this machine from those of others; empty where the system does not say."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
