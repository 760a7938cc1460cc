"""Draws this page's pictures from the spreadsheets beside it: accuracy after the last round, by the number of clients.

Run it with `python experiments/first_results/draw.py`.
"""

from __future__ import annotations

from pathlib import Path

from fedtune.reports.settings import order
from fedtune.reports.spreadsheet import read_cells
from fedtune.runs.figures import CHANCE, legend_below, new_figure, save, style_of

HERE = Path(__file__).parent
BESIDE = 1.06  # factor between the places of two models, whose ranges would else hide each other


def draw(spreadsheet: Path, picture: Path) -> None:
    """A panel a split, a line a model: mean over seeds of the accuracy on the test part, and a bar from least to greatest."""
    cells = read_cells(spreadsheet)
    splits = sorted(cells.split.unique(), key=order)
    figure, panels = new_figure(1, len(splits), (9.6, 4.0), sharey=True)
    for panel, split in zip(panels, splits, strict=True):
        here = cells[(cells.split == split) | (cells.clients == 1)]  # one client has the same texts whatever the split
        for number, (model, rows) in enumerate(here.groupby("model")):
            rows = rows.sort_values("clients")
            places, style = rows.clients * BESIDE ** (2 * number - 1), style_of(number, number)
            panel.plot(places, rows["test.score"], label=model, markersize=4, **style)
            panel.vlines(places, rows["test.score_min"], rows["test.score_max"], color=style["color"], linewidth=1.2)
        majority = here["test.majority"].mean()
        panel.axhline(majority, label=f"majority class ({majority:.2f})", **CHANCE)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(here.clients.unique()), [f"{clients}" for clients in sorted(here.clients.unique())])
        panel.set(title=split, xlabel="clients", ylim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    seeds, rounds = int(cells.seeds.max()), int(cells.rounds.max())
    figure.suptitle(f"{cells.task.iloc[0]}: test part after round {rounds}, {seeds} seeds", fontsize=10)
    legend_below(figure, panels)
    save(figure, picture, dpi=110)


if __name__ == "__main__":
    for name in ("spooky", "authors"):
        draw(HERE / f"{name}.csv", HERE / f"{name}.png")
