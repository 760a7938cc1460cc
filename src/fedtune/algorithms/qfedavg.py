"""q-FedAvg: Li et al. 2020, "Fair Resource Allocation in Federated Learning", Algorithm 2.

    client k: F <- f_k(x), the loss before training; y_k by local steps from x; with L = 1 / eta of the local steps
        D_k <- F^q L (x - y_k)
        h_k <- q F^(q-1) L^2 |x - y_k|^2 + L F^q
    server: x <- x - sum over S of D_k / sum over S of h_k

D_k and h_k are sent divided by L, which cancels, and losses divided by the mean one of the round before, which cancels, too.
All clients weigh the same but for F^q: q = 0 is their uniform mean, and a large q favours those that the model serves badly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch

from fedtune.algorithms.fedavg import Mean, fedavg
from fedtune.errors import UsageError
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm, ServerStep
from fedtune.tensors import Groups

_LEAST = 1e-10  # of a loss, as in the authors' code
_FINER = 2**40  # what h has below 2^-10 travels apart, as sums have a grid


@final
@dataclass(frozen=True)
class Fair(ClientUpdate):
    """Local epochs, whose update is weighted by the loss before them.

    Args:
        q: how much, 0 or more; 0 is FedAvg with uniform weights, to the bit.
    """

    q: float = 1.0
    makes: ClassVar[tuple[str, ...]] = ("update", "scale")
    numbers: ClassVar[tuple[str, ...]] = ("scale",)
    weighting: ClassVar[str | None] = "uniform"

    def __post_init__(self) -> None:
        if not self.q >= 0:
            raise UsageError("q", self.q, "a number, 0 or more")

    def __call__(self, client: Client) -> Groups:
        """Train; send the weighted update and its scale."""
        loss, unit = client.loss() if self.q else 1.0, client.request.groups.get("unit", {})
        if loss < 0:
            raise UsageError("q", self.q, "0, where a loss is negative")
        found = max(loss, _LEAST)
        loss = found / max(float(unit["loss"]), _LEAST) if unit else found
        rate = max(float(group.get("initial_lr", group["lr"])) for group in client.optimizer.param_groups)
        client.train()
        update, factor = client.update(), loss**self.q
        square = sum(float(tensor.double().square().sum()) for tensor in update.values()) if self.q else 0.0
        scale = factor + (self.q * factor / found * square / rate if square else 0.0)
        if factor != 1.0:
            for tensor in update.values():
                tensor.mul_(factor)
        scales = {"h": round(scale * 2**10) / 2**10, "loss": found}
        scales["rest"] = (scale - scales["h"]) * _FINER
        return {"update": update, "scale": {name: torch.tensor(one, dtype=torch.float64) for name, one in scales.items()}}


@final
@dataclass(frozen=True)
class Scaled(ServerStep):
    """The sum of the weighted updates over the sum of their scales."""

    needs: ClassVar[tuple[str, ...]] = ("update", "scale")
    sends: ClassVar[tuple[str, ...]] = ("unit",)

    def __call__(self, groups: Groups, memory: Groups, context: Context) -> tuple[Groups, Groups]:
        """One step."""
        scale = groups["scale"]["h"] + groups["scale"]["rest"] / _FINER
        step = {name: tensor / scale if scale else torch.zeros_like(tensor) for name, tensor in groups["update"].items()}
        return {"update": step}, {"unit": {"loss": groups["scale"]["loss"]}}


def qfedavg(q: float = 1.0) -> Algorithm:
    """q-FedAvg."""
    mean = Mean("uniform", update_limit=2.0**10, other_limit=2.0**30)
    return replace(fedavg("uniform"), client=Fair(q), aggregator=mean, server=(Scaled(),))
