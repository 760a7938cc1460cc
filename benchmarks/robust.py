"""Questions: what memory and time do robust rules take with 100 clients, and what do they make of known attacks?

Memory and time: synthetic updates in the size of MiniLM (22.7 million fp32 values), each rule in a process of its own, on one
thread. The updates lie in a temporary file (9 GB for 100 clients; TMPDIR says where).
Attacks (--table): 16 honest updates of 1,000 values, normal with mean 0.1 and deviation 1, and 4 equal ones of attackers who
know them; the distance of a rule's result from the honest mean. A run takes updates out that are not finite.
Run it from the project's folder: .venv/bin/python benchmarks/robust.py [--table]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import about, write

from fedtune.algorithms.fedavg import Mean
from fedtune.algorithms.robust import (
    CentredClipping,
    ClippedMean,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NearestMean,
    TrimmedMean,
)
from fedtune.federated.messages import ClientReport, Context, Failure, Reply, Request
from fedtune.federated.parts import Aggregator, Runtime
from fedtune.federated.pieces import Pieces
from fedtune.federated.state import ServerState

SHAPES = {"embedding": (30_522, 384), "layers": (10_992_768,)}  # MiniLM's 22.7 million values, most in one tensor


def rules(f: int) -> dict[str, Aggregator]:
    return {
        "mean": Mean("uniform"),
        "clipped mean": ClippedMean(1.0),
        "median": Median(),
        "trimmed mean": TrimmedMean(f),
        "geometric median": GeometricMedian(),
        "Krum": Krum(f),
        "Multi-Krum": MultiKrum(f),
        "centred clipping": CentredClipping(tau=10.0),
        "nearest mean": NearestMean(f),
        "NNM + median": Median(f, mix=True),
    }


F = 4
TABLE: dict[str, Aggregator] = {
    "mean": TrimmedMean(0),
    "median": Median(),
    "trimmed": TrimmedMean(F),
    "geometric": GeometricMedian(),
    "Krum": Krum(F),
    "Multi-Krum": MultiKrum(F),
    "NNM + trimmed": TrimmedMean(F, mix=True),
}


class Alone(Runtime):
    """One process, whose replies are given to the aggregator by hand."""

    def replies(self, requests: Sequence[Request], context: Context) -> Iterator[Reply | Failure]:
        return iter(())

    def add_up_(self, tensors: list[torch.Tensor]) -> None: ...

    def gather(self, values: list[Any]) -> list[Any]:
        return values

    def discard(self, round: int, clients: Sequence[int]) -> None: ...


def reply(client: int, update: dict[str, torch.Tensor]) -> Reply:
    return Reply(client, 1, {"update": update}, ClientReport(client, 1, 1, 0, 0.0, 0.0), 0, {"update": Pieces(update)})


def aggregated(rule: Aggregator, replies: Iterator[Reply], clients: int) -> dict[str, torch.Tensor]:
    context = Context(0, 1, clients, tuple(range(clients)), clients)
    return rule(replies, ServerState(0, {}), context, Alone())["update"]


def resident_bytes(field: str) -> int:
    """A field of this process's memory: VmRSS now, VmHWM the highest since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure(rule: str, clients: int, part: float) -> dict[str, Any]:
    """Resident bytes before and at most; seconds to take the updates in, and to make one of them."""
    sizes = {name: max(1, round(torch.Size(shape).numel() * part)) for name, shape in SHAPES.items()}
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(sum(sizes.values()) + 1000 * clients, generator=generator).mul_(1e-3)
    before, taken = resident_bytes("VmRSS"), 0.0
    Path("/proc/self/clear_refs").write_text("5")
    made = 0.0

    def replies() -> Iterator[Reply]:
        nonlocal taken, made
        for client in range(clients):
            start = time.perf_counter()
            values = base[1000 * client :][: sum(sizes.values())].clone().split(list(sizes.values()))
            found = reply(client, dict(zip(sizes, values, strict=True)))
            made += time.perf_counter() - start
            yield found
        taken = time.perf_counter()

    start = time.perf_counter()
    aggregated(rules(clients // 5)[rule], replies(), clients)
    end = time.perf_counter()
    return {"before": before, "peak": resident_bytes("VmHWM"), "taking in": taken - start - made, "making": end - taken}


def attacks() -> dict[str, np.ndarray]:
    """(20, 1000) updates by attack."""
    honest = honest_updates()
    mean, deviation = honest.mean(0), honest.std(0, ddof=1)
    lies = {
        "sign flip": -mean,
        "ALIE 1.5": mean + 1.5 * deviation,
        "ALIE -1.5": mean - 1.5 * deviation,
        "IPM 2": -2 * mean,
        "1e30": np.full_like(mean, 1e30),
        "Inf, taken out": None,
    }
    return {name: honest if lie is None else np.concatenate([honest, np.tile(lie, (F, 1))]) for name, lie in lies.items()}


def honest_updates() -> np.ndarray:
    """(16, 1000)."""
    return np.random.default_rng(0).normal(0.1, 1.0, (16, 1000))


def table() -> dict[str, dict[str, float]]:
    """Attack -> rule -> distance of its result from the honest mean."""
    found: dict[str, dict[str, float]] = {}
    for attack, rows in attacks().items():
        found[attack] = {}
        for name, rule in TABLE.items():
            replies = (reply(client, {"w": torch.from_numpy(row)}) for client, row in enumerate(rows))
            result = aggregated(rule, replies, len(rows))["w"].numpy()
            found[attack][name] = round(float(np.linalg.norm(result - honest_updates().mean(0))), 3)
    return found


def show(found: dict[str, dict[str, Any]]) -> None:
    columns = list(next(iter(found.values())))
    print(f"{'':18}" + "".join(f"{column:>15}" for column in columns))
    for name, row in found.items():
        print(f"{name:18}" + "".join(f"{row[column]:15.5g}" for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="what rules make of attacks")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--part", type=float, default=1.0, help="of MiniLM's values")
    parser.add_argument("--rules", nargs="+", default=list(rules(0)), choices=list(rules(0)))
    parser.add_argument("--name", default="robust", help="of the file of results; - for none")
    parser.add_argument("--only", choices=list(rules(0)), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        print(json.dumps(measure(options.only, options.clients, options.part)))
        return
    if options.table:
        found = table()
        show(found)
        unit = "distance of the result from the mean of 16 honest updates of 1,000 values, beside 4 of attackers"
        write("robust_attacks", about() | {"unit": unit, "raw": found})
        return
    print(f"{shutil.disk_usage(tempfile.gettempdir()).free / 1e9:.0f} GB free in {tempfile.gettempdir()}")
    raw = {}
    for rule in options.rules:
        command = [sys.executable, __file__, "--only", rule, "--clients", str(options.clients), "--part", str(options.part)]
        raw[rule] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        show({rule: raw[rule]})
    if options.name != "-":
        unit = "bytes resident before and at most; seconds to take in the updates, and to make one of them"
        write(options.name, about() | {"clients": options.clients, "unit": unit, "raw": raw})


if __name__ == "__main__":
    main()
