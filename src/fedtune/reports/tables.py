"""The cells of a grid as tables for a reader: for each task the test part, the rounds' part, and the best learning rates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fedtune.files import printable
from fedtune.reports.cells import METRICS, REACHED
from fedtune.reports.results import TEST
from fedtune.reports.settings import label_of, rates, settings, short_names, shown_setting, that_differ
from fedtune.storage.summary import SHARES

if TYPE_CHECKING:
    from pandas import DataFrame

_LONGEST = 1000  # characters of a cell
_MARKUP = re.compile(r"[\\`*\[\]<>|&~$#]|(?<![^\W_])_|_(?![^\W_])")  # what Markdown gives a meaning to
_NONE = "–"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        label: its heading.
        name: the column of the cells that it is sorted by.
        show: a row of the cells as text.
    """

    label: str
    name: str
    show: Callable[[Row], str]


@dataclass(frozen=True)
class Table:
    """A table of one task.

    Args:
        task: its name.
        title, note: what stands above it.
        columns: those that say something in some row.
        cells: a row of `compare` for each of its rows.
    """

    task: str
    title: str
    note: str
    columns: Sequence[Column]
    cells: Sequence[Row] = field(repr=False)

    def rows(self) -> list[list[str]]:
        """Text in every cell."""
        return [[column.show(cell) for column in self.columns] for cell in self.cells]

    def markdown(self) -> str:
        """The table as Markdown shows it, without its title."""
        labels = [column.label for column in self.columns]
        return _lines([labels, ["---"] * len(labels), *self.rows()])


def tables_of(cells: DataFrame, best: DataFrame) -> Iterator[Table]:
    """The tables of each task, one task after the other.

    Args:
        cells: as from `compare`.
        best: as from `tuned`.
    """
    other = settings(cells)
    for task, found in cells.groupby("task", sort=False):
        of_task = found.to_dict("records")
        monitors = dict.fromkeys(one["monitor"] for one in of_task)
        parts = ", ".join(dict.fromkeys(str(one["part"]) for one in of_task))
        named = [*_named(other, of_task), *_monitor(monitors)]
        tested = [one for one in of_task if _known(one[f"{TEST}score"])]
        if tested:
            yield _table(task, "test part", *_tested(named, monitors, tested), tested)
        note = _range(of_task)
        note += _ROUNDS if any(_known(one["baseline"]) for one in of_task) else ""
        yield _table(task, f"{parts} part, after the last round", note, [*named, *_rounds(monitors)], of_task)
        tuned = best[best.task == task].to_dict("records")
        if tuned and that_differ(rates(other), of_task):
            columns = [*named, *_best(monitors, parts, rates(other))]
            yield _table(
                task, f"best learning rate per cell, chosen on the {parts} part", _BEST + _range(tuned), columns, tuned
            )


_ROUNDS = f" Rounds to a share of the baseline's: mean over seeds, {_NONE} where one did not get there, or the baseline is no "
_ROUNDS += "better than chance. The baseline has one client, else it is centralised."
_BEST = "Of each cell the learning rate that is best on the part named above: of the rates with the most seeds, over the seeds "
_BEST += (
    "that these have in common. Baselines alike, each with a rate of its own (Reddi et al. 2021). The other tables have every "
)
_BEST += "rate. "


def _range(cells: Sequence[Row]) -> str:
    several = any(one["seeds"] > 1 for one in cells)
    return "Mean over seeds (least to greatest)." if several else "One seed."


def _table(task: Any, title: str, note: str, columns: Sequence[Column], cells: Sequence[Row]) -> Table:
    kept = [column for column in columns if any(column.show(cell) != _NONE for cell in cells)]
    return Table(str(task), title, note, kept, cells)


def _named(other: Sequence[str], cells: Sequence[Row]) -> list[Column]:
    """The columns that name a row: what runs are called by, and the settings in which those of this task differ."""
    names = short_names(other)
    found = [_setting("model", "model"), _setting("split", "split"), _setting("clients", "clients")]
    found += [_setting(names[name], name) for name in that_differ(other, cells)]
    return [*found, Column("seeds", "seeds", lambda row: str(row["seeds"]))]


def _setting(label: str, name: str) -> Column:
    return Column(label, name, lambda row: shown_setting(row[name]))


def _monitor(monitors: Mapping[str, Any]) -> list[Column]:
    """What is monitored, where that differs."""
    return [Column("monitored", "monitor", lambda row: label_of(row["monitor"]))] if len(monitors) > 1 else []


def _measures(monitors: Mapping[str, Any], before: str) -> list[Column]:
    """The metric that is monitored, and the others, each with its range."""
    first = next(iter(monitors)) if len(monitors) == 1 else "score"
    scores = [_ranged("score" if first == "score" else label_of(first), f"{before}score")]
    return scores + [_ranged(label_of(name), f"{before}{name}") for name in METRICS if name != first]


