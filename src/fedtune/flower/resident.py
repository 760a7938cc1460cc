"""A process of a site that stays: it holds module and data between messages.

Flower starts a process for each message. That one hands the message to this one, which has read everything already, and ends
after `idle` seconds without a message, or with the SuperNode. No state passes from message to message but what a run in one
process has, too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from fedtune.flower.wire import receive, send

_LONGEST = 60  # characters; the name of a socket has 100 or so
_CODE = "import sys; from fedtune.flower.serve import serve; serve(*sys.argv[1:])"


@dataclass(frozen=True)
class App:
    """The file of an app.

    Args:
        folder: where it lies.
        module: its name.
    """

    folder: Path
    module: str


def asked(app: App, node: int, idle: float, about: dict[str, Any], content: RecordDict) -> RecordDict:
    """What the resident process of a node answers; it is started where there is none.

    Raises:
        RuntimeError: it ended without an answer.
    """
    with _connected(app, node, idle) as there:
        try:
            send(there, about, content)
            return receive(there)[1]
        except OSError as error:
            raise RuntimeError("the process that trains has ended without an answer") from error


@contextlib.contextmanager
def _connected(app: App, node: int, idle: float) -> Iterator[socket.socket]:
    place = _place(app, node)
    with socket.socket(socket.AF_UNIX) as there:
        with locked(place):  # of two messages at once, one starts it
            try:
                there.connect(str(place))
            except (FileNotFoundError, ConnectionRefusedError):
                _start(app, place, idle)
                there.connect(str(place))
        yield there


@contextlib.contextmanager
def locked(place: Path) -> Iterator[None]:
    """Inside the block nobody else connects to a socket, or takes it away."""
    with (place.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _place(app: App, node: int) -> Path:
    """The socket of a node, in a folder of this user alone.

    Raises:
        PermissionError: the folder is somebody else's.
    """
    temporary = tempfile.gettempdir()
    folder = Path(temporary if len(temporary) < _LONGEST else "/tmp") / f"fedtune-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone")
    name = hashlib.sha256(f"{app.folder} {app.module} {node} {os.getppid()}".encode()).hexdigest()[:16]
    return folder / name


def _start(app: App, place: Path, idle: float) -> None:
    """Start the process with a socket that listens already, so that a message can wait for it there."""
    for one in place.parent.iterdir():
        if one.is_socket() and not _listens(one):  # of a process that was killed
            one.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))
        listening.listen(16)
        words = [str(listening.fileno()), str(place), str(app.folder), app.module, str(idle), str(os.getppid())]
        subprocess.Popen([sys.executable, "-c", _CODE, *words], pass_fds=[listening.fileno()], stdin=subprocess.DEVNULL)


def _listens(place: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as there:
        there.setblocking(False)
        return there.connect_ex(str(place)) != errno.ECONNREFUSED
