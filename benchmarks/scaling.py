"""Question: how do the seconds and the memory of a round grow with the number of clients, and how long does set-up take?

The same texts, cut to the same length, are divided among more and more clients, so that tokens, steps and padding stay what
they are and only the clients' own cost grows. Each number of clients runs in a process of its own, one after the other.
A client's cost is given twice: what the round takes beyond the steps, and what the whole round takes more than with one client,
which also holds how much the steps of two processes happen to differ.
Set-up: a million sentences are tokenised (no cache) and divided among 10,000 clients.
With the word `million`: a million clients of one text each, of whom a thousand are drawn for each of three rounds.
Run it from the project's folder: .venv/bin/python benchmarks/scaling.py
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import about, write

import fedtune

LENGTH = 16  # tokens; nearly every text is longer
# model: clients, texts, texts in a batch, repeats
GROWTH = {"minilm": ([1, 8, 32, 128], 2048, 16, 3), "tiny": ([1, 10, 100, 1_000, 10_000], 10_000, 1, 1)}
SETUP_TEXTS, SETUP_CLIENTS = 1_000_000, 10_000


def sentences() -> list[str]:
    """Real sentences of more than LENGTH words; those of the embedded task are passages."""
    try:
        task = fedtune.FederatedDataModule("spooky_author").task
    except fedtune.UsageError:
        task = fedtune.FederatedDataModule("authors").task
    return [text for text in task.texts if len(text.split()) >= LENGTH]


def task_of(count: int) -> fedtune.TextTask:
    """So many texts to train on and 64 for each other part, 20 labels, 5,000 authors."""
    texts = sentences()
    rng = np.random.default_rng(0)
    total = count + 128
    parts = dict(zip(("train", "validation", "test"), np.split(np.arange(total), [count, count + 64]), strict=True))
    return fedtune.TextTask(
        "scaling",
        [texts[i % len(texts)] for i in range(total)],
        rng.integers(20, size=total),
        tuple(map(str, range(20))),
        parts,
        authors=rng.integers(min(5_000, count), size=total),
        author_names=tuple(map(str, range(min(5_000, count)))),
    )


def one_round(model: str, clients: int) -> dict[str, float]:
    """Seconds of the second of two rounds (tiny model: of one), and the highest memory, in MB."""
    _, texts, batch, _ = GROWTH[model]
    data = fedtune.FederatedDataModule(task_of(texts), num_clients=clients, batch_size=batch, max_length=LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        name = "minilm" if model == "minilm" else _tiny(folder)
        module = fedtune.build_classifier(name, 20, optimizer="sgd", learning_rate=1e-4)
        loop = fedtune.FederatedLoop(
            max_rounds=2 if model == "minilm" else 1, baselines=(), options=fedtune.RunOptions(progress=False)
        )
        record = loop.fit(module, data)[-1]
    seconds = record.seconds_train + record.seconds_aggregate
    beyond = (seconds - sum(client.seconds for client in record.clients)) / clients
    memory = loop.summary["peak_memory_bytes"] / 2**20
    return {"seconds": seconds, "steps": record.num_steps, "seconds_beyond_steps": beyond, "memory_mb": memory}


def million(clients: int = 1_000_000, cohort: int = 1_000) -> dict[str, float]:
    """Seconds until the first round, seconds of the rounds after it, bytes of a record, and the highest memory, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        data = fedtune.FederatedDataModule(task_of(clients), num_clients=clients, batch_size=1, max_length=LENGTH)
        _ = data.tokens
        module = fedtune.build_classifier(_tiny(folder), 20, optimizer="sgd", learning_rate=1e-4)
        options = {"max_rounds": 3, "clients_per_round": cohort, "run_dir": f"{folder}/run", "accelerator": "cpu"}
        loop = fedtune.FederatedLoop(**options, baselines=(), options=fedtune.RunOptions(progress=False))
        start = time.perf_counter()
        rounds = loop.fit(module, data)[1:]
        whole = time.perf_counter() - start
        lines = Path(folder, "run", "rounds.jsonl").read_text().splitlines()
    parts = ("train", "aggregate", "evaluate")
    seconds = {part: statistics.mean(getattr(record, f"seconds_{part}") for record in rounds) for part in parts}
    memory = loop.summary["peak_memory_bytes"] / 2**20
    return {"seconds": whole, **seconds, "record_bytes": len(lines[-1]), "memory_mb": memory}


def _tiny(folder: str) -> str:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    return folder


def set_up() -> dict[str, float]:
    """Seconds to tokenise and to divide."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FEDTUNE_CACHE"] = folder
        task = task_of(SETUP_TEXTS)
        data = fedtune.FederatedDataModule(task, num_clients=SETUP_CLIENTS, split="by_author", skew=0.8, max_length=128)
        start = time.perf_counter()
        tokens = int(data.tokens.lengths.sum())
        middle = time.perf_counter()
        _ = data.client_indices
        return {"tokenise": middle - start, "divide": time.perf_counter() - middle, "tokens": tokens}


def apart(*arguments: str) -> dict[str, float]:
    """What this script prints in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arguments} failed:\n{done.stderr[-3000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    raw: dict[str, Any] = {}
    for model, (counts, _, _, repeats) in GROWTH.items():
        raw[model] = {clients: [] for clients in counts}
        for _ in range(repeats):
            for clients in counts:
                raw[model][clients].append(apart(model, str(clients)))
        base = raw[model][counts[0]]
        print(f"\n{model}\n{'clients':>8} {'seconds':>9} {'ms beyond steps':>16} {'ms a further client':>20} {'memory MB':>10}")
        for clients, results in raw[model].items():
            middle = {key: statistics.median(one[key] for one in results) for key in results[0]}
            pairs = zip(results, base, strict=True)
            extra = statistics.median((one["seconds"] - first["seconds"]) / max(clients - 1, 1) for one, first in pairs)
            print(
                f"{clients:8} {middle['seconds']:9.2f} {1000 * middle['seconds_beyond_steps']:16.1f} "
                f"{1000 * extra:20.1f} {middle['memory_mb']:10.0f}",
                flush=True,
            )
    raw["set-up"] = apart("set-up")
    print(f"\nset-up of {SETUP_TEXTS:,} texts into {SETUP_CLIENTS:,} clients: {raw['set-up']}")
    write("scaling", about() | {"unit": "seconds of one round; MB", "raw": raw})


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1:] == ["million"]:
        found = million()
        print(found)
        write("million", about() | {"raw": found})
    else:
        print(json.dumps(set_up() if sys.argv[1] == "set-up" else one_round(sys.argv[1], int(sys.argv[2]))))
