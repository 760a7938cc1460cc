"""SCAFFOLD: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", Algorithm 1.

    server: c <- 0; client k: c_k <- 0
    for each round, for each client k of the cohort S, of N clients in all:
        y <- x; local steps y <- y - eta (g_k(y) - c_k + c)
        option I:  c_k+ <- the gradient of f_k at x
        option II: c_k+ <- c_k - c + (x - y) / (sum of the local rates eta)
        send y - x and c_k+ - c_k; remember c_k <- c_k+
    x <- x + eta_g * mean over S of (y_k - x)
    c <- c + 1/N * sum over S of (c_k+ - c_k)

So c is the mean of all clients' c_k, always. All clients weigh the same.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from fedtune.algorithms.fedavg import fedavg
from fedtune.errors import UsageError
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.corrections import Offsets
from fedtune.federated.messages import Context
from fedtune.federated.optimisation import sgd_groups
from fedtune.federated.parts import Algorithm, ServerStep
from fedtune.federated.pieces import together
from fedtune.tensors import Groups, Tensors

OPTIONS = (1, 2)


@final
@dataclass(frozen=True)
class Controlled(ClientUpdate):
    """Local epochs with a correction by control variates, as large as a gradient, which a client remembers.

    Args:
        option: of the paper: 2 reads c_k off the client's path; 1 takes the gradient at the server's weights, by one more pass
            over the client's data.
    """

    option: int = 2
    makes: ClassVar[tuple[str, ...]] = ("update", "control")
    alike: ClassVar[tuple[str, ...]] = ("update", "control")
    weighting: ClassVar[str | None] = "uniform"

    def __post_init__(self) -> None:
        if self.option not in OPTIONS:
            raise UsageError("option", self.option, "1 or 2")

    def __call__(self, client: Client) -> Groups:
        """Train; send the update and the change of the control variate."""
        sgd_groups(client.optimizer, "SCAFFOLD", momentum=False)
        if clip := client.gradient_clip_val:
            raise UsageError("gradient_clip_val", clip, "for SCAFFOLD, none: c_k is read off steps that are not clipped")
        mine, all_ = client.memory.get("control", {}), client.request.groups.get("control", {})
        offset = {name: _difference(all_.get(name), mine.get(name)) for name in client.server}
        offsets = Offsets({name: tensor for name, tensor in offset.items() if tensor is not None})
        at_server = client.gradient() if self.option == 1 else {}
        rates: defaultdict[str, float] = defaultdict(float)

        def correct(names: list[str], gradients: list[Tensor], weights: list[Tensor]) -> None:
            settings = client.settings
            for name in names:
                rates[name] += settings[name]["lr"]
            offsets.add_to_(names, gradients)

        client.train(correct=correct)
        update, change = client.update(), Tensors()
        client.memory["control"] = {}
        for name, tensor in update.items():
            old, by = mine.get(name), offset[name]
            if self.option == 1:
                new = at_server[name]
                change[name] = new if old is None else new - old
            elif rates[name]:
                new, change[name] = _read_off(tensor, rates[name], by, old)
            else:  # no step says anything of its gradient
                new, change[name] = torch.zeros_like(tensor) if old is None else old, torch.zeros_like(tensor)
            client.memory["control"][name] = new
        return {"update": update, "control": change}


@final
@dataclass(frozen=True)
class Control(ServerStep):
    """The server's control variate, and its step.

    Args:
        learning_rate: eta_g, of the server.
    """

    learning_rate: float = 1.0
    needs: ClassVar[tuple[str, ...]] = ("update", "control")
    sends: ClassVar[tuple[str, ...]] = ("control",)

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UsageError("learning_rate", self.learning_rate, "a number above 0")

    def __call__(self, groups: Groups, memory: Groups, context: Context) -> tuple[Groups, Groups]:
        """One step."""
        share, before = len(context.answered) / context.num_clients, memory.get("control", {})
        control = {name: _sum(before.get(name), tensor, share) for name, tensor in groups["control"].items()}
        step = groups["update"]
        if self.learning_rate != 1:
            step = {name: self.learning_rate * tensor for name, tensor in step.items()}
        return {"update": step}, {"control": control}


def scaffold(option: int = 2, learning_rate: float = 1.0) -> Algorithm:
    """SCAFFOLD, with option 1 or 2 of the paper."""
    return replace(fedavg("uniform"), client=Controlled(option), server=(Control(learning_rate),))


def _sum(one: Tensor | None, other: Tensor, factor: float) -> Tensor:
    """one + factor x other, in the type of one."""
    found = torch.empty_like(other if one is None else one, memory_format=torch.contiguous_format)
    for into, here, there in together(found, other if one is None else one, other):
        torch.mul(there, factor, out=into) if one is None else into.copy_(here + there * factor)
    return found


def _read_off(update: Tensor, rates: float, offset: Tensor | None, old: Tensor | None) -> tuple[Tensor, Tensor]:
    """c_k - c + (x - y) / (sum of rates), with y - x the update and c - c_k the offset; and how much that is more than c_k."""
    new = torch.empty_like(update, memory_format=torch.contiguous_format)
    change = new if old is None else torch.empty_like(new)
    for moved, by, before, now, more in together(
        update, new if offset is None else offset, new if old is None else old, new, change
    ):
        torch.div(moved, -rates, out=now)
        if offset is not None:
            now.sub_(by)
        if old is not None:
            torch.sub(now, before, out=more)
    return new, change


def _difference(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """one - other, where a missing one is zero."""
    if one is None or other is None:
        return one if other is None else -other
    return one - other
