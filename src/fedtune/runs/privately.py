"""A loop's privacy, planned for its data and said."""

from __future__ import annotations

from typing import Any

from fedtune.privacy.plan import PrivacyPlan, plan_of
from fedtune.runs.progress import Progress


def planned(loop: Any, num_clients: int, progress: Progress) -> tuple[PrivacyPlan | None, int]:
    """The plan of a run, and how many rounds it will have: no more than its budget is for. The sentence goes into `config`.

    Raises:
        UsageError: as `plan_of`.
    """
    if loop._privacy is None:
        return None, loop.max_rounds
    plan = plan_of(loop._privacy, num_clients, loop.clients_per_round)
    most = min(loop.max_rounds, plan.limit or loop.max_rounds)
    loop.config["content"]["privacy"] = plan.sentence(most)
    progress.line(loop.config["content"]["privacy"])
    if most < loop.max_rounds:
        progress.line(f"the privacy budget is used up after round {most}: the run ends there, not after {loop.max_rounds}")
    return plan, most
