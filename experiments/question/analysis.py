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

from fits import FACTORS, Fit, effects, of_factor
from laws import PAPER, Growth, Power, against
from records import NATS, RECORDS, Column, Run, dosed, in_epochs, is_head, log_of, read, scaled

BOTH = {"distilbert": is_head("distilbert")}


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows as Markdown."""
    if not rows:
        return
    print(f"\n**{title}**\n")
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print(
            "| "
            + " | ".join(
                "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()
            )
            + " |"
        )


def _row(what: str, fit: Fit, name: str, power: bool = False) -> dict[str, Any]:
    return {"what": what, "found": fit.said(name, power), "runs (left)": f"{fit.runs} ({fit.seen})"}


def dose(runs: Sequence[Run]) -> None:
    """Rate, head and scale."""
    main = [run for run in runs if run["gamma"] == 1]
    natural = [run for run in main if run["head"] in ("pooler", "distilbert")]
    by_rate = Fit(natural, {"log rate": log_of("rate"), **BOTH})
    rows = [
        _row("slope of log T on log rate", by_rate, "log rate"),
        _row("T of distilbert over that of pooler", by_rate, "distilbert", power=True),
    ]
    for head in ("tanh", "relu", "none", "orthogonal", "trained", "saturated"):
        chosen = [dosed(run) for run in main if run["head"] in ("pooler", head)]
        rows.append(_row(f"rate x T of {head} over that of pooler", Fit(chosen, {head: is_head(head)}), head, power=True))
    heads = [run for run in runs if run["head"] in ("pooler", "distilbert")]
    scale = {"log gamma": log_of("gamma"), **BOTH}
    same = [run for run in heads if run["rate"] == 0.05]
    moved = [run for run in heads if math.isclose(run["rate"] * run["gamma"] ** 2, 0.05)]
    rows.append(_row("slope of log T on log gamma, the rate as it is", Fit(same, scale), "log gamma"))
    rows.append(_row("the same, rate x gamma squared as it is", Fit(moved, scale), "log gamma"))
    table("One client: rate, head, scale", rows)


def laws(parts: Mapping[str, Sequence[Run]]) -> None:
    """What a head brings, and rate x T."""
    known = parts["dose"]
    square, power, growth = Power(known, "square"), Power(known), Growth(known)
    found: dict[str, tuple[Power | Growth, str]] = {
        "(gamma squared x mean square)^b": (square, f"b {square.fit.said('log size')}"),
        "(gamma squared x speed)^b": (power, f"b {power.fit.said('log size')}"),
        "growth": (growth, f"k {growth.k:.2f}"),
    }
    others = ("small_steps", "started", "fast", "last_layer")
    rows = []
    for name, (law, fitted) in found.items():
        off = {
            f"T over the law's, {part}": against(parts[part], law).said("constant", power=True)
            if parts[part] and (law is growth or part != "last_layer")
            else None
            for part in others
        }
        rows.append({"law": name, "fitted": fitted, "deviation of log T": law.sigma, **off})
    table(f"Laws, fitted to {len(known)} runs of one client", rows)
    new = [run for part in others for run in parts[part]]
    names = ("part", "head", "gamma", "rate", "seed")
    rows = [
        {name: run[name] for name in names}
        | {
            "T": run["left"] or f"> {run['last']}",
            "by the power law": None if run["part"] == "last_layer" else power.dose(run) / run["rate"],
            "by growth": growth.dose(run) / run["rate"],
        }
        for run in sorted(new, key=lambda run: (run["part"], run["head"], run["gamma"], -run["rate"], run["seed"]))
    ]
    table("Runs that no law was fitted to", rows)


def needed(runs: Sequence[Run]) -> None:
    """The paper's cell: which speed a model needs to leave chance within 100 rounds."""
    counts = (1, 2, 4, 8, 16, 32)
    doses = [PAPER / count for count in counts]
    power = Power(runs)
    rows = [
        {"clients": count, "rate x steps of a client": dose, "speed needed": f"{value:.2g} ({low:.2g} to {high:.2g})"}
        for count, dose, (value, low, high) in zip(counts, doses, power.speed_needed(doses), strict=True)
    ]
    table("The paper's cell: IMDB, 100 rounds of two epochs, batches of 32, rate 2e-5", rows)
    known = [run["gamma"] ** 2 * run["speed"] for run in runs]
    print(f"\nPower law of {len(runs)} runs with speeds of {min(known):.2g} to {max(known):.2g}: ", end="")
    print(f"b {power.fit.said('log size')}, deviation of log T {power.sigma:.2f}")


