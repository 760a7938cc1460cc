"""How clients are dealt out to those who train them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def longest_first(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """For each rank the places of what falls to it: the longest first, each to the rank that has least to do by then.

    Graham 1969, "Bounds on Multiprocessing Timing Anomalies": no rank has more than 4/3 of what the best division would give
    the busiest one. Of equal ones the first comes first, so all ranks deal alike.

    >>> longest_first([1, 5, 4, 2], 2)
    [[1, 0], [2, 3]]
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0.0, rank) for rank in range(ranks)]
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        load, rank = heapq.heappop(loads)
        dealt[rank].append(place)
        heapq.heappush(loads, (load + costs[place], rank))
    return dealt
