"""How the clients of a round agree: the cosines of their updates, and how far they drift apart."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch

from fedtune.federated.pieces import Pieces
from fedtune.federated.sums import MANTISSA_32, Key, Total, Workers, join


@dataclass(frozen=True)
class Agreement:
    """How the updates u_k = w_k - w of a round's clients relate.

    Args:
        mean_update_norm: Euclidean length of their weighted mean, the step that the server makes.
        update_cosine: mean cosine over all pairs of clients; None for a single client.
        drift: per layer, the weighted mean of the squared distances of the clients' weights from their mean.
    """

    mean_update_norm: float
    update_cosine: float | None = None
    drift: dict[str, float] = field(default_factory=dict)


class RunningAgreement:
    """`Agreement` from running sums: whatever the number of clients, the memory of one copy of the weights.

    For K unit updates e_k the mean cosine over pairs is (|sum e_k|^2 - K) / (K (K - 1)); the drift of a layer is the mean of
    |u_k|^2 minus |mean of u_k|^2. Unit updates are added as whole numbers, so the order of clients changes no bit; what that
    moves a cosine by is below 1e-6 (but for models of a billion weights and thousands of clients).

    Args:
        most: the most clients that are added.
        full: False gives the norm of the mean update only, and needs no memory.
    """

    def __init__(self, most: int, full: bool = True) -> None:
        self._full = full
        self._bits = min(MANTISSA_32, 30 - (most - 1).bit_length())
        self._units: dict[Key, Total] = {}
        self._clients: dict[int, tuple[int, dict[str, float]]] = {}
        self._moved = 0

    def add(self, client: int, update: Pieces, weight: int) -> None:
        """Take in one client's update, when next its pieces are gone through."""
        if not self._full:
            return
        self._clients[client] = weight, of_layers(update.squares)
        if not update.length:
            return
        self._moved += 1
        for name, tensor in update.tensors.items():
            if ("update", name) not in self._units:
                self._units["update", name] = Total(tensor, MANTISSA_32)
        scale = 2.0**self._bits / update.length
        update.watched_by(lambda name, place, values: self._units["update", name].add(place, values, scale))

    def result(self, mean: Pieces, workers: Workers | None = None) -> Agreement:
        """The agreement of the clients of all workers; `mean` is the weighted mean of their updates."""
        if not self._full:
            return Agreement(mean.length)
        if workers is not None:
            join(self._units, workers)
            self._clients = {client: found for one in workers.gather([self._clients]) for client, found in one.items()}
            self._moved = sum(workers.gather([self._moved]))
        clients = [self._clients[client] for client in sorted(self._clients)]
        total = sum(weight for weight, _ in clients) or 1  # a round that nobody answered
        drift = {
            layer: max(0.0, sum(weight * squares[layer] for weight, squares in clients) / total - moved)
            for layer, moved in of_layers(mean.squares).items()
        }
        pairs = self._moved * (self._moved - 1)
        cosine = (self._square_of_units() - self._moved) / pairs if pairs else None
        return Agreement(mean.length, cosine, drift)

    def _square_of_units(self) -> float:
        """|sum e_k|^2."""
        found = 0.0
        for total in self._units.values():
            for _, units in total.pieces():
                exact = units.double().view(-1)
                found += float(torch.dot(exact, exact))
        return found * 4.0**-self._bits


def of_layers(squares: dict[str, float]) -> dict[str, float]:
    """Sums over the tensors of a layer."""
    found: dict[str, float] = defaultdict(float)
    for name, square in squares.items():
        found[layer_of(name)] += square
    return dict(found)


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
