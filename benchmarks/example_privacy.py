"""Question: what does privacy of examples cost a step of LoRA?

MiniLM with adapters of rank 8, passages of the task `authors`, the same batches of 32 for all, AdamW, dropout on, one thread. A
turn is one batch through all ways, one after the other; seconds are medians over the turns, and a ratio is the median of the
turns' ratios. Ways with privacy clip, add noise and make the optimizer's step, too:

    plain, packed      the step as it is by default: no padding
    plain, padded      the Hugging Face network as it is
    packed             what `ExampleGaussian` does: opacus' hooks, given the packed rows text by text
    padded, hooks      opacus' hooks on the padded network
    padded, functorch  opacus with torch.func in every layer
    padded, ghost      opacus' ghost clipping: lengths first, then a second backward pass of the weighted loss

Run it from the project's folder: .venv/bin/python benchmarks/example_privacy.py --turns 8
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from machine import about, write
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
from torch.nn import functional as F

import fedtune
from fedtune.federated.dropout import FastDropout
from fedtune.privacy.gradients import apart, hooked
from fedtune.privacy.steps import NoisySum

CLIP, NOISE, SIZE = 1.0, 1.0, 32
Step = Callable[[dict[str, torch.Tensor]], None]


class Way:
    """A module, its optimizer and what makes the gradients."""

    def __init__(self, labels: int, packed: bool, kind: str, precision: str) -> None:
        self.module = fedtune.BertClassifier("minilm", num_labels=labels, lora={"rank": 8, "alpha": 16}, padding_free=packed)
        self.module.log = lambda *_, **__: None  # type: ignore[assignment, method-assign]
        self.optimizer = torch.optim.AdamW([one for one in self.module.parameters() if one.requires_grad], lr=1e-4, fused=True)
        self.kind, self.half, self.stack = kind, precision == "bf16-mixed", contextlib.ExitStack()
        self.sum = NoisySum(self.module, CLIP, NOISE, SIZE, np.random.default_rng(0))
        if kind != "plain":
            self.stack.enter_context(apart(self.module))
        if kind in ("hooks", "packed"):
            self.stack.enter_context(hooked(self.module))
        elif kind == "functorch":
            GradSampleHooks(self.module, force_functorch=True)
        elif kind == "ghost":
            self.ghost = GradSampleHooksFastGradientClipping(self.module, max_grad_norm=CLIP)

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of the training step."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            return self.module.training_step(batch, 0)

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        """One step of the optimizer."""
        if self.kind == "ghost":
            self._ghost(batch)
        else:
            self.loss(batch).backward()  # type: ignore[no-untyped-call]
            if self.kind != "plain":
                self.sum.expected.append(1)
                self.sum.add(SIZE)
                self.sum.finish()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _ghost(self, batch: dict[str, torch.Tensor]) -> None:
        self.ghost.enable_hooks()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            logits = self.module(batch["input_ids"], batch["attention_mask"])
        losses = F.cross_entropy(logits.float(), batch["labels"], reduction="none")
        losses.mean().backward(retain_graph=True)  # type: ignore[no-untyped-call]
        weights = self.ghost.get_clipping_coef().detach()
        self.optimizer.zero_grad()
        self.ghost.disable_hooks()
        (weights * losses).sum().backward()
        for one in self.module.parameters():
            if one.requires_grad and one.grad is not None:
                one.grad.add_(torch.randn_like(one.grad), alpha=NOISE * CLIP).div_(SIZE)


WAYS = {
    "plain, packed": (True, "plain"),
    "plain, padded": (False, "plain"),
    "packed": (True, "packed"),
    "padded, hooks": (False, "hooks"),
    "padded, functorch": (False, "functorch"),
    "padded, ghost": (False, "ghost"),
}


def batches(data: fedtune.FederatedDataModule, count: int) -> list[Any]:
    """Full batches of pooled texts, in a random order."""
    torch.manual_seed(0)
    return [batch for batch in data.train_dataloader() if len(batch["labels"]) == SIZE][:count]


def measured(data: fedtune.FederatedDataModule, precision: str, turns: int) -> dict[str, Any]:
    """Seconds of each way in each turn; the first turn is left out."""
    ways = {name: Way(data.num_labels, *how, precision) for name, how in WAYS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    given = batches(data, turns + 1)
    with FastDropout():
        for number, batch in enumerate(given):
            for name, way in ways.items():
                began = time.perf_counter()
                way.step(batch)
                if number:
                    seconds[name].append(time.perf_counter() - began)
    tokens = [float(batch["attention_mask"].sum(1).float().mean()) for batch in given[1:]]
    padded = [float(batch["input_ids"].shape[1]) for batch in given[1:]]
    return {
        "tokens a text": statistics.mean(tokens),
        "padded to": statistics.mean(padded),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        **{f"of {base}": {name: _ratio(values, seconds[base]) for name, values in seconds.items()} for base in list(WAYS)[:2]},
        "raw": seconds,
    }


def _ratio(values: list[float], base: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(values, base, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--name", default="example_privacy", help="of the file of results; - writes none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = fedtune.FederatedDataModule("authors", "minilm", num_clients=8, batch_size=SIZE, max_length=128)
    found: dict[str, Any] = {}
    for precision in ("32-true", "bf16-mixed"):
        found[precision] = measured(data, precision, options.turns)
        print(precision, {name: value for name, value in found[precision].items() if name != "raw"})
    if options.name != "-":
        write(options.name, about() | {"clip": CLIP, "noise": NOISE, "batch": SIZE} | found)


if __name__ == "__main__":
    main()
