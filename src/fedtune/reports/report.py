"""The report of many runs: tables, curves, and one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import UsageError
from fedtune.files import write_text
from fedtune.reports.curves import plot_grid
from fedtune.reports.page import page
from fedtune.reports.results import CELL, compare, failures, metric_names, read_runs, settings, unfinished
from fedtune.storage.summary import SHARES

if TYPE_CHECKING:
    from pandas import DataFrame, Series

FILES = ("tables.md", "tables.csv", "curves.png", "curves.svg", "report.html")


def report(folder: Path, out: Path) -> None:
    """Write tables.md, tables.csv, curves.png, curves.svg and report.html about all runs below a folder, and print where.

    Raises:
        UsageError: there is no federated run below the folder, or `out` cannot be written.
        RunError: the files of a run are damaged.
    """
    failed = failures(folder)
    try:
        rounds = read_runs(folder)
    except UsageError as error:
        if not failed:
            raise
        reasons = "; ".join(f"{run}: {reason}" for run, reason in failed.items())
        raise UsageError("runs_dir", str(folder), f"a directory with runs that did not all fail ({reasons})") from error
    if not (rounds.kind == "federated").any():
        raise UsageError("runs_dir", str(folder), "a directory with federated runs in it, not only their baselines")
    table, metric = compare(rounds), metric_names(rounds)[0]
    try:
        out.mkdir(parents=True, exist_ok=True)
        table.to_csv(out / "tables.csv", index=False)
        write_text(out / "tables.md", markdown(table, failed))
        for suffix in ("png", "svg"):
            plot_grid(rounds, out / f"curves.{suffix}", metric)
        write_text(out / "report.html", page(rounds, readable(table), failed, folder.resolve().name))
    except OSError as error:
        raise UsageError("--out", str(out), f"a directory that can be written ({error})") from error
    number = rounds[rounds.kind == "federated"].run.nunique()
    left_out = f"{unfinished(rounds)} unfinished and not in the tables, " if unfinished(rounds) else ""
    print(f"{number} runs, {left_out}{len(failed)} failed: {', '.join(str(out / name) for name in FILES)}")


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
        text += f"\n## {task}\n\n" + _lines([list(shown.columns), ["---"] * len(shown.columns), *shown.values.tolist()])
    if failed:
        text += "\n## Failed\n\n" + _lines([["run", "reason"], ["---"] * 2, *map(list, failed.items())])
    return text


def _readable(row: Series[Any], other: list[str]) -> dict[str, str]:
    cell = {name: str(row[name]) for name in [*CELL, *other]}
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
    return "".join("| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in row) + " |\n" for row in rows)
