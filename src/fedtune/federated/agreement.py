"""How the clients of a round agree: the cosines of their updates, and how far they drift apart."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch

from fedtune.tensors import Weights, differences, distance, squared_distances


@dataclass(frozen=True)
class Agreement:
    """How the updates u_k = w_k - w of a round's clients relate.

    Args:
        update_norm: Euclidean length of their weighted mean, the step that the server makes.
        update_cosine: mean cosine over all pairs of clients; None for a single client.
        drift: per layer, the weighted mean of the squared distances of the clients' weights from their mean.
    """

    update_norm: float
    update_cosine: float | None = None
    drift: dict[str, float] = field(default_factory=dict)


class RunningAgreement:
    """`Agreement` from running sums: whatever the number of clients, the memory of one copy of the weights.

    For K unit updates e_k the mean cosine over pairs is (|sum e_k|^2 - K) / (K (K - 1)); the drift of a layer is the mean of
    |u_k|^2 minus |mean of u_k|^2.

    Args:
        server: the weights w from which all clients start.
        full: False gives the norm of the mean update only, and needs no memory.
    """

    def __init__(self, server: Weights, full: bool = True) -> None:
        self._server, self._full = server, full
        self._units: Weights = {}
        self._squares: dict[str, float] = defaultdict(float)
        self._total, self._count = 0.0, 0

    @torch.no_grad()
    def add(self, weights: Weights, weight: float) -> float:
        """Take in one client's weights; returns the length of its update."""
        if not self._full:
            return distance(weights, self._server)
        squares = squared_distances(weights, self._server)
        norm = math.sqrt(sum(squares.values()))
        for name, square in squares.items():
            self._squares[layer_of(name)] += weight * square
        if not self._units:
            self._units = {name: torch.zeros_like(tensor.reshape(-1)) for name, tensor in self._server.items()}
        for name, place, update in differences(weights, self._server):
            self._units[name][place].add_(update, alpha=1 / max(norm, 1e-30))
        self._total, self._count = self._total + weight, self._count + 1
        return norm

    @torch.no_grad()
    def result(self, mean: Weights) -> Agreement:
        """The agreement of all clients; `mean` is the weighted mean of their weights."""
        if not self._full:
            return Agreement(distance(mean, self._server))
        moved: dict[str, float] = defaultdict(float)
        for name, square in squared_distances(mean, self._server).items():
            moved[layer_of(name)] += square
        drift = {layer: max(0.0, self._squares[layer] / self._total - square) for layer, square in moved.items()}
        pairs = self._count * (self._count - 1)
        units = sum(float(torch.linalg.vector_norm(unit, dtype=torch.float32)) ** 2 for unit in self._units.values())
        cosine = (units - self._count) / pairs if pairs else None
        return Agreement(math.sqrt(sum(moved.values())), cosine, drift)


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: its name up to the first number, else up to its module.

    >>> layer_of("network.bert.encoder.layer.3.attention.self.query.weight")
    'network.bert.encoder.layer.3'
    >>> layer_of("network.classifier.bias")
    'network.classifier'
    """
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: max(number, 0) + 1])
