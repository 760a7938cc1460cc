"""A loop's privacy and secure sums, planned for its data and said."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from fedtune.errors import UsageError
from fedtune.federated.messages import Context
from fedtune.federated.passes import Epochs
from fedtune.federated.ranks import Ranks
from fedtune.federated.round import run_round
from fedtune.federated.state import RoundResult
from fedtune.federated.training import Training
from fedtune.privacy.examples import ExamplePlan, example_plan
from fedtune.privacy.mechanisms import ExampleGaussian, Mechanism
from fedtune.privacy.plan import PrivacyPlan, plan_of
from fedtune.privacy.sampling import sampling_of
from fedtune.runs.callbacks import Run
from fedtune.runs.sharing import check_same
from fedtune.secure.parts import PairwiseMasks


def planned(loop: Any, training: Training, run: Run, ranks: Ranks) -> PrivacyPlan | ExamplePlan | None:
    """The plan of a run, which then has no more rounds than its budget is for. The sentence goes into its configuration.

    Raises:
        UsageError: as `plan_of` and `example_plan`; with privacy of examples, padding that is read as text; the ranks come to
            different plans, as they have different data.
    """
    if loop._secure is not None:
        run.print(secure_sentence(loop, run.data.num_clients))
    if loop._privacy is None:
        return None
    data = run.data
    plan: PrivacyPlan | ExamplePlan
    if isinstance(loop._privacy, ExampleGaussian):
        _check_padding(run.config["data"])
        if getattr(training.module.hparams, "packing", None):
            run.print("packing: not while clients train, as privacy of examples wants a row for each conversation")
        samplings = [sampling_of(data.client_dataloader(client), training, client) for client in range(data.num_clients)]
        how = loop.seed, loop.clients_per_round, loop.local_epochs, loop.max_rounds
        plan = example_plan(loop._privacy, samplings, *how)
    else:
        plan = plan_of(loop._privacy, data.num_clients, loop.clients_per_round)
    check_same({"privacy": dataclasses.asdict(plan)}, ranks)
    run.max_rounds = min(loop.max_rounds, plan.limit or loop.max_rounds)
    run.config["content"]["privacy"] = plan.sentence(run.max_rounds)
    run.print(run.config["content"]["privacy"])
    if run.max_rounds < loop.max_rounds:
        ends = f"the run ends there, not after {loop.max_rounds}"
        run.print(f"the privacy budget is used up after round {run.max_rounds}: {ends}")
        if training.trainer.asked_for_the_end:
            run.print(f"the module asked how long the run is before that was known, and was told: {loop.max_rounds} rounds")
    return plan


def _check_padding(data: Mapping[str, Any]) -> None:
    """Raise `UsageError` where a text's padding, which says who else is in its batch, is read as text; of data of ours."""
    if "class" not in data and data.get("mask") is False and data.get("padding") != "max_length":
        raise UsageError("data.mask", False, "true, or padding max_length, with privacy of examples")


def secure_sentence(loop: Any, num_clients: int) -> str:
    """What may be said of a run's secure sums; Poisson cohorts have their size in the mean."""
    varying = (
        isinstance(loop._privacy, Mechanism) and loop._privacy.sampling == "poisson" and loop.clients_per_round is not None
    )
    return str(loop._secure.sentence(loop.clients_per_round or num_clients, varying))


def training_of(plan: PrivacyPlan | ExamplePlan | None) -> Callable[[Context], Epochs] | None:
    """How clients train by a plan, where that is another way."""
    return plan.training if isinstance(plan, ExamplePlan) else None


def played(secure: PairwiseMasks | None) -> Callable[..., RoundResult]:
    """What plays a round: `run_round`, with secure sums or without."""
    if secure is None:
        return run_round
    from fedtune.secure.round import secure_round  # the packages of an extra

    return functools.partial(secure_round, secure)
