"""Question: what does a federated round cost, against centralised training, a plain loop and other frameworks?

Every contender of `reference/` does the same job in a process of its own, one after the other and all of that several times,
so that a busy minute of the machine hits all alike. `make bench` runs it; QUICK=1 takes a small job once. PEERS=1 adds Flower
and pfl-research, installed in an environment of their own (extra `bench`), as their pins clash with ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from machine import about, write

import fedtune
from fedtune.data.splits import Columns, iid

HERE = Path(__file__).parent / "reference"
sys.path.insert(0, str(HERE))
from job import Job  # noqa: E402 - the contenders' folder is no package

CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {  # name in the table: script, changes to the job
    "fedtune": ("ours.py", {}),
    "floor, the clients' batches": ("floor.py", {}),
    "floor, pooled batches": ("floor.py", {"pooled": True}),
    "fedtune, LoRA": ("ours.py", {"rank": 8}),
    "floor, LoRA": ("floor.py", {"rank": 8}),
    "plain loop, bf16 autocast": ("plain.py", {"precision": "bf16"}),
    "plain loop, fp32": ("plain.py", {}),
    "the authors' algorithm": ("authors.py", {}),
    "Flower simulation, bf16": ("flower.py", {"precision": "bf16"}),
    "Flower simulation, fp32": ("flower.py", {}),
    "pfl-research, bf16": ("pfl_research.py", {"precision": "bf16"}),
    "pfl-research, fp32": ("pfl_research.py", {}),
}
DEFAULT = [name for name in CONTENDERS if "LoRA" not in name]
PEERS = [name for name, (script, _) in CONTENDERS.items() if script in ("flower.py", "pfl_research.py")]


def build(options: argparse.Namespace) -> Job:
    """The job: real Spooky sentences where they are at hand, else passages of the embedded task."""
    try:
        data = fedtune.FederatedDataModule("spooky_author", task_options={"validation": 0.0})
        task = data.task
    except fedtune.UsageError:
        data = fedtune.FederatedDataModule("authors")
        task = data.task
    rng = np.random.default_rng(0)
    train = rng.permutation(task.parts["train"])[: options.sentences]
    held_out = rng.permutation(task.parts["test"])[: options.held_out]
    if len(train) < options.sentences or len(held_out) < options.held_out:
        raise SystemExit(
            f"the task {task.name} has {len(train)} and {len(held_out)} texts; ask for fewer --sentences, --held_out"
        )
    clients = [train[part] for part in iid(Columns(task.labels[train]), options.clients, 0)]
    kept = np.concatenate([train, held_out])
    place = {int(row): number for number, row in enumerate(kept)}
    offsets = data.tokens.offsets.tolist()
    return Job(
        task=task.name,
        texts=[task.texts[row] for row in kept],
        ids=[data.tokens.ids_T[offsets[row] : offsets[row + 1]].tolist() for row in kept],
        labels=torch.from_numpy(task.labels[kept]),
        clients=[[place[int(row)] for row in rows] for rows in clients],
        held_out=list(range(len(train), len(kept))),
        classes=len(task.label_names),
        optimizer=options.optimizer,
        learning_rate=options.learning_rate,
        rounds=options.rounds,
    )


def run(python: str, script: str, job: Path) -> dict[str, Any]:
    """What a contender reports, with the highest memory of its process tree in MB."""
    process = psutil.Popen([python, str(HERE / script), str(job)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.25):
            peak = max(peak, _memory(process))

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{script} failed:\n{err[-3000:]}")
    result: dict[str, Any] = json.loads([line for line in out.splitlines() if line.startswith('{"rounds"')][-1])
    return result | {"peak_memory_mb": peak}


def _memory(process: psutil.Process) -> int:
    """Training memory of a process and its descendants in MB; what they share with others counts once.

    The proportional set size would be exact, but asking for it stops the process for so long that it changes the result.
    """
    private, shared = 0, 0
    try:
        for one in [process, *process.children(recursive=True)]:
            found = one.memory_info()
            private, shared = private + found.rss - found.shared, max(shared, found.shared)
    except psutil.Error:
        pass  # one of them has just ended
    return (private + shared) // 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"sentences": 4096, "held_out": 2048, "clients": 8, "rounds": 1, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--optimizer", default="sgd", choices=["sgd", "adamw"])
    parser.add_argument("--learning_rate", type=float, default=0.05)
    parser.add_argument("--only", nargs="*", default=DEFAULT, choices=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--peers", help="the Python of an environment with fedtune[bench]")
    parser.add_argument("--name", default="reference", help="of the file below results/; - writes none")
    options = parser.parse_args()
    python = dict.fromkeys(CONTENDERS, sys.executable) | dict.fromkeys(PEERS, options.peers)
    names = [name for name in options.only if python[name]]
    job = build(options)
    raw: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.pt"
        job.save(str(path))
        run(sys.executable, "ours.py", path)  # not measured: it brings the libraries' files into memory
        for repeat in range(options.repeats):
            for name in names:
                script, changes = CONTENDERS[name]
                Job(**{**vars(job), "seed": repeat, **changes}).save(str(path))
                raw[name].append(run(python[name], script, path))
                print(f"repeat {repeat + 1}: {name}: {_line(raw[name][-1])}", flush=True)
            if options.name != "-":
                write(options.name, about() | {"task": job.task, "peers": _versions(options.peers), "raw": raw})
    _table(raw)


def _versions(python: str | None) -> list[str]:
    """What the peers' environment holds."""
    listed = subprocess.run([python or "true", "-m", "pip", "freeze"], capture_output=True, text=True, check=False).stdout
    return [line for line in listed.splitlines() if line.startswith(("flwr==", "pfl==", "torch==", "transformers==", "ray=="))]


def _line(result: dict[str, Any]) -> str:
    last = result["rounds"][-1]
    return f"{last['train']:.1f} s training, {last['evaluate']:.1f} s evaluation, accuracy {last['accuracy']:.3f}"


def _table(raw: dict[str, list[dict[str, Any]]]) -> None:
    """Medians over the repeats (of the seconds of a mean round), and how many times as long as the first."""
    print(f"\n{'':28} {'train s':>8} {'evaluate s':>10} {'memory MB':>10} {'x training':>10} {'x both':>7}  accuracies")
    ratios: dict[str, list[float]] = {}
    first = next(iter(raw.values()))
    for name, results in raw.items():
        seconds = {
            key: statistics.median(statistics.mean(one[key] for one in result["rounds"]) for result in results)
            for key in ("train", "evaluate")
        }
        ratios[name] = [
            statistics.median(_mean(mine, keys) / _mean(theirs, keys) for mine, theirs in zip(results, first, strict=True))
            for keys in (("train",), ("train", "evaluate"))
        ]
        memory = statistics.median(result["peak_memory_mb"] for result in results)
        accuracies = ", ".join(f"{result['rounds'][-1]['accuracy']:.3f}" for result in results)
        print(
            f"{name:28} {seconds['train']:8.1f} {seconds['evaluate']:10.1f} {memory:10.0f} "
            f"{ratios[name][0]:10.2f} {ratios[name][1]:7.2f}  {accuracies}"
        )


def _mean(result: dict[str, Any], keys: tuple[str, ...]) -> float:
    return statistics.mean(sum(one[key] for key in keys) for one in result["rounds"])


if __name__ == "__main__":
    main()
