"""What the runs of the study say: `python experiments/question/analysis.py` prints tables of records.jsonl.

Another file, or a folder of records (runs/question), may be named.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from laws import (
    FACTORS,
    LAST,
    PAPER,
    RECORDS,
    SPEED,
    SQUARE,
    Fit,
    Run,
    by_the_law,
    dosed,
    effects,
    epochs,
    is_head,
    law,
    log_of,
    of_factor,
    read,
    speed_needed,
)


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as Markdown."""
    print(f"\n**{title}**\n")
    if not rows:
        return
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print(
            "| "
            + " | ".join(
                "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()
            )
            + " |"
        )


def dose(runs: Sequence[Run]) -> None:
    """Rate, head and scale."""
    rows: list[dict[str, Any]] = []

    def add(
        what: str, chosen: Sequence[Run], name: str, columns: Mapping[str, Callable[[Run], float]], power: bool = False
    ) -> None:
        fit = Fit(chosen, columns)
        rows.append({"what": what, "found": fit.said(name, power), "runs (left)": f"{fit.runs} ({fit.seen})"})

    main = [run for run in runs if run["gamma"] == 1]
    natural = [run for run in main if run["head"] in ("pooler", "distilbert")]
    both = {"distilbert": is_head("distilbert")}
    add("slope of log T on log rate", natural, "log rate", {"log rate": log_of("rate"), **both})
    add("T of distilbert over that of pooler", natural, "distilbert", {"log rate": log_of("rate"), **both}, power=True)
    for head in ("tanh", "relu", "none", "orthogonal"):
        chosen = [dosed(run) for run in main if run["head"] in ("pooler", head)]
        add(f"rate x T of {head} over that of pooler", chosen, head, {head: is_head(head)}, power=True)
    heads = [run for run in runs if run["head"] in ("pooler", "distilbert")]
    same = [run for run in heads if run["rate"] == 0.05]
    add("slope of log T on log gamma, the rate as it is", same, "log gamma", {"log gamma": log_of("gamma"), **both})
    moved = [run for run in heads if math.isclose(run["rate"] * run["gamma"] ** 2, 0.05)]
    add("the same, rate x gamma squared as it is", moved, "log gamma", {"log gamma": log_of("gamma"), **both})
    table("Dose: one client", rows)
    laws = []
    for name, size in (("A: mean square", SQUARE), ("B: speed", SPEED)):
        free = law(runs, size)
        laws.append(
            {
                "size": name,
                "slope of log (rate x T) on log (gamma squared x size)": free.said("log size"),
                "predicted": "-1",
                "deviation of log T": free.sigma,
                "runs (left)": f"{free.runs} ({free.seen})",
            }
        )
    table("Two laws over all runs", laws)


def prediction(runs: Sequence[Run]) -> None:
    """The paper's cell: which speed a model needs to leave chance within 100 rounds."""
    counts = (1, 2, 4, 8, 16, 32)
    doses = [PAPER / count for count in counts]
    rows = [
        {"clients": count, "rate x steps of a client": dose, "speed needed": f"{value:.2g} ({low:.2g} to {high:.2g})"}
        for count, dose, (value, low, high) in zip(counts, doses, speed_needed(law(runs), doses), strict=True)
    ]
    table("What the paper's protocol needs: IMDB, 100 rounds of two epochs, batches of 32, rate 2e-5", rows)


def clients(runs: Sequence[Run]) -> None:
    """Many clients."""
    many = [run for run in runs if run["steps"] is None]
    head = {"distilbert": is_head("distilbert")}
    rounds = epochs(many, {"log K": log_of("clients"), **head})
    steps = Fit(many, {"log K": log_of("clients"), **head})
    rows = [{"what": "slope of log round on log K, an epoch a round", "found": rounds.said("log K")},
            {"what": "slope of log T (steps of a client) on log K", "found": steps.said("log K")},
            {"what": "T of distilbert over that of pooler", "found": steps.said("distilbert", power=True)}]  # fmt: skip
    two = [run for run in runs if run["client_steps"] == 2]
    if {run["clients"] for run in two} == {1, 32}:
        averaging = Fit(two, {"32 clients": lambda run: run["clients"] == 32, **head})
        rows.append(
            {
                "what": "T with 32 clients over that of one client, two steps a round",
                "found": averaging.said("32 clients", power=True),
            }
        )
    table("Clients", rows)


def together(runs: Sequence[Run]) -> None:
    """All runs of plain SGD on Spooky: the round of leaving chance with an epoch a round."""
    names = {"log K": "clients", "log rate": "rate", "log gamma": "gamma", "log speed of the head": "speed"}
    columns = {name: log_of(setting) for name, setting in names.items()}
    whole = epochs(runs, columns)
    rows: list[dict[str, Any]] = [
        {"slope of log round on": name, "found": whole.said(name), "decades": _decades(runs, column), "deviation": whole.sigma}
        for name, column in columns.items()
    ]
    clients, rate, gamma, speed = columns.values()
    combined: dict[str, Callable[[Run], float]] = {
        "log (K / (rate x gamma squared x speed))": lambda run: clients(run) - rate(run) - 2 * gamma(run) - speed(run),
        "log (K / (rate x gamma x root of speed))": lambda run: clients(run) - rate(run) - gamma(run) - speed(run) / 2,
    }
    for name, column in combined.items():
        fit = epochs(runs, {name: column})
        rows.append(
            {
                "slope of log round on": f"{name}, alone",
                "found": fit.said(name),
                "decades": _decades(runs, column),
                "deviation": fit.sigma,
            }
        )
    table(f"All runs of plain SGD together: {whole.runs} ({whole.seen} left chance)", rows)


