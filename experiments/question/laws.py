"""Two laws of rate x T from what a head brings, and what they say of other cells."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from fits import Fit, maximum
from records import NATS, Run, dosed, scaled, scaled_by_gamma

PAPER = 100 * 2 * (25_000 // 32) * 2e-5  # rate x steps of one client that has all of IMDB
IMDB = 0.5  # mean square of (frequencies - class as a unit vector): two classes of one size


class Power:
    """rate x T = c (gamma squared x size)^b, found after the first replicate; c and b are fitted.

    Args:
        runs: what it is fitted to.
        size: "speed" or "square".
    """

    def __init__(self, runs: Sequence[Run], size: str = "speed") -> None:
        self.size = scaled_by_gamma(size)
        self.fit = Fit([dosed(run) for run in runs], {"log size": lambda run: math.log(self.size(run))})
        self.sigma = self.fit.sigma

    def dose(self, run: Run) -> float:
        """rate x T of a run."""
        return math.exp(self.fit.value["constant"] + self.fit.value["log size"] * math.log(self.size(run)))

    def speed_needed(self, doses: Sequence[float]) -> np.ndarray:
        """Speed with which a model leaves chance when rate x steps are those: (doses, 3), value and ends of the interval."""
        rng = np.random.default_rng(0)
        mean = np.array([self.fit.value["constant"], self.fit.value["log size"]])
        constants, slopes = rng.multivariate_normal(mean, self.fit.covariance[:2, :2], 100_000).T
        off = rng.normal(0, self.sigma, 100_000)  # one model from another
        return np.array(
            [
                np.exp([(math.log(dose) - mean[0]) / mean[1], *_ends((math.log(dose) - constants - off) / slopes)])
                for dose in doses
            ]
        )


class Growth:
    """rate x T = asinh(2 k gamma x) / (2 k gamma), x = nats / (residual x gamma squared x speed); k is fitted.

    A last layer v that reads gamma x features u learns at a speed that goes with gamma u, the features at one that goes with
    gamma v. Both then grow as exp(k gamma x rate x steps), and what is learned as sinh(2 k gamma x rate x steps) / (2 k gamma),
    which begins with the speed that is measured before training. Where features do not learn k is 0, and rate x T is x.

    Args:
        runs: what it is fitted to; one of `last_layer` has k = 0 and the speed of its last layer.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        doses = [dosed(run) for run in runs]

        def means(parameters: np.ndarray) -> np.ndarray:
            return np.log([self._dose(run, math.exp(parameters[0])) for run in runs])

        found, covariance, self.sigma = maximum(doses, means, np.array([0.0]))
        self.log_k, self.spread = float(found[0]), math.sqrt(covariance[0, 0])
        self.k = math.exp(self.log_k)

    @staticmethod
    def _dose(run: Run, k: float) -> float:
        if run.get("trained") == "last":
            return NATS / (run["residual"] * scaled_by_gamma("last_speed")(run))
        x = NATS / (run["residual"] * scaled_by_gamma("speed")(run))
        return math.asinh(2 * k * run["gamma"] * x) / (2 * k * run["gamma"])

    def dose(self, run: Run) -> float:
        """rate x T of a run."""
        return self._dose(run, self.k)

    def speed_needed(self, doses: Sequence[float], residual: float = IMDB) -> np.ndarray:
        """As of `Power`, on texts of some residual."""
        rng = np.random.default_rng(0)
        k, off = np.exp(rng.normal(self.log_k, self.spread, 100_000)), np.exp(rng.normal(0, self.sigma, 100_000))
        sampled = [np.append(self.k, k), np.append(1, off)]  # the middle first
        needed = [NATS / residual * 2 * sampled[0] / np.sinh(2 * sampled[0] * dose / sampled[1]) for dose in doses]
        return np.array([[one[0], *_ends(one[1:])] for one in needed])


def _ends(sampled: np.ndarray) -> np.ndarray:
    return np.quantile(sampled, [0.025, 0.975])


def against(runs: Sequence[Run], law: Power | Growth) -> Fit:
    """By what T differs from a law: the constant is the mean of log (T / the law's)."""
    return Fit([scaled(run, run["rate"] / law.dose(run)) for run in runs], {})
