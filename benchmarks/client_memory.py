"""Question: what does it cost that clients remember something from round to round?

10,000 clients with 24 KB each save and load once, on this machine's disk; then MiniLM's weights as one client's memory.
Run it from the project's folder: .venv/bin/python benchmarks/client_memory.py
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import about, write

import fedtune
from fedtune.federated.memory import MemoryOnDisk
from fedtune.tensors import Groups, num_bytes, trainable

CLIENTS, TENSORS, ELEMENTS, REPEATS = 10_000, 4, 1_536, 5


def seconds(what: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    what()
    return time.perf_counter() - start


def peak_mb() -> float:
    """Highest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def many(folder: Path) -> dict[str, float]:
    """All clients, one after the other."""
    memory = MemoryOnDisk(folder, CLIENTS)
    small: Groups = {"control": {f"layer.{i}": torch.randn(ELEMENTS) for i in range(TENSORS)}}
    memory.save(0, 1, small)
    before = peak_mb()
    saved = [seconds(lambda client=client: memory.save(client, 1, small)) for client in range(CLIENTS)]
    loaded = [seconds(lambda client=client: memory.load(client, 2)) for client in range(CLIENTS)]
    return {
        "bytes a client": num_bytes(small["control"]),
        "save, ms": 1000 * statistics.mean(saved),
        "save, 99th percentile, ms": 1000 * sorted(saved)[CLIENTS * 99 // 100],
        "load, ms": 1000 * statistics.mean(loaded),
        "rewind of all, s": seconds(lambda: memory.rewind(1)),
        "memory grows by, MB": peak_mb() - before,
    }


def one(folder: Path) -> dict[str, float]:
    """A client that remembers as much as MiniLM has weights."""
    memory = MemoryOnDisk(folder, 1)
    large: Groups = {"control": trainable(fedtune.BertClassifier("minilm", 16))}
    saved = [seconds(lambda number=number: memory.save(0, number, large)) for number in range(1, REPEATS + 1)]
    loaded = [seconds(lambda: memory.load(0, REPEATS + 1)) for _ in range(REPEATS)]
    return {
        "bytes a client": num_bytes(large["control"]),
        "save, ms": 1000 * statistics.median(saved),
        "load, ms": 1000 * statistics.median(loaded),
    }


def main() -> None:
    raw: dict[str, Any] = {}
    for name, measure in (("10,000 clients", many), ("one client, MiniLM", one)):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            raw[name] = measure(Path(folder))
        print(name, ", ".join(f"{key} {value:.2f}" for key, value in raw[name].items()))
    write("client_memory", about() | {"raw": raw})


if __name__ == "__main__":
    main()
