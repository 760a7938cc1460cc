"""Question: what does each step of the engine give (all on, then one off), and what does a client cost beyond its steps?

One client's epoch over 512 texts (MiniLM, dropout 0.1, plain SGD), all variants one after the other, several times.
Run it from the project's folder: .venv/bin/python benchmarks/engine.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning_fabric import Fabric
from machine import about, write
from torch.utils.data import DataLoader

import fedtune
from fedtune.aggregation import RunningAgreement, RunningMean
from fedtune.client import Optimisation, Resident, run_steps
from fedtune.evaluation import attached, evaluate
from fedtune.hardware import resolve_precision
from fedtune.weights import assign_, snapshot, travelling

TEXTS, REPEATS = 512, 3
ON = {"grouped": True, "fast_dropout": True, "precision": "auto", "attention": "eager"}
VARIANTS: dict[str, dict[str, Any]] = {
    "everything on": {},
    "batches not grouped by length": {"grouped": False},
    "torch's dropout": {"fast_dropout": False},
    "fp32": {"precision": "32-true"},
    "sdpa": {"attention": "sdpa"},
    "nothing on": {"grouped": False, "fast_dropout": False, "precision": "32-true", "attention": "sdpa"},
}


def task() -> fedtune.FederatedDataModule:
    """Real sentences where they are at hand, else the embedded passages, which are of similar length."""
    try:
        data = fedtune.FederatedDataModule("spooky_author", num_clients=1, limit=TEXTS, task_options={"validation": 0.1})
        data.setup()
    except fedtune.UsageError:
        data = fedtune.FederatedDataModule("authors", num_clients=1, limit=TEXTS)
    return data


def epoch(data: fedtune.FederatedDataModule, module: Any, variant: dict[str, Any]) -> float:
    """Seconds of one epoch."""
    options = ON | variant
    fabric = Fabric(accelerator="cpu", devices=1, precision=resolve_precision(options["precision"], "cpu"))
    module.network.set_attn_implementation(options["attention"])
    loader = data.client_dataloader(0)
    if not options["grouped"]:
        loader = DataLoader(loader.dataset, batch_size=32, shuffle=True, collate_fn=lambda batch: batch)
    with attached(fabric, module):
        resident = Resident(fabric, module, 0, None, options["fast_dropout"])
        return run_steps(resident, Optimisation(module, 0, 0), loader, "here").seconds


def evaluation(data: fedtune.FederatedDataModule, module: Any, size: int) -> float:
    """Seconds of one evaluation with batches of a size."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=resolve_precision("auto", "cpu"))
    module.network.set_attn_implementation("eager")
    data.hparams["eval_batch_size"] = size
    with attached(fabric, module):
        return seconds(lambda: evaluate(fabric, module, data.val_dataloader()))


def fixed(module: Any) -> dict[str, float]:
    """Seconds that a client costs beyond its steps, by part: medians over eight clients."""
    here = travelling(module)
    server = snapshot(here)
    for tensor in here.values():
        tensor.add_(torch.randn_like(tensor), alpha=1e-4)
    agreement, norms, mean = RunningAgreement(server), RunningAgreement(server, full=False), RunningMean()
    parts: dict[str, Callable[[], Any]] = {
        "reset to the server's weights": lambda: assign_(here, server),
        "fresh optimizer": lambda: Optimisation(module, 0, 0),
        "running mean": lambda: mean.add(here, 1),
        "agreement": lambda: agreement.add(here, 1),
        "norm only": lambda: norms.add(here, 1),
    }
    moved = snapshot(here)
    found: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(8):
        for name, part in parts.items():
            found[name].append(seconds(part))
            assign_(here, moved)
    return {name: statistics.median(values) for name, values in found.items()}


def seconds(what: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def main() -> None:
    data = task()
    module = fedtune.BertClassifier("minilm", data.num_labels, optimizer="sgd", learning_rate=1e-4)
    epoch(data, module, {})  # the memory of the first steps is fresh
    sizes = (16, 32, 64, 128, 256)
    raw: dict[str, Any] = {"epoch": {name: [] for name in VARIANTS}, "evaluation": {size: [] for size in sizes}}
    for _ in range(REPEATS):
        for name, variant in VARIANTS.items():
            raw["epoch"][name].append(epoch(data, module, variant))
        for size in sizes:
            raw["evaluation"][size].append(evaluation(data, module, size))
    for kind, base in (("epoch", "everything on"), ("evaluation", 64)):
        print(f"\n{kind:32} {'seconds':>8} {'times as long':>14}")
        for name, times in raw[kind].items():
            ratio = statistics.median(mine / first for mine, first in zip(times, raw[kind][base], strict=True))
            print(f"{name:<32} {statistics.median(times):8.2f} {ratio:14.2f}")
    raw["fixed"] = fixed(module)
    print("\na client beyond its steps, ms: " + ", ".join(f"{name} {1000 * value:.1f}" for name, value in raw["fixed"].items()))
    write("engine", about() | {"unit": "seconds", "raw": raw})


if __name__ == "__main__":
    main()
