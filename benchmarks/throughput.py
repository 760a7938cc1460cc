"""Question: how much of the hardware's matrix rate does a training step use, for the real sizes of the paper's models?

BERT-base, DistilBERT, ALBERT and MiniLM with random weights, batches of 32 random texts of 40 and 128 tokens without padding,
dropout on, AdamW, in the precision that "auto" chooses. The matrix rate is measured at the shape of the feed-forward layer.
On a GPU each is also run with the network compiled (`mode="reduce-overhead"`: CUDA graphs).
Run it from the project's folder: .venv/bin/python benchmarks/throughput.py
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from lightning_fabric import Fabric
from machine import about, write
from torch.utils.flop_counter import FlopCounterMode

import fedtune
from fedtune.federated.evaluation import attached
from fedtune.federated.messages import Position
from fedtune.federated.optimisation import Optimisation
from fedtune.federated.training import Training, train
from fedtune.runs.hardware import resolve_precision

BATCH, REPEATS = 32, 3


def matrix_rate(fabric: Fabric, tokens: int, hidden: int) -> float:
    """Floating-point operations a second of (tokens, hidden) x (hidden, 4 hidden) in the run's precision."""
    dtype = torch.bfloat16 if "bf16" in resolve_precision("auto") else torch.float32
    left, right = (torch.randn(shape, device=fabric.device, dtype=dtype) for shape in ((tokens, hidden), (hidden, 4 * hidden)))
    many = 100 if fabric.device.type == "cuda" else 1  # so that the wait for the device is a small part
    times = []
    for _ in range(30):
        start = _now(fabric)
        for _ in range(many):
            left @ right
        times.append(_now(fabric) - start)
    return 2 * tokens * hidden * 4 * hidden * many / min(times)  # the best: what the hardware can do


def _now(fabric: Fabric) -> float:
    if fabric.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(fabric: Fabric, name: str, length: int, compiled: bool) -> dict[str, float]:
    """Tokens a second, operations of a token, share of the matrix rate."""
    module = fedtune.build_classifier(name, 4, init="random")
    ids = torch.randint(5, module.network.config.vocab_size, (BATCH, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(BATCH) % 4}
    training = Training(fabric, module, 0)
    with attached(training):
        optimisation = Optimisation(training.trainer, Position())
        with FlopCounterMode(display=False) as counter:
            train(training, optimisation, [[batch]], name)
        if compiled:
            module.network.compile(mode="reduce-overhead", dynamic=False)
        steps = 50 if fabric.device.type == "cuda" else 3
        train(training, optimisation, [[batch] * (5 if compiled else 1)], name)
        taken = statistics.median(train(training, optimisation, [[batch] * steps], name).seconds for _ in range(REPEATS))
    rate = steps * BATCH * length / taken
    per_token = counter.get_total_flops() / (BATCH * length)
    possible = matrix_rate(fabric, BATCH * length, module.network.config.hidden_size)
    return {
        "tokens_per_s": rate,
        "flop_per_token": per_token,
        "matrix_rate": possible,
        "hidden": module.network.config.hidden_size,
    }


def main() -> None:
    fabric = Fabric(accelerator="auto", devices=1, precision=resolve_precision("auto"))
    raw: dict[str, Any] = {}
    for length in (40, 128):
        for name in ("bert", "distilbert", "albert", "minilm"):
            for compiled in (False, True) if fabric.device.type == "cuda" else (False,):
                label = f"{name}, {length} tokens{', compiled' if compiled else ''}"
                raw[label] = measure(fabric, name, length, compiled)
                print(label, flush=True)
    print(f"\n{'':30} {'tokens/s':>9} {'MFLOP a token':>14} {'of the matrix rate':>19}")
    for label, found in raw.items():  # against the best rate of the width: a single measurement may fall into a busy moment
        best = max(other["matrix_rate"] for other in raw.values() if other["hidden"] == found["hidden"])
        found["share"] = found["tokens_per_s"] * found["flop_per_token"] / best
        print(f"{label:30} {found['tokens_per_s']:9.0f} {found['flop_per_token'] / 1e6:14.0f} {found['share']:19.2f}")
    write("throughput", about() | {"raw": raw})


if __name__ == "__main__":
    main()
