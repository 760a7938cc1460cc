"""What a mechanism means in one run: who is drawn, how much noise there is, for how many rounds, and what may be said of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import numpy as np

from fedtune.errors import UsageError, whole
from fedtune.federated.cohorts import cohort
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm
from fedtune.federated.state import RoundResult, ServerState
from fedtune.privacy.accountant import Release, count_within, epsilon_by, epsilon_of_rdp, noise_for, rdp_of
from fedtune.privacy.aggregation import PrivateMean
from fedtune.privacy.mechanisms import AdaptiveGaussian, Banded, Mechanism
from fedtune.randomness import stream
from fedtune.tensors import Tensors, without

NOT_COVERED = (
    "not covered: metrics on held-out texts, counts and whatever else the records say of the clients (the guarantee is for the "
    "weights), tuning by looking at several runs, and whoever knows the seed, or which clients were drawn"
)


@final
@dataclass(frozen=True)
class PrivacyPlan:
    """A mechanism in a run.

    Args:
        mechanism: as the configuration has it.
        num_clients: N.
        cohort_size: q N, clients of a round in the mean; in cohorts of a fixed size always.
        noise: z, standard deviation of the noise in units of the clip.
        limit: the number of rounds after which the budget is used up; None: there is none.
    """

    mechanism: Mechanism
    num_clients: int
    cohort_size: int
    noise: float
    limit: int | None
    hides_clients: ClassVar[bool] = True

    @property
    def bands(self) -> int:
        """Rounds from one in which a client may be to the next one; 1 where it may be in any."""
        return self.mechanism.bands if isinstance(self.mechanism, Banded) else 1

    @property
    def rate(self) -> float:
        """The probability with which a client is in a round in which it may be."""
        return self.bands * self.cohort_size / self.num_clients

    def release(self, noise: float) -> Release:
        """A round, as an accountant sees it; replacing a client's update by another moves the sum by up to two clips."""
        if self.mechanism.relation == "add_or_remove_one":
            return Release(self.rate, noise)
        return Release(self.rate, noise / 2, (self.cohort_size, self.num_clients) if self.rate < 1 else None)

    def count(self, rounds: int) -> int:
        """Rounds in which one client may be."""
        return math.ceil(rounds / self.bands)

    def cohort(self, seed: int, number: int) -> list[int]:
        """The clients of a round."""
        if self.mechanism.sampling == "fixed":
            return cohort(seed, number, self.num_clients, self.cohort_size)
        drawn = stream(seed, "cohort", number).random(self.num_clients) < self.rate
        turn = np.arange(self.num_clients) % self.bands == (number - 1) % self.bands
        return np.flatnonzero(drawn & turn).tolist()

    def algorithm(self, algorithm: Algorithm, buffers: frozenset[str], personal: frozenset[str]) -> Algorithm:
        """An algorithm with the private mean in place of its own.

        Args:
            buffers: the names of the module's.
            personal: the names of what stays with the clients, and so is in no update.

        Raises:
            UsageError: buffers travel, which are averaged as they are.
        """
        check_buffers(buffers, personal)

        def named(state: ServerState, context: Context) -> Tensors:
            trains = algorithm.client.trains
            travel = without(state.weights, buffers | personal)
            return {name: tensor for name, tensor in travel.items() if trains(name, context.round)}

        mean = PrivateMean(self.mechanism, self.noise, self.rate, float(self.cohort_size), self.limit, named)
        return replace(algorithm, aggregator=mean)

    def noted(self, result: RoundResult, before: ServerState) -> RoundResult:
        """The result of a round, with the epsilon so far and the clip among its diagnostics; the ledger is the aggregator's."""
        memory = result.state.memory[PrivateMean.__name__]
        known = {name: value for name, value in result.diagnostics.items() if name.removesuffix("_norm") not in memory}
        rounds = int(memory["ledger"]["rounds"])
        epsilon = epsilon_of_rdp(*rdp_of(self.release(self.noise)), self.count(rounds), self.mechanism.delta)
        clip = {"clip": float(memory["clip"]["clip"])} if "clip" in memory else {}
        return replace(result, diagnostics=known | {"epsilon_rdp": epsilon} | clip)

    def figures(self, rounds: int) -> dict[str, Any]:
        """Epsilon after so many rounds by both accountants, and what it is of; None by PLD for cohorts of a fixed size."""
        whole("rounds", rounds, 0)
        release, count, delta = self.release(self.noise), self.count(rounds), self.mechanism.delta
        pld = epsilon_by("pld", release, count, delta) if release.fixed is None else None
        return {
            "epsilon_rdp": epsilon_by("rdp", release, count, delta),
            "epsilon_pld": pld,
            "delta": delta,
            "noise_multiplier": self.noise,
            "clip": self.mechanism.clip,
            "denominator": self.cohort_size,
            "sampling": self.mechanism.sampling,
            "sampling_rate": self.rate,
            "neighbours": self.mechanism.relation,
        }

    def sentence(self, rounds: int) -> str:
        """What may be said of a run after so many rounds."""
        found, mechanism = self.figures(rounds), self.mechanism
        pld = found["epsilon_pld"]
        tighter = "no PLD accountant for cohorts of a fixed size" if pld is None else f"{pld:.4f} by PLD"
        relation = "with one client more or less" if mechanism.relation == "add_or_remove_one" else "with one client replaced"
        first = "at first " if isinstance(mechanism, AdaptiveGaussian) else ""
        return (
            f"client-level differential privacy after {rounds} round{'s' * (rounds != 1)}: "
            f"epsilon {found['epsilon_rdp']:.4f} by RDP, {tighter}, "
            f"at delta {mechanism.delta:g}; unit: a client with all its texts; neighbours: federations {relation}; "
            f"sampling: {self._sampling}; denominator: {self.cohort_size}, whoever answers; "
            f"clip: {first}{mechanism.clip:g}, the length of an update; noise: {self._noise}; {NOT_COVERED}"
        )

    @property
    def _sampling(self) -> str:
        size, clients = self.cohort_size, self.num_clients
        whose = f"{clients} clients" if self.bands == 1 else f"{clients} clients, in {self.bands} groups in turn"
        if self.rate == 1:
            return f"none, all of {whose}"
        if self.mechanism.sampling == "fixed":
            return f"{size} of {whose}, without replacement"
        return f"Poisson, each of {whose}, with probability {self.rate:g}"

    @property
    def _noise(self) -> str:
        what = f"normal, standard deviation {self.noise:.6g} clips on the sum"
        if self.mechanism.relation == "replace_one":
            return f"{what}, half of that for each of the two that a replacement moves it by"
        if isinstance(self.mechanism, AdaptiveGaussian):
            return f"{what} and the count of what was not clipped, taken together"
        return (
            what if self.bands == 1 else f"{what} times the length of the matrix's columns, correlated over {self.bands} rounds"
        )


