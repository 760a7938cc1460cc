"""Question: how many copies of the weights does a federated round hold, at full size and whatever the number of clients?

BERT-base, DistilBERT and ALBERT with random weights in their real sizes do one round on real text (the embedded task), each
variant in a process of its own, beside a plain training loop over as many batches.
Run it from the project's folder: .venv/bin/python benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from machine import about, write

import fedtune
from fedtune.data.registry import load_task
from fedtune.tensors import num_bytes, travelling

MODELS = ("bert", "distilbert", "albert")
VARIANTS = {"plain": 2, "federated": 2, "federated, 8 clients": 8, "federated with agreement": 2}
CLIENT_TEXTS = 32  # one batch


def resident_bytes(field: str) -> int:
    """A field of this process's memory: VmRSS now, VmHWM the highest since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure(model: str, variant: str) -> dict[str, Any]:
    """Bytes of the weights, resident before training, and the highest while training."""
    clients = VARIANTS[variant]
    task = load_task("authors", {})
    parts = {"train": task.parts["train"][:: len(task.parts["train"]) // (CLIENT_TEXTS * clients)][: CLIENT_TEXTS * clients]}
    parts |= {part: task.parts[part][:32] for part in ("validation", "test")}
    data = fedtune.FederatedDataModule(
        dataclasses.replace(task, parts=parts), "minilm", num_clients=clients, batch_size=CLIENT_TEXTS, eval_batch_size=32
    )
    module = fedtune.build_classifier(
        model, data.num_labels, init="random", vocab_size=len(data.tokenizer), optimizer="sgd", learning_rate=1e-3
    )
    data.setup()
    weights = num_bytes(travelling(module))
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    seconds = None
    if variant == "plain":
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        module.log = lambda *_, **__: None
        for client in range(clients):
            for batch in data.client_dataloader(client):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = module.training_step(batch, 0)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    else:
        options = fedtune.RunOptions(agreement="agreement" in variant, progress=False)
        loop = fedtune.FederatedLoop(max_rounds=1, precision="bf16-mixed", baselines=(), options=options)
        seconds = loop.fit(module, data)[0].seconds
    return {"weights": weights, "before": before, "peak": resident_bytes("VmHWM"), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs=2, metavar=("MODEL", "VARIANT"))
    only = parser.parse_args().only
    if only:
        print(json.dumps(measure(*only)))
        return
    raw: dict[str, dict[str, Any]] = {model: {} for model in MODELS}
    print(f"{'':11} {'':25} {'weights, MB':>12} {'peak over start, MB':>20} {'copies more than plain':>23}")
    for model in MODELS:
        for variant in VARIANTS:
            command = [sys.executable, __file__, "--only", model, variant]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
            raw[model][variant] = found
            rise = found["peak"] - found["before"]
            plain = raw[model]["plain"]
            more = (rise - (plain["peak"] - plain["before"])) / found["weights"]
            print(f"{model:11} {variant:25} {found['weights'] / 1e6:12.0f} {rise / 1e6:20.0f} {more:23.2f}")
    write("memory", about() | {"unit": "bytes, seconds of the round", "raw": raw})


if __name__ == "__main__":
    main()
