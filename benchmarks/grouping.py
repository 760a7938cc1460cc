"""Question: what do batches grouped by length do to learning, and how much padding do they save?

MiniLM with AdamW on real sentences (the embedded passages where they are not at hand), as one client and as eight, two rounds
of one local epoch, several seeds of head, batches and dropout: plain random batches against `group_by_length`.
Run it from the project's folder: .venv/bin/python benchmarks/grouping.py
"""

from __future__ import annotations

import logging
import statistics
from typing import Any

from machine import about, write

import fedtune

TEXTS, ROUNDS, SEEDS, CLIENTS = 3072, 2, 4, (1, 8)


def data_of(clients: int, grouped: bool) -> fedtune.FederatedDataModule:
    """The task for so many clients."""
    options: dict[str, Any] = {"num_clients": clients, "limit": TEXTS, "group_by_length": grouped}
    try:
        data = fedtune.FederatedDataModule("spooky_author", **options)
        data.setup()
    except fedtune.UsageError:
        data = fedtune.FederatedDataModule("authors", **options)
    return data


def padded_length(data: fedtune.FederatedDataModule) -> float:
    """Mean length in tokens to which an epoch's texts are padded."""
    shapes = [batch["input_ids"].shape for client in range(data.num_clients) for batch in data.client_dataloader(client)]
    return sum(texts * length for texts, length in shapes) / sum(texts for texts, _ in shapes)


def main() -> None:
    logging.getLogger("lightning").setLevel(logging.ERROR)
    raw = []
    for seed in range(SEEDS):
        for clients in CLIENTS:
            for grouped in (False, True):
                data = data_of(clients, grouped)
                module = fedtune.BertClassifier("minilm", data.num_labels, seed=seed)
                options = fedtune.RunOptions(progress=False, agreement=False)
                loop = fedtune.FederatedLoop(max_rounds=ROUNDS, seed=seed, baselines=(), options=options)
                found = [(record.accuracy, record.loss_nats) for record in loop.fit(module, data)]
                setting = {"seed": seed, "clients": clients, "grouped": grouped}
                raw.append(setting | {"rounds": found, "padded": padded_length(data)})
                print(raw[-1], flush=True)
    print(f"{'clients':>7} {'batches':>8} {'padded to':>9}   mean accuracy and loss (nats) after each round")
    for clients in CLIENTS:
        for grouped in (False, True):
            runs = [one for one in raw if (one["clients"], one["grouped"]) == (clients, grouped)]
            rounds = zip(*(one["rounds"] for one in runs), strict=True)
            means = [tuple(map(statistics.mean, zip(*values, strict=True))) for values in rounds]
            told = ", ".join(f"{accuracy:.3f} {loss:.3f}" for accuracy, loss in means)
            length = statistics.mean(one["padded"] for one in runs)
            print(f"{clients:7} {'grouped' if grouped else 'random':>8} {length:9.1f}   {told}")
    write("grouping", about() | {"texts": TEXTS, "raw": raw})


if __name__ == "__main__":
    main()
