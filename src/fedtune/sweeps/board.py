"""The state of a sweep: what is done, running, failed and left, and how long that will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedtune.runs.forecast import duration
from fedtune.sweeps.cell import Cell
from fedtune.sweeps.grid import Sweep
from fedtune.sweeps.worker import status

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

    from fedtune.runs.launcher import MeetingPoint


@dataclass
class Running:
    """A run in a process, and what it said last; where it has others, these, and where they meet."""

    cell: Cell
    process: ForkServerProcess
    line: Connection
    slot: int
    note: str = "starting"
    others: list[tuple[ForkServerProcess, Connection]] = field(default_factory=list)
    point: MeetingPoint | None = None

    def terminate(self) -> None:
        """End it, which is safe at any moment: a run goes on from its last complete round."""
        for process in (self.process, *(other for other, _ in self.others)):
            process.terminate()
            process.join()


@dataclass
class Board:
    """The state of a sweep, as shown."""

    sweep: Sweep
    folder: Path
    workers: int
    running: list[Running] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    grows: bool = False

    def __post_init__(self) -> None:
        search = self.sweep.search
        self.cells, self.grows = list(self.sweep.cells) if search is None else search.proposed(self.folder), search is not None
        self.found = {cell.name: mark(self.folder / cell.name) for cell in self.cells}

    def grow(self) -> list[Cell]:
        """Cells that are proposed beyond those that are known; none, and from then on none, where there are enough."""
        more = self.sweep.search.grow(self.folder, self.cells) if self.grows and self.sweep.search else []
        self.cells += more
        self.grows = bool(more)
        return more

    @property
    def total(self) -> int:
        """Cells in all, those that are not proposed yet among them."""
        return max(self.sweep.search.most, len(self.cells)) if self.grows and self.sweep.search else len(self.cells)

    def ended(self) -> dict[str, dict[str, Any]]:
        """Directory name -> status, of the finished runs."""
        for cell in self.cells:
            if cell.name not in self.finished:
                found = status(self.folder / cell.name)
                if found.get("state") == "finished":
                    self.finished[cell.name] = found
        return self.finished

    def failed_elsewhere(self, cell: Cell) -> str | None:
        """Why a run failed in another sweep since this one began; None where it did not. No clock has a say in it."""
        folder = self.folder / cell.name
        found = status(folder)
        if found.get("state") != "failed" or mark(folder) == self.found.get(cell.name):
            return None
        return str(found.get("error"))

    def reached(self) -> bool:
        """Whether a finished run has reached the target of the sweep."""
        metric = self.sweep.metric[0]
        return any(self.sweep.is_reached(one.get("metrics", {}).get(metric)) for one in self.ended().values())

    def summary(self) -> str:
        """One line: how many are done, running, failed, what is left, the best."""
        done = self.ended()
        left = [cell for cell in self.cells if cell.name not in done and cell.name not in self.failed]
        if self.sweep.search is not None:  # what is not proposed yet is like the others
            left += self.sweep.search.probes[:1] * (self.total - len(self.cells))
        seconds = estimate(left, self.cells, done)
        time_left = "unknown until a run is done" if seconds is None else duration(seconds / self.workers)
        parts = [f"{len(done)} of {self.total} done", f"{len(self.running)} running", f"{len(self.failed)} failed"]
        parts.append(f"time left {time_left if left else 'none'}")
        metric, more = self.sweep.metric
        known = [(one["metrics"][metric], name) for name, one in done.items() if metric in one.get("metrics", {})]
        if known:
            value, name = (max if more else min)(known)
            title = next(cell.title for cell in self.cells if cell.name == name)
            parts.append(f"best {metric} {value:.3f} ({title})")
        return ", ".join(parts)

    def __rich__(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for column in ("running", "", ""):
            table.add_column(column)
        for one in self.running:
            table.add_row(one.cell.name, Text(one.cell.title), Text(one.note))
        return Group(Text(self.summary()), table)


def mark(folder: Path) -> tuple[int, ...] | None:
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
