"""Question: which precision and which attention implementation make a client's training fastest on this machine?

MiniLM (full fine-tuning, dropout 0.1, AdamW) trains on 256 passages of the embedded task in batches of 32, in every
combination, interleaved. Run it from the project's folder: .venv/bin/python benchmarks/precision.py
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from datetime import date
from pathlib import Path

import torch

import fedtune
from fedtune.rundir import versions

REPEATS = 5
VARIANTS = [(precision, attention) for precision in ("32-true", "bf16-mixed") for attention in ("sdpa", "eager")]


def seconds(data: fedtune.FederatedDataModule, precision: str, attention: str) -> tuple[float, float]:
    """Seconds of one round's training and of its evaluation."""
    torch.manual_seed(0)
    module = fedtune.BertClassifier("minilm", data.num_labels)
    module.network.set_attn_implementation(attention)
    loop = fedtune.FederatedLoop(max_rounds=1, precision=precision, baselines=(), progress=False)
    record = loop.fit(module, data)[0]
    return record.seconds_train, record.seconds_evaluate


def processor() -> str:
    found = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    names = [line.partition(":")[2].strip() for line in found.splitlines() if line.startswith("Model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    data = fedtune.FederatedDataModule(num_clients=1, limit=256)
    raw: dict[str, list[tuple[float, float]]] = {f"{precision} {attention}": [] for precision, attention in VARIANTS}
    for _ in range(REPEATS):
        for precision, attention in VARIANTS:
            raw[f"{precision} {attention}"].append(seconds(data, precision, attention))
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in raw.items()}
    base = medians["32-true sdpa"]
    print(f"{'':18}  train s  evaluate s   times as fast as fp32 sdpa: train, evaluate")
    for name, (train, evaluate) in medians.items():
        print(f"{name:18}  {train:7.2f}  {evaluate:10.2f}   {base[0] / train:.2f}, {base[1] / evaluate:.2f}")
    capabilities = {name: value for name, value in torch.cpu.get_capabilities().items() if "bf16" in name or "amx" in name}
    result = {
        "command": "python benchmarks/precision.py",
        "date": date.today().isoformat(),
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.is_available(),
            **capabilities,
        },
        "versions": versions(),
        "unit": "seconds: [training, evaluation] of one round, 256 training and 192 validation passages",
        "raw": raw,
        "median": medians,
    }
    path = Path(__file__).parent / "results" / "precision.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
