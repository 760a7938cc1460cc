"""Question: what does each step of the engine give (all on, then one changed), and what does a client cost beyond its steps?

One client's epoch over 512 texts (MiniLM, dropout 0.1, plain SGD), all variants one after the other, several times. Whether
freed memory is kept decides for a whole process how its memory is laid out, so that is measured in processes of their own.
Run it from the project's folder: .venv/bin/python benchmarks/engine.py
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning_fabric import Fabric
from machine import about, write
from torch.utils.data import DataLoader, Dataset

import fedtune
from fedtune.algorithms.fedavg import fedavg
from fedtune.data.batches import LengthGroupedBatches
from fedtune.federated.agreement import RunningAgreement
from fedtune.federated.client import Worker
from fedtune.federated.dropout import FastDropout
from fedtune.federated.evaluation import attached, evaluate
from fedtune.federated.memory import MemoryInRam
from fedtune.federated.messages import Context, Position
from fedtune.federated.optimisation import Optimisation
from fedtune.federated.pieces import Pieces
from fedtune.federated.round import run_round
from fedtune.federated.state import ServerState
from fedtune.federated.sums import ExactSum
from fedtune.federated.training import Training, train
from fedtune.randomness import seeded
from fedtune.runs.hardware import freed_memory_kept, resolve_precision
from fedtune.runtimes.serial import Serial
from fedtune.tensors import assign_, snapshot, subtract_, travelling

TEXTS, REPEATS = 512, 3
MEMORY = ("kept", "given back")
ON = {
    "grouped": False,
    "slices": True,
    "waits": False,
    "fast_dropout": True,
    "precision": "auto",
    "padding_free": True,
    "attention": "eager",  # of the padded network
}
VARIANTS: dict[str, dict[str, Any]] = {
    "everything on": {},
    "batches grouped by length": {"grouped": True},
    "batches padded from Python lists": {"slices": False},
    "the loss is read after each step": {"waits": True},
    "torch's dropout": {"fast_dropout": False},
    "fp32": {"precision": "32-true"},
    "padded batches": {"padding_free": False},
    "padded batches, sdpa": {"padding_free": False, "attention": "sdpa"},
    "padded batches, grouped by length": {"padding_free": False, "grouped": True},
    "nothing on": {
        "slices": False,
        "waits": True,
        "fast_dropout": False,
        "precision": "32-true",
        "padding_free": False,
        "attention": "sdpa",
    },
}


def task(texts: int = TEXTS, clients: int = 1) -> fedtune.FederatedDataModule:
    """Real sentences where they are at hand, else the embedded passages, which are of similar length."""
    size = {"num_clients": clients, "limit": texts}
    try:
        data = fedtune.FederatedDataModule("spooky_author", **size, task_options={"validation": 0.1})
        data.setup()
    except fedtune.UsageError:
        data = fedtune.FederatedDataModule("authors", **size)
    return data


class Lists(Dataset[dict[str, torch.Tensor]]):
    """The same batches, made as most collate functions make them: from a list of tokens a text."""

    def __init__(self, texts: Any) -> None:
        offsets = texts.tokens.offsets
        self.ids = [texts.tokens.ids_T[offsets[row] : offsets[row + 1]].tolist() for row in texts.rows.tolist()]
        self.labels = texts.labels[texts.rows].tolist()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitems__(self, places: list[int]) -> dict[str, torch.Tensor]:
        longest = max(len(self.ids[place]) for place in places)
        gaps = [longest - len(self.ids[place]) for place in places]
        return {
            "input_ids": torch.tensor([self.ids[place] + [0] * gap for place, gap in zip(places, gaps, strict=True)]),
            "attention_mask": torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps]),
            "labels": torch.tensor([self.labels[place] for place in places]),
        }


def epoch(data: fedtune.FederatedDataModule, module: Any, variant: dict[str, Any]) -> float:
    """Seconds of one epoch."""
    options = ON | variant
    fabric = Fabric(accelerator="cpu", devices=1, precision=resolve_precision(options["precision"], "cpu"))
    module.network.set_attn_implementation(options["attention"])
    module.hparams["padding_free"] = options["padding_free"]
    loader = data.client_dataloader(0)
    texts = loader.dataset if options["slices"] else Lists(loader.dataset)
    order = LengthGroupedBatches(loader.dataset.lengths, 32) if options["grouped"] else loader.batch_sampler
    loader = DataLoader(texts, batch_sampler=order, collate_fn=lambda batch: batch)
    training = Training(fabric, module, 0, fast_dropout=options["fast_dropout"])
    with attached(training):
        optimisation = Optimisation(training.trainer, Position())
        if not options["waits"]:
            return train(training, optimisation, [loader], "here").seconds
        return sum(train(training, optimisation, [[batch]], "here").seconds for batch in loader)


def evaluation(data: fedtune.FederatedDataModule, module: Any, size: int, ordered: bool = True) -> float:
    """Seconds of one evaluation with batches of a size."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=resolve_precision("auto", "cpu"))
    module.hparams["padding_free"] = True
    data.hparams["eval_batch_size"] = size
    loader = data.val_dataloader()
    if not ordered:
        loader = DataLoader(loader.dataset, batch_size=size, shuffle=True, collate_fn=lambda batch: batch)
    training = Training(fabric, module, 0)
    with attached(training):
        return seconds(lambda: evaluate(training, loader))


