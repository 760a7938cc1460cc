"""What a score costs in bytes: pictures of many runs, one a task, a point a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.reports.best import BEST
from fedtune.reports.curves import by_task
from fedtune.reports.layout import Layout, values_of
from fedtune.reports.results import TEST, column_of
from fedtune.reports.settings import label_of, rates, settings, short_names
from fedtune.reports.tables import size
from fedtune.runs.figures import legend_below, new_figure, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

_PANEL = ["model", "split", "clients"]
_PANELS, _ACROSS, _SAME = 60, 3, 1.01  # panels in one picture, and in a row; bytes that differ by less are the same


def plot_costs(cells: DataFrame, path: str | Path, also: Sequence[str] = ()) -> list[Path]:
    """Draw the score against the bytes that a client sends up in a round: a panel a model, split and number of clients.

    A point is a cell, its bar goes from the least to the greatest over seeds. Of cells that differ in learning rates alone
    the one with the best is drawn, which is that of `tuned`. The score is that of the test part where all
    cells of a task have it. A task has a picture where cells of a panel send different numbers of bytes.

    Args:
        cells: as from `compare`.
        path: the picture; its suffix chooses the format. Where there are several tasks, each has a picture of that name with
            its own at the end.
        also: suffixes of other formats, in which each picture is written beside it.

    Returns:
        the pictures.
    """
    return by_task(cells[cells.bytes_up > 0], Path(path), also, _drawn)


def _drawn(cells: DataFrame, task: str) -> Figure | None:
    """The picture of a task, where there is one."""
    chosen = rates(settings(cells)) if (cells.part != "test").all() and cells[BEST].notna().any() else []
    cells = cells[(cells[BEST] == 1) & cells.score.notna()] if chosen else cells
    by_panel = cells.groupby(_PANEL, dropna=False).bytes_up
    if not (by_panel.max() > _SAME * by_panel.min()).any():
        return None
    other = [name for name in settings(cells) if name not in chosen]
    layout = Layout((), (), tuple(other), short_names(other), baseline=False)
    score = f"{TEST}score" if cells[f"{TEST}score"].notna().all() else "score"
    names, panels = [layout.name(other, values) for values in values_of(cells, other)], values_of(cells, _PANEL)
    drawn = panels[:_PANELS]
    across, down = min(len(drawn), _ACROSS), -(-len(drawn) // _ACROSS)
    figure, axes = new_figure(down, across, (max(5.5, 4.0 * across) + 0.6, 2.7 * down + 1.6), sharey=True)
    for panel, key in zip(axes, drawn, strict=False):
        for cell in cells[(cells[_PANEL] == list(key)).all(axis=1)].to_dict("records"):
            name = layout.name(other, [cell[setting] for setting in other])
            _point(panel, cell, score, name, names.index(name))
        _over_bytes(panel, layout.name(_PANEL, key))
    for panel in axes[len(drawn) :]:
        panel.set_visible(False)
    monitors = list(dict.fromkeys(cells.monitor))
    for panel in axes[::across]:
        panel.set_ylabel(label_of(column_of(monitors[0])) if len(monitors) == 1 else "score")
    parts = "test" if score != "score" else " and ".join(dict.fromkeys(cells.part.astype(str)))
    left_out = f"\n{len(drawn)} of {len(panels):,} panels; the tables have all" if len(panels) > len(drawn) else ""
    figure.suptitle(f"{task}: {parts} part{left_out}", fontsize=10)
    legend_below(figure, axes)
    return figure


def _point(panel: Axes, cell: Mapping[str, Any], score: str, name: str, number: int) -> None:
    style = style_of(number, number) | {"linestyle": "", "markersize": 6}
    panel.plot([cell["bytes_up"]], [cell[score]], label=name, **style)
    panel.vlines(cell["bytes_up"], cell[f"{score}_min"], cell[f"{score}_max"], color=style["color"], linewidth=1.2)


def _over_bytes(panel: Axes, title: str) -> None:
    panel.set_title(title, fontsize=9)
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(lambda value, _: size(value))
    panel.set_xlabel("sent up by a client in a round")
    panel.grid(alpha=0.3)