def alone(runs: Sequence[Run]) -> list[Run]:
    """One client with eight steps a round at the rate of the runs with many."""
    return [
        run
        for run in runs
        if (run["rate"], run["gamma"], run["steps"]) == (0.05, 1, 8) and run["head"] in ("pooler", "distilbert")
    ]


def clients(one: Sequence[Run], runs: Sequence[Run]) -> None:
    """Many clients."""
    many = [*one, *(run for run in runs if run["steps"] is None)]
    most = max(run["clients"] for run in many)
    steps = Fit(many, {"log K": log_of("clients"), **BOTH})
    rows = [
        _row(f"slope of log T (steps of a client) on log K, 1 to {most} clients", steps, "log K"),
        _row("T of distilbert over that of pooler", steps, "distilbert", power=True),
    ]
    two = [run for run in runs if run["client_steps"] == 2]
    if two:
        averaging = Fit(two, {"32 clients": lambda run: run["clients"] == 32, **BOTH})
        rows.append(_row("T with 32 clients over that of one client, two steps a round", averaging, "32 clients", power=True))
    table("Clients", rows)


def together(runs: Sequence[Run]) -> None:
    """All runs of plain SGD on Spooky: the round of leaving chance with an epoch a round."""
    names = {"log K": "clients", "log rate": "rate", "log gamma": "gamma", "log speed of the head": "speed"}
    columns = {name: log_of(setting) for name, setting in names.items()}
    clients, rate, gamma, speed = columns.values()
    combined: dict[str, Column] = {
        "log (K / (rate x gamma squared x speed)), alone": lambda run: clients(run) - rate(run) - 2 * gamma(run) - speed(run),
        "log (K / (rate x gamma x root of speed)), alone": lambda run: clients(run) - rate(run) - gamma(run) - speed(run) / 2,
    }
    own = [in_epochs(run) for run in runs]
    rows = []
    for group in (columns, *({name: column} for name, column in combined.items())):
        fit = Fit(own, group)
        for name, column in group.items():
            values = [column(run) for run in runs]
            decades = (max(values) - min(values)) / math.log(10)
            rows.append({"slope of log round on": name, "found": fit.said(name), "decades": decades, "deviation": fit.sigma})
    seen = sum(run["left"] is not None for run in runs)
    table(f"All runs of plain SGD in which everything learns: {len(runs)} ({seen} left chance)", rows)


def last_layer(runs: Sequence[Run]) -> None:
    """Only the last layer learns."""
    columns = {"log gamma": log_of("gamma"), **BOTH}
    own = [scaled(run, run["rate"] * run["last_speed"]) for run in runs]
    rows = [
        _row("slope of log T on log gamma", Fit(runs, columns), "log gamma"),
        _row("rate x speed of the last layer x T, distilbert over none", Fit(own, columns), "distilbert", power=True),
    ]
    table("Only the last layer learns", rows)


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
            "steps of a client": found[0]["last"],
            "T": ", ".join("–" if run["left"] is None else f"{run['left']:.1f}" for run in found),
            "T by accuracy": ", ".join(str(run["left_by_accuracy"] or "–") for run in found),
            "least loss, nats": ", ".join(f"{run['best_loss']:.3f}" for run in found),
            "accuracy there": ", ".join(f"{run['best_accuracy']:.3f}" for run in found),
        }
        for name, found in groups.items()
    ]
    table("Remedies: DistilBERT, 32 clients (a value a seed)", rows)


