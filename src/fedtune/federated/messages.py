"""What travels between the server and its clients."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClientReport:
    """What one client did in one round. `update_norm`: Euclidean length of the way from the server's weights."""

    client: int
    num_examples: int
    num_steps: int
    num_tokens: int
    train_loss_nats: float
    seconds: float
    update_norm: float = 0.0
