"""The cells of a grid as a CSV file, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import RunError, UsageError
from fedtune.files import content, said
from fedtune.reports.cells import METRICS, REACHED
from fedtune.reports.results import TEST
from fedtune.reports.settings import CELL, order, settings

if TYPE_CHECKING:
    from pandas import DataFrame

_RANGES = ("", "_min", "_max")
_NUMBERS = ["baseline", "centralised", "chance", *REACHED, "client_min", "client_mean", "client_max"]
_NUMBERS += ["bytes_up", "bytes_down", "megabytes", "seconds"]
_NUMBERS += [f"{before}{name}{end}" for before in ("", TEST) for name in ("score", *METRICS) for end in _RANGES]
_NUMBERS += [TEST + name for name in ("examples", "standard_error", "majority", "local", "centralised")]
_DEFAULTS = {"monitor": "accuracy", "mode": "max", "part": "validation", "seeds": 1, "rounds": float("nan")}


def spreadsheet(cells: DataFrame) -> str:
    """The table of `compare` as CSV, without columns that say nothing, and in which no text is a formula: one that begins as
    those do has a ' before it."""
    silent = [name for name in _NUMBERS if name in cells and name not in ("accuracy", "loss_nats") and cells[name].isna().all()]
    return str(cells.drop(columns=silent).rename(columns=_no_formula).map(_no_formula).to_csv(index=False))


def _no_formula(value: Any) -> Any:
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def _monitored(cells: DataFrame, before: str, end: str) -> list[float]:
    """For each row the column of the metric that is monitored, where there is one."""
    return [row.get(f"{before}{row['monitor']}{end}", float("nan")) for row in cells.to_dict("records")]


def read_cells(file: Path) -> DataFrame:
    """The table that `spreadsheet` wrote; columns that it left out are unknown, and a score is that of
    the metric that is monitored.

    Raises:
        UsageError: there is no such file, or it is no such table.
    """
    from io import BytesIO

    from pandas import read_csv, to_numeric

    try:
        cells = read_csv(BytesIO(content(file)))
    except (OSError, ValueError, RunError) as error:
        raise UsageError("runs_dir", str(file), f"a tables.csv that a report wrote ({said(error)})") from error
    missing = [name for name in CELL if name not in cells]
    if missing or not len(cells):
        raise UsageError("runs_dir", str(file), f"a tables.csv that a report wrote (it has no {', '.join(missing) or 'row'})")
    for name, value in _DEFAULTS.items():
        cells[name] = cells[name].fillna(value) if name in cells else value
    for before in ("", TEST):
        for end in _RANGES:
            if f"{before}score{end}" not in cells:
                cells[f"{before}score{end}"] = _monitored(cells, before, end)
    wrong = [
        name
        for name in _NUMBERS
        if name in cells and to_numeric(cells[name], errors="coerce").isna().sum() > cells[name].isna().sum()
    ]
    if wrong:
        raise UsageError("runs_dir", str(file), f"a tables.csv that a report wrote (its {wrong[0]} is no number)")
    lacking = {name: float("nan") for name in _NUMBERS if name not in cells}
    keys = [*CELL, *settings(cells)]
    return cells.assign(**lacking).sort_values(keys, ignore_index=True, key=lambda column: column.map(order))
