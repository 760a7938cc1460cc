"""report.html: one page that needs no network, with curves to hover and tables to sort, both to filter."""

from __future__ import annotations

import base64
import gzip
import html
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template
from typing import TYPE_CHECKING, Any

from fedtune.files import printable
from fedtune.reports.layout import layout_of
from fedtune.reports.results import column_of, metric_names, unfinished
from fedtune.reports.settings import CELL, label_of, order, rates, settings, short_names, shown_setting, that_differ
from fedtune.reports.tables import Table
from fedtune.runs.figures import PALETTE

if TYPE_CHECKING:
    from pandas import DataFrame

_MOST = 4_000_000  # numbers in curves; a page with more of them would not open
_METRICS = 24  # at most, in its list
_LONGEST = 1000  # characters of a name or a reason
_DASHES = ("solid", "dash", "dot", "dashdot", "longdashdot", "longdash", "3px,5px")


def page(rounds: DataFrame, tables: Sequence[Table], failed: Mapping[str, str], title: str) -> str:
    """The page.

    Args:
        rounds: as from `read_runs`.
        tables: of each task.
        failed: directory -> reason, also of what was left out.
        title: what the runs are.
    """
    metrics = [*metric_names(rounds), *(name for name in ("update_cosine", "mean_update_norm") if rounds[name].notna().any())]
    metrics = metrics[:_METRICS]
    drawn = _first(rounds, len(metrics))
    few = "" if len(drawn) == rounds.run.nunique() else f" Curves of the first {len(drawn)} only."
    runs, longest = rounds[rounds.kind == "federated"].run.nunique(), int(rounds["round"].max())
    about = f"{runs} runs, {longest} rounds at most, {unfinished(rounds)} unfinished, {len(failed)} failed or left out.{few}"
    shown = rounds[rounds.run.isin(drawn)]
    files = {name: (resources.files("fedtune.reports") / f"page.{name}").read_text("utf-8") for name in ("html", "js")}
    return Template(files["html"]).substitute(
        title=_text(title),
        summary=about,
        failed=_list(failed),
        data=json.dumps(_data(rounds, shown, tables, metrics)).replace("<", "\\u003c"),  # no name in it ends the script
        values=_packed(shown[metrics].astype("float32").to_numpy(), shown["round"].to_numpy()),
        plotly=_compressed(_plotly()),
        script=files["js"],
    )


def _first(rounds: DataFrame, metrics: int) -> list[str]:
    """As many runs as a page may have, in their order; one at least."""
    sizes = rounds.groupby("run", sort=False).size().cumsum() * metrics
    return list(sizes.index[: max(1, int((sizes <= _MOST).sum()))])


def _packed(numbers: Any, rounds: Any) -> str:
    """The values of all runs, run by run, and of a run metric by metric."""
    starts = [*(place for place, number in enumerate(rounds) if number == 1), len(rounds)]
    parts = [numbers[first:last].T.tobytes() for first, last in itertools.pairwise(starts)]
    return _compressed(b"".join(parts))


def _compressed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def _plotly() -> bytes:
    from plotly.offline import get_plotlyjs

    return bytes(get_plotlyjs().encode())


def _data(rounds: DataFrame, drawn: DataFrame, tables: Sequence[Table], metrics: Sequence[str]) -> dict[str, Any]:
    """What the script of the page reads: dimensions with their values, tasks, runs and tables, which name values by number."""
    other = settings(rounds)
    labels = dict.fromkeys([*CELL, "seed"]) | short_names(other)
    keys = [*CELL, *other, "seed"]
    federated = rounds[rounds.kind == "federated"]
    values = {key: _values(federated[key] if key != "task" else rounds[key]) for key in keys}
    numbers = {key: {value: number for number, value in enumerate(found)} for key, found in values.items()}

    def places(row: Mapping[str, Any], pooled: bool = False) -> list[int]:
        missing = [pooled and (key in ("split", "clients") or not _known(row[key])) for key in keys]
        return [-1 if lacks else numbers[key].get(_said(row.get(key)), -1) for key, lacks in zip(keys, missing, strict=True)]

    tasks = [_task(rounds[rounds.task.map(_said) == task], metrics, keys) for task in values["task"]]
    chosen = [keys.index(key) for key in rates(other)]
    return {
        "dims": [{"key": key, "label": labels[key] or key, "values": values[key]} for key in keys],
        "metrics": [printable(label_of(name), _LONGEST) for name in metrics],
        "tasks": [task | {"tuned": bool(chosen) and task["part"] != "test"} for task in tasks],
        "rates": chosen,
        "runs": _runs(drawn, metrics, places),
        "tables": [_table(one, numbers["task"], places) for one in tables]
        + _of_runs(federated, other, numbers["task"], places),
        "colours": PALETTE,
        "dashes": _DASHES,
    }


