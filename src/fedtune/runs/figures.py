"""The pictures: convergence curves, and who holds what."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedtune.files import printable, replaced, said
from fedtune.storage.records import RoundRecord
from fedtune.storage.summary import mean_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's colours, which colour-blind readers can tell apart
_LABELS = {"loss_nats": "loss in nats", "train_loss_nats": "training loss in nats"}
_NAMES = 60  # labels or authors that have a colour of their own in a picture; the rest are one
_TALLEST, _ROWS = 60, 500  # inches, and bars, in a picture of clients
_LONGEST, _LINES, _NAME = 120, 4, 40  # characters of a line of text in a picture, lines, and characters of a name in a legend
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def plot_curves(
    runs: Mapping[str, Sequence[RoundRecord]],
    path: str | Path,
    levels: Mapping[str, float] | None = None,
    title: str = "",
    monitor: str = "accuracy",
) -> None:
    """Draw accuracy (or what else is monitored) and loss over rounds.

    Args:
        runs: name -> its records; a run named "centralised" is dashed.
        path: the picture; its suffix chooses the format.
        levels: name -> value of what is monitored, drawn as dotted lines (the majority class, clients alone).
        title: what the runs have in common.
        monitor: the metric that comes first.
    """
    metrics = drawn_metrics(runs, monitor)
    figure, panels = new_figure(1, len(metrics), (5 * len(metrics), 4.2))
    for colour, (name, history) in zip(itertools.cycle(PALETTE), runs.items(), strict=False):
        style: dict[str, Any] = {
            "color": colour,
            "linestyle": "--" if name == "centralised" else "-",
            "marker": "o",
            "markersize": 3,
        }
        for axes, metric in zip(panels, metrics, strict=True):
            points = [(record.round, value) for record in history if (value := _value(record, metric)) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, **style)
    for shade, (name, level) in zip(itertools.cycle(("0.35", "0.6")), (levels or {}).items(), strict=False):
        panels[0].axhline(level, color=shade, linestyle=":", label=f"{name} ({level:.2f})")
    for axes, metric in zip(panels, metrics, strict=True):
        axes.set_ylabel(_LABELS.get(metric, metric))
        if metric == "accuracy":
            axes.set_ylim(0, None)
        over_rounds(axes)
    handles = drawn_lines(panels)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title)
    save(figure, path)


def over_rounds(axes: Axes) -> None:
    """Let the lower axis of what was drawn be that of rounds: whole numbers, also where there is one round only."""
    from matplotlib.ticker import MaxNLocator

    left, right = axes.get_xlim()
    if right - left < 1:
        axes.set_xlim(left - 0.5, right + 0.5)
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)


def drawn_metrics(runs: Mapping[str, Sequence[RoundRecord]], monitor: str) -> list[str]:
    """What is drawn of runs: the metric that is monitored and the loss, or other metrics where those are missing; the training
    loss where nothing is known."""
    known = {name for history in runs.values() for record in history for name in record.metrics}
    known = {name for name in known if any(_value(one, name) is not None for history in runs.values() for one in history)}
    wanted = [name for name in dict.fromkeys((monitor, "accuracy", "loss_nats", *sorted(known))) if name in known]
    return wanted[:2] if len(wanted) > 1 else [*wanted, "train_loss_nats"]


def _value(record: RoundRecord, metric: str) -> float | None:
    value = record.train_loss_nats if metric == "train_loss_nats" else record.metrics.get(metric)
    return value if value is not None and math.isfinite(value) else None


def plot_run(
    folder: Path, history: Sequence[RoundRecord], baselines: Mapping[str, Sequence[Any]], part: str, monitor: str
) -> None:
    """Draw curves.png of a run directory: the rounds, evaluated on a part, beside the baselines that are known.

    A picture that cannot be drawn is a warning: the run is not about it.
    """
    curves = {"federated": history, "centralised": baselines.get("centralised", ())}
    levels = {}
    for measured in ("test", part):
        alone = mean_of(baselines.get("local", ()), measured, monitor)
        if alone is not None:
            levels = {"each client alone, mean" + (f", {measured} part" if measured != part else ""): alone}
    drawn = {name: rounds for name, rounds in curves.items() if rounds}
    try:
        plot_curves(drawn, folder / "curves.png", levels, f"{folder.name}: {part} part", monitor)
    except Exception as error:  # whatever it is
        warnings.warn(f"{folder / 'curves.png'} could not be drawn: {type(error).__name__}: {said(error)}", stacklevel=2)


def plot_split(table: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw labels per client, authors per client where the task names authors (the most frequent, where there are many), and
    the mean length of a client's texts where the table has it.

    Args:
        table: as from `FederatedDataModule.describe`.
        path: the picture.
    """
    panels = [key for key in ("labels", "authors", "mean_characters") if key in table[0]]
    height = min(_TALLEST, max(3.5, 0.3 * len(table) + 1.5))
    figure, axes = new_figure(1, len(panels), (5.5 * len(panels) + 1, height))
    step = -(-len(table) // _ROWS)
    label = "client" if step == 1 else f"client (a row has {step})"
    for panel, key in zip(axes, panels, strict=True):
        if key == "mean_characters":
            _stack(panel, [{key: mean} for mean in _mean_lengths(table, step)], step, legend=False)
            panel.set(xlabel="characters of a text", title="mean length per client")
        else:
            rows = _most_frequent([row[key] for row in table])
            _stack(panel, [sum(rows[first : first + step], Counter()) for first in range(0, len(rows), step)], step)
            panel.set(xlabel="training texts", title=f"{key} per client")
        panel.set_ylabel(label)
        panel.set_yticks(range(len(table)) if len(table) <= 40 else range(0, len(table), len(table) // 20))
        panel.invert_yaxis()
    figure.suptitle(title)
    save(figure, path)


def _mean_lengths(table: Sequence[Mapping[str, Any]], step: int) -> list[float]:
    """The mean number of characters of a text, for each so many clients."""
    groups = [table[first : first + step] for first in range(0, len(table), step)]
    return [
        sum(row["mean_characters"] * row["examples"] for row in rows) / sum(row["examples"] for row in rows) for rows in groups
    ]


def _most_frequent(clients: Sequence[Mapping[str, int]]) -> list[Counter[str]]:
    """What clients hold, with one name for all that are not among the most frequent."""
    total = Counter[str]()
    for counts in clients:
        total.update(counts)
    if len(total) <= _NAMES:
        return [Counter(counts) for counts in clients]
    own, rest = {name for name, _ in total.most_common(_NAMES - 1)}, f"{len(total) - _NAMES + 1:,} others"
    found = []
    for counts in clients:
        mine = Counter({name: count for name, count in counts.items() if name in own})
        mine[rest] += sum(count for name, count in counts.items() if name not in own)
        found.append(mine)
    return found


def _stack(axes: Axes, clients: Sequence[Mapping[str, float]], step: int, legend: bool = True) -> None:
    """Bars, one for so many clients each."""
    from matplotlib import colormaps

    names = sorted({name for counts in clients for name in counts})
    colours = colormaps["tab20"].colors  # type: ignore[attr-defined]  # a listed colour map has them
    start, edges, drawn = [0.0] * len(clients), [number * step - 0.5 for number in range(len(clients) + 1)], []
    for index, name in enumerate(names):
        end = [before + counts.get(name, 0) for before, counts in zip(start, clients, strict=True)]
        style: dict[str, Any] = {"color": colours[index % 20], "fill": True, "orientation": "horizontal", "linewidth": 0}
        drawn.append(axes.stairs(end, edges, baseline=start, **style))
        start = end
    if len(clients) <= 100:
        axes.hlines(edges, 0, max(start), color="white", linewidth=2)
    if legend and len(names) <= 20:  # a longer legend would hide the bars
        axes.legend(drawn, [printable(name, _NAME) for name in names], fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))


def new_figure(
    rows: int, columns: int, size: tuple[float, float], sharey: bool | Literal["row"] = False
) -> tuple[Figure, list[Axes]]:
    """A figure with rows x columns panels, row by row; `size` in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")  # no pyplot: the caller's figures and backend stay as they are
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)


def save(figure: Figure, path: str | Path, dpi: int = 120) -> None:
    """Write a figure; the folder is made where it is missing. Names are drawn as they are: a $ in them begins no formula, and
    what no font has is a box. The file is whole or as it was."""
    from matplotlib.text import Text

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        lines = text.get_text().split("\n")
        text.set_text("\n".join(printable(line, _LONGEST) for line in lines[:_LINES]))  # a name of a file need not be Unicode
    with warnings.catch_warnings(), replaced(path) as temporary:
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        figure.savefig(temporary, dpi=dpi, format=path.suffix.removeprefix(".") or "png")


def drawn_lines(panels: Sequence[Axes]) -> dict[str, Line2D]:
    """Label -> line, of all lines that were given one. Of labels that begin with "_" matplotlib would make no legend."""
    lines = [line for panel in panels for line in panel.get_lines()]
    return {label: line for line in lines if not re.fullmatch(r"_child\d+", label := str(line.get_label()))}
