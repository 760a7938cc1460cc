"""What cannot be had with privacy, refused in one line that says all of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fedtune.algorithms.fedavg import Mean
from fedtune.errors import UsageError, raise_all
from fedtune.federated.examples import not_once
from fedtune.federated.parts import Algorithm
from fedtune.privacy.accountant import Release, check_installed, epsilon_by
from fedtune.privacy.aggregation import PrivateMean
from fedtune.privacy.gradients import check_opacus
from fedtune.privacy.mechanisms import OF_SAMPLING, AdaptiveGaussian, Banded, Budget, Mechanism, kind_of, privacy_of
from fedtune.privacy.plan import PrivacyPlan


def privacy_with(given: Any, algorithm: Algorithm) -> Budget | None:
    """The mechanism that a name or a dictionary of plain values means, with an algorithm that suits it; None for none.

    Raises:
        UsageError: values that it does not take, values that are missing, and what it does not suit, all at once.
    """
    if given is None:
        return None
    mechanism, kind = None, kind_of(given)
    wrong = list(_of_algorithm(algorithm, kind) if issubclass(kind, Mechanism) else _of_client(algorithm.client))
    try:
        mechanism = privacy_of(given)
    except UsageError as error:
        wrong.insert(0, error)
    raise_all(wrong)
    return mechanism


def check_examples(algorithm: Algorithm, accumulate_grad_batches: int) -> None:
    """Raise `UsageError` for all that the accounting of privacy of examples would not be true of."""
    check_installed()
    check_opacus()
    wrong = list(_of_client(algorithm.client))
    if accumulate_grad_batches != 1:
        allowed = "1, with privacy of examples: a step is one draw"
        wrong.append(UsageError("accumulate_grad_batches", accumulate_grad_batches, allowed))
    raise_all(wrong)


def _of_client(client: Any) -> Iterator[UsageError]:
    """What is wrong with a client part that does more than train by gradients of its examples, once a round."""
    if client.makes != ("update",) or client.seeds:
        allowed = "with privacy of examples, one that trains by gradients and sends its update alone"
        yield UsageError("algorithm.client", type(client).__name__, allowed)
    elif client.personal is not None:
        yield not_once(client)


def check_privacy(
    mechanism: Mechanism, algorithm: Algorithm, num_clients: int, clients_per_round: int | None, min_clients: int | None
) -> None:
    """Raise `UsageError` for all that the accounting would not be true of."""
    check_installed()
    of_run = _of_run(mechanism, num_clients, clients_per_round or num_clients, min_clients)
    raise_all([*_of_algorithm(algorithm, type(mechanism)), *of_run])


def _of_run(mechanism: Mechanism, num_clients: int, size: int, min_clients: int | None) -> Iterator[UsageError]:
    """What is wrong with a mechanism for so many clients, and `size` of them in a round."""
    plan = PrivacyPlan(mechanism, num_clients, size, mechanism.noise, None)
    if not mechanism.delta < 1 / num_clients:
        allowed = f"below 1 / num_clients, {1 / num_clients:g}: else a whole client may be published"
        yield UsageError("privacy.delta", mechanism.delta, allowed)
    if plan.rate > 1:
        yield UsageError("privacy.bands", plan.bands, f"at most num_clients / clients_per_round, {num_clients // size}")
    if min_clients is not None:
        allowed = "nothing, with privacy: a round counts whoever answers, even if nobody does"
        yield UsageError("options.min_clients", min_clients, allowed)
    yield from _of_relation(mechanism, num_clients, size)
    if mechanism.accountant == "classical" and (mechanism.noise or mechanism.rounds != 1 or plan.rate < 1):
        allowed = "pld or rdp: sqrt(2 ln(1.25/delta)) / epsilon is found for one round (rounds: 1, no noise) with everyone"
        yield UsageError("privacy.accountant", "classical", allowed)
    if mechanism.accountant == "pld" and mechanism.sampling == "fixed" and plan.rate < 1:
        yield UsageError("privacy.accountant", "pld", "rdp, for cohorts of a fixed size")
    if isinstance(mechanism, AdaptiveGaussian) and mechanism.noise:
        most = 2 * mechanism.noise_of_count(size)
        if not mechanism.noise < most:
            yield UsageError("privacy.noise", mechanism.noise, f"below twice count_noise, {most:g}, with AdaptiveGaussian")


def _of_relation(mechanism: Mechanism, num_clients: int, size: int) -> Iterator[UsageError]:
    """Cohorts of a fixed size under the name of Poisson's relation, or the reverse."""
    wanted = OF_SAMPLING[mechanism.sampling]
    if mechanism.relation == wanted:
        return
    if mechanism.sampling == "poisson":
        yield UsageError("privacy.neighbours", mechanism.relation, f"{wanted} with sampling poisson, or sampling fixed")
        return
    honest = ""
    if mechanism.noise and mechanism.rounds:
        fixed = (size, num_clients) if size < num_clients else None
        release = Release(size / num_clients, mechanism.noise / 2, fixed)
        found = epsilon_by("rdp", release, mechanism.rounds, mechanism.delta)
        honest = f", whose epsilon is {found:.4g} by RDP after {mechanism.rounds} rounds"
    allowed = f"{wanted} with cohorts of a fixed size{honest}; or sampling poisson: a fixed size is not Poisson sampling"
    yield UsageError("privacy.neighbours", mechanism.relation, allowed)


def _of_algorithm(algorithm: Algorithm, kind: type[Mechanism]) -> Iterator[UsageError]:
    """What is wrong with an algorithm whose result is no sum of clipped updates over a fixed number."""
    aggregator, client = algorithm.aggregator, algorithm.client
    if isinstance(aggregator, PrivateMean):
        return
    name = type(aggregator).__name__
    if not isinstance(aggregator, Mean):
        allowed = f"Mean, with privacy: the accounting is that of a sum of clipped updates, which {name} is not"
        yield UsageError("algorithm.aggregator", name, allowed)
    elif aggregator.weighting != "uniform":
        allowed = "uniform, with privacy: in a weighted mean one client may count for any part of it"
        yield UsageError("algorithm.aggregator.weighting", aggregator.weighting, allowed)
    if client.makes != ("update",):
        allowed = f"with privacy, one that sends its update alone, not {', '.join(client.makes)}: noise is added to that"
        yield UsageError("algorithm.client", type(client).__name__, allowed)
    for step in algorithm.server:
        if step.counts:
            allowed = "with privacy, steps that don't depend on how many clients answer"
            yield UsageError("algorithm.server", type(step).__name__, allowed)
    if client.alternates and kind is Banded:
        yield UsageError("privacy", "Banded", f"Gaussian, with {type(client).__name__}, which trains other tensors each round")