def compiled(data: fedtune.FederatedDataModule) -> list[float]:
    """Seconds of three epochs of the padded network with `torch.compile` for any length; the first holds the compiling."""
    module = fedtune.BertClassifier("minilm", data.num_labels, optimizer="sgd", learning_rate=1e-4)
    module.network.compile(dynamic=True)
    return [epoch(data, module, {}) for _ in range(3)]


def fixed(module: Any) -> dict[str, float]:
    """Seconds that a client costs beyond its steps, by part: medians over eight clients."""
    here = travelling(module)
    server = snapshot(here)
    for tensor in here.values():
        tensor.add_(torch.randn_like(tensor), alpha=1e-4)
    agreement, total = RunningAgreement(8), ExactSum(lambda group: 8.0, 99)
    state = copy.deepcopy(module.state_dict())
    update = snapshot(here)  # of another client, so that the parts do not depend on each other
    subtract_(update, server)
    keep_rows(update)
    changed = Pieces(update)
    trainer = Training(Fabric(accelerator="cpu", devices=1), module, 0).trainer

    def both() -> None:
        agreement.add(0, changed, 1)
        total.add({"update": changed}, 1)

    parts: dict[str, Callable[[], Any]] = {
        "reset to the server's weights": lambda: assign_(here, server),
        "load_state_dict instead": lambda: module.load_state_dict(state),
        "a deep copy of the module instead": lambda: copy.deepcopy(module),
        "fresh optimizer": lambda: Optimisation(trainer, Position()),
        "update and its length": lambda: Pieces(here, minus=server),
        "exact sum": lambda: total.add({"update": changed}, 1),
        "exact sum and agreement": both,
    }
    moved = snapshot(here)
    found: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(8):
        for name, part in parts.items():
            found[name].append(seconds(part))
            assign_(here, moved)
    return {name: statistics.median(values) for name, values in found.items()}


def keep_rows(tensors: dict[str, torch.Tensor]) -> None:
    """Make most rows of the embedding zeros, as in a client's update: 3,000 of its 30,522 words occur in 512 texts."""
    name = next(name for name in tensors if "word_embeddings" in name)
    others = torch.randperm(len(tensors[name]), generator=torch.Generator().manual_seed(0))[3000:]
    tensors[name][others] = 0


