"""What privacy of examples means in a run: how much noise each client adds, for how many rounds, and what may be said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast, final

import numpy as np
import torch
from numpy.typing import NDArray

from fedtune.errors import RunError, UsageError, whole
from fedtune.federated.cohorts import cohort
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm
from fedtune.federated.state import RoundResult, ServerState
from fedtune.privacy.accountant import QUICK, Release, count_within, epsilon_by, noise_for
from fedtune.privacy.mechanisms import ExampleGaussian
from fedtune.privacy.plan import check_buffers
from fedtune.privacy.sampling import Sampling
from fedtune.privacy.steps import PrivateEpochs

LEDGER = "ExampleGaussian"  # in the server's memory
NOT_COVERED = (
    "not covered: how many examples a client has and which clients take part (weights by number of examples tell them), "
    "losses, metrics and whatever else the records say of the clients (the guarantee is for the weights), texts that are "
    "several examples or are held by several clients, tuning by looking at several runs, and whoever knows the seed, or which "
    "examples were drawn"
)
Counts = NDArray[np.int64]


@final
@dataclass(frozen=True)
class ExamplePlan:
    """A mechanism in a run.

    Args:
        mechanism: as the configuration has it.
        seed: of the cohorts.
        clients_per_round: of them; None: all.
        samplings: of each client.
        epochs: local epochs.
        noises: z of each client.
        limit: the number of rounds after which the first client's budget is used up; None: there is none.
    """

    mechanism: ExampleGaussian
    seed: int
    clients_per_round: int | None
    samplings: tuple[Sampling, ...]
    epochs: int
    noises: tuple[float, ...] = field(repr=False)
    limit: int | None
    hides_clients: ClassVar[bool] = False

    def cohort(self, seed: int, number: int) -> list[int]:
        """The clients of a round."""
        return cohort(seed, number, len(self.samplings), self.clients_per_round)

    def algorithm(self, algorithm: Algorithm, buffers: frozenset[str], personal: frozenset[str]) -> Algorithm:
        """The algorithm as it is: what it makes of updates costs nothing more.

        Raises:
            UsageError: buffers travel, which have no noise.
        """
        check_buffers(buffers, personal)
        return algorithm

    def training(self, context: Context) -> PrivateEpochs:
        """How a client trains in a round."""
        client = cast(int, context.client)  # of a client's own context
        return PrivateEpochs(self.mechanism.clip, self.noises[client], self.samplings[client], context)

    def release(self, client: int) -> Release:
        """A step of a client, as an accountant sees it."""
        return Release(self.samplings[client].rate, self.noises[client])

    def steps(self, client: int) -> int:
        """Steps of a client in a round."""
        return self.samplings[client].steps * self.epochs

    def noted(self, result: RoundResult, before: ServerState) -> RoundResult:
        """The result of a round, with the ledger in its memory, and the largest epsilon so far among its diagnostics.

        Raises:
            RunError: the rounds before had other noise or sampling, or are in no ledger.
        """
        clients = range(len(self.samplings))
        now = {
            "rate": [self.samplings[client].rate for client in clients],
            "noise": list(self.noises),
            "steps": [float(self.steps(client)) for client in clients],
        }
        known = before.memory.get(LEDGER, {}).get("ledger", {})
        if before.round and not known:
            raise RunError(f"round {result.state.round}: the privacy ledger has no rounds, where {before.round} were before")
        for name, values in now.items():
            if known and known[name].cpu().tolist() != values:
                raise RunError(
                    f"round {result.state.round}: the privacy ledger has another {name} for the rounds before, as by another "
                    "version of dp-accounting; go on with the one that the run began with"
                )
        rounds = known["rounds"].cpu().clone() if known else torch.zeros(len(clients), dtype=torch.float64)
        rounds[self.cohort(self.seed, result.state.round)] += 1
        ledger = {name: torch.tensor(values, dtype=torch.float64) for name, values in now.items()} | {"rounds": rounds}
        state = replace(result.state, memory=result.state.memory | {LEDGER: {"ledger": ledger}})
        epsilon = max(self._each("rdp", rounds.numpy().astype(np.int64)))
        return replace(result, state=state, diagnostics=result.diagnostics | {"epsilon_rdp": epsilon})

    def figures(self, rounds: int) -> dict[str, Any]:
        """Epsilon after so many rounds by both accountants: the largest over clients, and the least."""
        whole("rounds", rounds, 0)
        counts = rounds_of_clients(self.seed, len(self.samplings), self.clients_per_round, rounds)
        found: dict[str, Any] = {}
        for accountant in ("rdp", "pld"):
            each = self._each(accountant, counts)
            found |= {f"epsilon_{accountant}": max(each), f"epsilon_{accountant}_least": min(each)}
        rates = [one.rate for one in self.samplings]
        return found | {
            "delta": self.mechanism.delta,
            "noise_multiplier": max(self.noises),
            "noise_multiplier_least": min(self.noises),
            "clip": self.mechanism.clip,
            "denominator": max(one.expected for one in self.samplings),
            "sampling": "poisson",
            "sampling_rate": max(rates),
            "sampling_rate_least": min(rates),
            "neighbours": "add_or_remove_one",
        }

    def sentence(self, rounds: int) -> str:
        """What may be said of a run after so many rounds."""
        found, expected = self.figures(rounds), [one.expected for one in self.samplings]
        steps = [self.steps(client) for client in range(len(self.samplings))]
        rdp, pld, rate, noise = (
            _span(found[f"{name}_least"], found[name], how)
            for name, how in (
                ("epsilon_rdp", ".4f"),
                ("epsilon_pld", ".4f"),
                ("sampling_rate", "g"),
                ("noise_multiplier", ".6g"),
            )
        )
        return (
            "example-level differential privacy within each client "
            f"after {rounds} round{'s' * (rounds != 1)}: epsilon {rdp} by RDP, {pld} by PLD, "
            f"at delta {self.mechanism.delta:g}; "
            "unit: an example of a client; neighbours: the examples of a client with one more or less; "
            f"sampling: Poisson, each of a client's examples in a step with probability {rate}, "
            f"{_span(min(steps), max(steps))} step{'s' * (max(steps) != 1)} a round; "
            f"denominator: {_span(min(expected), max(expected))}, whoever is drawn; "
            f"clip: {self.mechanism.clip:g}, the length of an example's gradient; "
            f"noise: normal, standard deviation {noise} clips on the sum of each step, added by the client; {NOT_COVERED}"
        )

    def epsilons(self, accountant: str, rounds: int) -> list[float]:
        """Epsilon of each client after so many rounds, by "rdp" or "pld"."""
        return self._each(accountant, rounds_of_clients(self.seed, len(self.samplings), self.clients_per_round, rounds))

    def _each(self, accountant: str, counts: Counts) -> list[float]:
        delta, known, found = self.mechanism.delta, dict[tuple[Release, int], float](), []
        for client, count in enumerate(counts.tolist()):
            key = self.release(client), count * self.steps(client)
            if key not in known:
                known[key] = epsilon_by(accountant, *key, delta, QUICK)
            found.append(known[key])
        return found


def _span(least: float, most: float, how: str = "g") -> str:
    """One number, or two.

    >>> _span(1, 1), _span(0.5, 2)
    ('1', '0.5 to 2')
    """
    one, other = format(least, how), format(most, how)
    return one if one == other else f"{one} to {other}"


def rounds_of_clients(seed: int, num_clients: int, clients_per_round: int | None, rounds: int) -> Counts:
    """(N,) in how many of the first rounds each client is."""
    if clients_per_round is None or clients_per_round >= num_clients:
        return np.full(num_clients, rounds, dtype=np.int64)
    found = np.zeros(num_clients, dtype=np.int64)
    for number in range(1, rounds + 1):
        found[cohort(seed, number, num_clients, clients_per_round)] += 1
    return found


def example_plan(
    mechanism: ExampleGaussian,
    samplings: Sequence[Sampling],
    seed: int,
    clients_per_round: int | None,
    epochs: int,
    max_rounds: int,
) -> ExamplePlan:
    """A mechanism in a run; what is not given is found.

    Args:
        samplings: of each client.
        epochs: local epochs.
        max_rounds: beyond which nobody asks for a limit.

    Raises:
        UsageError: a delta that is too large for a client, an epsilon that no noise, or no round, stays within.
    """
    largest = max(samplings, key=lambda one: one.examples).examples
    if not mechanism.delta < 1 / largest:
        allowed = f"below 1 / the number of a client's examples, {1 / largest:g}: else a whole example may be published"
        raise UsageError("privacy.delta", mechanism.delta, allowed)
    planned = rounds_of_clients(seed, len(samplings), clients_per_round, mechanism.rounds)
    noises = [
        mechanism.noise or _noise_for(mechanism, one.rate, one.steps * epochs * max(1, count))
        for one, count in zip(samplings, planned.tolist(), strict=True)
    ]
    plan = ExamplePlan(mechanism, seed, clients_per_round, tuple(samplings), epochs, tuple(noises), mechanism.rounds or None)
    if not (mechanism.noise and mechanism.epsilon):
        return plan
    within = _limit(plan, max_rounds)
    return plan if within is None else replace(plan, limit=min(within, plan.limit or within))


def _noise_for(mechanism: ExampleGaussian, rate: float, steps: int) -> float:
    """The least noise with which so many steps stay within the budget."""
    return noise_for(lambda noise: Release(rate, noise), steps, mechanism.delta, mechanism.epsilon, mechanism.finder)


def _limit(plan: ExamplePlan, max_rounds: int) -> int | None:
    """The last round in which nobody's budget is passed; None where there are fewer.

    Raises:
        UsageError: the first round passes one.
    """
    mechanism, clients = plan.mechanism, range(len(plan.samplings))
    releases = {plan.release(client) for client in clients}
    steps = {one: count_within(one, mechanism.delta, mechanism.epsilon, mechanism.finder) for one in releases}
    allowed = np.array([steps[plan.release(client)] // plan.steps(client) for client in clients])
    if not allowed.min():
        finder, delta = mechanism.finder, mechanism.delta
        least, client = max((epsilon_by(finder, plan.release(one), plan.steps(one), delta, QUICK), one) for one in clients)
        raise UsageError(
            "privacy.epsilon", mechanism.epsilon, f"{least:.4g} or more, which a round of client {client} needs with this noise"
        )
    counts = np.zeros(len(clients), dtype=np.int64)
    for number in range(1, max_rounds + 1):
        counts[plan.cohort(plan.seed, number)] += 1
        if (counts > allowed).any():
            return number - 1
    return None