def _values(column: Any) -> list[str]:
    """The values of a column as they are shown, sorted."""
    return list(dict.fromkeys(map(_said, sorted(column.unique(), key=order))))


def _task(runs: DataFrame, metrics: Sequence[str], keys: Sequence[str]) -> dict[str, Any]:
    """How the curves of a task are arranged, and by which metric."""
    layout, first = layout_of(runs), runs.iloc[0]
    column, is_max = column_of(first.monitor), first["mode"] == "max"
    arranged = {name: [keys.index(key) for key in getattr(layout, name)] for name in ("columns", "rows", "lines")}
    return arranged | {
        "baseline": layout.baseline,
        "metric": metrics.index(column) if column in metrics else 0,
        "mode": first["mode"],
        "part": printable(first.part, _LONGEST).capitalize(),
        "chance": "majority class" if is_max else "uniform guess",
    }


def _runs(rounds: DataFrame, metrics: Sequence[str], places: Any) -> list[dict[str, Any]]:
    """Each run: where its values are, and what it is."""
    found, start = [], 0
    for run, one in rounds.groupby("run", sort=False):
        first, number = one.iloc[0], len(one)
        pooled = first.kind != "federated"
        known = [place for place, name in enumerate(metrics) if one[name].notna().any()]
        about = {"d": places(first, pooled), "pooled": pooled, "name": printable(run, _LONGEST), "n": number, "at": start}
        found.append(about | {"m": known, "chance": first.chance if _known(first.chance) else None})
        start += number * len(metrics)
    return found


def _table(table: Table, tasks: Mapping[str, int], places: Any) -> dict[str, Any]:
    rows = []
    for cell, texts in zip(table.cells, table.rows(), strict=True):
        by = [_sortable(cell.get(column.name)) for column in table.columns]
        where = [*places(dict(cell) | {"seed": None})[:-1], -1]  # a row is a mean over seeds, whichever is chosen
        rows.append({"d": where, "t": [printable(text, _LONGEST) for text in texts], "v": by})
    columns = [printable(column.label, _LONGEST) for column in table.columns]
    title = table.title[:1].upper() + table.title[1:]
    return {"task": tasks[_said(table.task)], "title": title, "note": table.note, "columns": columns, "rows": rows}


def _of_runs(federated: DataFrame, other: Sequence[str], tasks: Mapping[str, int], places: Any) -> list[dict[str, Any]]:
    """A table of the single runs of each task, which the page folds."""
    names, found = short_names(other), []
    for task, runs in federated.groupby("task", sort=False):
        last = runs.groupby("run", sort=False).last().reset_index().to_dict("records")
        keys = ["run", "model", "split", "clients", *that_differ(other, last), "seed", "round", "complete", "score"]
        labels = [names.get(key, key) for key in keys[:-3]] + ["rounds", "complete", "last score"]
        rows = [
            {
                "d": places(one),
                "t": [f"{one[key]:.4f}" if key == "score" and _known(one[key]) else _said(one[key]) for key in keys],
                "v": [_sortable(one[key]) for key in keys],
            }
            for one in last
        ]
        table = {"task": tasks[_said(task)], "title": f"Runs ({len(rows)})", "note": "", "columns": labels, "rows": rows}
        found.append(table | {"folded": True})
    return found


def _said(value: Any) -> str:
    return printable(shown_setting(value), _LONGEST)


def _known(value: Any) -> bool:
    return value is not None and bool(value == value)


def _sortable(value: Any) -> Any:
    """A value by which the page sorts: a number, else text; null where there is none."""
    if not _known(value):
        return None
    if isinstance(value, (int, float)) or hasattr(value, "dtype"):
        return float(value) if math.isfinite(value) else None
    return printable(value, _LONGEST)


def _text(value: object) -> str:
    """A text that the page shows as it is."""
    return html.escape(printable(value, _LONGEST))


def _list(failed: Mapping[str, str]) -> str:
    if not failed:
        return "<p>None.</p>"
    lines = "".join(f"<li><b>{_text(run)}</b>: {_text(reason)}</li>" for run, reason in failed.items())
    return f'<ul id="failed">{lines}</ul>'