def seconds(what: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def federated(data: fedtune.FederatedDataModule, module: Any, number: int) -> float:
    """Seconds of a round of one client, all that the server does included."""
    fabric, algorithm = Fabric(accelerator="cpu", devices=1, precision=resolve_precision("auto", "cpu")), fedavg()
    training = Training(fabric, module, 0)
    with attached(training):
        worker = Worker(training, data, algorithm.client, MemoryInRam())
        state, context = ServerState(number - 1, snapshot(travelling(module))), Context(0, number, 1, (0,), 2 * TEXTS)
        return seconds(lambda: run_round(state, algorithm, context, Serial(worker)))


def bare(data: fedtune.FederatedDataModule, module: Any, number: int) -> float:
    """Seconds of the same batches in a bare loop with the same settings."""
    bf16, optimizer = resolve_precision("auto", "cpu") == "bf16-mixed", module.configure_optimizers()["optimizer"]

    def steps() -> None:
        with seeded(0, "client", number), FastDropout():
            for batch in data.client_dataloader(0):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    logits = module(batch["input_ids"], batch["attention_mask"])
                    loss = torch.nn.functional.cross_entropy(logits.float(), batch["labels"])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    return seconds(steps)


def memory(mode: str) -> list[float]:
    """Seconds of some epochs with what is freed kept or given back to the system, printed as JSON; the first is not counted."""
    data = task()
    module = fedtune.BertClassifier("minilm", data.num_labels, optimizer="sgd", learning_rate=1e-4)
    with freed_memory_kept() if mode == "kept" else contextlib.nullcontext():
        return [epoch(data, module, {}) for _ in range(REPEATS + 1)][1:]


def apart(mode: str) -> list[float]:
    """`memory` in a process of its own."""
    out = subprocess.run([sys.executable, __file__, mode], capture_output=True, text=True, check=True).stdout
    times: list[float] = json.loads(out.splitlines()[-1])
    return times


def main() -> None:
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    if len(sys.argv) > 1:
        print(json.dumps(memory(sys.argv[1])))
        return
    raw: dict[str, Any] = {"memory": {mode: [] for mode in MEMORY}}
    for _ in range(3):
        for mode in MEMORY:
            raw["memory"][mode].append(apart(mode))
    for mode, runs in raw["memory"].items():
        print(f"freed memory {mode}, median seconds of an epoch:", ", ".join(f"{statistics.median(one):.2f}" for one in runs))
    with freed_memory_kept():
        measure(raw)
    write("engine", about() | {"unit": "seconds", "raw": raw})


def measure(raw: dict[str, Any]) -> None:
    """The epochs, the evaluations, `torch.compile`, and what a client costs beyond its steps."""
    data = task()
    module = fedtune.BertClassifier("minilm", data.num_labels, optimizer="sgd", learning_rate=1e-4)
    epoch(data, module, {})  # the memory of the first steps is fresh
    sizes: dict[Any, Callable[[], float]] = {
        size: functools.partial(evaluation, data, module, size) for size in (16, 32, 64, 128, 256)
    }
    sizes["64, not sorted"] = functools.partial(evaluation, data, module, 64, False)
    raw |= {"epoch": {name: [] for name in VARIANTS}, "evaluation": {size: [] for size in sizes}}
    for _ in range(REPEATS):
        for name, variant in VARIANTS.items():
            raw["epoch"][name].append(epoch(data, module, variant))
        for size, measured in sizes.items():
            raw["evaluation"][size].append(measured())
    for kind, base in (("epoch", "everything on"), ("evaluation", 64)):
        print(f"\n{kind:32} {'seconds':>8} {'times as long':>14}")
        for name, times in raw[kind].items():
            ratio = statistics.median(mine / first for mine, first in zip(times, raw[kind][base], strict=True))
            print(f"{name:<32} {statistics.median(times):8.2f} {ratio:14.2f}")
    module.hparams["padding_free"] = True
    pairs = [(federated(data, module, number), bare(data, module, number)) for number in range(1, 2 * REPEATS)]
    raw["overhead"] = {"federated": [one for one, _ in pairs], "bare": [other for _, other in pairs]}
    ratios = sorted(one / other for one, other in pairs)
    print(
        f"\na round of one client against a bare loop over its batches: {statistics.median(ratios):.3f}, {ratios[0]:.3f}"
        f" to {ratios[-1]:.3f}"
    )
    raw["compiled"] = compiled(data)
    print("\ncompiled, three epochs, seconds: " + ", ".join(f"{value:.2f}" for value in raw["compiled"]))
    raw["fixed"] = fixed(module)
    print("\na client beyond its steps, ms: " + ", ".join(f"{name} {1000 * value:.1f}" for name, value in raw["fixed"].items()))


if __name__ == "__main__":
    main()
