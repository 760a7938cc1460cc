"""What a private run would guarantee, found without one."""

from __future__ import annotations

from typing import Any, cast

from fedtune.algorithms.fedavg import fedavg
from fedtune.errors import UsageError, one_of, whole
from fedtune.privacy.checks import check_privacy
from fedtune.privacy.mechanisms import PRIVACY, Mechanism, kind_of, privacy_of
from fedtune.privacy.plan import PrivacyPlan, plan_of


def plan_privacy(privacy: Any, num_clients: int, clients_per_round: int | None = None) -> PrivacyPlan:
    """What a run would guarantee: the noise for an epsilon, epsilon after any number of rounds, the sentence.

    Args:
        privacy: as of `FederatedLoop`: a name of `fedtune.PRIVACY`, or a dictionary with it and its values.
        num_clients: clients of the federation.
        clients_per_round: in the mean, or, with cohorts of a fixed size, always; every client by default.

    Returns:
        the plan: `noise`, `limit` (rounds within the budget), `figures(rounds)`, `sentence(rounds)`.

    Raises:
        UsageError: values that no run could have.

    >>> plan = plan_privacy({"name": "Gaussian", "noise": 0.8, "delta": 1e-6}, num_clients=100_000, clients_per_round=1000)
    >>> round(plan.figures(rounds=1000)["epsilon_rdp"], 4)
    4.2935
    """
    if not issubclass(kind_of(privacy), Mechanism):  # that of examples depends on how many texts each client has
        raise one_of("privacy", privacy, [name for name, kind in PRIVACY.items() if issubclass(kind, Mechanism)])
    mechanism = cast(Mechanism, privacy_of(privacy))
    whole("num_clients", num_clients, 1)
    if clients_per_round is not None:
        whole("clients_per_round", clients_per_round, 1)
        if clients_per_round > num_clients:
            raise UsageError("clients_per_round", clients_per_round, f"1 to {num_clients}, the number of clients")
    check_privacy(mechanism, fedavg(weighting="uniform"), num_clients, clients_per_round, None)
    return plan_of(mechanism, num_clients, clients_per_round)