def _decades(runs: Sequence[Run], column: Callable[[Run], float]) -> float:
    values = [column(run) for run in runs]
    return (max(values) - min(values)) / math.log(10)


def last_layer(runs: Sequence[Run]) -> None:
    """Only the last layer learns."""
    scaled = Fit(runs, {"log gamma": log_of("gamma"), "distilbert": is_head("distilbert")})
    own = [run | {name: run[name] and run[name] * run["rate"] * LAST[run["head"]] for name in ("left", "last")} for run in runs]
    heads = Fit(own, {"log gamma": log_of("gamma"), "distilbert": is_head("distilbert")})
    name = "rate x speed of the last layer x T, distilbert over none"
    rows = [
        {
            "what": "slope of log T on log gamma",
            "found": scaled.said("log gamma"),
            "runs (left)": f"{scaled.runs} ({scaled.seen})",
        },
        {"what": name, "found": heads.said("distilbert", power=True), "runs (left)": f"{heads.runs} ({heads.seen})"},
    ]
    table("Only the last layer learns", rows)


def fast(runs: Sequence[Run], before: Sequence[Run]) -> None:
    """Speeds above those that the law was fitted to."""
    rows = []
    fit = law([run for run in before if run["seed"] == 0])
    for head in ("none", "orthogonal", None):
        own = [run for run in runs if head in (None, run["head"])]
        off = by_the_law(own, fit)
        rows.append(
            {
                "head": head or "both",
                "T over the law's": off.said("constant", power=True),
                "runs (left)": f"{off.runs} ({off.seen})",
            }
        )
    table("Speeds of 0.4 to 1.9", rows)


def remedies(runs: Sequence[Run]) -> None:
    """What helps DistilBERT with 32 clients."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        plain = {"rate": 0.05, "steps": None, "optimizer": "sgd", "head": "distilbert", "gamma": 1, "probe": 0}
        more = ", ".join(f"{name} {run[name]}" for name, value in plain.items() if run[name] != value)
        groups[more or "as it is"].append(run)
    rows = [
        {
            "what": name,
            "leaves chance at round": ", ".join(_round(run) for run in found),
            "least loss, nats": ", ".join(f"{run['best_loss']:.3f}" for run in found),
            "accuracy there": ", ".join(f"{run['best_accuracy']:.3f}" for run in found),
        }
        for name, found in groups.items()
    ]
    table("Remedies: DistilBERT, 32 clients, 12 epochs (a value a seed)", rows)


def _round(run: Run) -> str:
    return "–" if run["left"] is None else f"{run['left'] / run['client_steps']:.1f}"


def screening(runs: Sequence[Run]) -> None:
    """Main effects of the factorial."""
    for task in sorted({run["task"] for run in runs}):
        own = [run for run in runs if run["task"] == task]
        rows = [
            {
                "factor": name,
                "T by a factor of": times,
                "least loss, nats, by": f"{value:+.3f} ({value - half:+.3f} to {value + half:+.3f})",
            }
            for name, (times, value, half) in effects(own).items()
        ]
        left = sum(run["left"] is not None for run in own)
        table(f"Screening: {task}, {len(own)} runs, {left} left chance", rows)
    factors = {name: of_factor(name) for name in FACTORS}
    mixed = [run for run in runs if run["shuffle"]]  # batches in the order of `authors` are of one author each
    whole = Fit(mixed, {"authors": lambda run: run["task"] == "authors", **factors})
    rows = [{"what": "T of authors over that of spooky_author, shuffled", "found": whole.said("authors", power=True)}]
    for name, adamw in (("SGD", False), ("AdamW", True)):
        own = [run for run in runs if FACTORS["AdamW"](run) == adamw and run["task"] != "authors"]
        fit = Fit(own, {name: factors[name] for name in ("gamma 2", "dropout 0.1")})
        rows.append(
            {"what": f"T with gamma 2 over that with gamma 1, spooky_author, {name}", "found": fit.said("gamma 2", power=True)}
        )
    table("Screening: comparisons", rows)


def main() -> None:
    runs = read(Path(sys.argv[1]) if len(sys.argv) > 1 else RECORDS)
    parts: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        parts[run["part"]].append(run)
    for name, what in (
        ("dose", dose),
        ("dose", prediction),
        ("clients", clients),
        ("remedies", remedies),
        ("screening", screening),
    ):
        if parts[name]:
            what(parts[name])
    if parts["dose"] and parts["clients"]:
        plain = [run for run in parts["remedies"] if run["optimizer"] == "sgd" and not run["probe"]]
        together([*parts["dose"], *parts["clients"], *plain, *parts["fast"]])
    if parts["last_layer"]:
        last_layer(parts["last_layer"])
    if parts["fast"] and parts["dose"]:
        fast(parts["fast"], parts["dose"])


if __name__ == "__main__":
    main()
