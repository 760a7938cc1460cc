"""The local runner of a sweep: a process for each run, a directory for each run, nothing done twice."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedtune.files import printable, write_text
from fedtune.runs.displays import new_console
from fedtune.runs.forecast import duration
from fedtune.runs.launcher import MeetingPoint, threads_of
from fedtune.storage.locks import is_locked, locked
from fedtune.sweeps.board import Board, Running, estimate
from fedtune.sweeps.cell import Cell
from fedtune.sweeps.grid import Sweep
from fedtune.sweeps.hyperband import Stopping
from fedtune.sweeps.stale import put_aside, stale
from fedtune.sweeps.worker import status, work

# each run has a process of its own, forked from a server that has done the imports
_PROCESSES = multiprocessing.get_context("forkserver")
_IMPORTS = ["fedtune.runs.flags", "transformers.models.bert.modeling_bert"]
_PATIENCE = 10.0  # seconds that the others of a run have to end after its first process
_SHARED = "baselines"  # beside the runs: what they are compared with, for those that can share it


def plan(sweep: Sweep, folder: Path, workers: int) -> None:
    """Print the grid, what is done of it, and an estimate of the time for the rest; for bayes, what is searched, and what is
    proposed by now.

    Raises:
        RunError: what was proposed cannot be read.
    """
    console = new_console(highlight=False, markup=False)
    board = Board(sweep, folder, workers)
    done, outdated = board.ended(), stale(board.cells, folder)
    if sweep.search is not None:
        axes = Table(title=f"{sweep.name}: at most {sweep.search.most} runs, proposed one after another", title_justify="left")
        for column in ("parameter", "searched"):
            axes.add_column(column)
        for name, one in sweep.search.axes.items():
            axes.add_row(Text(name), Text(one.text))
        console.print(axes)
    if board.cells:
        table = Table(title=f"{sweep.name}: {len(board.cells)} runs in {folder}", title_justify="left")
        to_do = [cell for cell in board.cells if cell.name not in done]
        # from the runs that are done: before the first of them nothing is known of the others
        estimates = {cell.name: duration(estimate([cell], board.cells, done) or 0) for cell in to_do if done}
        for column in ("directory", *(board.cells[0].varied), "state", *["estimate"] * bool(estimates)):
            table.add_column(column.rpartition(".")[2])
        for cell in board.cells:
            state = "stale" if cell.name in outdated else status(folder / cell.name).get("state", "to do")
            values = map(Text, map(str, cell.varied.values()))
            table.add_row(cell.name, *values, state, *[estimates.get(cell.name, "")] * bool(estimates))
        console.print(table)
    console.print(board.summary(), soft_wrap=True)


def run(sweep: Sweep, folder: Path, workers: int = 1, logger: str = "none") -> int:
    """Run what is not finished yet of a sweep; finished runs are left as they are, interrupted ones resumed.

    Args:
        folder: one directory a run is made in it, named by the hash of the run's configuration.
        workers: runs at a time, each with `sweep.workers_per_run` processes; threads,
            and GPUs where there are several, are divided among them.
        logger: as in `FederatedLoop`.

    Returns:
        the number of runs that failed; their reasons are printed and kept in their status.json.

    Raises:
        UsageError: the folder cannot be written.
        RunError: what was proposed cannot be read.
    """
    console = new_console(highlight=False, markup=False)
    board = Board(sweep, folder, workers)
    with locked(folder / _SHARED, wait=True):  # nothing but a look whether the folder can be written
        pass
    console.print(f"{sweep.name}: {board.total} runs in {folder.resolve()}, {workers} at a time", soft_wrap=True)
    _renew(board, console)
    _start_server()
    live = console.is_terminal and not console.is_jupyter
    with Live(board, console=console, transient=True, refresh_per_second=2) if live else contextlib.nullcontext():
        try:
            _all(board, console, logger)
        finally:
            for one in board.running:
                one.terminate()
    for name, error in board.failed.items():
        console.print(f"failed: {name}: {printable(error)}", soft_wrap=True)
    console.print(board.summary(), soft_wrap=True)
    if logger == "wandb":
        console.print(
            f"W&B wrote offline files unless there is a key; send them with: wandb sync {folder}/*/wandb/offline-run-*",
            soft_wrap=True,
        )
    return len(board.failed)


def _renew(board: Board, console: Console) -> None:
    """Put runs aside whose texts or model have changed."""
    for name, differs in stale(board.cells, board.folder).items():
        place = put_aside(board.folder, name)
        kept = "somebody works in it, and it stays" if place is None else f"done again; what it was is kept in {place.name}"
        console.print(f"stale: {name}: {differs}: {kept}", soft_wrap=True)


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


def _all(board: Board, console: Console, logger: str) -> None:
    queue = list(board.cells)
    while queue or board.running or board.grows:
        if (queue or board.grows) and board.reached():
            console.print(
                f"target {board.sweep.metric[0]} {board.sweep.target} reached: no other run is started", soft_wrap=True
            )
            queue.clear()
            board.grows = False
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
        if len(board.running) < board.workers and (more := board.grow()):
            queue += more
            continue
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


def _start(cell: Cell, board: Board, logger: str) -> Running:
    slot, each = min(set(range(board.workers)) - {one.slot for one in board.running}), board.sweep.workers_per_run
    point = MeetingPoint(each) if each > 1 else None
    arguments = {part: dict(values) for part, values in cell.arguments.items()}
    options = arguments["loop"]["options"]
    shared = options["baseline_dir"] or str(board.folder / _SHARED)
    arguments["loop"]["options"] = options | {"progress": False, "baseline_dir": shared}
    started = []
    for rank in range(each):
        ours, theirs = _PROCESSES.Pipe()
        setting: dict[str, Any] = {
            "environment": _environment(board, slot * each + rank),
            "logger": logger,
            "callbacks": _callbacks(board),
        }
        setting |= {"threads": threads_of(board.workers * each), "point": point.environment(rank) if point else {}}
        process = _PROCESSES.Process(target=work, args=(arguments, board.folder / cell.name, setting, theirs))
        process.start()
        theirs.close()
        started.append((process, ours))
    return Running(cell, *started[0], slot, others=started[1:], point=point)


def _environment(board: Board, place: int) -> dict[str, str]:
    """Of a process, which has the GPU of its place."""
    import torch

    found = {"WANDB_RUN_GROUP": board.sweep.name} | os.environ  # the server may have been started with another one
    found |= board.sweep.environment
    if torch.cuda.device_count() > 1:
        found["CUDA_VISIBLE_DEVICES"] = gpu(place, torch.cuda.device_count())
    return found


def _callbacks(board: Board) -> list[Stopping]:
    """What watches each run."""
    sweep = board.sweep
    if sweep.early is None:
        return []
    journal = None if sweep.search is None else sweep.search.journal(board.folder)
    return [Stopping(sweep.early, board.folder, [cell.name for cell in board.cells], journal)]


def gpu(slot: int, count: int) -> str:
    """The GPU of a worker, among those that this process may use."""
    mine = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else None
    return mine[slot % len(mine)] if mine else str(slot % count)


def _close(one: Running, board: Board, console: Console, queue: list[Cell]) -> None:
    one.process.join()
    one.line.close()
    until = time.monotonic() + _PATIENCE
    for process, line in one.others:
        process.join(max(0.0, until - time.monotonic()))
        process.terminate()
        process.join()
        line.close()
    folder = board.folder / one.cell.name
    found = status(folder)
    if one.note.startswith("left: "):  # another sweep was faster
        queue.append(one.cell)
    elif found.get("state") == "finished":
        metric = board.sweep.metric[0]
        text = f"finished, {metric} {found['metrics'].get(metric, float('nan')):.3f}, {found['seconds']:.0f} s"
        _say(console, one, text + (f", stopped by {found['stopped']}" if "stopped" in found else ""))
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


def _say(console: Console, one: Running, text: str) -> None:
    if not console.is_terminal or text.startswith(("finished", "failed")):
        console.print(f"{one.cell.name}  {printable(one.cell.title)}  {printable(text)}", soft_wrap=True)
