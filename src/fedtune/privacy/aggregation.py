"""A mean under client-level differential privacy: the aggregator of a run with `privacy`.

    S <- the replies of the round's clients                          whatever number they are, none among them
    s <- sum over k in S of D_k min(1, C / |D_k|)                    exact, so of any order and number of processes
    update <- (s + z C n) / (q N)                                    n standard normal, drawn from an address; q N is fixed
    b <- (sum over k in S of ([|D_k| <= C] - 1/2) + N(0, sigma_b^2)) / (q N) + 1/2        AdaptiveGaussian alone
    C <- C exp(-eta_C (b - gamma))

A client that is added or removed moves s by at most C, the roundings of fp32 and of the grid included. The half that is taken
from each count makes one client move it by 1/2, not 1; so count and sum together are one release of noise z where the sum's is
(z^-2 - (2 sigma_b)^-2)^(-1/2) (Andrew et al. 2021, Theorem 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from fedtune.errors import RunError
from fedtune.federated.messages import Context, Reply
from fedtune.federated.parts import Aggregator, Runtime
from fedtune.federated.pieces import Pieces
from fedtune.federated.state import ServerState
from fedtune.federated.sums import grid_bits
from fedtune.privacy.factorisation import bands, sensitivity
from fedtune.privacy.mechanisms import AdaptiveGaussian, Banded, Mechanism
from fedtune.tensors import Groups, Tensors

_MOST_LOG_CLIP = 30 * math.log(10)  # beyond, products in fp32 would be infinite, or nothing


@final
@dataclass(frozen=True)
class PrivateMean(Aggregator):
    """Clips, adds up, adds noise, divides by what does not depend on who answers.

    Args:
        mechanism: as the configuration has it.
        noise: z, of the whole release.
        rate: q, as the ledger has it.
        denominator: q N.
        limit_rounds: after which the budget is used up; None: there is none.
        named: the tensors of a round's update, also where nobody answers.

    What is kept for the next round: "ledger" (rounds, rate and noise so far), the "clip", and the "past" noise of Banded.
    """

    mechanism: Mechanism
    noise: float
    rate: float
    denominator: float
    limit_rounds: int | None
    named: Callable[[ServerState, Context], Tensors]
    takes: ClassVar[tuple[str, ...] | None] = ("update",)
    least: int = 0

    @property
    def keeps(self) -> tuple[str, ...]:  # type: ignore[override]
        """What is kept for the next round."""
        more = {AdaptiveGaussian: ("clip",), Banded: ("past",)}
        return ("ledger", *more.get(type(self.mechanism), ()))

    def __call__(self, replies: Iterator[Reply], state: ServerState, context: Context, runtime: Runtime) -> Groups:
        """Clip, add up and add noise."""
        memory, clip = state.memory.get(type(self).__name__, {}), self.clip_of(state)
        groups: Groups = {"ledger": self._ledger(memory.get("ledger"), context)}
        limit, halves = 2.0 ** (math.ceil(math.log2(clip)) + 1), 0.0
        sums, step = context.sums(lambda _: limit, context.num_clients), 2.0 ** -grid_bits(limit, context.num_clients)
        for reply in replies:
            factor = clipping(reply.pieces["update"], clip, step)
            halves += 0.5 if factor == 1.0 else -0.5
            sums.add({"update": reply.pieces["update"]}, 1, factor, reply.client)
        found = sums.mean(runtime, over=self.denominator).get("update", {})
        noise, scale = standard_normal(self.named(state, context), context), self._of_sum() * clip
        if isinstance(self.mechanism, Banded):
            noise, groups["past"] = correlated(self.mechanism, noise, memory.get("past", {}))
            scale *= sensitivity(bands(self.mechanism.bands))
        if isinstance(self.mechanism, AdaptiveGaussian):
            groups["clip"] = {"clip": self._next_clip(self.mechanism, clip, sum(runtime.gather([halves])), context)}
        groups["update"] = {
            name: drawn * (scale / self.denominator) + found.get(name, torch.zeros_like(drawn)) for name, drawn in noise.items()
        }
        return groups

    def clip_of(self, state: ServerState) -> float:
        """C of the next round."""
        kept = state.memory.get(type(self).__name__, {}).get("clip")
        return self.mechanism.clip if kept is None else float(kept["clip"])

    def weight(self, reply: Reply) -> int:
        """1."""
        return 1

    def limit(self, group: str) -> float:
        """None: what is long is cut."""
        return math.inf

    def _ledger(self, before: Tensors | None, context: Context) -> Tensors:
        """What has been released, this round included.

        Raises:
            RunError: the budget is used up, or the rounds before had other noise or sampling.
        """
        now = {"rate": self.rate, "noise": self.noise}
        for name, value in now.items():
            if before is not None and float(before[name]) != value:
                raise RunError(
                    f"round {context.round}: the privacy ledger has {name} {float(before[name])!r} for the rounds before, and "
                    f"now it is {value!r}, as by another version of dp-accounting; go on with the one that the run began with"
                )
        rounds = 1 + (0 if before is None else int(before["rounds"]))
        if rounds != context.round:
            raise RunError(f"round {context.round}: the privacy ledger has {rounds - 1} rounds")
        if self.limit_rounds is not None and rounds > self.limit_rounds:
            raise RunError(f"round {rounds}: the privacy budget is used up after round {self.limit_rounds}")
        return {name: torch.tensor(float(value), dtype=torch.float64) for name, value in (now | {"rounds": rounds}).items()}

    def _of_sum(self) -> float:
        """Noise on the sum, in units of the clip."""
        if not isinstance(self.mechanism, AdaptiveGaussian):
            return self.noise
        return noise_of_sum(self.noise, self.mechanism.noise_of_count(self.denominator))

    def _next_clip(self, mechanism: AdaptiveGaussian, clip: float, halves: float, context: Context) -> Tensor:
        drawn = float(context.rng("privacy count").standard_normal())
        share = (halves + mechanism.noise_of_count(self.denominator) * drawn) / self.denominator + 0.5
        moved = math.log(clip) - mechanism.clip_rate * (share - mechanism.quantile)
        if abs(moved) > _MOST_LOG_CLIP:
            allowed = f"1e-30 to 1e30; a smaller clip_rate ({mechanism.clip_rate:g}) or count_noise moves it less"
            raise RunError(f"round {context.round}: the clip moves to 1e{moved / math.log(10):.0f}; allowed: {allowed}")
        return torch.tensor(clip * math.exp(-mechanism.clip_rate * (share - mechanism.quantile)), dtype=torch.float64)


def correlated(mechanism: Banded, fresh: Tensors, past: Tensors) -> tuple[Tensors, Tensors]:
    """C^-1 z of a round, by forward substitution, and what the next round needs of it and the rounds before.

    Args:
        fresh: z of this round.
        past: as it was returned for the round before: "1:NAME" is C^-1 z of the last round, "2:NAME" of the one before.
    """
    column, found = bands(mechanism.bands), {}
    for name, drawn in fresh.items():
        known = [(back, past.get(f"{back}:{name}")) for back in range(1, len(column))]
        found[name] = sum((-column[back] * value.to(drawn) for back, value in known if value is not None), start=drawn)
    kept: Tensors = {}
    for back in range(1, len(column)):
        before = found if back == 1 else {name: past[f"{back - 1}:{name}"] for name in fresh if f"{back - 1}:{name}" in past}
        kept |= {f"{back}:{name}": value for name, value in before.items()}
    return found, kept


def noise_of_sum(noise: float, count_noise: float) -> float:
    """z_D = (z^-2 - (2 sigma_b)^-2)^(-1/2), for z below 2 sigma_b."""
    return (noise**-2 - (2 * count_noise) ** -2) ** -0.5


@torch.no_grad()
def clipping(update: Pieces, clip: float, step: float) -> float:
    """The factor, at most 1, with which an update is at most as long as the clip, on a grid of so large a step, too.

    Its length is found in fp64. What it falls short of the clip by is what rounding may add: of the product, in the update's
    type, and of each element on the grid.
    """
    squares = [torch.linalg.vector_norm(values, dtype=torch.float64).square() for _, _, values in update]
    length = math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0
    kinds = {tensor.dtype for tensor in update.tensors.values()}
    rounding = 8 * max((torch.finfo(kind).eps for kind in kinds), default=0.0)
    size = sum(tensor.numel() for tensor in update.tensors.values())
    most = clip * (1 - rounding) - math.sqrt(size) * step
    return min(1.0, most / length) if length else 1.0


def standard_normal(like: Tensors, context: Context) -> Tensors:
    """Standard normal numbers, fp64, of an address for each tensor: the same in every process."""
    return {
        name: torch.from_numpy(context.rng(f"privacy/{name}").standard_normal(tuple(tensor.shape))).to(tensor.device)
        for name, tensor in like.items()
    }
