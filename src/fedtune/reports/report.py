"""The report of many runs: tables, curves, and one page."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.errors import UsageError, warn
from fedtune.files import printable, said, write_text
from fedtune.reports.cells import compare, tuned
from fedtune.reports.costs import plot_costs
from fedtune.reports.curves import plot_grid
from fedtune.reports.folders import failures, has_rounds
from fedtune.reports.page import page
from fedtune.reports.repeats import repeats, without
from fedtune.reports.results import read_runs, unfinished
from fedtune.reports.spreadsheet import read_cells, spreadsheet
from fedtune.reports.tables import markdown, tables_of

if TYPE_CHECKING:
    from pandas import DataFrame

_CUT, _FIRST = 200, 5  # characters of a name or reason, and reasons, in a line
_OWN = "report"  # the folder of the report of what is a run itself
FILES = ("tables.md", "tables.csv", "curves.png", "curves.svg", "report.html")  # of runs of one task that send equally much


def report(folder: Path, out: Path | None = None) -> Path | None:
    """Write tables.md, tables.csv, curves.png, curves.svg and report.html about all runs below a folder, and print where.

    Where clients of a task send different numbers of bytes, there is also bytes.png (and .svg). Where there are several tasks,
    each has pictures of its own, `curves-TASK.png`. A run whose files are damaged is left out, and named with the reason; so is
    one with the settings and the seed of another one, as a seed counts once. A picture that cannot be drawn is a warning. No
    file of a run is written over.

    Args:
        folder: the runs; or a tables.csv of theirs, which is printed as Markdown tables (with `out`, into its tables.md, with
            bytes.png where there is one).
        out: where the report goes; by default the folder of the runs, or "report" below it where that is a run itself.

    Returns:
        where it went; None where it was printed.

    Raises:
        UsageError: there is no federated run below the folder that can be read, or `out` cannot be written, or is a run.
    """
    folder = Path(os.path.expanduser(folder))
    if folder.suffix == ".csv":
        return _report_of_cells(folder, None if out is None else Path(os.path.expanduser(out)))
    out = _place(folder, out)
    damaged: dict[str, str] = {}
    failed = failures(folder, damaged)
    rounds = _read(folder, failed, damaged)
    failed |= {run: f"damaged and left out: {reason}" for run, reason in damaged.items()}
    twice = {run: f"the settings and the seed of {counted}" for run, counted in repeats(rounds).items()}
    rounds = without(rounds, twice)
    failed_or_left_out = failed | {run: f"left out: {reason}" for run, reason in twice.items()}
    cells = compare(rounds)
    tables = list(tables_of(cells, tuned(rounds)))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "tables.csv", spreadsheet(cells))
        write_text(out / "tables.md", markdown(tables, failed_or_left_out))
        pictures = _drawn(plot_grid, rounds, out / "curves.png") + _drawn(plot_costs, cells, out / "bytes.png")
        write_text(out / "report.html", page(rounds, tables, failed_or_left_out, folder.resolve().name))
    except (OSError, ValueError) as error:  # a name with a NUL is of the second kind
        raise UsageError("--out", str(out), f"a directory that can be written ({said(error)})") from error
    number = rounds[rounds.kind == "federated"].run.nunique()
    left_out = f"{unfinished(rounds)} unfinished and not in the tables, " if unfinished(rounds) else ""
    left_out += f"{len(damaged)} damaged and left out ({_listed(damaged)}), " if damaged else ""
    left_out += f"{len(twice)} more left out, as a seed counts once ({_listed(twice)}), " if twice else ""
    written = ", ".join(map(printable, [out / "tables.md", out / "tables.csv", *pictures, out / "report.html"]))
    print(f"{number} runs, {left_out}{len(failed) - len(damaged)} failed: {written}")
    return out


def _place(folder: Path, out: Path | None) -> Path:
    """Where the report goes, which is never where a run has its own files."""
    if out is None:
        return folder / _OWN if has_rounds(folder) else folder
    out = Path(os.path.expanduser(out))
    if has_rounds(out):
        raise UsageError("--out", str(out), "a directory that is no run's own: a report writes over no file of a run")
    return out


def _report_of_cells(file: Path, out: Path | None) -> Path | None:
    """The tables of a spreadsheet that a report wrote."""
    cells = read_cells(file)
    text = markdown(list(tables_of(cells, cells[:0])), {})
    if out is None:
        print(text, end="")
        return None
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "tables.md", text)
        pictures = _drawn(plot_costs, cells, out / "bytes.png")
    except (OSError, ValueError) as error:
        raise UsageError("--out", str(out), f"a directory that can be written ({said(error)})") from error
    print(", ".join(map(printable, [out / "tables.md", *pictures])))
    return out


def _read(folder: Path, failed: dict[str, str], damaged: dict[str, str]) -> DataFrame:
    """All rounds, or an error that says why there are none."""
    try:
        rounds = read_runs(folder, damaged)
    except UsageError as error:
        if not failed and not damaged:
            raise
        allowed = f"a directory with runs that are not all failed or damaged ({_listed(failed | damaged)})"
        raise UsageError("runs_dir", str(folder), allowed) from error
    if not (rounds.kind == "federated").any():
        named = f" (damaged: {_listed(damaged)})" if damaged else ""
        raise UsageError("runs_dir", str(folder), f"a directory with federated runs in it, not only their baselines{named}")
    return rounds


def _listed(reasons: dict[str, str]) -> str:
    """Some runs and their reasons, on a line."""
    first = [f"{printable(run, _CUT)}: {printable(reason, _CUT)}" for run, reason in list(reasons.items())[:_FIRST]]
    return "; ".join(first) + (f"; and {len(reasons) - _FIRST} more" if len(reasons) > _FIRST else "")


def _drawn(draw: Callable[..., list[Path]], table: DataFrame, path: Path) -> list[Path]:
    """The pictures; none where they cannot be drawn."""
    try:
        return draw(table, path, also=[".svg"])
    except OSError:  # of the place, not of the picture
        raise
    except Exception as error:  # whatever it is, the tables are not about it
        warn(f"{path} could not be drawn: {type(error).__name__}: {said(error)}")
        return []
