"""What a process of a site that stays does: it answers message after message (`fedtune.flower.resident` starts it)."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
import threading
import time
from pathlib import Path

from fedtune.flower.answers import Answers
from fedtune.flower.client import made
from fedtune.flower.resident import locked
from fedtune.flower.wire import receive, send


def serve(number: str, place: str, folder: str, module: str, idle: str, parent: str) -> None:
    """Answer messages, one after the other; the arguments are what `resident` says."""
    _end_with(int(parent), Path(place))
    sys.path.insert(0, folder)
    importlib.import_module(module)
    setup, known = made(), dict[str, Answers]()
    with socket.socket(fileno=int(number)) as listening:
        listening.settimeout(float(idle))
        while True:
            try:
                there, _ = listening.accept()
            except TimeoutError:  # it ends, after those who had connected by now
                with locked(Path(place)):
                    Path(place).unlink(missing_ok=True)
                listening.setblocking(False)
                continue
            except BlockingIOError:
                break
            there.setblocking(True)
            with there, contextlib.suppress(ConnectionError):
                about, content = receive(there)
                key = repr((about["run"], about["node"]))
                if key not in known:
                    for other in known.values():
                        other.close()
                    known = {key: Answers(setup, about["run"], about["node"])}
                send(there, None, known[key].answer(about["kind"], content))


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
