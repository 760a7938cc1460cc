"""`fedtune run --workers N`: the command in N processes on this machine, as torchrun starts them, and as one command.

Ctrl-C goes to all of them, one of them says what there is to say, and the command ends with the code of the first that ended
badly. A process that is killed ends the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta

from torch.distributed import PrefixStore, TCPStore

from fedtune.errors import RunError, UsageError
from fedtune.runtimes.environment import STARTER

_ADDRESS = "127.0.0.1"
_PATIENCE = 30.0  # seconds that the others have to end by themselves
_BADLY = 2


class MeetingPoint:
    """Where the processes of one run on this machine meet; it ends with its owner."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._store = TCPStore(_ADDRESS, 0, None, True, timeout=timedelta(minutes=5), wait_for_workers=False)

    def environment(self, rank: int) -> dict[str, str]:
        """The variables of one process."""
        found: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self._size, "MASTER_PORT": self._store.port}
        found |= {"MASTER_ADDR": _ADDRESS, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        if sys.platform == "linux":
            found["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
        return {name: str(value) for name, value in found.items()}

    def speak(self) -> bool:
        """Whether none of the processes has said what went wrong; from now on none does."""
        store = PrefixStore("fedtune/0", self._store)
        return all(store.compare_set(f"said/{run}", "", json.dumps("starter")) == b'"starter"' for run in (0, 1))


def threads_of(workers: int) -> int:
    """Threads of each of so many processes that share this machine; `OMP_NUM_THREADS`, where it is set, is kept."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else max(1, len(os.sched_getaffinity(0)) // workers)


def launch(arguments: Sequence[str], workers: int, runtime: str = "auto") -> None:
    """Run `fedtune` with some arguments in so many processes.

    Raises:
        UsageError: a runtime of one process.
        RunError: one of them was killed, and nobody has said so.
        SystemExit: with the code of the first that ended badly, after it has said why.
    """
    if runtime == "serial":
        raise UsageError("--loop.runtime", runtime, "auto or torchrun, with --workers")
    point = MeetingPoint(workers)
    shared = {"OMP_NUM_THREADS": str(threads_of(workers))} | dict(os.environ) | {STARTER: str(os.getpid())}
    command = [sys.executable, "-m", "fedtune", *arguments]
    processes = [
        subprocess.Popen(command, env=shared | point.environment(rank), start_new_session=True) for rank in range(workers)
    ]
    with _passed_on(processes):
        rank = _first_to_fail(processes)
        if rank is None:
            return
        code = processes[rank].returncode
        speaks = code < 0 and point.speak()
        _end(processes, at_once=code < 0)
    if speaks:
        name = signal.Signals(-code).name
        raise RunError(f"rank {rank} was ended by {name}; the next start goes on from the last complete round")
    raise SystemExit(code if code > 0 else _BADLY)


def _first_to_fail(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """The number of the process that first ends badly; None where all end well."""
    while True:
        codes = [process.poll() for process in processes]
        bad = [rank for rank, code in enumerate(codes) if code]
        if bad:
            return min(bad, key=lambda rank: codes[rank] or 0)  # killed before ended
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _end(processes: Sequence[subprocess.Popen[bytes]], at_once: bool) -> None:
    """Wait for all; who takes too long is asked to end, then made to. A run can be ended at any moment."""
    for sent in (signal.SIGTERM, signal.SIGKILL) if at_once else (None, signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if sent is not None and process.poll() is None:
                process.send_signal(sent)
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until and any(process.poll() is None for process in processes):
            time.sleep(0.05)


@contextlib.contextmanager
def _passed_on(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Inside the block Ctrl-C, and a request to end, are for the processes; none of them outlives it."""

    def send(number: int, _: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, send) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
