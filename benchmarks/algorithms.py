"""Question: what does a round of each algorithm take, against FedAvg's?

Rounds of MiniLM clients over real texts, each client with its memory on the disk, plain SGD, dropout 0.1. The algorithms take
turns, round by round, in one process; the first round of each is not counted.
Run it from the project's folder: .venv/bin/python benchmarks/algorithms.py
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch
from engine import task
from lightning_fabric import Fabric
from machine import about, write

import fedtune
from fedtune.algorithms import fedavg
from fedtune.algorithms.specification import algorithm_of, specification_of
from fedtune.federated.client import Worker
from fedtune.federated.evaluation import attached
from fedtune.federated.memory import MemoryOnDisk
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm
from fedtune.federated.personal import personal_names
from fedtune.federated.round import RoundOptions, run_round
from fedtune.federated.state import ServerState
from fedtune.federated.training import Training
from fedtune.runs.hardware import freed_memory_kept, resolve_precision
from fedtune.runtimes.serial import Serial
from fedtune.tensors import snapshot, travelling

CLIENTS, TEXTS, ROUNDS = 2, 512, 6
PRIVATE = "private"  # FedAvg with clipped updates and noise on their sum; not among the algorithms that are measured by default
NAMES = ("fedavg", "fedprox", "fedadam", "scaffold", "fednova", "feddyn", "qfedavg", "ditto", "fedper", "diloco")


PRIVACY = {"name": "Gaussian", "noise": 1.0, "clip": 0.5}


def _algorithm(name: str, clients: int) -> Algorithm:
    """A registered one, or FedAvg with privacy of clients."""
    if name != PRIVATE:
        return algorithm_of(name)
    return fedtune.plan_privacy(PRIVACY, clients).algorithm(fedavg(weighting="uniform"), frozenset(), frozenset())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--texts", type=int, default=TEXTS, help="of a client")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--only", nargs="+", default=NAMES, help="algorithms, fedavg first; private is FedAvg with privacy of clients"
    )
    parser.add_argument("--name", default="algorithms", help="name of the file of results; - for none")
    options = parser.parse_args()
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    data = task(options.clients * options.texts, options.clients)
    module = fedtune.BertClassifier("minilm", data.num_labels, optimizer="sgd", learning_rate=1e-2)
    fabric = Fabric(accelerator="cpu", devices=1, precision=resolve_precision("auto", "cpu"))
    training = Training(fabric, module, 0, data)
    seconds: dict[str, list[float]] = {name: [] for name in options.only}
    with tempfile.TemporaryDirectory() as folder, attached(training), freed_memory_kept():
        start, sides = snapshot(travelling(module)), {}
        for name in options.only:
            algorithm = _algorithm(name, options.clients)
            personal = personal_names(algorithm.personal, start)
            memory = MemoryOnDisk(Path(folder) / name, options.clients)
            worker = Worker(training, data, algorithm.client, memory, personal={one: start[one] for one in personal})
            sides[name] = [algorithm, Serial(worker), RoundOptions(personal=personal), ServerState(0, snapshot(start))]
        for number in range(1, options.rounds + 2):
            context = Context(0, number, options.clients, tuple(range(options.clients)), options.clients * options.texts)
            for name, side in sides.items():
                algorithm, runtime, how, state = side
                began = time.perf_counter()
                side[3] = run_round(state, algorithm, context, runtime, how).state
                if number > 1:
                    seconds[name].append(time.perf_counter() - began)
                runtime._worker.memory.prune(number - 1, context.cohort)
    first = seconds[options.only[0]]
    print(f"{'':10} {'s a round':>10} {'of ' + options.only[0]:>10}   pairs")
    for name, found in seconds.items():
        ratios = sorted(one / other for one, other in zip(found, first, strict=True))
        middle = statistics.median(ratios)
        print(f"{name:10} {statistics.median(found):10.2f} {middle:10.3f}   {ratios[0]:.3f} to {ratios[-1]:.3f}")
    if options.name != "-":
        used = {name: PRIVACY if name == PRIVATE else specification_of(algorithm_of(name)) for name in options.only}
        threads = torch.get_num_threads()
        write(options.name, about() | {"unit": "seconds", "threads": threads, "algorithms": used, "raw": seconds})


if __name__ == "__main__":
    main()
