"""What the runs of the study say: `python experiments/question/analysis.py` prints tables of records.jsonl.

Another file, or a folder of records (runs/question), may be named.

T is the step of a client at which a run leaves chance. Laws are fitted to log T by maximum likelihood with normal errors; a run
that has not left counts as T greater than its last step (Tobin 1958). Intervals are of 95 %, from the likelihood's curvature.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.stats import norm

RECORDS = Path(__file__).parent / "records.jsonl"
MARGIN, NATS = 0.05, 0.05  # of accuracy above the majority class; of loss below guessing the frequencies
SQUARE = {"pooler": 1.57, "tanh": 7.60, "relu": 4.04, "none": 53.4, "distilbert": 3.96, "orthogonal": 52.3}
SPEED = {"pooler": 0.0127, "tanh": 0.0260, "relu": 0.0141, "none": 0.121, "distilbert": 0.0120, "orthogonal": 0.103}
Run = dict[str, Any]


def read(path: Path = RECORDS) -> list[Run]:
    """The runs of records.jsonl, or of a folder of records, each with its settings and what came of it.

    `curve` has (step of a client, round, accuracy, loss) for each evaluation; `left` is T, or None.
    """
    lines = [one.read_text() for one in sorted(path.glob("*.json"))] if path.is_dir() else path.read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    for run in runs:
        run["client_steps"] = run["steps"] or 64 // run["clients"]
        run["curve"] = [
            (run["client_steps"] * one["round"], one["round"], one["accuracy"], one["loss_nats"])
            for one in run["rounds_evaluated"]
        ]
        run["left"], run["last"] = _by_loss(run), run["curve"][-1][0]
        run["left_by_accuracy"] = _by_accuracy(run)
        run["best_loss"] = min(point[3] for point in run["curve"])
        run["best_accuracy"] = max(point[2] for point in run["curve"] if point[3] == run["best_loss"])
    return runs


def _by_loss(run: Run) -> float | None:
    """The step at which the loss first is below that of guessing by 0.05 nats, by a line from the evaluation before."""
    step_before, loss_before = 0.0, max(run["entropy"], math.log(16 if run["task"] == "authors" else 3))
    level = run["entropy"] - NATS
    for step, _, _, loss in run["curve"]:
        if loss < level:
            return step_before + (step - step_before) * (loss_before - level) / (loss_before - loss)
        step_before, loss_before = step, loss
    return None


def _by_accuracy(run: Run) -> float | None:
    """The step of the first evaluation from which on the accuracy stays above the majority's by 0.05."""
    left = None
    for step, _, accuracy, _ in run["curve"]:
        left = None if accuracy <= run["majority"] + MARGIN else left if left is not None else step
    return left


class Fit:
    """A linear law of log T.

    Args:
        runs: each with `left` (T, or None) and `last`.
        columns: name -> the value of a run; a constant is added, and what is the same for all runs is left out.
        response: what is fitted; steps, or another unit such as rounds by a divisor.
    """

    def __init__(
        self, runs: Sequence[Run], columns: Mapping[str, Callable[[Run], float]], unit: Callable[[Run], float] = lambda run: 1
    ) -> None:
        columns = {name: column for name, column in columns.items() if len({float(column(run)) for run in runs}) > 1}
        x = np.array([[1.0, *(float(column(run)) for column in columns.values())] for run in runs])
        seen = np.array([run["left"] is not None for run in runs])
        y = np.log([(run["left"] or run["last"]) / unit(run) for run in runs])

        def unlikely(parameters: np.ndarray) -> float:
            *weights, log_sigma = parameters
            z = (y - x @ np.array(weights)) / math.exp(log_sigma)
            return -float(np.where(seen, norm.logpdf(z) - log_sigma, norm.logsf(z)).sum())

        start = np.append(np.linalg.lstsq(x, y, rcond=None)[0], math.log(0.3))
        found = minimize(unlikely, start, method="BFGS", options={"gtol": 1e-6})
        try:
            spread = np.sqrt(np.diag(np.linalg.inv(_curvature(unlikely, found.x))))
        except np.linalg.LinAlgError:  # a group of which no run has left has no upper end
            spread = np.full(len(found.x), np.inf)
        freedom = max(len(runs) - x.shape[1], 1)
        wider = math.sqrt(len(runs) / freedom) * _student(freedom) / 1.96  # few runs: as in least squares
        names = ["constant", *columns]
        self.value = dict(zip(names, found.x, strict=False))
        self.half = {name: 1.96 * wider * width for name, width in zip(names, spread, strict=False)}
        self.sigma, self.runs, self.seen = math.exp(found.x[-1]) * math.sqrt(len(runs) / freedom), len(runs), int(seen.sum())

    def said(self, name: str, power: bool = False) -> str:
        """A coefficient with its interval; as a factor where it is that of a yes or no."""
        if name not in self.value:
            return "not known: all runs are alike in this"
        low, value, high = (self.value[name] + sign * self.half[name] for sign in (-1, 0, 1))
        if power:
            low, value, high = math.exp(low), math.exp(value), math.exp(high)
        return f"{value:.2f} ({low:.2f} to {high:.2f})" if np.isfinite(self.half[name]) else "not known: none of them left"


