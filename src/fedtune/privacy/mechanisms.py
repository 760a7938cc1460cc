"""Mechanisms of differential privacy, as parts of plain values. What is hidden is a client, or an example within its client.

Clients (`Mechanism`):
Gaussian            McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models": fixed clipping
AdaptiveGaussian    Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping"
Banded              Choquette-Choo et al. 2023, "(Amplified) Banded Matrix Factorization: A unified approach to private
                    training"; the bands are those of Kalinin and Lampert 2024, "Banded Square Root Matrix Factorization
                    for Differentially Private Model Training"

Examples:
ExampleGaussian     Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1, within each client
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, final

from fedtune.errors import NotGiven, UsageError, at_least, one_of, raise_all
from fedtune.federated.values import kind_and_values, named, plain, typed
from fedtune.privacy.accountant import ACCOUNTANTS

SAMPLINGS = ("poisson", "fixed")
NEIGHBOURS = ("add_or_remove_one", "replace_one")
OF_SAMPLING = dict(zip(SAMPLINGS, NEIGHBOURS, strict=True))
LEAST_GIVEN = 1e-4  # noise: with less epsilon has eight digits or more, which says nothing
MOST_CLIP_RATE = 10.0  # fifty times that of the paper


@dataclass(frozen=True)
class Budget:
    """What all have in common: a sum of clipped vectors, noise on it, and how often.

    Args:
        noise: z, standard deviation of the noise on the sum of what is clipped, in units of the clip, 0.0001 or more; 0: found
            for `epsilon` and `rounds`.
        epsilon: the budget; 0: none. With `noise` it says how many rounds there may be.
        delta: of (epsilon, delta).
        rounds: for which noise is found, or after which the budget is used up; 0: not said.
        clip: C, the largest Euclidean length of what is added up.
        accountant: which of "pld" and "rdp" finds noise and rounds; "": pld where there is one for the sampling.

    Raises:
        UsageError: values of another type, or outside of what is allowed, all of them at once.
    """

    noise: float = 0.0
    epsilon: float = 0.0
    delta: float = 1e-5
    rounds: int = 0
    clip: float = 1.0
    accountant: str = ""

    accountants: ClassVar[tuple[str, ...]] = ("pld", "rdp")
    units: ClassVar[str] = ""  # of which there are fewer than 1 / delta

    def __post_init__(self) -> None:
        raise_all(self._typed())  # of what is no number nothing more can be said
        raise_all(self._wrong())

    def _typed(self) -> Iterator[UsageError]:
        """Give each field its type, as from a configuration; values of another one are wrong."""
        hints = typing.get_type_hints(type(self))
        for name in (one.name for one in fields(self)):
            try:
                object.__setattr__(self, name, typed(getattr(self, name), hints[name], name))
            except UsageError as error:
                yield error

    def _wrong(self) -> Iterator[UsageError]:
        """Values that cannot be used, or are missing."""
        if self.noise and not LEAST_GIVEN <= self.noise < math.inf:
            yield UsageError("noise", self.noise, f"{LEAST_GIVEN:g} or more, or 0 where it is not given")
        if not 0 <= self.epsilon < math.inf:
            yield UsageError("epsilon", self.epsilon, "a number above 0, or 0 where it is not given")
        if not 0 < self.delta < 1:
            yield UsageError("delta", self.delta, f"a number above 0 and below 1 / {self.units}")
        if not 1e-30 <= self.clip <= 1e30:  # beyond, products in fp32 would be infinite, or nothing
            yield UsageError("clip", self.clip, "a number above 0, 1e-30 to 1e30")
        yield from self._too_small(0, "rounds")
        if self.accountant not in ("", *self.accountants):
            yield one_of("accountant", self.accountant, self.accountants)
        if not self.noise and not self.epsilon:
            yield NotGiven("noise", "noise (a multiple of the clip); or epsilon and rounds, for which it is found")

    def _too_small(self, least: int, *names: str) -> Iterator[UsageError]:
        for name in names:
            try:
                at_least(name, getattr(self, name), least)
            except UsageError as error:
                yield error


@dataclass(frozen=True)
class Mechanism(Budget):
    """Client-level privacy. The number of clients in a round, in the mean, is the loop's `clients_per_round`.

    Args:
        noise, epsilon, rounds: as in `Budget`; what is clipped is a client's update.
        delta: below 1 / num_clients.
        clip: C, the largest Euclidean length of an update (in AdaptiveGaussian: the first).
        accountant: as in `Budget`, or "classical": sqrt(2 ln(1.25 / delta)) / epsilon, which holds for one round with everyone
            and an epsilon up to 1.
        sampling: "poisson": each client is in a round with probability q = clients_per_round / num_clients; "fixed": cohorts of
            clients_per_round, whose epsilon is larger.
        neighbours: what two federations differ by that cannot be told apart: "add_or_remove_one" client (with poisson),
            "replace_one" (with fixed); "": that of the sampling.
    """

    sampling: str = "poisson"
    neighbours: str = ""

    accountants: ClassVar[tuple[str, ...]] = ACCOUNTANTS
    units: ClassVar[str] = "num_clients"

    def _wrong(self) -> Iterator[UsageError]:
        yield from super()._wrong()
        for name, known in (("sampling", SAMPLINGS), ("neighbours", ("", *NEIGHBOURS))):
            if getattr(self, name) not in known:
                yield one_of(name, getattr(self, name), [one for one in known if one])
        if self.epsilon and not self.noise and not self.rounds:
            yield NotGiven("rounds", "the number of rounds that epsilon is for; or noise in place of both")
        if self.accountant == "classical" and self.epsilon > 1:
            allowed = (
                f"pld or rdp: sqrt(2 ln(1.25/delta)) / epsilon holds for epsilon up to 1 only, and epsilon is {self.epsilon:g}"
            )
            yield UsageError("accountant", self.accountant, allowed)

    @property
    def relation(self) -> str:
        """The neighbouring relation."""
        return self.neighbours or OF_SAMPLING[self.sampling]

    @property
    def finder(self) -> str:
        """The accountant that finds noise and rounds."""
        return self.accountant or ("pld" if self.sampling == "poisson" else "rdp")


@final
@dataclass(frozen=True)
class Gaussian(Mechanism):
    """DP-FedAvg with a fixed clip: x += (sum of D_k min(1, C / |D_k|) + N(0, z^2 C^2 I)) / (q N)."""


@final
@dataclass(frozen=True)
class AdaptiveGaussian(Mechanism):
    """DP-FedAvg whose clip follows a quantile of the updates' lengths, by a count with noise of its own.

    Args:
        quantile: gamma, the share of clients whose updates should stay as they are.
        clip_rate: eta_C, by which the logarithm of the clip moves, times the difference from the quantile; at most 10.
        count_noise: sigma_b, standard deviation of the noise on the count; 0: a twentieth of the clients of a round.
    """

    clip: float = 0.1
    quantile: float = 0.5
    clip_rate: float = 0.2
    count_noise: float = 0.0

    def _wrong(self) -> Iterator[UsageError]:
        yield from super()._wrong()
        if not 0 < self.quantile < 1:
            yield UsageError("quantile", self.quantile, "a number between 0 and 1")
        if not 0 <= self.clip_rate <= MOST_CLIP_RATE:
            yield UsageError("clip_rate", self.clip_rate, f"a number from 0 to {MOST_CLIP_RATE:g}")
        if not 0 <= self.count_noise < math.inf:
            yield UsageError("count_noise", self.count_noise, "a number above 0, or 0 where it is not given")

    def noise_of_count(self, clients: float) -> float:
        """sigma_b, where so many clients are in a round; the noise z of both together must be below twice that."""
        return self.count_noise or clients / 20


@final
@dataclass(frozen=True)
class Banded(Mechanism):
    """DP-FTRL with a banded matrix: the noise of a round takes back some of that of the rounds before.

    Clients are in groups, k mod bands; round t draws from group (t - 1) mod bands alone.

    Args:
        bands: b, rounds over which noise is correlated; 1 is Gaussian. b - 1 copies of the noise, fp64, are kept.
    """

    bands: int = 4

    def _wrong(self) -> Iterator[UsageError]:
        yield from super()._wrong()
        yield from self._too_small(1, "bands")
        if self.sampling != "poisson":
            yield UsageError("sampling", self.sampling, "poisson, for Banded")


@final
@dataclass(frozen=True)
class ExampleGaussian(Budget):
    """DP-SGD within each client: a step adds up clipped gradients of a Poisson batch of its examples, and noise.

    Its unit is another one than that of the mechanisms above, an example of a client, and it is a name beside theirs all the
    same: a run has one unit, one noise, one budget and one sentence, and the flags of these are the same. The two are not to be
    had together, as a client's clipped update says nothing of one example.

    Args:
        noise: as in `Budget`, for every client; where it is found, each client has its own.
        rounds: 0 with epsilon and without noise: the loop's `max_rounds`.
        delta: below 1 / the number of texts of each client.
        clip: C, the largest Euclidean length of an example's gradient, all tensors together.
    """

    units: ClassVar[str] = "the number of a client's examples"

    @property
    def finder(self) -> str:
        """The accountant that finds noise and rounds."""
        return self.accountant or "pld"


PRIVACY: dict[str, type[Budget]] = {one.__name__: one for one in (Gaussian, AdaptiveGaussian, Banded, ExampleGaussian)}


def privacy_of(given: Any) -> Budget | None:
    """The mechanism that a name or a dictionary of plain values means; None for none.

    Raises:
        UsageError: an unknown name or parameter, or a value that it does not take.
    """
    return named(given, "privacy", PRIVACY, Budget)


def kind_of(given: Any) -> type[Budget]:
    """The class of a mechanism, or of what a name or a dictionary of plain values means.

    Raises:
        UsageError: an unknown name.
    """
    return type(given) if isinstance(given, Budget) else kind_and_values(given, "privacy", PRIVACY)[0]


def for_rounds(privacy: Budget | None, max_rounds: int) -> Budget | None:
    """With the rounds that noise is found for, where they are those of the run."""
    if isinstance(privacy, ExampleGaussian) and not privacy.noise and not privacy.rounds:
        return replace(privacy, rounds=max_rounds)
    return privacy


def plain_privacy(mechanism: Budget | None, strict: bool = True) -> dict[str, Any] | None:
    """A mechanism in plain values."""
    return None if mechanism is None else plain(mechanism, "privacy", PRIVACY, strict)
