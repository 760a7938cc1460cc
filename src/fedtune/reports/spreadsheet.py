"""The cells of a grid as a CSV file, and back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import RunError, UsageError, shown
from fedtune.files import content, said
from fedtune.reports.best import BEST, marked
from fedtune.reports.cells import METRICS, REACHED
from fedtune.reports.results import TEST
from fedtune.reports.settings import CELL, order, settings, told_apart, written
from fedtune.storage.summary import MODES

if TYPE_CHECKING:
    from pandas import DataFrame, Series

_RANGES = ("", "_min", "_max")
_NUMBERS = [BEST, "baseline", "centralised", "chance", *REACHED, "client_min", "client_mean", "client_max"]
_NUMBERS += ["bytes_up", "bytes_down", "megabytes", "seconds"]
_NUMBERS += [f"{before}{name}{end}" for before in ("", TEST) for name in ("score", *METRICS) for end in _RANGES]
_NUMBERS += [TEST + name for name in ("examples", "standard_error", "majority", "local", "centralised")]
_DEFAULTS = {"monitor": "accuracy", "mode": "max", "part": "validation", "seeds": "1", "rounds": math.nan}
_WHOLE, _MOST = ("clients", "seeds", "rounds"), 2**53  # where fractions end
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")  # as pandas writes one: 007 is a name


def spreadsheet(cells: DataFrame) -> str:
    """The table of `compare` as CSV, without columns that say nothing, and in which no text is a formula: one that begins as
    those do has a ' before it."""
    silent = [name for name in _NUMBERS if name in cells and name not in ("accuracy", "loss_nats") and cells[name].isna().all()]
    return str(cells.drop(columns=silent).rename(columns=_no_formula).map(_no_formula).to_csv(index=False))


def _no_formula(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and _is_formula(value) else value


def _as_it_was(value: Any) -> Any:
    """A text without the ' that `_no_formula` put before it."""
    return value[1:] if isinstance(value, str) and value.startswith("'") and _is_formula(value[1:]) else value


def _is_formula(text: str) -> bool:
    """Whether a program for spreadsheets would compute a text; or one without the ' before it, so that each comes back."""
    if not text.lstrip("'").startswith(_FORMULA):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False


def read_cells(file: Path) -> DataFrame:
    """The table that `spreadsheet` wrote; columns that it left out are unknown, and a score is that of the metric that is
    monitored. Names are texts, whatever they look like.

    Raises:
        UsageError: there is no such file, or it is no such table.
    """
    from io import BytesIO

    from pandas import read_csv

    try:
        found = read_csv(BytesIO(content(file)), dtype=str, keep_default_na=False, na_values=[""])
    except (OSError, ValueError, RunError) as error:
        raise UsageError("runs_dir", str(file), f"a tables.csv that a report wrote ({said(error)})") from error
    cells = found.rename(columns=_as_it_was).map(_as_it_was)
    missing = [name for name in CELL if name not in cells]
    if missing or not len(cells):
        raise UsageError("runs_dir", str(file), f"a tables.csv that a report wrote (it has no {', '.join(missing) or 'row'})")
    for name, value in _DEFAULTS.items():
        cells[name] = cells[name].astype(object).where(cells[name].notna(), value) if name in cells else value
    other = settings(cells)
    try:
        cells = cells.assign(**{name: _setting(cells[name]) for name in other}, **_numbers(cells))
    except ValueError as error:
        raise UsageError("runs_dir", str(file), f"a tables.csv that a report wrote ({error})") from error
    for before in ("", TEST):
        for end in _RANGES:
            if f"{before}score{end}" not in cells:
                cells[f"{before}score{end}"] = _monitored(cells, before, end)
    cells = cells.assign(**{name: math.nan for name in _NUMBERS if name not in cells})
    return _with_best(cells, other).sort_values([*CELL, *other], ignore_index=True, key=lambda column: column.map(order))


def _numbers(cells: DataFrame) -> dict[str, Any]:
    """The columns of numbers, as such. Raises `ValueError` where one is something else, or a mode is none."""
    from pandas import isna, to_numeric

    wrong = next((mode for mode in cells["mode"] if mode not in MODES), None)
    if wrong is not None:
        raise ValueError(f"its mode is {shown(wrong)}, where {' or '.join(MODES)} belongs")
    found = {}
    for name in (*_WHOLE, *(name for name in _NUMBERS if name in cells)):
        found[name] = values = to_numeric(cells[name], errors="coerce").astype(float)
        is_wrong = values.isna() & cells[name].notna()
        if name in _WHOLE:  # how many rounds there were need not be known
            is_wrong |= (values % 1 != 0) & values.notna() | (values < (name != "rounds")) | (values > _MOST)
            is_wrong |= values.isna() & (name != "rounds")
        if is_wrong.any():
            allowed = "a whole number" if name in _WHOLE else "a number"
            first = cells[name][is_wrong].iloc[0]
            came = "" if isna(first) else first
            raise ValueError(f"its {name} is {shown(came)}, where {allowed} belongs")
        found[name] = values.astype(int) if name in _WHOLE and values.notna().all() else values
    return found


def _setting(column: Series[str]) -> Series[Any]:
    """A column of a setting, numbers as such; what is 1 and what is 1.0 stay two."""
    from pandas import Series

    known = [json.loads(text) if isinstance(text, str) and _NUMBER.fullmatch(text) else text for text in column]
    values = told_apart(value for value in known if value == value)
    found = [values[written(value)] if value == value else value for value in known]
    return Series(found, index=column.index, dtype=object).infer_objects()  # as numbers 1 and 1.0 would be one


def _monitored(cells: DataFrame, before: str, end: str) -> list[float]:
    """For each row the column of the metric that is monitored, where there is one."""
    return [row.get(f"{before}{row['monitor']}{end}", math.nan) for row in cells.to_dict("records")]


def _with_best(cells: DataFrame, other: Sequence[str]) -> DataFrame:
    """The cells with their best learning rates; where a file does not say which, by what it says of their seeds: how many."""
    if cells[BEST].notna().any():
        return cells
    runs = cells.loc[cells.index.repeat(cells.seeds.rank(method="dense").astype(int))]  # which have more is all that counts
    runs = runs.assign(seed=runs.groupby(level=0).cumcount(), other_seeds=None)
    return cells.assign(**{BEST: marked(runs.reset_index(names="cell"), other).groupby("cell")[BEST].max()})