def _student(freedom: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def _curvature(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-3) -> np.ndarray:
    size = len(at)
    found = np.empty((size, size))
    moves = step * np.eye(size)
    for i in range(size):
        for j in range(size):
            corners = [a * b * function(at + a * moves[i] + b * moves[j]) for a in (1, -1) for b in (1, -1)]
            found[i, j] = sum(corners) / (4 * step**2)
    return found


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


def _is(head: str) -> Callable[[Run], float]:
    return lambda run: float(run["head"] == head)


def _of_factor(name: str) -> Callable[[Run], float]:
    return lambda run: float(FACTORS[name](run))


def _log(name: str) -> Callable[[Run], float]:
    return lambda run: math.log(run[name])


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
    both = {"distilbert": _is("distilbert")}
    add("slope of log T on log rate", natural, "log rate", {"log rate": _log("rate"), **both})
    add("T of distilbert over that of pooler", natural, "distilbert", {"log rate": _log("rate"), **both}, power=True)
    for head in ("tanh", "relu", "none", "orthogonal"):
        dosed = [_dosed(run) for run in main if run["head"] in ("pooler", head)]
        add(f"rate x T of {head} over that of pooler", dosed, head, {head: _is(head)}, power=True)
    heads = [run for run in runs if run["head"] in ("pooler", "distilbert")]
    same = [run for run in heads if run["rate"] == 0.05]
    add("slope of log T on log gamma, the rate as it is", same, "log gamma", {"log gamma": _log("gamma"), **both})
    moved = [run for run in heads if math.isclose(run["rate"] * run["gamma"] ** 2, 0.05)]
    add("the same, rate x gamma squared as it is", moved, "log gamma", {"log gamma": _log("gamma"), **both})
    table("Dose: one client", rows)
    laws = []
    for name, size in (("A: mean square", SQUARE), ("B: speed", SPEED)):
        free = Fit([_dosed(run) for run in runs], {"log size": _size(size)})
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


def _size(size: Mapping[str, float]) -> Callable[[Run], float]:
    return lambda run: math.log(run["gamma"] ** 2 * size[run["head"]])


def _dosed(run: Run) -> Run:
    """The run with rate x steps in the place of steps."""
    return run | {"left": run["left"] and run["left"] * run["rate"], "last": run["last"] * run["rate"]}


def clients(runs: Sequence[Run]) -> None:
    """Many clients."""
    many = [run for run in runs if run["steps"] is None]
    head = {"distilbert": _is("distilbert")}
    rounds = Fit(many, {"log K": _log("clients"), **head}, unit=lambda run: run["client_steps"])
    steps = Fit(many, {"log K": _log("clients"), **head})
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


FACTORS: dict[str, Callable[[Run], bool]] = {
    "DistilBERT's head": lambda run: run["head"] == "distilbert",
    "gamma 2": lambda run: run["gamma"] == 2,
    "16 clients": lambda run: run["clients"] == 16,
    "steps fixed": lambda run: run["steps"] is not None,
    "no mask": lambda run: not run["mask"],
    "no shuffling": lambda run: not run["shuffle"],
    "dropout 0.1": lambda run: run["dropout"] > 0,
    "AdamW": lambda run: run["optimizer"] == "adamw",
}


def screening(runs: Sequence[Run]) -> None:
    """Main effects of the factorial."""
    for task in sorted({run["task"] for run in runs}):
        own = [run for run in runs if run["task"] == task]
        signs = np.array([[1.0, *(2.0 * bool(of(run)) - 1 for of in FACTORS.values())] for run in own])
        loss = np.array([run["best_loss"] for run in own])
        weights, *_ = np.linalg.lstsq(signs, loss, rcond=None)
        freedom = max(len(own) - signs.shape[1], 1)
        error = math.sqrt(float(((loss - signs @ weights) ** 2).sum()) / freedom / len(own))
        fit, half = Fit(own, {name: _of_factor(name) for name in FACTORS}), _student(freedom) * error
        rows = [
            {
                "factor": name,
                "T by a factor of": fit.said(name, power=True),
                "least loss, nats, by": f"{2 * weight:+.3f} ({2 * (weight - half):+.3f} to {2 * (weight + half):+.3f})",
            }
            for name, weight in zip(FACTORS, weights[1:], strict=True)
        ]
        table(f"Screening: {task}, {len(own)} runs, {fit.seen} left chance", rows)


def main() -> None:
    runs = read(Path(sys.argv[1]) if len(sys.argv) > 1 else RECORDS)
    for name, what in (("dose", dose), ("clients", clients), ("remedies", remedies), ("screening", screening)):
        part = [run for run in runs if run["part"] == name]
        if part:
            what(part)


if __name__ == "__main__":
    main()
