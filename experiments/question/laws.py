"""What is read out of the records of the study: T, and laws that are fitted to it.

T is the step of a client at which a run leaves chance. Laws are fitted to log T by maximum likelihood with normal errors; a run
that has not left counts as T greater than its last step (Tobin 1958). Intervals are of 95 %, from the likelihood's curvature.
"""

from __future__ import annotations

import json
import math
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
LAST = {"none": 0.0548, "distilbert": 0.0029}  # of SPEED, the last layer's
PAPER = 100 * 2 * (25_000 // 32) * 2e-5  # rate x steps of one client that has all of IMDB
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
        unit: steps of a client in the unit that T is fitted in; 1 for steps themselves, those of a round for rounds.
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
            covariance = np.linalg.inv(_curvature(unlikely, found.x))
        except np.linalg.LinAlgError:  # a group of which no run has left has no upper end
            covariance = np.full((len(found.x), len(found.x)), np.inf)
        variances = np.diag(covariance)
        spread = np.sqrt(np.where(variances > 0, variances, np.inf))
        freedom = max(len(runs) - x.shape[1], 1)
        wider = math.sqrt(len(runs) / freedom) * _student(freedom) / 1.96  # few runs: as in least squares
        self.covariance = wider**2 * covariance[:-1, :-1]  # of the values, in their order
        names = ["constant", *columns]
        self.value = dict(zip(names, found.x, strict=False))
        self.half = {name: 1.96 * wider * width for name, width in zip(names, spread, strict=False)}
        self.saturated = len(runs) <= x.shape[1]  # as many coefficients as runs: nothing is left to tell an interval from
        self.sigma, self.runs, self.seen = math.exp(found.x[-1]) * math.sqrt(len(runs) / freedom), len(runs), int(seen.sum())

    def said(self, name: str, power: bool = False) -> str:
        """A coefficient with its interval; as a factor where it is that of a yes or no."""
        if name not in self.value:
            return "not known: all runs are alike in this"
        low, value, high = (self.value[name] + sign * self.half[name] for sign in (-1, 0, 1))
        if power:
            with np.errstate(over="ignore"):
                low, value, high = np.exp((low, value, high))
        if self.saturated and np.isfinite(high):
            return f"{value:.2f} (too few runs for an interval)"
        return f"{value:.2f} ({low:.2f} to {high:.2f})" if np.isfinite(high) else "not known: too few of them left"


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


def is_head(head: str) -> Callable[[Run], float]:
    """A column: 1 for the runs of a head, 0 for others."""
    return lambda run: float(run["head"] == head)


def of_factor(name: str) -> Callable[[Run], float]:
    """A column: 1 where a factor of the screening is at its second level, else 0."""
    return lambda run: float(FACTORS[name](run))


def log_of(name: str) -> Callable[[Run], float]:
    """A column: the log of a setting; that of `speed` is of the head's own, with gamma 1."""
    return lambda run: math.log(SPEED[run["head"]] if name == "speed" else run[name])


def _size(size: Mapping[str, float]) -> Callable[[Run], float]:
    return lambda run: math.log(run["gamma"] ** 2 * size[run["head"]])


def dosed(run: Run) -> Run:
    """The run with rate x steps in the place of steps."""
    return run | {"left": run["left"] and run["left"] * run["rate"], "last": run["last"] * run["rate"]}


def law(runs: Sequence[Run], size: Mapping[str, float] = SPEED) -> Fit:
    """Rate x T as a power of gamma squared times the size of a head; the columns are `constant` and `log size`."""
    return Fit([dosed(run) for run in runs], {"log size": _size(size)})


def epochs(runs: Sequence[Run], columns: Mapping[str, Callable[[Run], float]]) -> Fit:
    """Epochs of a client's texts until it leaves chance; with one epoch a round these are rounds."""
    return Fit(runs, columns, unit=lambda run: 64 / run["clients"])


def by_the_law(runs: Sequence[Run], fit: Fit) -> Fit:
    """What T is a multiple of, where a law of other runs gives 1: the constant is the log of the mean."""
    own = []
    for run in map(dosed, runs):
        given = math.exp(fit.value["constant"] + fit.value["log size"] * _size(SPEED)(run))
        own.append(run | {"left": run["left"] and run["left"] / given, "last": run["last"] / given})
    return Fit(own, {})


def speed_needed(fit: Fit, doses: Sequence[float]) -> np.ndarray:
    """Speed with which chance is left just at the end of a run, where a law holds: (doses, 3), value and ends of the interval.

    Args:
        fit: of `law`.
        doses: rate x steps of a client in a run.
    """
    rng = np.random.default_rng(0)
    names = ["constant", "log size"]
    mean = np.array([fit.value[name] for name in names])
    constants, slopes = rng.multivariate_normal(mean, fit.covariance, 100_000).T
    off = rng.normal(0, fit.sigma, 100_000)  # one model from another
    values = []
    for dose in doses:
        sampled = (math.log(dose) - constants - off) / slopes
        middle = (math.log(dose) - mean[0]) / mean[1]
        values.append(np.exp([middle, *np.quantile(sampled, [0.025, 0.975])]))
    return np.array(values)


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


def effects(runs: Sequence[Run]) -> dict[str, tuple[str, float, float]]:
    """Main effects: factor -> what it multiplies T by, in words; nats that it adds to the least loss; half its interval."""
    signs = np.array([[1.0, *(2.0 * bool(of(run)) - 1 for of in FACTORS.values())] for run in runs])
    loss = np.array([run["best_loss"] for run in runs])
    weights, *_ = np.linalg.lstsq(signs, loss, rcond=None)
    freedom = max(len(runs) - signs.shape[1], 1)
    error = math.sqrt(float(((loss - signs @ weights) ** 2).sum()) / freedom / len(runs))
    fit, half = Fit(runs, {name: of_factor(name) for name in FACTORS}), _student(freedom) * error
    return {
        name: (fit.said(name, power=True), float(2 * weight), float(2 * half))
        for name, weight in zip(FACTORS, weights[1:], strict=True)
    }
