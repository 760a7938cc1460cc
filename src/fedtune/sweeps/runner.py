"""The local runner of a sweep: a process for each run, a directory for each run, nothing done twice."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedtune.files import printable, write_text
from fedtune.storage.locks import is_locked, locked
from fedtune.sweeps.grid import Cell, Sweep
from fedtune.sweeps.stale import put_aside, stale
from fedtune.sweeps.worker import status, work

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

# each run has a process of its own, forked from a server that has done the imports
_PROCESSES = multiprocessing.get_context("forkserver")
_IMPORTS = ["fedtune.runs.flags", "transformers.models.bert.modeling_bert"]
_SHARED = "baselines"  # beside the runs: what they are compared with, for those that can share it


@dataclass
class _Running:
    cell: Cell
    process: ForkServerProcess
    line: Connection
    slot: int
    note: str = "starting"


@dataclass
class _Board:
    """The state of a sweep, as shown."""

    sweep: Sweep
    folder: Path
    workers: int
    running: list[_Running] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.found = {cell.name: _mark(self.folder / cell.name) for cell in self.sweep.cells}

    def ended(self) -> dict[str, dict[str, Any]]:
        """Directory name -> status, of the finished runs."""
        for cell in self.sweep.cells:
            if cell.name not in self.finished:
                found = status(self.folder / cell.name)
                if found.get("state") == "finished":
                    self.finished[cell.name] = found
        return self.finished

    def failed_elsewhere(self, cell: Cell) -> str | None:
        """Why a run failed in another sweep since this one began; None where it did not. No clock has a say in it."""
        folder = self.folder / cell.name
        found = status(folder)
        if found.get("state") != "failed" or _mark(folder) == self.found[cell.name]:
            return None
        return str(found.get("error"))

    def reached(self) -> bool:
        """Whether a finished run has reached the target of the sweep."""
        metric = self.sweep.metric[0]
        return any(self.sweep.is_reached(one.get("metrics", {}).get(metric)) for one in self.ended().values())

    def summary(self) -> str:
        """One line: how many are done, running, failed, what is left, the best."""
        done = self.ended()
        left = [cell for cell in self.sweep.cells if cell.name not in done and cell.name not in self.failed]
        seconds = estimate(left, self.sweep.cells, done)
        time_left = "unknown until a run is done" if seconds is None else _duration(seconds / self.workers)
        parts = [f"{len(done)} of {len(self.sweep.cells)} done", f"{len(self.running)} running", f"{len(self.failed)} failed"]
        parts.append(f"time left {time_left if left else 'none'}")
        metric, more = self.sweep.metric
        known = [(one["metrics"][metric], name) for name, one in done.items() if metric in one.get("metrics", {})]
        if known:
            value, name = (max if more else min)(known)
            title = next(cell.title for cell in self.sweep.cells if cell.name == name)
            parts.append(f"best {metric} {value:.3f} ({title})")
        return ", ".join(parts)

    def __rich__(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for column in ("running", "", ""):
            table.add_column(column)
        for one in self.running:
            table.add_row(one.cell.name, Text(one.cell.title), Text(one.note))
        return Group(Text(self.summary()), table)


def _mark(folder: Path) -> tuple[int, ...] | None:
    """What tells one status.json from the next."""
    try:
        found = (folder / "status.json").lstat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def estimate(cells: Sequence[Cell], among: Sequence[Cell], done: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Seconds that some runs will take one after the other, from the finished ones: mean of those with the same model and
    task, else of all; None before the first is finished."""

    def kind(cell: Cell) -> tuple[Any, Any]:
        return cell.arguments["model"]["name"], cell.arguments["data"]["task"]

    known = [(kind(cell), done[cell.name]["seconds"]) for cell in among if cell.name in done]
    if not known:
        return None
    total = 0.0
    for cell in cells:
        alike = [seconds for of, seconds in known if of == kind(cell)] or [seconds for _, seconds in known]
        total += sum(alike) / len(alike)
    return total


def plan(sweep: Sweep, folder: Path, workers: int) -> None:
    """Print the grid, what is done of it, and an estimate of the time for the rest."""
    console = Console(highlight=False, markup=False)
    board = _Board(sweep, folder, workers)
    done, outdated = board.ended(), stale(sweep.cells, folder)
    table = Table(title=f"{sweep.name}: {len(sweep.cells)} runs in {folder}", title_justify="left")
    for column in ("directory", *(sweep.cells[0].varied), "state", "estimate"):
        table.add_column(column.rpartition(".")[2])
    for cell in sweep.cells:
        seconds = None if cell.name in done else estimate([cell], sweep.cells, done)
        state = "stale" if cell.name in outdated else status(folder / cell.name).get("state", "to do")
        table.add_row(
            cell.name, *map(Text, map(str, cell.varied.values())), state, "" if seconds is None else _duration(seconds)
        )
    console.print(table)
    console.print(board.summary(), soft_wrap=True)


