"""Question: is this version as fast as another one, and does it take as little memory?

Rounds of eight MiniLM clients over real texts (AdamW, dropout, the defaults of `FederatedLoop` without baselines), by this
checkout and by another, in processes that take turns. A client's cost beyond its steps is what the round takes beyond the
clients' own seconds, divided by the clients. The first round of a process is not counted.
Run it from the project's folder: .venv/bin/python benchmarks/versions.py --other FOLDER_OF_ANOTHER_CHECKOUT
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CLIENTS, TEXTS, ROUNDS, REPEATS = 8, 128, 4, 5
HERE = Path(__file__).resolve().parent.parent


def job(clients: int, texts: int) -> dict[str, Any]:
    """What the rounds of this process's fedtune take."""
    import fedtune

    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    try:
        data = fedtune.FederatedDataModule("spooky_author", num_clients=clients, limit=clients * texts)
        data.setup()
    except fedtune.UsageError:
        data = fedtune.FederatedDataModule("authors", num_clients=clients, limit=clients * texts)
    quiet = {"progress": False}
    if "progress" not in inspect.signature(fedtune.FederatedLoop).parameters:
        quiet = {"options": fedtune.RunOptions(progress=False)}
    with tempfile.TemporaryDirectory() as folder:
        loop = fedtune.FederatedLoop(max_rounds=ROUNDS, baselines=(), run_dir=f"{folder}/run", **quiet)
        history = loop.fit(fedtune.BertClassifier("minilm", data.num_labels), data)[1:]
    rounds = [record.seconds_train + record.seconds_aggregate for record in history]
    steps = [sum(client.seconds for client in record.clients) for record in history]
    beyond = [1000 * (whole - own) / clients for whole, own in zip(rounds, steps, strict=True)]
    return {"round": rounds, "beyond": beyond, "aggregate": [record.seconds_aggregate for record in history]} | {
        "memory": loop.summary["peak_memory_bytes"] / 1e6,
        "loss": history[-1].loss_nats,
    }


def apart(source: Path, clients: int, texts: int) -> dict[str, Any]:
    """`job` in a process of its own, with the fedtune of a folder."""
    command = [sys.executable, __file__, "--clients", str(clients), "--texts", str(texts), "--job"]
    environment = os.environ | {"PYTHONPATH": str(source / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{source} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def commit(folder: Path) -> str:
    """The commit of a checkout."""
    command = ["git", "-C", str(folder), "log", "-1", "--format=%h %s"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", type=Path, help="another checkout")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--texts", type=int, default=TEXTS, help="of a client")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--name", default="versions", help="name of the file of results; - for none")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(job(options.clients, options.texts)))
        return
    from machine import about, write

    sides = {"other": options.other.resolve(), "this": HERE}
    raw: dict[str, list[Any]] = {side: [] for side in sides}
    for _ in range(options.repeats):
        for side, source in sides.items():
            raw[side].append(apart(source, options.clients, options.texts))
    print(f"{'':8} {'s a round':>10} {'ms a client beyond its steps':>29} {'s aggregating':>14} {'peak MB':>9}")
    for side, runs in raw.items():
        middle = {
            key: statistics.median(value for run in runs for value in run[key]) for key in ("round", "beyond", "aggregate")
        }
        memory = statistics.median(run["memory"] for run in runs)
        print(f"{side:8} {middle['round']:10.2f} {middle['beyond']:29.1f} {middle['aggregate']:14.3f} {memory:9.0f}")
    pairs = zip(raw["this"], raw["other"], strict=True)
    ratios = sorted(statistics.median(mine["round"]) / statistics.median(theirs["round"]) for mine, theirs in pairs)
    middle = {side: statistics.median(second for run in runs for second in run["round"]) for side, runs in raw.items()}
    print(
        f"a round of this one against the other: {middle['this'] / middle['other']:.3f} (medians of all rounds); "
        f"pair by pair {statistics.median(ratios):.3f}, {ratios[0]:.3f} to {ratios[-1]:.3f}"
    )
    if options.name != "-":
        compared = {side: commit(source) for side, source in sides.items()}
        write(options.name, about() | {"compared": compared, "unit": "seconds; ms; MB", "raw": raw})


if __name__ == "__main__":
    main()