def screening(runs: Sequence[Run]) -> None:
    """Main effects of the factorial."""
    for task in sorted({run["task"] for run in runs}):
        own = [run for run in runs if run["task"] == task]
        fit, losses = effects(own)
        rows = [
            {
                "factor": name,
                "T by a factor of": fit.said(name, power=True),
                "least loss, nats, by": f"{value:+.3f} ({value - half:+.3f} to {value + half:+.3f})",
            }
            for name, (value, half) in losses.items()
        ]
        left = sum(run["left"] is not None for run in own)
        table(f"Screening: {task}, {len(own)} runs, {left} left chance", rows)
    factors = {name: of_factor(name) for name in FACTORS}
    mixed = [run for run in runs if run["shuffle"]]  # batches in the order of `authors` are of one author each
    whole = Fit(mixed, {"authors": lambda run: run["task"] == "authors", **factors})
    rows = [_row("T of authors over that of spooky_author, shuffled", whole, "authors", power=True)]
    for name, adamw in (("SGD", False), ("AdamW", True)):
        own = [run for run in runs if FACTORS["AdamW"](run) == adamw and run["task"] != "authors"]
        fit = Fit(own, {name: factors[name] for name in ("gamma 2", "dropout 0.1")})
        rows.append(_row(f"T with gamma 2 over that with gamma 1, spooky_author, {name}", fit, "gamma 2", power=True))
    table("Screening: comparisons", rows)


def responses(path: Path) -> None:
    """The same slopes where leaving chance is read in another way."""
    ways: dict[str, tuple[float, Callable[[Run], Run]]] = {
        f"loss {NATS} nats below guessing": (NATS, lambda run: run),
        "loss 0.02 nats below guessing": (0.02, lambda run: run),
        "loss 0.1 nats below guessing": (0.1, lambda run: run),
        "accuracy 5 points above the majority, to the end": (NATS, lambda run: run | {"left": run["left_by_accuracy"]}),
    }
    rows = []
    for name, (nats, way) in ways.items():
        runs = [way(run) for run in read(path, nats) if run["task"] == "spooky_author"]
        main = [run for run in runs if run["part"] == "dose" and run["head"] in ("pooler", "distilbert")]
        many = [run for run in runs if run["part"] == "clients" and run["steps"] is None]
        by_rate = Fit([run for run in main if run["gamma"] == 1], {"log rate": log_of("rate"), **BOTH})
        by_gamma = Fit([run for run in main if run["rate"] == 0.05], {"log gamma": log_of("gamma"), **BOTH})
        by_clients = Fit([*alone(main), *many], {"log K": log_of("clients"), **BOTH})
        rows.append(
            {
                "left where": name,
                "log rate": by_rate.said("log rate"),
                "log gamma": by_gamma.said("log gamma"),
                "log K": by_clients.said("log K"),
                "distilbert over pooler": by_clients.said("distilbert", power=True),
            }
        )
    table("Slopes of log T by what counts as leaving chance", rows)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RECORDS
    parts: dict[str, list[Run]] = defaultdict(list)
    for run in read(path):
        parts[run["part"]].append(run)
    if parts["dose"]:
        dose([*parts["dose"], *parts["started"]])
        laws(parts)
        needed([run for part in ("dose", "small_steps", "started", "fast") for run in parts[part]])
    if parts["dose"] and parts["clients"]:
        clients(alone(parts["dose"]), parts["clients"])
        plain = [run for run in parts["remedies"] if run["optimizer"] == "sgd" and not run["probe"]]
        together([*parts["dose"], *parts["clients"], *plain, *parts["small_steps"]])
        responses(path)
    for name, what in (("last_layer", last_layer), ("remedies", remedies), ("screening", screening)):
        if parts[name]:
            what(parts[name])


if __name__ == "__main__":
    main()