def check_buffers(buffers: frozenset[str], personal: frozenset[str]) -> None:
    """Raise `UsageError` where buffers travel: those that do not stay with the clients."""
    if buffers - personal:
        one, many = min(buffers - personal), f"{len(buffers - personal)} buffers"
        allowed = f"a module without such, with privacy ({one}: of a batch norm?), as they are averaged without noise"
        raise UsageError("module", many, allowed)


def plan_of(mechanism: Mechanism, num_clients: int, clients_per_round: int | None) -> PrivacyPlan:
    """A mechanism in a run of so many clients; what is not given is found.

    Raises:
        UsageError: an epsilon that no noise, or no round, stays within; one that needs more than a noisy count allows.
    """
    plan = PrivacyPlan(mechanism, num_clients, clients_per_round or num_clients, mechanism.noise, mechanism.rounds or None)
    if not mechanism.noise:
        noise = _noise_for(mechanism, num_clients, plan.cohort_size, plan.count(mechanism.rounds))
        _check_count(mechanism, noise, plan.cohort_size)
        return replace(plan, noise=noise)
    if not mechanism.epsilon:
        return plan
    count = count_within(plan.release(plan.noise), mechanism.delta, mechanism.epsilon, mechanism.finder)
    if not count:
        least = epsilon_by(mechanism.finder, plan.release(plan.noise), 1, mechanism.delta)
        raise UsageError(
            "privacy.epsilon", mechanism.epsilon, f"{least:.4g} or more, which the first round needs with this noise"
        )
    within = count * plan.bands
    return replace(plan, limit=min(within, plan.limit or within))


def _check_count(mechanism: Mechanism, noise: float, cohort_size: int) -> None:
    """Raise `UsageError` where the noise that was found is not below that of the count: no noise on the sum would do."""
    if isinstance(mechanism, AdaptiveGaussian) and noise >= (most := 2 * mechanism.noise_of_count(cohort_size)):
        allowed = f"one that needs noise below twice count_noise, {most:g} (this one needs {noise:.4g})"
        raise UsageError("privacy.epsilon", mechanism.epsilon, f"{allowed}; or a larger count_noise")


@functools.lru_cache(maxsize=16)
def _noise_for(mechanism: Mechanism, num_clients: int, cohort_size: int, count: int) -> float:
    make: Callable[[float], Release] = PrivacyPlan(mechanism, num_clients, cohort_size, 0.0, None).release
    return noise_for(make, count, mechanism.delta, mechanism.epsilon, mechanism.finder)
