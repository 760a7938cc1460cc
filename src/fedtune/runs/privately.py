"""A loop's privacy and secure sums, planned for its data and said."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fedtune.federated.round import run_round
from fedtune.federated.state import RoundResult
from fedtune.privacy.plan import PrivacyPlan, plan_of
from fedtune.runs.progress import Progress
from fedtune.secure.parts import PairwiseMasks


def planned(loop: Any, num_clients: int, progress: Progress) -> tuple[PrivacyPlan | None, int]:
    """The plan of a run, and how many rounds it will have: no more than its budget is for. The sentence goes into `config`.

    Raises:
        UsageError: as `plan_of`.
    """
    if loop._secure is not None:
        progress.line(loop._secure.sentence(loop.clients_per_round or num_clients))
    if loop._privacy is None:
        return None, loop.max_rounds
    plan = plan_of(loop._privacy, num_clients, loop.clients_per_round)
    most = min(loop.max_rounds, plan.limit or loop.max_rounds)
    loop.config["content"]["privacy"] = plan.sentence(most)
    progress.line(loop.config["content"]["privacy"])
    if most < loop.max_rounds:
        progress.line(f"the privacy budget is used up after round {most}: the run ends there, not after {loop.max_rounds}")
    return plan, most


def played(secure: PairwiseMasks | None) -> Callable[..., RoundResult]:
    """What plays a round: `run_round`, with secure sums or without."""
    if secure is None:
        return run_round
    from fedtune.secure.round import secure_round  # the packages of an extra

    return functools.partial(secure_round, secure)
