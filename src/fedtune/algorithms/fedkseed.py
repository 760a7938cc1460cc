"""FedKSeed: Qin et al. 2024, "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost under
18 Kilobytes".

    w(a) = w_0 - sum over j < K of a_j z_j           z_j: a direction that seed j draws; a is all that travels, a <- 0
    for each round, for each client k of the cohort S: w <- w(a), b <- 0
        for each local step, on a batch: j <- one of the K seeds
            rho <- (L(w + eps z_j) - L(w - eps z_j)) / (2 eps)
            w <- w - eta rho z_j
            b_j <- b_j + eta rho
        send b
    a <- a + sum over k in S of (n_k / n) b_k

No gradient is made, so a client needs the memory of inference. The paper adds up rho and multiplies by eta at the end; with eta
in the sum a schedule is allowed. Both losses of a step are of one batch and one dropout. Every seed is as likely as another
(FedKSeed-Pro has probabilities that the server learns).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch

from fedtune.algorithms.fedavg import fedavg
from fedtune.errors import UsageError
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.directions import SCALARS
from fedtune.federated.optimisation import sgd_groups
from fedtune.federated.parts import Algorithm
from fedtune.federated.walks import Loss
from fedtune.tensors import Groups


@final
@dataclass(frozen=True)
class ZerothOrder(ClientUpdate):
    """Local epochs without gradients: each step goes along one of K random directions, as far as two losses say.

    Args:
        seeds: K.
        epsilon: how far from the weights the losses are found, in standard deviations of a direction's elements.
    """

    seeds: int = 1024
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if isinstance(self.seeds, bool) or not isinstance(self.seeds, int) or self.seeds < 1:
            raise UsageError("seeds", self.seeds, "a whole number, 1 or more")
        if not 0 < self.epsilon < float("inf"):
            raise UsageError("epsilon", self.epsilon, "a number above 0")

    def __call__(self, client: Client) -> Groups:
        """Train; send how far the client went along each direction."""
        _check(client)
        directions, weights = client.directions, client.weights
        gone = directions.zeros()
        with client.apart("seeds"):
            rng = np.random.default_rng(int(torch.randint(2**62, ())))

        def walk(loss: Loss) -> None:
            seed = int(rng.integers(self.seeds))
            directions.add_(weights, seed, self.epsilon)
            above = loss()
            directions.add_(weights, seed, -2 * self.epsilon)
            below = loss()
            slope = 0.0 if above is None or below is None else (above - below) / (2 * self.epsilon)
            step = client.optimizer.param_groups[0]["lr"] * slope
            directions.add_(weights, seed, self.epsilon - step)
            gone[seed] += step

        client.train(walk=walk)
        client.update()
        return {"update": {SCALARS: gone}}


def _check(client: Client) -> None:
    """Raise `UsageError` where the module's optimizer would not move all weights by rate times gradient, with one rate."""
    groups = sgd_groups(client.optimizer, "FedKSeed", momentum=False)
    if decay := max(group["weight_decay"] for group in groups):
        raise UsageError("algorithm", f"FedKSeed with weight decay {decay}", "FedKSeed without: w(a) has no place for it")
    if len(rates := sorted({float(group["lr"]) for group in groups})) > 1:
        raise UsageError("algorithm", f"FedKSeed with the rates {rates}", "FedKSeed with one rate for all weights")
    if left := sorted(client.weights.keys() - client.settings.keys()):
        allowed = "FedKSeed with an optimizer of all that is trained (algorithm.frozen says what is not)"
        raise UsageError("algorithm", f"FedKSeed without {left[0]} in its optimizer", allowed)


def fedkseed(seeds: int = 1024, epsilon: float = 1e-3, weighting: str = "examples") -> Algorithm:
    """FedKSeed: K scalars travel, up and down."""
    return replace(fedavg(weighting), client=ZerothOrder(seeds, epsilon))
