"""Who takes part in a round."""

from __future__ import annotations

from fedtune.randomness import stream


def cohort(seed: int, number: int, num_clients: int, clients_per_round: int | None) -> list[int]:
    """The clients of a round, drawn uniformly without replacement; all of them when `clients_per_round` is None."""
    if clients_per_round is None or clients_per_round >= num_clients:
        return list(range(num_clients))
    return sorted(stream(seed, "cohort", number).choice(num_clients, clients_per_round, replace=False).tolist())
