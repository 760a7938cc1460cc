"""The report of many runs: tables, curves, and one page."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import UsageError
from fedtune.files import printable, said, write_text
from fedtune.reports.curves import plot_grid
from fedtune.reports.folders import failures
from fedtune.reports.page import page
from fedtune.reports.results import CELL, compare, metric_names, read_runs, settings, shown_setting, unfinished
from fedtune.storage.summary import SHARES

if TYPE_CHECKING:
    from pandas import DataFrame, Series

_CUT, _FIRST = 200, 5  # characters of a name or reason, and reasons, in a line
_LONGEST = 1000  # characters of a cell
_MARKUP = re.compile(r"[\\`*\[\]<>|&~$#]|(?<![^\W_])_|_(?![^\W_])")  # what Markdown gives a meaning to
FILES = ("tables.md", "tables.csv", "curves.png", "curves.svg", "report.html")


def report(folder: Path, out: Path) -> None:
    """Write tables.md, tables.csv, curves.png, curves.svg and report.html about all runs below a folder, and print where.

    A run whose files are damaged is left out, and named with the reason. A picture that cannot be drawn is a warning.

    Raises:
        UsageError: there is no federated run below the folder that can be read, or `out` cannot be written.
    """
    folder, out = (Path(os.path.expanduser(one)) for one in (folder, out))
    damaged: dict[str, str] = {}
    failed = failures(folder, damaged)
    rounds = _read(folder, failed, damaged)
    failed |= {run: f"damaged and left out: {reason}" for run, reason in damaged.items()}
    table, metric = compare(rounds), metric_names(rounds)[0]
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "tables.csv", spreadsheet(table))
        write_text(out / "tables.md", markdown(table, failed))
        for suffix in ("png", "svg"):
            _draw(rounds, out / f"curves.{suffix}", metric)
        write_text(out / "report.html", page(rounds, readable(table), failed, folder.resolve().name))
    except (OSError, ValueError) as error:  # a name with a NUL is of the second kind
        raise UsageError("--out", str(out), f"a directory that can be written ({said(error)})") from error
    number = rounds[rounds.kind == "federated"].run.nunique()
    left_out = f"{unfinished(rounds)} unfinished and not in the tables, " if unfinished(rounds) else ""
    left_out += f"{len(damaged)} damaged and left out ({_listed(damaged)}), " if damaged else ""
    written = ", ".join(printable(out / name) for name in FILES)
    print(f"{number} runs, {left_out}{len(failed) - len(damaged)} failed: {written}")


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


def _draw(rounds: DataFrame, path: Path, metric: str) -> None:
    try:
        plot_grid(rounds, path, metric)
    except OSError:  # of the place, not of the picture
        raise
    except Exception as error:  # whatever it is, the tables are not about it
        warnings.warn(f"{path} could not be drawn: {type(error).__name__}: {said(error)}", stacklevel=2)


def spreadsheet(table: DataFrame) -> str:
    """The table as CSV, in which no text is a formula: one that begins as those do has a ' before it."""
    return str(table.rename(columns=_no_formula).map(_no_formula).to_csv(index=False))


def _no_formula(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def readable(table: DataFrame) -> DataFrame:
    """The table of `compare` for a reader: text in every cell, mean and range in one."""
    from pandas import DataFrame

    return DataFrame([_readable(row, settings(table)) for _, row in table.iterrows()])


def markdown(table: DataFrame, failed: dict[str, str]) -> str:
    """The tables as Markdown, one a task."""
    text = "# Results\n\nAccuracy after the last round: mean over seeds (least to greatest). Rounds to a share of the\n"
    text += "baseline's: mean over seeds, – where one did not get there. The baseline has one client, else it is centralised.\n"
    for task, rows in table.groupby("task", sort=False):
        shown = readable(rows).drop(columns="task")
        text += f"\n## {_plain(task)}\n\n" + _lines([list(shown.columns), ["---"] * len(shown.columns), *shown.values.tolist()])
    if failed:
        text += "\n## Failed\n\n" + _lines([["run", "reason"], ["---"] * 2, *map(list, failed.items())])
    return text


def _readable(row: Series[Any], other: list[str]) -> dict[str, str]:
    cell = {name: shown_setting(row[name]) for name in [*CELL, *other]}
    if "monitor" in row:
        cell |= {"monitor": str(row.monitor), "score": _number(row.score) + _spread(row, "score")}
    cell |= {
        "seeds": str(row.seeds),
        "rounds": str(row["rounds"]),
        "accuracy": _number(row.accuracy) + _spread(row, "accuracy"),
    }
    cell |= {"baseline": _number(row.baseline)}
    cell |= {f"rounds to {share} %": _number(row[f"rounds_to_{share}pct"], 1) for share in SHARES}
    known = row.client_min == row.client_min
    cell["for a client"] = f"{row.client_min:.3f} to {row.client_max:.3f}" if known else "–"
    return cell | {
        "loss, nats": _number(row.loss_nats),
        "MB sent": _number(row.megabytes, 0),
        "seconds": _number(row.seconds, 0),
    }


def _spread(row: Series[Any], name: str) -> str:
    low, high = row[f"{name}_min"], row[f"{name}_max"]
    return f" ({low:.3f} to {high:.3f})" if row.seeds > 1 and low == low else ""


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def _lines(rows: list[list[str]]) -> str:
    return "".join("| " + " | ".join(map(_plain, row)) + " |\n" for row in rows)


def _plain(cell: object) -> str:
    """A text that Markdown shows as it is."""
    return _MARKUP.sub(r"\\\g<0>", printable(cell, _LONGEST))
