"""Draws this page's picture from the spreadsheet beside it: accuracy by how many clients hide in the mean, and by epsilon.

Run it with `python experiments/privacy/picture.py`.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fedtune.reports.spreadsheet import read_cells
from fedtune.runs.figures import CHANCE, new_figure, save, style_of

HERE = Path(__file__).parent
SETTINGS = {  # noise and epsilon as the sweep gives them: what they stand for, least noise first
    (0.00404, 0.0): "10,000 clients\nepsilon 8",
    (0.00657, 0.0): "10,000\n4",
    (0.01114, 0.0): "10,000\n2",
    (0.04036, 0.0): "1,000\n8",
    (0.11139, 0.0): "1,000\n2",
    (0.0, 8.0): "40\n8",
    (0.0, 4.0): "40\n4",
    (0.0, 2.0): "40\n2",
}


def tuned(cells: pd.DataFrame) -> pd.DataFrame:
    """Of each algorithm and setting the learning rate that all seeds had; `place` 0 is without privacy, then as in SETTINGS."""
    places = {setting: place for place, setting in enumerate(SETTINGS, 1)}
    noise, epsilon = cells["loop.privacy.noise"].fillna(0.0), cells["loop.privacy.epsilon"].fillna(0.0)
    here = cells.assign(
        algorithm=cells["loop.algorithm.frozen"].isna().map({True: "LoRA (FedIT)", False: "FFA-LoRA"}),
        place=[places.get(setting, 0) for setting in zip(noise, epsilon, strict=True)],
    )
    return here[here.seeds == cells.seeds.max()].sort_values(["algorithm", "place"])


def draw(spreadsheet: Path, picture: Path) -> None:
    """A line an algorithm: mean over seeds of the accuracy on the test part, and a bar from least to greatest."""
    cells = tuned(read_cells(spreadsheet))
    figure, (panel,) = new_figure(1, 1, (8.2, 3.8))
    for number, (name, rows) in enumerate(cells.groupby("algorithm", sort=False)):
        places, style = rows.place + 0.08 * (2 * number - 1), style_of(number, number)
        panel.plot(places, rows["test.score"], label=name, markersize=5, **style)
        panel.vlines(places, rows["test.score_min"], rows["test.score_max"], color=style["color"], linewidth=1.2)
    majority = cells["test.majority"].mean()
    panel.axhline(majority, label=f"majority class ({majority:.2f})", **CHANCE)
    panel.set_xticks(range(len(SETTINGS) + 1), ["no\nprivacy", *SETTINGS.values()])
    panel.set(ylabel="accuracy, test part", ylim=(0, None))
    panel.grid(alpha=0.3)
    panel.legend(fontsize=9)
    save(figure, picture, dpi=110)


if __name__ == "__main__":
    draw(HERE / "authors.csv", HERE / "authors.png")
