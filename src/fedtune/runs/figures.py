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

from fedtune.errors import warn
from fedtune.files import printable, replaced, said
from fedtune.storage.records import RoundRecord
from fedtune.storage.summary import mean_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_WORDS = ("exact_match", "token_accuracy")
_LABELS = {"loss_nats": "loss in nats", "train_loss_nats": "training loss in nats"}
# the most frequent names of a client, as far as which rank
_RANKS = {"the client's most frequent": 1, "its 2nd to 5th": 5, "its 6th to 20th": 20, "its 21st to 100th": 100, "others": None}
_SHADES = ("#08306B", "#2171B5", "#6BAED6", "#C6DBEF", "#BBBBBB")
_OTHERS, _LENGTH = "#BBBBBB", "#4477AA"  # colours of all other labels or authors, and of lengths
_TALLEST, _ROWS = 9, 500  # inches, and bars, in a picture of clients
_LONGEST, _LINES, _NAME = 120, 4, 40  # characters of a line of text in a picture, lines, and characters of a name in a legend
_MARKED = 12  # rounds; the points of more of them are no longer seen one by one
# Okabe and Ito's colours, which colour-blind readers can tell apart; black and grey are for what curves are compared with
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#B8A900")
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 3)), (0, (2, 3)))
_MARKERS = "os^Dv<>P"
CENTRALISED: dict[str, Any] = {"color": "#000000", "linestyle": (0, (7, 2)), "marker": "x", "linewidth": 1.6}
ONE_CLIENT: dict[str, Any] = {"color": "#777777", "linestyle": "-", "marker": "+", "linewidth": 1.6}
CHANCE: dict[str, Any] = {"color": "#555555", "linestyle": ":", "linewidth": 1.2}


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
    others = itertools.count()
    for name, history in runs.items():
        style = CENTRALISED if name == "centralised" else style_of(number := next(others), number)
        for axes, metric in zip(panels, metrics, strict=True):
            points = [(record.round, value) for record in history if (value := _value(record, metric)) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, **style, **marked(len(points)))
    for number, (name, level) in enumerate((levels or {}).items()):
        style = CHANCE | {"linestyle": (0, (1, 1 + number)), "color": ("#555555", "#AA3377")[number % 2]}
        panels[0].axhline(level, label=f"{name} ({level:.2f})", **style)
    for axes, metric in zip(panels, metrics, strict=True):
        axes.set_ylabel(_LABELS.get(metric, metric.replace("_", " ") if metric in _WORDS else metric))
        if metric == "accuracy":
            axes.set_ylim(0, None)
        over_rounds(axes)
    legend_below(figure, panels)
    figure.suptitle(title)
    save(figure, path)


def legend_below(figure: Figure, panels: Sequence[Axes]) -> None:
    """A legend of all that panels have, in as many columns as the figure is wide."""
    handles = drawn_lines(panels)
    longest = max(map(len, handles), default=1)
    columns = max(1, int(figure.get_figwidth() / (0.075 * longest + 0.6)))  # inches: of a letter, and of the line before it
    style: dict[str, Any] = {"fontsize": 8, "frameon": False, "handlelength": 3}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, **style)


def style_of(colour: int, dash: int) -> dict[str, Any]:
    """How a curve is drawn: both its colour and its dash tell it from others, also where a page is printed in grey."""
    return {
        "color": PALETTE[colour % len(PALETTE)],
        "linestyle": DASHES[dash % len(DASHES)],
        "marker": _MARKERS[dash % len(_MARKERS)],
        "linewidth": 1.5,
    }


def marked(points: int) -> dict[str, Any]:
    """What a curve of so many points has beside its style: marks for few points, none where they would make a band."""
    return {"markersize": 3.5} if points <= _MARKED else {"markersize": 0}


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
    folder: Path,
    history: Sequence[RoundRecord],
    baselines: Mapping[str, Sequence[Any]],
    part: str,
    monitor: str,
    majority: float | None = None,
) -> None:
    """Draw curves.png of a run directory: the rounds, evaluated on a part, beside the baselines that are known.

    A picture that cannot be drawn is a warning: the run is not about it.

    Args:
        majority: accuracy of the most frequent class on that part, where it is known.
    """
    curves = {"federated": history, "centralised": baselines.get("centralised", ())}
    levels = {} if majority is None or monitor != "accuracy" else {"majority class": majority}
    for measured in ("test", part):
        alone = mean_of(baselines.get("local", ()), measured, monitor)
        if alone is not None:
            levels["each client alone, mean" + (f", {measured} part" if measured != part else "")] = alone
            break
    drawn = {name: rounds for name, rounds in curves.items() if rounds}
    try:
        plot_curves(drawn, folder / "curves.png", levels, f"{folder.name}: {part} part", monitor)
    except Exception as error:  # whatever it is
        warn(f"{folder / 'curves.png'} could not be drawn: {type(error).__name__}: {said(error)}")


