"""The runs of the study: `python experiments/question/study.py`, from the project's folder, with FEDTUNE_DATA set for Spooky.

One row of the design is one federated run; its record, `runs/question/NAME.json`, is written when it is complete, so that a run
that was interrupted begins anew and a complete one is never repeated. `--collect` writes what is there to `records.jsonl`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from design import PARTS, STEPS, Cell

HERE = Path(__file__).parent
RECORDS, FOLDER = HERE / "records.jsonl", Path("runs/question")
POOLER = FOLDER / "pooler.pt"
BATCH, SENTENCES = 16, 1024  # texts of a batch, of the training part


def run(cell: Cell, folder: Path) -> str:
    """Train one cell and write its record."""
    import torch

    torch.set_num_threads(1)
    import fedtune

    started = time.perf_counter()
    data = data_of(cell)
    module = module_of(cell, data)
    own_steps = STEPS // cell.clients  # of an epoch of a client's own texts
    loop = fedtune.FederatedLoop(
        max_rounds=cell.rounds,
        check_val_every_n_rounds=cell.every,
        local_epochs=max(1, cell.client_steps // own_steps),
        limit_train_batches=min(cell.client_steps, own_steps),
        limit_test_batches=1,
        seed=cell.seed,
        baselines=(),
        algorithm={"name": "fedavg", "weighting": "uniform"},
        options=fedtune.RunOptions(progress=False),
    )
    if cell.probe:
        _probe(module, data, cell)
    if cell.trained == "last":
        _only(module, module.network.classifier)
    loop.fit(module, data)
    majority = max(shares_of(data, "validation"))
    rounds = [
        {"round": one.round, "accuracy": one.metrics["accuracy"], "loss_nats": one.metrics["loss_nats"]}
        for one in loop.history
        if one.metrics
    ]
    record = dataclasses.asdict(cell) | {
        "name": cell.name,
        "majority": majority,
        "train_entropy": _entropy(shares_of(data, "train")),
        "entropy": _cross(shares_of(data, "validation"), shares_of(data, "train")),
        "seconds": time.perf_counter() - started,
        "rounds_evaluated": rounds,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cell.name}.json"
    path.with_suffix(".part").write_text(json.dumps(record))
    path.with_suffix(".part").replace(path)
    return f"{cell.name}: {record['seconds']:.0f} s, accuracy {rounds[-1]['accuracy']:.3f} (majority {majority:.3f})"


def data_of(cell: Cell) -> Any:
    """The texts of a cell, dealt out to its clients."""
    import fedtune

    options = {"validation": 0.02} if cell.task == "spooky_author" else {}
    own: dict[str, Any] = {"padding": "max_length"} if not cell.mask else {}
    data = fedtune.FederatedDataModule(
        cell.task, task_options=options, limit=SENTENCES, num_clients=cell.clients, batch_size=BATCH, max_length=48,
        mask=cell.mask, shuffle=cell.shuffle, model="minilm", seed=cell.seed, **own,
    )  # fmt: skip
    data.setup()
    return data


def module_of(cell: Cell, data: Any) -> Any:
    """The module of a cell before training."""
    from fedtune.randomness import seeded

    sys.path.insert(0, str(HERE))
    import heads

    given: dict[str, Any] = {"gamma": cell.gamma, "optimizer": cell.optimizer, "dropout": cell.dropout}
    given["learning_rate"] = cell.rate
    with seeded(cell.seed, "model"):
        if cell.head == "trained":
            return heads.Bert("minilm", data.num_labels, head=cell.head, pooler=str(POOLER), **given)
        if cell.head in heads.HEADS:
            return heads.Bert("minilm", data.num_labels, head=cell.head, **given)
        return heads.DistilBert("minilm-distilbert", data.num_labels, scaled_start=cell.head == "orthogonal", **given)


def train_pooler() -> None:
    """A pooler that has learned another task, as that of BERT has: the sixteen authors, beneath MiniLM's frozen encoder."""
    import torch

    import fedtune

    cell = Cell("started", task="authors", head="tanh", optimizer="adamw", rate=1e-3, rounds=8, seed=7)
    data = data_of(cell)
    module = module_of(cell, data)
    _only(module, *(module.network.get_submodule(part) for part in module.head), module.network.bert.pooler)
    quiet = fedtune.RunOptions(progress=False)
    loop = fedtune.FederatedLoop(max_rounds=cell.rounds, check_val_every_n_rounds=cell.rounds, baselines=(), options=quiet)
    loop.fit(module, data)
    print(f"pooler: accuracy {loop.history[-1].metrics['accuracy']:.3f} on sixteen authors", flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    part = POOLER.with_suffix(".part")
    torch.save(module.network.bert.pooler.state_dict(), part)
    part.replace(POOLER)


def _only(module: Any, *parts: Any) -> list[Any]:
    """Leave some parts of a module to be trained; returns the weights that were before."""
    before = [weight for weight in module.parameters() if weight.requires_grad]
    kept = {id(weight) for part in parts for weight in part.parameters()}
    for weight in before:
        weight.requires_grad_(id(weight) in kept)
    return before


def _probe(module: Any, data: Any, cell: Cell) -> None:
    """A warm start: so many federated rounds in which the head alone learns, at ten times the rate."""
    import fedtune

    rate = module.hparams["learning_rate"]
    before = _only(module, *(module.network.get_submodule(part) for part in module.head))
    module.hparams["learning_rate"] = 10 * rate
    quiet = fedtune.RunOptions(progress=False)
    algorithm = {"name": "fedavg", "weighting": "uniform"}
    fedtune.FederatedLoop(
        max_rounds=cell.probe,
        baselines=(),
        limit_val_batches=1,
        limit_test_batches=1,
        algorithm=algorithm,
        options=quiet,
        seed=cell.seed,
    ).fit(module, data)
    module.hparams["learning_rate"] = rate
    for weight in before:
        weight.requires_grad_(True)


def shares_of(data: Any, part: str) -> list[float]:
    """The frequency of each class in a part."""
    import numpy as np

    rows = np.concatenate(data.client_indices) if part == "train" else data.task.parts[part]
    counts = np.bincount(np.asarray(data.task.labels)[rows], minlength=data.num_labels)
    return [float(one) for one in counts / counts.sum()]


def _entropy(shares: list[float]) -> float:
    return _cross(shares, shares)


def _cross(shares: list[float], guessed: list[float]) -> float:
    """Loss in nats of who guesses with some shares where others are true."""
    import math

    return -sum(one * math.log(max(guess, 1e-9)) for one, guess in zip(shares, guessed, strict=True))


def collect(folder: Path) -> int:
    """Add the records that there are to `records.jsonl`, a line a run in the order of names; returns the number of all."""
    found = known() | {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    RECORDS.write_text("".join(f"{json.dumps(found[name])}\n" for name in sorted(found)))
    return len(found)


def known() -> dict[str, dict[str, Any]]:
    """Name -> the record of each run of `records.jsonl`."""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    return {record["name"]: record for record in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS), help="parts of the design")
    parser.add_argument("--seeds", type=int, default=2, help="replicates: 1 or 2")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--quick", action="store_true", help="eight runs: six heads at one rate, and 4 and 16 clients")
    parser.add_argument("--collect", action="store_true", help="write records.jsonl from what is there, run nothing")
    options = parser.parse_args()
    if options.collect:
        print(f"{collect(FOLDER)} runs: {RECORDS}")
        return
    cells = [cell for part in options.only for cell in PARTS[part]() if cell.seed < options.seeds]
    if options.quick:
        one = [cell for cell in cells if cell.part == "dose" and cell.seed == 0 and cell.gamma == 1]
        heads = [cell for cell in one if cell.rate == (0.02 if cell.head in ("none", "orthogonal") else 0.05)]
        many = [cell for cell in cells if cell.part == "clients" and cell.seed == 0 and cell.head == "pooler"]
        cells = heads + [cell for cell in many if cell.clients in (4, 16)]
    there = {} if options.quick else known()  # --quick is to see for oneself
    left = [cell for cell in dict.fromkeys(cells) if cell.name not in there and not (FOLDER / f"{cell.name}.json").exists()]
    left.sort(key=lambda cell: cell.seed)  # a whole replicate before the next
    print(f"{len(cells)} runs, {len(left)} of them to do", flush=True)
    if any(cell.head == "trained" for cell in left) and not POOLER.exists():
        train_pooler()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for done in pool.map(run, left, [FOLDER] * len(left)):
            print(done, flush=True)


if __name__ == "__main__":
    main()
