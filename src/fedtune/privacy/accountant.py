"""What rounds of noise come to: epsilon by two accountants of `dp-accounting`, the noise for an epsilon, the rounds within one.

    RDP    Mironov 2017, "Rényi Differential Privacy"; Mironov et al. 2019 (Poisson sampling); Wang, Balle and
           Kasiviswanathan 2019 (fixed sizes)
    PLD    Koskela et al. 2020; Doroshenko et al. 2022: privacy loss distributions, tighter, as upper bounds

Epsilon is that of (epsilon, delta) differential privacy; smaller is more private.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedtune.errors import UsageError, unsaid

ACCOUNTANTS = ("pld", "rdp", "classical")
LEAST_NOISE, MOST_NOISE = 0.2, 1e6  # what is searched for a noise multiplier
FINE, QUICK = (
    1e-4,
    1e-3,
)  # to which PLD rounds losses up: the quick one gives less than 1e-4 of epsilon more, in an eighth of the time
_MOST_COUNT = 2**40
_MOST_LOSSES = 1e6  # intervals that an epsilon is divided into
_MOST_EPSILON = 1e8  # beyond, PLD's exponentials overflow, and its epsilon says as little as RDP's


@dataclass(frozen=True)
class Release:
    """One noisy sum, as an accountant sees it.

    Args:
        rate: the probability with which a client (or an example) is in it, or the share of clients that is.
        noise: standard deviation of the noise over what one client (or example) can move the sum by.
        fixed: (cohort, clients) where cohorts of a fixed size are drawn without replacement; None where each client is drawn by
            itself, or all are there.
    """

    rate: float
    noise: float
    fixed: tuple[int, int] | None = None

    def event(self) -> Any:
        """In the words of `dp-accounting`."""
        events = _library().dp_event
        gaussian = events.GaussianDpEvent(self.noise)
        if self.fixed is not None:
            return events.SampledWithoutReplacementDpEvent(self.fixed[1], self.fixed[0], gaussian)
        return events.PoissonSampledDpEvent(self.rate, gaussian) if self.rate < 1 else gaussian


def check_installed() -> None:
    """Raise `UsageError` where the package is missing."""
    _library()


@functools.cache
def _library() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise UsageError(
            "privacy", "no package dp-accounting", "after: pip install 'fedtune[privacy]' (the package dp-accounting)"
        ) from error
    return dp_accounting


@functools.lru_cache(maxsize=4096)
def epsilon_by(accountant: str, release: Release, count: int, delta: float, interval: float = FINE) -> float:
    """Epsilon of `count` releases at `delta`, by "rdp" or "pld" (with losses rounded to an interval); 0 of none.

    Above 10^8 that by PLD is RDP's, which is a bound, too.

    Raises:
        UsageError: by "pld", of cohorts of a fixed size, for which there is no such accountant.
    """
    if count == 0:
        return 0.0
    if accountant == "rdp":
        return epsilon_of_rdp(*rdp_of(release), count, delta)
    if release.fixed is not None:
        raise UsageError("privacy.accountant", accountant, "rdp, for cohorts of a fixed size")
    # with next to no noise losses are so large that those of the usual interval would fill the memory
    bound = epsilon_by("rdp", release, count, delta)
    if bound > _MOST_EPSILON:
        return bound
    losses = _library().pld.PLDAccountant(value_discretization_interval=max(interval, bound / _MOST_LOSSES))
    return float(losses.compose(release.event(), count).get_epsilon(delta))


@functools.lru_cache(maxsize=4096)
def rdp_of(release: Release) -> tuple[Any, Any]:
    """(orders,) the orders and the Rényi divergences of one release."""
    library = _library()
    relations = library.NeighboringRelation
    relation = relations.ADD_OR_REMOVE_ONE if release.fixed is None else relations.REPLACE_ONE
    # it says which of its many orders it leaves out, as it cannot compute them; the least over the others is a bound, too
    with unsaid(logging.getLogger("absl"), "_compute_log_a_frac failed to converge"):
        found = library.rdp.RdpAccountant(neighboring_relation=relation).compose(release.event())
    return found.orders, found.rdp


def epsilon_of_rdp(orders: Any, divergences: Any, count: int, delta: float) -> float:
    """Epsilon from the Rényi divergences of one release, `count` times."""
    found, _ = _library().rdp.compute_epsilon(orders, count * divergences, delta)
    return float(found)


def noise_for(make: Callable[[float], Release], count: int, delta: float, epsilon: float, accountant: str) -> float:
    """The least noise, to a part in 100,000, with which `count` releases stay within `epsilon`.

    Args:
        make: from a noise multiplier to a release.

    Raises:
        UsageError: an epsilon that needs less noise than 0.2, which is as good as none, or more than 1,000,000.
    """

    from scipy.optimize import brentq  # it comes with dp-accounting

    def beyond(noise: float) -> float:
        return epsilon_by(accountant, make(noise), count, delta, QUICK) - epsilon

    if accountant == "classical":
        return math.sqrt(2 * math.log(1.25 / delta)) / epsilon
    high = 1.0
    while beyond(high) > 0:
        high *= 2
        if high > MOST_NOISE:
            raise UsageError("privacy.epsilon", epsilon, f"an epsilon that needs noise up to {MOST_NOISE:g} times the clip")
    low = high / 2
    while beyond(low) <= 0:
        high, low = low, low / 2
        if high < LEAST_NOISE:
            raise UsageError("privacy.epsilon", epsilon, f"an epsilon that needs noise from {LEAST_NOISE} times the clip on")
    found = float(brentq(beyond, low, high, xtol=1e-6 * low))
    while beyond(found) > 0:
        found *= 1 + 2e-6
    return found


def count_within(release: Release, delta: float, epsilon: float, accountant: str) -> int:
    """How many releases stay within `epsilon`."""
    low, high = 0, 1
    while high < _MOST_COUNT and epsilon_by(accountant, release, high, delta, QUICK) <= epsilon:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if epsilon_by(accountant, release, middle, delta, QUICK) <= epsilon else (low, middle)
    return low
