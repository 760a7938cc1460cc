"""Question: which precision and which attention implementation make a client's training fastest on this machine?

MiniLM (full fine-tuning, dropout 0.1, AdamW) trains on 256 passages of the embedded task in batches of 32, in every
combination, interleaved. Run it from the project's folder: .venv/bin/python benchmarks/precision.py
"""

from __future__ import annotations

import statistics

import torch
from machine import about, write

import fedtune

REPEATS = 5
VARIANTS = [(precision, attention) for precision in ("32-true", "bf16-mixed") for attention in ("sdpa", "eager")]


def seconds(data: fedtune.FederatedDataModule, precision: str, attention: str) -> tuple[float, float]:
    """Seconds of one round's training and of its evaluation."""
    torch.manual_seed(0)
    module = fedtune.BertClassifier("minilm", data.num_labels, padding_free=False)  # attention is its network's
    module.network.set_attn_implementation(attention)
    loop = fedtune.FederatedLoop(max_rounds=1, precision=precision, baselines=(), options=fedtune.RunOptions(progress=False))
    record = loop.fit(module, data)[0]
    return record.seconds_train, record.seconds_evaluate


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
    unit = "seconds: [training, evaluation] of one round, 256 training and 192 validation passages"
    write("precision", about() | {"unit": unit, "raw": raw, "median": medians})


if __name__ == "__main__":
    main()
