"""FedAdagrad, FedAdam, FedYogi: Reddi et al. 2021, "Adaptive Federated Optimization", Algorithm 2.

    D <- the mean update of the round
    m <- beta1 m + (1 - beta1) D
    v <- v + D^2                                      FedAdagrad
    v <- v - (1 - beta2) D^2 sign(v - D^2)            FedYogi
    v <- beta2 v + (1 - beta2) D^2                    FedAdam
    w <- w + eta m / (sqrt(v) + tau)

m starts at 0 and v at tau^2; there is no correction of their bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from fedtune.algorithms.fedavg import fedavg
from fedtune.errors import UsageError
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm, ServerStep
from fedtune.federated.pieces import together
from fedtune.tensors import Groups, Tensors


@dataclass(frozen=True)
class _Adaptive(ServerStep):
    """What the three have in common.

    Args:
        learning_rate: eta, of the server.
        beta1, beta2: what is left of the moments after a round, at least 0 and below 1.
        tau: adaptivity, above 0: in sqrt(v) + tau, and the square root of the first v.
    """

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(name, getattr(self, name), "at least 0 and below 1")
        for name in ("learning_rate", "tau"):
            if not getattr(self, name) > 0:
                raise UsageError(name, getattr(self, name), "a number above 0")

    def __call__(self, groups: Groups, memory: Groups, context: Context) -> tuple[Groups, Groups]:
        """One step."""
        first: Tensors = {}
        second: Tensors = {}
        step: Tensors = {}
        for name, update in groups["update"].items():
            kind = torch.promote_types(context.weights.get(name, update).dtype, torch.float32)
            kept = [memory[group][name] if memory else update for group in ("first", "second")]
            step[name] = torch.empty_like(update, memory_format=torch.contiguous_format)
            first[name], second[name] = (torch.empty_like(step[name], dtype=kind) for _ in kept)
            for d, m, v, into_m, into_v, into in together(update, *kept, first[name], second[name], step[name]):
                m = d * (1 - self.beta1) if not memory else m.double().mul_(self.beta1).add_(d, alpha=1 - self.beta1)
                v = self._second(v.double() if memory else torch.full_like(d, self.tau**2), d.square())
                torch.div(m, v.sqrt().add_(self.tau), out=into).mul_(self.learning_rate)
                into_m.copy_(m)
                into_v.copy_(v)
        return groups | {"update": step}, {"first": first, "second": second}

    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        raise NotImplementedError


@final
@dataclass(frozen=True)
class Adagrad(_Adaptive):
    """FedAdagrad's step; beta2 is not used."""

    beta1: float = 0.0

    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square


@final
@dataclass(frozen=True)
class Adam(_Adaptive):
    """FedAdam's step."""

    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        return v * self.beta2 + square * (1 - self.beta2)


@final
@dataclass(frozen=True)
class Yogi(_Adaptive):
    """FedYogi's step."""

    def _second(self, v: Tensor, square: Tensor) -> Tensor:
        return v - square * (v - square).sign() * (1 - self.beta2)


def fedadagrad(learning_rate: float = 0.01, beta1: float = 0.0, tau: float = 1e-3, weighting: str = "examples") -> Algorithm:
    """FedAdagrad."""
    return replace(fedavg(weighting), server=(Adagrad(learning_rate, beta1, tau=tau),))


def fedadam(
    learning_rate: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3, weighting: str = "examples"
) -> Algorithm:
    """FedAdam."""
    return replace(fedavg(weighting), server=(Adam(learning_rate, beta1, beta2, tau),))


def fedyogi(
    learning_rate: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3, weighting: str = "examples"
) -> Algorithm:
    """FedYogi."""
    return replace(fedavg(weighting), server=(Yogi(learning_rate, beta1, beta2, tau),))
