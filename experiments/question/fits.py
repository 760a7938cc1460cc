"""Laws that are linear in log T, and the effects of the screening.

They are fitted by maximum likelihood with normal errors of log T; a run that has not left counts as T greater than its last
step (Tobin 1958). Intervals are of 95 %, from the likelihood's curvature, with a mean of its own for each seed, widened as in
least squares for the runs that have left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from records import Column, Run
from scipy.optimize import minimize
from scipy.stats import norm, t


class Fit:
    """A linear law of log T.

    Args:
        runs: each with `left` (T, or None) and `last`.
        columns: name -> the value of a run; a constant is added, and what is the same for all runs is left out.
    """

    def __init__(self, runs: Sequence[Run], columns: Mapping[str, Column]) -> None:
        columns = {**columns, "seed": lambda run: run.get("seed", 0) - 0.5}
        columns = {name: column for name, column in columns.items() if len({float(column(run)) for run in runs}) > 1}
        x = np.array([[1.0, *(float(column(run)) for column in columns.values())] for run in runs])
        start = np.linalg.lstsq(x, _logs(runs), rcond=None)[0]
        found, covariance, self.sigma = maximum(runs, lambda weights: x @ weights, start)
        self.runs, self.seen = len(runs), sum(run["left"] is not None for run in runs)
        spread = np.sqrt(np.where(np.diag(covariance) > 0, np.diag(covariance), np.inf))
        self.covariance = covariance  # of the values, in their order
        names = ["constant", *columns]
        self.value = dict(zip(names, found, strict=True))
        self.half = {name: 1.96 * width for name, width in zip(names, spread, strict=True)}
        self.saturated = self.seen <= x.shape[1]  # as many coefficients as runs: nothing is left to tell an interval from

    def said(self, name: str, power: bool = False) -> str:
        """A coefficient with its interval; as a factor where it is that of a yes or no."""
        if name not in self.value:
            return "not known: all runs are alike in this"
        low, value, high = (self.value[name] + sign * self.half[name] for sign in (-1, 0, 1))
        if power:
            with np.errstate(over="ignore"):
                low, value, high = np.exp((low, value, high))
        if not np.isfinite(high):
            return "not known: too few of them left"
        return f"{value:.2f} (too few runs for an interval)" if self.saturated else f"{value:.2f} ({low:.2f} to {high:.2f})"


def _logs(runs: Sequence[Run]) -> np.ndarray:
    return np.log([run["left"] or run["last"] for run in runs])


def maximum(
    runs: Sequence[Run], means: Callable[[np.ndarray], np.ndarray], start: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Most likely parameters (p,) of a law of log T, their covariance (p, p), and the deviation of log T from it.

    Args:
        means: parameters (p,) -> expected log T of each run.
        start: parameters to begin with.
    """
    seen = np.array([run["left"] is not None for run in runs])
    y = _logs(runs)

    def unlikely(parameters: np.ndarray) -> float:
        *own, log_sigma = parameters
        sigma, mean = math.exp(log_sigma), means(np.array(own))
        z = (y - mean) / sigma
        return -float(np.where(seen, norm.logpdf(z) - log_sigma, norm.logsf(z)).sum())

    found = minimize(unlikely, np.append(start, math.log(0.3)), method="BFGS", options={"gtol": 1e-6})
    try:
        covariance = np.linalg.inv(_curvature(unlikely, found.x))
    except np.linalg.LinAlgError:  # a group of which no run has left has no upper end
        covariance = np.full((len(found.x), len(found.x)), np.inf)
    freedom = max(int(seen.sum()) - len(start), 1)
    wider = math.sqrt(max(int(seen.sum()), 1) / freedom)  # few runs: as in least squares
    quantile = float(t.ppf(0.975, freedom)) / 1.96
    return found.x[:-1], (wider * quantile) ** 2 * covariance[:-1, :-1], math.exp(found.x[-1]) * wider


def _curvature(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-3) -> np.ndarray:
    size = len(at)
    found = np.empty((size, size))
    moves = step * np.eye(size)
    for i in range(size):
        for j in range(size):
            corners = [a * b * function(at + a * moves[i] + b * moves[j]) for a in (1, -1) for b in (1, -1)]
            found[i, j] = sum(corners) / (4 * step**2)
    return found


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


def of_factor(name: str) -> Column:
    """A column: 1 where a factor of the screening is at its second level, else 0."""
    return lambda run: float(FACTORS[name](run))


def effects(runs: Sequence[Run]) -> tuple[Fit, dict[str, tuple[float, float]]]:
    """Main effects of the factors: on log T, and on the least loss in nats with half its interval."""
    factors: dict[str, Column] = {name: of_factor(name) for name in FACTORS}
    columns = [*factors.values(), *([lambda run: run["seed"]] if len({run["seed"] for run in runs}) > 1 else [])]
    signs = np.array([[1.0, *(2.0 * column(run) - 1 for column in columns)] for run in runs])
    loss = np.array([run["best_loss"] for run in runs])
    weights, *_ = np.linalg.lstsq(signs, loss, rcond=None)
    freedom = max(len(runs) - signs.shape[1], 1)
    error = math.sqrt(float(((loss - signs @ weights) ** 2).sum()) / freedom / len(runs))
    half = 2 * float(t.ppf(0.975, freedom)) * error
    return Fit(runs, factors), {name: (float(2 * weight), half) for name, weight in zip(factors, weights[1:], strict=False)}
