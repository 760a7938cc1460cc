"""The pictures of many runs, one a task: convergence curves with their spread over seeds."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.reports.layout import Layout, best_of, layout_of, values_of, with_values
from fedtune.reports.repeats import each_once
from fedtune.reports.results import column_of
from fedtune.reports.settings import label_of, settings
from fedtune.runs.figures import CENTRALISED, CHANCE, ONE_CLIENT, legend_below, marked, new_figure, over_rounds, save, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

_PANELS, _ACROSS = 60, 3  # panels in one picture, and in a row where nothing else says how many
_WIDEST = 10


def plot_grid(rounds: DataFrame, path: str | Path, metric: str | None = None, also: Sequence[str] = ()) -> list[Path]:
    """Draw the convergence of many runs, a picture a task: a column a model, a row a split, a line a number of clients.

    Settings in which runs differ beyond that make lines as long as a panel has few, else rows. Lines are means over seeds,
    bands go from the least to the greatest, and all panels have one scale. Baselines are in every panel: the runs with one
    client (of the panel's split, where there are any), centralised training, each with the settings that are best for it, and
    the majority class. Of a great many panels the first are drawn, and the picture says so. A seed counts once,
    as in `compare`.

    Args:
        rounds: as from `read_runs`.
        path: the picture; its suffix chooses the format. Where there are several tasks, each has a picture of that name
            with its own at the end.
        metric: a column of `rounds`; by default what the runs of a task monitor.
        also: suffixes of other formats, in which each picture is written beside it.

    Returns:
        the pictures.
    """
    return by_task(each_once(rounds), Path(path), also, lambda runs, task: _draw(runs, task, metric))


def by_task(table: DataFrame, path: Path, also: Sequence[str], draw: Callable[[DataFrame, str], Figure | None]) -> list[Path]:
    """Write a picture for each task of a table, as `plot_grid` says; `draw` may say that there is none of a task."""
    tasks = list(dict.fromkeys(table.task))
    paths = [path] if len(tasks) == 1 else _names(path, tasks)
    found = []
    for task, place in zip(tasks, paths, strict=True):
        figure = draw(table[table.task == task], str(task))
        if figure is None:
            continue
        for one in (place, *(place.with_suffix(suffix) for suffix in also)):
            save(figure, one, dpi=110)
            figure.set_layout_engine("none")  # it is laid out by now
            found.append(one)
    return found


def _names(path: Path, tasks: Sequence[Any]) -> list[Path]:
    """A name for each task, which every file system takes and no other task has."""
    found: list[Path] = []
    for task in tasks:
        short = re.sub(r"[^A-Za-z0-9._-]+", "_", str(task)).strip("._")[:60] or "task"
        name = f"{path.stem}-{short}"
        while path.with_name(name + path.suffix) in found:
            name += "_"
        found.append(path.with_name(name + path.suffix))
    return found


def _draw(runs: DataFrame, task: str, metric: str | None) -> Figure:
    layout = layout_of(runs)
    monitors = list(dict.fromkeys(runs.monitor))
    column = metric or (column_of(monitors[0]) if len(monitors) == 1 else "score")
    curves = layout.curves(runs)
    places, across = _places(curves, layout)
    drawn = places[:_PANELS]
    size = (max(5.5, 4.0 * across) + 0.6, 2.7 * -(-len(drawn) // across) + 1.4)
    figure, panels = new_figure(-(-len(drawn) // across), across, size, sharey=True)
    lines = values_of(curves, layout.lines)
    for panel, (keys, values) in zip(panels, drawn, strict=False):
        here = with_values(runs, keys, values)
        mine = layout.curves(here)
        for key, style in zip(lines, _styles(lines), strict=True):
            _band(
                panel,
                with_values(mine, layout.lines, key),
                column,
                label=layout.name(layout.lines, key) or "federated",
                **style,
            )
        _baselines(panel, here, runs, layout, column)
        panel.set_title(layout.name(keys, values), fontsize=9)
        over_rounds(panel)
    for panel in panels[len(drawn) :]:
        panel.set_visible(False)
    for panel in panels[:: max(1, across)]:
        panel.set_ylabel("score" if column == "score" else label_of(column))
    figure.suptitle(_title(curves, task, layout, len(drawn), len(places)), fontsize=10)
    legend_below(figure, panels)
    return figure


def _places(curves: DataFrame, layout: Layout) -> tuple[list[tuple[list[str], list[Any]]], int]:
    """What each panel has, row by row, and panels in a row."""
    columns, rows = values_of(curves, layout.columns)[:_WIDEST], values_of(curves, layout.rows)
    keys = [*layout.columns, *layout.rows]
    found = [(keys, [*column, *row]) for row in rows for column in columns]
    if len(columns) == 1 or (len(rows) == 1 and len(columns) > _ACROSS):
        return found, min(len(found), _ACROSS)
    return found, len(columns)


def _title(curves: DataFrame, task: str, layout: Layout, drawn: int, panels: int) -> str:
    """The task, and what all curves have in common."""
    same = [key for key in ("model", "split", "clients") if curves[key].nunique() == 1]
    common = layout.name(same, [curves[key].iloc[0] for key in same])
    parts = " and ".join(dict.fromkeys(curves.part.astype(str)))
    left_out = f"\n{drawn} of {panels:,} panels; the tables have all" if panels > drawn else ""
    return f"{task}{', ' * bool(common)}{common}: {parts} part{left_out}"


def _styles(lines: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """A colour and a dash for each line: where two things differ, the first has the colours and the others the dashes."""
    first = list(dict.fromkeys(key[:1] for key in lines))
    rest = list(dict.fromkeys(key[1:] for key in lines))
    if len(rest) == 1:
        return [style_of(number, number) for number in range(len(lines))]
    return [style_of(first.index(key[:1]), rest.index(key[1:])) for key in lines]


def _baselines(panel: Axes, here: DataFrame, runs: DataFrame, layout: Layout, column: str) -> None:
    """What a panel is compared with, each with those settings that are best for it."""
    mode, other = here["mode"].iloc[0] if len(here) else "max", settings(runs)
    inner = [key for key in layout.lines if key in other]
    of_panel = [key for key in (*layout.columns, *layout.rows) if key not in ("split", "clients")]
    found = with_values(runs, of_panel, [here[key].iloc[0] for key in of_panel]) if len(here) else here
    single = found[(found.kind == "federated") & (found.clients == 1)] if layout.baseline else found[:0]
    same_split = single[single.split.isin(here[here.kind == "federated"].split)]
    for name, base, style in (
        ("one client", same_split if len(same_split) else single, ONE_CLIENT),
        ("centralised", found[found.kind == "centralised"], CENTRALISED),
    ):
        if len(base) and column in base and base[column].notna().any():
            key, best = best_of(base, inner, column, mode)
            named = layout.name(inner, key)
            _band(panel, best, column, label=f"{name}{', ' * bool(named)}{named}", **style)
    chance = here.chance.dropna() if column in ("score", *here.monitor.map(column_of)) else here.chance[:0]
    if len(chance):
        name = "majority class" if (here["mode"] == "max").all() else "uniform guess"
        panel.axhline(chance.mean(), label=f"{name} ({chance.mean():.2f})", **CHANCE)


def _band(panel: Axes, runs: DataFrame, metric: str, **style: Any) -> None:
    runs = runs.dropna(subset=[metric])  # not every round need be evaluated
    if not len(runs):
        return
    by_round = runs.groupby("round")[metric]
    mean, low, high = by_round.mean(), by_round.min(), by_round.max()
    panel.plot(mean.index, mean, **style, **marked(len(mean)))
    panel.fill_between(mean.index, low, high, color=style["color"], alpha=0.15, linewidth=0)
