"""How sums are made secure, as parts of plain values.

PairwiseMasks    Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning", without stage 3:
                 against a server that follows the protocol and looks at all that it gets
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from fedtune.algorithms.fedavg import Mean
from fedtune.errors import UsageError
from fedtune.federated.parts import Algorithm
from fedtune.federated.values import named, plain
from fedtune.privacy.mechanisms import AdaptiveGaussian, Budget

FEWEST = 3  # clients of a round: of a sum of two, each knows the other's part
_PACKAGES = {"cryptography": "cryptography", "Crypto": "pycryptodome"}  # by the names of what is imported


@final
@dataclass(frozen=True)
class PairwiseMasks:
    """The server sees masked numbers, and their sum. In a simulation: all clients and the server are in one process.

    Args:
        threshold: the share of a round's clients that must stay to the end, above a half: t is this times their number, rounded
            up. Fewer than t clients that tell the server all they know uncover nothing of the others but their sum.
        vanish: the probability that a client falls silent once its masked numbers are sent; they count all the same.
    """

    threshold: float = 0.67
    vanish: float = 0.0

    def __post_init__(self) -> None:
        if not 0.5 < self.threshold <= 1:
            raise UsageError("threshold", self.threshold, "a share above 0.5, up to 1")
        if not 0 <= self.vanish <= 1:
            raise UsageError("vanish", self.vanish, "a probability, from 0 to 1")

    def least(self, size: int) -> int:
        """t of so many clients."""
        return math.ceil(round(self.threshold * size, 9))

    def sentence(self, size: int, in_the_mean: bool = False) -> str:
        """What may be said of a run with so many clients a round, or in the mean of rounds."""
        least = self.least(size)
        stay, most = f"of {size} clients a round {least}", f"up to {least - 1} clients"
        if in_the_mean:
            stay, most = f"of a round's clients, {size} in the mean, {self.threshold:.0%}", "fewer clients than that"
        return (
            f"secure sums, simulated: {stay} must stay to the end; a server that keeps to the protocol, and {most} that tell "
            "it all they know, learn of the others' updates and weights no more than their sum; not covered: who lies or "
            "changes messages, what the sum itself says, and whoever knows the seed, of which all keys are made here; "
            "records name clients, their examples and losses, which the protocol does not send"
        )


SECURE_SUMS: dict[str, type[PairwiseMasks]] = {PairwiseMasks.__name__: PairwiseMasks}


def secure_of(given: Any) -> PairwiseMasks | None:
    """The part that a name or a dictionary of plain values means; None for none.

    Raises:
        UsageError: an unknown name or parameter, or a value that it does not take.
    """
    return named(given, "secure_sums", SECURE_SUMS, PairwiseMasks)


def plain_secure(part: PairwiseMasks | None, strict: bool = True) -> dict[str, Any] | None:
    """A part in plain values."""
    return None if part is None else plain(part, "secure_sums", SECURE_SUMS, strict)


def check_secure(algorithm: Algorithm, mechanism: Budget | None, size: int, lies: Sequence[str], all_clients: bool) -> None:
    """Raise `UsageError` for what needs more of a client than its part of a sum.

    Args:
        mechanism: of the privacy.
        size: clients of a round.
        lies: the names of faults in which clients lie.
        all_clients: whether these are all that there are.
    """
    if missing := [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]:
        raise UsageError("secure_sums", f"no package {missing[0]}", "after: pip install 'fedtune[secure]'")
    aggregator = type(algorithm.aggregator).__name__
    if not isinstance(algorithm.aggregator, Mean):
        allowed = f"Mean, with secure_sums: the server has the sum alone, and {aggregator} looks at each client's update"
        raise UsageError("algorithm.aggregator", aggregator, allowed)
    if algorithm.up:
        names = [type(stage).__name__ for stage in algorithm.up]
        allowed = "none, with secure_sums: the server cannot decode one client's message, and masked numbers have 8 bytes each"
        raise UsageError("algorithm.up", names, allowed)
    if isinstance(mechanism, AdaptiveGaussian):
        allowed = "another, with secure_sums: AdaptiveGaussian counts clients by the lengths of their updates"
        raise UsageError("privacy", "AdaptiveGaussian", allowed)
    if lies:
        allowed = "faults of clients that are honest (Drop, Late, Raise), with secure_sums: nobody sees what a client sent"
        raise UsageError("faults", lies[0], allowed)
    if size < FEWEST:
        allowed = f"{FEWEST} or more, with secure_sums: of a sum of two, each knows the other's part"
        raise UsageError("num_clients" if all_clients else "clients_per_round", size, allowed)
