"""The picture of many runs: convergence curves with their spread over seeds."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.reports.baselines import alike, baselines_among
from fedtune.reports.results import settings, shown_setting
from fedtune.runs.figures import PALETTE, drawn_lines, new_figure, over_rounds, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


_PANELS, _WIDEST = 60, 10  # in one picture, and in a row


def plot_grid(rounds: DataFrame, path: str | Path, metric: str = "accuracy") -> None:
    """Draw the convergence of many runs: a row a task, model and other setting, a column a split, a line a number of clients.

    Lines are means over seeds, bands go from the least to the greatest. The baseline (one client, else centralised training) is
    dashed in every panel. Of a great many panels the first are drawn, and the picture says so.

    Args:
        rounds: as from `read_runs`.
        path: the picture; its suffix chooses the format.
        metric: a column of `rounds`.
    """
    federated = rounds[rounds.kind == "federated"]
    curves = federated[federated.clients > 1] if (federated.clients > 1).any() else federated
    keys = ["task", "model", *settings(rounds)]
    lines = [row for _, row in curves[keys].drop_duplicates().iterrows()]
    splits = sorted(curves.split.unique(), key=lambda split: (not split.endswith("iid"), split))
    number = len(lines) * len(splits)
    splits = splits[:_WIDEST]
    lines = lines[: max(1, _PANELS // len(splits))]
    label = curves.monitor.iloc[0] if metric == "score" and curves.monitor.nunique() == 1 else metric
    colours = dict(zip(sorted(curves.clients.unique()), itertools.cycle(PALETTE[1:6] + PALETTE[:1])))
    figure, panels = new_figure(len(lines), len(splits), (4.2 * len(splits) + 1, 2.9 * len(lines) + 0.8), sharey="row")
    for place, panel in enumerate(panels):
        line, split = lines[place // len(splits)], splits[place % len(splits)]
        here = alike(curves, line, keys)
        for count, colour in colours.items():
            of_count = here[(here.split == split) & (here.clients == count)]
            _band(panel, of_count, metric, color=colour, label=f"{count} clients")
        _band(
            panel, baselines_among(alike(rounds, line, keys), split), metric, color=PALETTE[6], linestyle="--", label="baseline"
        )
        panel.set_title(", ".join(map(shown_setting, line)) + f"\n{split}", fontsize=9)
        panel.set_ylabel(label)
        over_rounds(panel)
    if number > len(panels):
        figure.suptitle(f"{len(panels)} of {number:,} panels; the tables have all")
    handles = drawn_lines(panels)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    save(figure, path, dpi=90)


def _band(panel: Axes, runs: DataFrame, metric: str, **style: Any) -> None:
    runs = runs.dropna(subset=[metric])  # not every round need be evaluated
    if not len(runs):
        return
    by_round = runs.groupby("round")[metric]
    mean, low, high = by_round.mean(), by_round.min(), by_round.max()
    panel.plot(mean.index, mean, marker="o", markersize=3, **style)
    panel.fill_between(mean.index, low, high, color=style["color"], alpha=0.15, linewidth=0)