def run(sweep: Sweep, folder: Path, workers: int = 1, logger: str = "none") -> int:
    """Run what is not finished yet of a sweep; finished runs are left as they are, interrupted ones resumed.

    Args:
        folder: one directory a run is made in it, named by the hash of the run's configuration.
        workers: runs at a time; threads, and GPUs where there are several, are divided among them.
        logger: as in `FederatedLoop`.

    Returns:
        the number of runs that failed; their reasons are printed and kept in their status.json.

    Raises:
        UsageError: the folder cannot be written.
    """
    console = Console(highlight=False, markup=False)
    board = _Board(sweep, folder, workers)
    with locked(folder / _SHARED, wait=True):  # nothing but a look whether the folder can be written
        pass
    console.print(f"{sweep.name}: {len(sweep.cells)} runs in {folder.resolve()}, {workers} at a time", soft_wrap=True)
    for name, differs in stale(sweep.cells, folder).items():
        place = put_aside(folder, name)
        kept = "somebody works in it, and it stays" if place is None else f"done again; what it was is kept in {place.name}"
        console.print(f"stale: {name}: {differs}: {kept}", soft_wrap=True)
    _start_server()
    live = console.is_terminal and not console.is_jupyter
    with Live(board, console=console, transient=True, refresh_per_second=2) if live else contextlib.nullcontext():
        try:
            _all(board, console, logger)
        finally:
            for one in board.running:
                one.process.terminate()  # safe at any moment: a run goes on from its last complete round
                one.process.join()
    for name, error in board.failed.items():
        console.print(f"failed: {name}: {printable(error)}", soft_wrap=True)
    console.print(board.summary(), soft_wrap=True)
    if logger == "wandb":
        console.print(
            f"W&B wrote offline files unless there is a key; send them with: wandb sync {folder}/*/wandb/offline-run-*",
            soft_wrap=True,
        )
    return len(board.failed)


def _start_server() -> None:
    """Start the server of processes; Ctrl-C is not for it."""
    _PROCESSES.set_forkserver_preload(_IMPORTS)
    if threading.current_thread() is not threading.main_thread():
        return forkserver.ensure_running()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


def _all(board: _Board, console: Console, logger: str) -> None:
    queue = list(board.sweep.cells)
    while queue or board.running:
        if queue and board.reached():
            console.print(
                f"target {board.sweep.metric[0]} {board.sweep.target} reached: no other run is started", soft_wrap=True
            )
            queue.clear()
        for cell in list(queue):
            folder = board.folder / cell.name
            error = board.failed_elsewhere(cell)
            if cell.name in board.ended():
                queue.remove(cell)
            elif error is not None:
                queue.remove(cell)
                board.failed[cell.name] = f"{cell.title}: {error}"
            elif len(board.running) < board.workers and not is_locked(folder):
                queue.remove(cell)
                board.running.append(_start(cell, board, logger))
        lines = [one.line for one in board.running]
        ready = wait(lines, timeout=1.0)
        if queue and not lines:
            time.sleep(1.0)  # what is left runs in another sweep
        for one in [one for one in board.running if one.line in ready]:
            try:
                one.note = str(one.line.recv())
                _say(console, one, one.note)
            except EOFError:  # the process is at its end
                board.running.remove(one)
                _close(one, board, console, queue)


def _start(cell: Cell, board: _Board, logger: str) -> _Running:
    import torch

    slot = min(set(range(board.workers)) - {one.slot for one in board.running})
    environment = {"WANDB_RUN_GROUP": board.sweep.name} | os.environ  # the server may have been started with another one
    environment |= board.sweep.environment
    if torch.cuda.device_count() > 1:
        environment["CUDA_VISIBLE_DEVICES"] = gpu(slot, torch.cuda.device_count())
    threads = max(1, len(os.sched_getaffinity(0)) // board.workers)
    setting = {"environment": environment, "threads": threads, "logger": logger}
    arguments = {part: dict(values) for part, values in cell.arguments.items()}
    options = arguments["loop"]["options"]
    shared = options["baseline_dir"] or str(board.folder / _SHARED)
    arguments["loop"]["options"] = options | {"progress": False, "baseline_dir": shared}
    ours, theirs = _PROCESSES.Pipe()
    process = _PROCESSES.Process(target=work, args=(arguments, board.folder / cell.name, setting, theirs))
    process.start()
    theirs.close()
    return _Running(cell, process, ours, slot)


def gpu(slot: int, count: int) -> str:
    """The GPU of a worker, among those that this process may use."""
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else None
    return mine[slot % len(mine)] if mine else str(slot % count)


def _close(one: _Running, board: _Board, console: Console, queue: list[Cell]) -> None:
    one.process.join()
    one.line.close()
    folder = board.folder / one.cell.name
    found = status(folder)
    if one.note.startswith("left: "):  # another sweep was faster
        queue.append(one.cell)
    elif found.get("state") == "finished":
        metric = board.sweep.metric[0]
        _say(console, one, f"finished, {metric} {found['metrics'].get(metric, float('nan')):.3f}, {found['seconds']:.0f} s")
    else:
        error = found.get("error") if one.process.exitcode == 0 else None
        error = one.note.removeprefix("failed: ") if one.note.startswith("failed: ") else error
        error = error or f"its process ended with exit code {one.process.exitcode}; {folder / 'log.txt'} may say why"
        if one.process.exitcode:
            with contextlib.suppress(OSError):  # the disk may be what is wrong
                folder.mkdir(parents=True, exist_ok=True)
                write_text(folder / "status.json", json.dumps({"state": "failed", "error": error}) + "\n")
        board.failed[one.cell.name] = f"{one.cell.title}: {error}"
        _say(console, one, f"failed: {error}")


def _say(console: Console, one: _Running, text: str) -> None:
    if not console.is_terminal or text.startswith(("finished", "failed")):
        console.print(f"{one.cell.name}  {printable(one.cell.title)}  {printable(text)}", soft_wrap=True)


def _duration(seconds: float) -> str:
    """Seconds for a reader: `_duration(75)` is 1 min 15 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
