"""DP-SGD within a client: Abadi et al. 2016, "Deep Learning with Differential Privacy", Algorithm 1.

    for each step: L <- each of the client's n examples with probability q = b / n        Poisson; L may be empty
                   g_i <- gradient of the loss of example i, for each i in L
                   g <- (sum over L of g_i min(1, C / |g_i|) + z C N(0, I)) / b            b is fixed, whatever L has
                   the module's optimizer makes its step with g

What is drawn has addresses: seed, round and client. So a resumed run has the same bits, whatever other clients do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from fedtune.errors import RunError
from fedtune.federated.examples import ByExample, Part
from fedtune.federated.messages import ClientReport, Context
from fedtune.federated.optimisation import Optimisation
from fedtune.federated.training import Correction, Training, train
from fedtune.privacy.gradients import apart, hooked, take
from fedtune.privacy.sampling import Sampling, fetched, sampling_of
from fedtune.privacy.trial import check_apart

_ROOM = 2**28  # numbers that the gradients of single examples may take at a time: 1 GB
_ROUNDING = 1e-5  # of a clip: what a length in fp32 may be wrong by
_TWICE = (
    "with privacy of examples the gradients of each batch are made once: training_step must not return None, "
    "on_train_batch_start not -1, and an optimizer must not ask for them again"
)


@final
class NoisySum(ByExample):
    """The sum of clipped gradients of a step's examples, noise, and division by what does not depend on who was drawn.

    Args:
        module: whose trained parameters have gradients by example, see `hooked`.
        clip: C.
        noise: z.
        denominator: b.
        rng: draws the noise.
    """

    def __init__(
        self, module: pl.LightningModule, clip: float, noise: float, denominator: float, rng: np.random.Generator
    ) -> None:
        self._trained = [one for one in module.parameters() if one.requires_grad]
        self._clip, self._deviation, self._denominator, self._rng = clip, noise * clip, denominator, rng
        self._sums: list[Tensor] = []
        self._added = 0
        self.expected: deque[int] = deque()  # parts of each step

    @torch.no_grad()
    def add(self, size: int) -> None:
        """Clip the gradients of so many examples, and add them up."""
        samples = [take(one) for one in self._trained]
        known = [one for one in samples if one is not None]
        if any(len(one) != size for one in known):
            raise RunError(f"{max(map(len, known))} gradients for {size} examples; each layer must be given one row a text")
        lengths = torch.stack([torch.linalg.vector_norm(one.flatten(1), dim=1) for one in known]).double()
        factors = (self._clip * (1 - _ROUNDING) / torch.linalg.vector_norm(lengths, dim=0)).clamp(max=1.0)
        if not self._sums:
            self._sums = [torch.zeros_like(one, dtype=torch.promote_types(one.dtype, torch.float32)) for one in self._trained]
        for total, sample in zip(self._sums, samples, strict=True):
            if sample is not None:
                total.add_(torch.tensordot(factors.to(sample.dtype), sample, 1))
        self._added += 1

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the noisy sum over the denominator in the parameters' gradients.

        Raises:
            RunError: a part of the step has made no gradients, or more than once.
        """
        if not self.expected or self._added != self.expected.popleft():
            raise RunError(_TWICE)
        for number, parameter in enumerate(self._trained):
            drawn = self._rng.standard_normal(tuple(parameter.shape), dtype=np.float32)
            noisy = torch.from_numpy(drawn).to(parameter.device).mul_(self._deviation)
            noisy += self._sums[number] if self._sums else 0.0
            parameter.grad = noisy.div_(self._denominator).to(parameter.dtype)
        self._sums, self._added = [], 0


@final
@dataclass(frozen=True)
class PrivateEpochs:
    """Local epochs of one client in one round; called as `train_epochs`.

    Args:
        clip: C.
        noise: z.
        sampling: as the noise was found, or the rounds, for it.
        context: of the client.
    """

    clip: float
    noise: float
    sampling: Sampling
    context: Context

    def __call__(
        self,
        training: Training,
        optimisation: Optimisation,
        loader: Any,
        epochs: int,
        where: str,
        client: int,
        correct: Correction | None = None,
    ) -> ClientReport:
        """Steps with noise. The report's number of examples, by which a mean may weigh, does not depend on who was drawn.

        Raises:
            RunError: the loader is no longer what it was when the run began.
            UsageError: as `check_apart` and `hooked`.
        """
        module, sampling = training.module, self.sampling
        if (now := sampling_of(loader, training, client)) != sampling:
            raise RunError(f"{where}: its loader has {now}, and had {sampling} when the run began, for which the privacy is")
        sums = NoisySum(module, self.clip, self.noise, sampling.expected, self.context.rng("privacy/noise"))
        room = max(1, _ROOM // sum(one.numel() for one in module.parameters() if one.requires_grad))
        draws = self.context.rng("privacy/examples")
        passes = (self._parts(loader, sums, room, draws) for _ in range(epochs))
        training.trainer.train_dataloader = loader
        check_apart(training, loader, client)
        with apart(module), hooked(module):
            report = train(training, optimisation, passes, where, client, correct, by_example=sums)
        return replace(report, num_examples=min(sampling.examples, sampling.steps * sampling.expected) * epochs)

    def _parts(self, loader: Any, sums: NoisySum, room: int, draws: np.random.Generator) -> Iterator[Part]:
        """The steps of an epoch, in parts of at most so many examples."""
        for _ in range(self.sampling.steps):
            places = np.flatnonzero(draws.random(self.sampling.examples) < self.sampling.rate).tolist()
            chunks = [places[start : start + room] for start in range(0, len(places), room)]
            sums.expected.append(len(chunks))
            if not chunks:
                yield Part(None, True)
            for number, chunk in enumerate(chunks, start=1):
                yield Part(fetched(loader, chunk), number == len(chunks))
