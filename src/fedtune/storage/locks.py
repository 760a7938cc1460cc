"""One process at a time in a folder. The system takes the lock back when its owner dies, so no lock outlives a kill."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from fedtune.errors import UsageError, shown
from fedtune.files import content, opened, regular


class Busy(UsageError):
    """Another process works in the folder."""


@contextlib.contextmanager
def locked(folder: str | Path | None, wait: bool = False) -> Iterator[None]:
    """Inside the block no other process that asks works in the folder; within one process blocks may be nested.

    Args:
        folder: made when it does not exist; None locks nothing.
        wait: wait for another process to finish, instead of giving up.

    Raises:
        Busy: another process works there; it is named.
        UsageError: the folder cannot be written.
    """
    if folder is None:
        yield
        return
    from filelock import FileLock, Timeout

    path = Path(folder)
    owner = path / ".lock.owner"
    try:
        path.mkdir(parents=True, exist_ok=True)
        for file in (path / ".lock", owner):
            regular(file, follow=False)
        lock = FileLock(path / ".lock", is_singleton=True)
        lock.acquire(timeout=-1 if wait else 0)
        _sign(owner)
    except Timeout as error:
        who = _signed(owner)
        raise Busy("run_dir", str(folder), f"a directory that nobody else works in ({who} does)") from error
    except OSError as error:
        raise UsageError(
            "run_dir", str(folder), f"a directory that can be written ({error.strerror}: {error.filename})"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _sign(owner: Path) -> None:
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name, too
        line = f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n"
        with opened(owner, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, "wb") as stream:
            stream.write(line.encode())


def _signed(owner: Path) -> str:
    """Who has the lock, as far as that is known."""
    try:
        regular(owner, follow=False)
        line = content(owner).decode("utf-8", "replace").strip()
    except OSError:
        return "another process"
    return line if line.isprintable() and len(line) <= 200 else shown(line)


def is_locked(folder: str | Path) -> bool:
    """Whether another process works in a folder."""
    if not os.path.lexists(Path(folder) / ".lock"):
        return False
    try:
        with locked(folder):
            return False
    except Busy:
        return True
    except UsageError:
        return False
