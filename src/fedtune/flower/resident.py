"""A process of a site that stays: it holds module and data between messages.

Flower starts a process for each message. That one hands the message to this one, which has read everything already, and ends
after `idle` seconds without a message, or with the SuperNode. No state passes from message to message but what a run in one
process has, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import RecordDict

from fedtune.flower.wire import receive, send

_CODE = "import sys; from fedtune.flower.resident import serve; serve(*sys.argv[1:])"


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
        with Path(f"{place}.lock").open("w") as lock:  # of two messages at once, one starts it
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                there.connect(str(place))
            except (FileNotFoundError, ConnectionRefusedError):
                _start(app, place, idle)
                there.connect(str(place))
        yield there


def _place(app: App, node: int) -> Path:
    """The socket of a node, in a folder of this user alone.

    Raises:
        PermissionError: the folder is somebody else's.
    """
    folder = Path(tempfile.gettempdir()) / f"fedtune-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone")
    name = hashlib.sha256(f"{app.folder} {app.module} {node} {os.getppid()}".encode()).hexdigest()[:16]
    return folder / name


def _start(app: App, place: Path, idle: float) -> None:
    """Start the process with a socket that listens already, so that a message can wait for it there."""
    place.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))
        listening.listen(16)
        words = [str(listening.fileno()), str(place), str(app.folder), app.module, str(idle), str(os.getppid())]
        subprocess.Popen([sys.executable, "-c", _CODE, *words], pass_fds=[listening.fileno()], stdin=subprocess.DEVNULL)


def serve(number: str, place: str, folder: str, module: str, idle: str, parent: str) -> None:
    """Answer messages, one after the other; the arguments are what `_start` says."""
    _end_with(int(parent), Path(place))
    sys.path.insert(0, folder)
    importlib.import_module(module)
    from fedtune.flower.answers import Answers
    from fedtune.flower.client import made

    setup, known = made(), dict[str, Answers]()
    with socket.socket(fileno=int(number)) as listening:
        listening.settimeout(float(idle))
        while True:
            try:
                there, _ = listening.accept()
            except TimeoutError:
                break
            with there, contextlib.suppress(ConnectionError):
                about, content = receive(there)
                key = repr((about["run"], about["node"]))
                if key not in known:
                    for other in known.values():
                        other.close()
                    known = {key: Answers(setup, about["run"], about["node"])}
                send(there, None, known[key].answer(about["kind"], content))
    Path(place).unlink(missing_ok=True)


def _end_with(parent: int, place: Path) -> None:
    """End this process, wherever it is, when the one that started it has gone."""

    def watch() -> None:
        while True:
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                place.unlink(missing_ok=True)
                os._exit(1)
            time.sleep(1.0)

    threading.Thread(target=watch, daemon=True).start()
