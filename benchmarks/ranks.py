"""Question: are two processes with one thread each faster than one process with two, and what memory do they take?

The same run, MiniLM on the embedded authors with 8 clients, as `fedtune run` with two threads and as `fedtune run --workers 2`
with one thread a process; both several times, interleaved. Seconds are those of the run's own records (training, aggregation
and evaluation of its rounds; no start). Memory is looked at twice a second: of the whole process tree, shared pages counted
once, and of the largest process. The ranks' weights must be those of one process with one thread, to the bit: that runs once.
What the machine can give at most: two runs of half the clients and texts side by side, which never wait for each other, with
one thread each; only their training compares, as each evaluates everything.
Run it from the project's folder, on a machine that nobody else uses: .venv/bin/python benchmarks/ranks.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
from machine import about, write

ONE, RANKS, HALVES, SLOW = (
    "one process, two threads",
    "two ranks, one thread each",
    "two halves, apart",
    "one process, one thread",
)
CONTENDERS = {ONE: (1, 2), RANKS: (2, 1), HALVES: (1, 1), SLOW: (1, 1)}  # processes of a run, threads of each
LOOK = 0.5  # seconds between looks at the memory


def command(given: argparse.Namespace, workers: int, run_dir: Path) -> list[str]:
    flags: dict[str, Any] = {"data.task": "authors", "data.num_clients": given.clients, "loop.max_rounds": given.rounds}
    flags |= {"model.name": given.model, "loop.baselines": "[]", "loop.options.progress": "false", "run_dir": run_dir}
    flags |= {"data.limit": given.texts, "data.max_length": given.max_length}
    flags |= {"workers": workers} if workers > 1 else {}
    return [sys.executable, "-m", "fedtune", "run", *(f"--{name}={value}" for name, value in flags.items())]


def memory_mb(process: psutil.Process) -> tuple[float, float]:
    """Of a process tree, what is shared counted once, and of its largest process."""
    private = shared = largest = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            found = one.memory_info()
        except psutil.Error:
            continue
        private, shared = private + found.rss - found.shared, max(shared, found.shared)
        largest = max(largest, found.rss)
    return (private + shared) / 1e6, largest / 1e6


def halves(given: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    """Two runs of half the job at the same time: the slower one's seconds."""
    half = argparse.Namespace(**vars(given) | {"clients": given.clients // 2, "texts": given.texts // 2})
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda place: measured(half, 1, 1, run_dir / str(place)), range(2)))
    return max(found, key=lambda one: one["seconds_train"])


def measured(given: argparse.Namespace, workers: int, threads: int, run_dir: Path) -> dict[str, Any]:
    """One run: seconds, memory, and the name of its weights."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    process = psutil.Popen(command(given, workers, run_dir), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    tree = largest = 0.0
    while True:
        try:
            process.wait(LOOK)
            break
        except psutil.TimeoutExpired:
            now = memory_mb(process)
            tree, largest = max(tree, now[0]), max(largest, now[1])
    if process.returncode:
        raise SystemExit(process.stderr.read().decode())
    records = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    state = json.loads((run_dir / "checkpoints" / f"round-{given.rounds:04d}" / "state.json").read_text())
    parts = {part: sum(record[f"seconds_{part}"] for record in records) for part in ("train", "aggregate", "evaluate")}
    seconds = {"seconds": sum(parts.values())} | {f"seconds_{part}": value for part, value in parts.items()}
    return seconds | {"memory_mb": tree, "memory_of_largest_mb": largest, "weights": state["sha256"]["weights"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--texts", type=int, default=2560, help="for training")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="ranks", help="of the file of results; - writes none")
    given = parser.parse_args()
    raw: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(given.repeats + 1):  # the first tokenises, and is not counted
            for name, (workers, threads) in CONTENDERS.items():
                if name != ONE and (not repeat or (name == SLOW and repeat > 1)):
                    continue
                run_dir = Path(folder) / f"{name}-{repeat}"
                found = halves(given, run_dir) if name == HALVES else measured(given, workers, threads, run_dir)
                if repeat:
                    raw[name].append(found)
                    print(f"{name:28} {found['seconds']:8.1f} s {found['memory_mb']:8.0f} MB", flush=True)
    middle = {
        name: {key: statistics.median(one[key] for one in found) for key in found[0] if key != "weights"}
        for name, found in raw.items()
    }
    faster = [one["seconds"] / two["seconds"] for one, two in zip(raw[ONE], raw[RANKS], strict=True)]
    most = [one["seconds_train"] / two["seconds_train"] for one, two in zip(raw[ONE], raw[HALVES], strict=True)]
    same = {one["weights"] for name in (RANKS, SLOW) for one in raw[name]}
    print(f"\n{'':28} {'seconds':>9} {'train':>8} {'evaluate':>9} {'memory MB':>10} {'largest':>9}")
    for name, one in middle.items():
        print(
            f"{name:28} {one['seconds']:9.1f} {one['seconds_train']:8.1f} {one['seconds_evaluate']:9.1f} "
            f"{one['memory_mb']:10.0f} {one['memory_of_largest_mb']:9.0f}"
        )
    print(f"two ranks are {statistics.median(faster):.2f} times as fast ({', '.join(f'{one:.2f}' for one in faster)})")
    print(f"two halves train {statistics.median(most):.2f} times as fast ({', '.join(f'{one:.2f}' for one in most)})")
    print(f"weights of two ranks and of one thread: {'the same bits' if len(same) == 1 else 'DIFFERENT'}")
    if given.name != "-":
        settings = {key: value for key, value in vars(given).items() if key != "name"}
        write(
            given.name,
            about() | {"settings": settings, "times as fast": faster, "halves": most, "same bits": len(same) == 1, "raw": raw},
        )
    raise SystemExit(len(same) > 1)


if __name__ == "__main__":
    main()