def _tested(named: Sequence[Column], monitors: Mapping[str, Any], cells: Sequence[Row]) -> tuple[str, list[Column]]:
    """The note and the columns of the test part; what is the same in all rows stands in the note."""
    score, *others = _measures(monitors, TEST)
    error, majority = _number("standard error", f"{TEST}standard_error"), _number("majority class: accuracy", f"{TEST}majority")
    examples = _number("n", f"{TEST}examples", 0)
    note, found = f"After the last round. {_range(cells)}", [*named, score, error, *others]
    for column, said in ((examples, "n = {} examples."), (majority, "The majority class has an accuracy of {}.")):
        values = {column.show(cell) for cell in cells}
        if len(values) > 1:
            found.append(column)
        elif values != {_NONE}:
            note += " " + said.format(*values)
    if any(error.show(cell) != _NONE for cell in cells):
        note += f" Standard error: of the {score.label} of one run, from n."
    of_local, of_pooled = (_number(f"{name}: {score.label}", f"{TEST}{name}") for name in ("local", "centralised"))
    return note, [*found, replace(of_local, label=f"each client alone: {score.label}"), of_pooled]


def _rounds(monitors: Mapping[str, Any]) -> list[Column]:
    score, *others = _measures(monitors, "")
    found = [_number("rounds", "rounds", 0), score, *others, _number(f"baseline: {score.label}", "baseline")]
    found += [_number(f"rounds to {share} %", name, 1) for share, name in zip(SHARES, REACHED, strict=True)]
    found += [Column("accuracy for a client", "client_min", _of_clients)]
    found += [Column("sent", "megabytes", lambda row: size(1e6 * row["megabytes"])), _number("seconds", "seconds", 0)]
    return found


def _best(monitors: Mapping[str, Any], parts: str, chosen: Sequence[str]) -> list[Column]:
    score, tested = _measures(monitors, "")[0], _measures(monitors, TEST)[0]
    found = [_ranged(f"{score.label}, {parts} part", "score"), _ranged(f"{tested.label}, test part", f"{TEST}score")]
    found += [_number("standard error", f"{TEST}standard_error")]
    several = f" ({', '.join(short_names(chosen).values())})" if len(chosen) > 1 else ""
    found += [_number(f"baseline, {parts} part", "baseline"), _setting(f"its rate{several}", "baseline_rate")]
    found += [_number("centralised, test part", f"{TEST}centralised"), _setting(f"its rate{several}", "centralised_rate")]
    found += [_number("each client alone, test part", f"{TEST}local")]
    return found + [_number(f"rounds to {share} %", name, 1) for share, name in zip(SHARES, REACHED, strict=True)]


def _ranged(label: str, name: str) -> Column:
    def show(row: Row) -> str:
        mean, low, high = row.get(name), row.get(f"{name}_min"), row.get(f"{name}_max")
        ranged = row["seeds"] > 1 and _known(low)
        return _digits(mean) + (f" ({_digits(low)} to {_digits(high)})" if ranged else "")

    return Column(label, name, show)


def _number(label: str, name: str, digits: int = 3) -> Column:
    return Column(label, name, lambda row: _digits(row.get(name), digits))


def _of_clients(row: Row) -> str:
    low, high = row["client_min"], row["client_max"]
    return f"{_digits(low)} to {_digits(high)}" if _known(low) else _NONE


def _digits(value: float | None, digits: int = 3) -> str:
    return f"{value:,.{digits}f}" if value is not None and _known(value) else _NONE


def _known(value: Any) -> bool:
    return value is not None and bool(value == value)


def size(number: float) -> str:
    """A number of bytes with the unit that suits it, three digits.

    >>> size(1.84e6), size(999.6e6), size(2_366_670_720), size(3.2e13)
    ('1.84 MB', '1.00 GB', '2.37 GB', '32.0 TB')
    """
    if not _known(number):
        return _NONE
    value, units = float(f"{number:.3g}"), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{0 if units[0] == 'B' else digits}f} {units[0]}"


def markdown(tables: Sequence[Table], failed: Mapping[str, str]) -> str:
    """The tables as Markdown, those of a task below its name, and what failed, or was left out, with the reason."""
    text, task = "# Results\n", None
    for table in tables:
        if table.task != task:
            task = table.task
            text += f"\n## {as_text(task)}\n"
        text += f"\n### {as_text(table.title[:1].upper() + table.title[1:])}\n\n{as_text(table.note)}\n\n{table.markdown()}"
    if failed:
        text += "\n## Failed, or left out\n\n" + _lines([["run", "reason"], ["---"] * 2, *map(list, failed.items())])
    return text


def _lines(rows: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(map(as_text, row)) + " |\n" for row in rows)


def as_text(cell: object) -> str:
    """A text that Markdown shows as it is."""
    return _MARKUP.sub(r"\\\g<0>", printable(cell, _LONGEST))
