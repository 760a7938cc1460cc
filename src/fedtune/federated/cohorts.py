"""Who takes part in a round."""

from __future__ import annotations

from typing import Any

from fedtune.randomness import stream

_UNKNOWN = 2**24  # examples a round, at most, where the data do not say how many they have


def cohort(seed: int, number: int, num_clients: int, clients_per_round: int | None) -> list[int]:
    """The clients of a round, drawn uniformly without replacement; all of them when `clients_per_round` is None."""
    if clients_per_round is None or clients_per_round >= num_clients:
        return list(range(num_clients))
    return sorted(stream(seed, "cohort", number).choice(num_clients, clients_per_round, replace=False).tolist())


def max_weight(data: Any, local_epochs: int) -> int:
    """The most examples that a round can have, each epoch counted: all clients' texts where `client_indices` lists them, else
    16 million. It is the same for every round, cohort and worker, as the grid of exact sums depends on it."""
    parts = getattr(data, "client_indices", None)
    return _UNKNOWN if parts is None else max(1, sum(map(len, parts)) * local_epochs)