def plot_split(table: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Draw labels per client, authors per client where the task names authors other than its labels, and the mean length of a
    client's texts where the table has it.

    Of many labels or authors the most frequent have a colour each, and the others are one. Where these others are most of the
    texts, colours say how concentrated a client is: how much is by its most frequent author, by the next four, and so on.

    Args:
        table: as from `FederatedDataModule.describe`.
        path: the picture.
    """
    panels = [key for key in ("labels", "authors", "mean_characters") if key in table[0]]
    if {"labels", "authors"} <= set(panels) and all(row["labels"] == row["authors"] for row in table):
        panels.remove("labels")  # who wrote it is what is learned
    height = min(_TALLEST, max(3.5, 0.3 * len(table) + 1.5))
    figure, axes = new_figure(1, len(panels), (5.5 * len(panels) + 1, height))
    step = -(-len(table) // _ROWS)
    label = "client" if step == 1 else f"client (a row has {step})"
    for panel, key in zip(axes, panels, strict=True):
        if key == "mean_characters":
            _stack(panel, [{key: mean} for mean in _mean_lengths(table, step)], step, {key: _LENGTH})
            panel.set(xlabel="characters of a text", title="mean length per client")
        else:
            rows, colours, about = _held([row[key] for row in table])
            bars = [sum(rows[first : first + step], Counter()) for first in range(0, len(rows), step)]
            _stack(panel, bars, step, colours)
            _legend(panel, colours)
            panel.set(xlabel="training texts", title=f"{key} per client{about}")
        panel.set_ylabel(label)
        every = next(size for size in (1, 2, 5, 10, 20, 50, 100, len(table)) if len(table) <= 25 * size)
        panel.set_yticks(range(0, len(table), every))
        panel.invert_yaxis()
    figure.suptitle(title)
    save(figure, path)


def _mean_lengths(table: Sequence[Mapping[str, Any]], step: int) -> list[float]:
    """The mean number of characters of a text, for each so many clients."""
    groups = [table[first : first + step] for first in range(0, len(table), step)]
    return [
        sum(row["mean_characters"] * row["examples"] for row in rows) / sum(row["examples"] for row in rows) for rows in groups
    ]


def _held(clients: Sequence[Mapping[str, int]]) -> tuple[list[Counter[str]], dict[str, Any], str]:
    """What clients hold, by names that are few enough for colours; name -> colour; and what of all names these are."""
    from matplotlib import colormaps

    total = Counter[str]()
    for counts in clients:
        total.update(counts)
    palette = colormaps["tab20"].colors  # type: ignore[attr-defined]  # a listed colour map has them
    palette = [*palette[:14:2], *palette[16::2], *palette[1:14:2], *palette[17::2]]  # strong ones first, without greys
    if len(total) <= len(palette):
        return [Counter(counts) for counts in clients], dict(zip(sorted(total), palette, strict=False)), ""
    own = [name for name, _ in total.most_common(len(palette))]
    if 2 * sum(total[name] for name in own) < sum(total.values()):
        return [_by_rank(counts) for counts in clients], dict(zip(_RANKS, _SHADES, strict=True)), f" ({len(total):,} in all)"
    rest = f"{len(total) - len(own):,} others"
    found = []
    for counts in clients:
        mine = Counter({name: counts[name] for name in own if name in counts})
        mine[rest] += sum(counts.values()) - sum(mine.values())
        found.append(mine)
    about = f" ({len(own)} most frequent of {len(total):,})"
    return found, dict(zip(sorted(own), palette, strict=False)) | {rest: _OTHERS}, about


def _by_rank(counts: Mapping[str, int]) -> Counter[str]:
    """How many texts are by a client's most frequent name, by the next ones, and by all others."""
    ranked, found, first = sorted(counts.values(), reverse=True), Counter[str](), 0
    for name, last in _RANKS.items():
        found[name] = sum(ranked[first:last])
        first = last or 0
    return found


def _stack(axes: Axes, clients: Sequence[Mapping[str, float]], step: int, colours: Mapping[str, Any]) -> None:
    """Bars, one for so many clients each, in the order of the colours."""
    start, edges = [0.0] * len(clients), [number * step - 0.5 for number in range(len(clients) + 1)]
    for name, colour in colours.items():
        end = [before + counts.get(name, 0) for before, counts in zip(start, clients, strict=True)]
        style: dict[str, Any] = {"color": colour, "fill": True, "orientation": "horizontal", "linewidth": 0}
        axes.stairs(end, edges, baseline=start, **style)
        start = end
    if len(clients) <= 100:
        axes.hlines(edges, 0, max(start), color="white", linewidth=2 if len(clients) <= 30 else 0.5)
    axes.set(xlim=(0, None), ylim=(edges[0], edges[-1]))


def _legend(axes: Axes, colours: Mapping[str, Any]) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=colour, label=printable(name, _NAME)) for name, colour in colours.items()]
    names = [printable(name, _NAME) for name in colours]
    axes.legend(patches, names, fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


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
