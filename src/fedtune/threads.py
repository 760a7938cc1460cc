"""Threads on a machine that others use, too, and signals, which interrupt the main one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

_SPINS = "1000"  # rounds that a thread waits actively for the others; libgomp's default is billions
_CHOSEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def spin_less_when_busy() -> None:
    """Let torch's threads wait for each other without using their cores up, where other processes want these cores now.

    Beside one busy process a step with a thread a core takes many times as long otherwise: a thread that waits actively keeps
    the core from the one that it waits for. On a machine that nobody else uses the setting costs time, so it is made only where
    the machine is busy. It has to be made before torch is imported, and is left alone where the user has made it.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in _CHOSEN) and is_busy():
        os.environ["GOMP_SPINCOUNT"] = _SPINS


def is_busy(looks: int = 5, apart: float = 0.002) -> bool:
    """Whether others run now: in most of some looks, milliseconds apart. False where the system does not say."""
    found = []
    for look in range(looks):
        if look:
            time.sleep(apart)
        try:
            running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
        except (OSError, ValueError, IndexError):
            return False
        found.append(running > 1)  # one of them is this process
    return 2 * sum(found) > looks


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside the block, a short one, Ctrl-C and other signals that a handler in Python answers wait for its end.

    Code in C may swallow the exception of a handler and raise one of its own, which is taken for an error of what it does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    held = {number: handler for number, handler in before.items() if callable(handler)}
    for number in held:
        signal.signal(number, lambda number, _: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for came in waiting:
            signal.raise_signal(came)
