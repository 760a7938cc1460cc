"""The runs of the study: `python experiments/question/study.py`, from the project's folder, with FEDTUNE_DATA set for Spooky.

One row of the design is one federated run; its record, `runs/question/NAME.json`, is written when it is complete, so that a run
that was interrupted begins anew and a complete one is never repeated. `--collect` writes what is there to `records.jsonl`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDS, FOLDER = HERE / "records.jsonl", Path("runs/question")
BATCH, SENTENCES, STEPS = 16, 1024, 64  # texts of a batch, of the training part; steps of an epoch


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run.

    Args:
        part: of the design, as in README.md.
        head: "pooler", "tanh", "relu", "none" on BERT's encoder; "distilbert", "orthogonal" on DistilBERT's.
        rate: the learning rate.
        gamma: scale of the features.
        clients: K, all in every round.
        steps: of a client in a round; None: one epoch of its own texts. More than those are several epochs.
        rounds: in all.
        every: rounds from one evaluation to the next.
        trained: "all", or the "last" layer alone.
    """

    part: str
    task: str = "spooky_author"
    head: str = "pooler"
    rate: float = 0.05
    gamma: float = 1.0
    clients: int = 1
    steps: int | None = 8
    rounds: int = 16
    every: int = 1
    optimizer: str = "sgd"
    dropout: float = 0.0
    mask: bool = True
    shuffle: bool = True
    probe: int = 0
    trained: str = "all"
    seed: int = 0

    @property
    def name(self) -> str:
        """What differs from the defaults, as the name of a file."""
        default = Cell(self.part)
        given = {name: value for name, value in vars(self).items() if value != getattr(default, name)}
        return "-".join([self.part, *(f"{name}_{value}" for name, value in given.items() if name != "part")])

    @property
    def client_steps(self) -> int:
        """Steps of a client in a round."""
        return STEPS // self.clients if self.steps is None else self.steps


def dose() -> Iterator[Cell]:
    """One client: how do head, rate and scale of the features move the step at which it leaves chance?"""
    for seed in (0, 1):
        for head, (rate, steps) in itertools.product(("pooler", "distilbert"), ((0.1, 4), (0.05, 8), (0.02, 20))):
            yield Cell("dose", head=head, rate=rate, steps=steps, seed=seed)
        for head in ("tanh", "relu"):
            yield Cell("dose", head=head, seed=seed)
        for head, (rate, steps) in itertools.product(("none", "orthogonal"), ((0.01, 4), (0.005, 8), (0.002, 20))):
            yield Cell("dose", head=head, rate=rate, steps=steps, seed=seed)
        for head in ("none", "orthogonal"):  # added when these had not left chance: a larger budget
            yield Cell("dose", head=head, rate=0.02, seed=seed)
        for head, gamma in itertools.product(("pooler", "distilbert"), (0.5, 2.0, 4.0)):
            yield Cell("dose", head=head, rate=0.05 / gamma**2, gamma=gamma, seed=seed)
        for head, gamma in itertools.product(("pooler", "distilbert"), (0.5, 2.0)):  # the rate as it was
            yield Cell("dose", head=head, gamma=gamma, steps=32 if gamma < 1 else 2, seed=seed)


def clients() -> Iterator[Cell]:
    """K clients, an epoch a round: is the round of leaving chance proportional to K? And does averaging itself slow?"""
    for seed in (0, 1):
        for head in ("pooler", "distilbert"):
            yield Cell("clients", head=head, clients=4, steps=None, rounds=8, seed=seed)
            yield Cell("clients", head=head, clients=16, steps=None, rounds=20, every=2, seed=seed)
            yield Cell("clients", head=head, clients=32, steps=None, rounds=36, every=2, seed=seed)
            yield Cell(
                "clients", head=head, clients=1, steps=2, rounds=60, every=3, seed=seed
            )  # the steps of 32 clients, by one


def remedies() -> Iterator[Cell]:
    """DistilBERT with 32 clients and the budget of 12 epochs at a rate with which it stays on the plateau: what helps?"""
    given: tuple[dict[str, Any], ...] = (
        {},
        {"rate": 0.2},
        {"steps": 16, "rounds": 2, "every": 1},
        {"optimizer": "adamw", "rate": 1e-4},
        {"head": "orthogonal"},
        {"gamma": 2.0},
        {"probe": 1},
    )
    for seed, more in itertools.product((0, 1), given):
        yield Cell(
            "remedies", **{"head": "distilbert", "clients": 32, "steps": None, "rounds": 12, "every": 2, "seed": seed} | more
        )


def last_layer() -> Iterator[Cell]:
    """Where only the last layer learns, does the scale of the features count squared?"""
    for seed, (head, rate), gamma in itertools.product((0, 1), (("none", 0.02), ("distilbert", 0.3)), (0.5, 1.0, 2.0)):
        steps = {0.5: 32, 1.0: 8, 2.0: 2}[gamma]
        yield Cell("last_layer", head=head, rate=rate, gamma=gamma, steps=steps, rounds=32, trained="last", seed=seed)


def fast() -> Iterator[Cell]:
    """Speeds of 0.4 to 2, which the paper's cell needs for 16 and 32 clients."""
    for seed, head, (gamma, rate) in itertools.product((0, 1), ("none", "orthogonal"), ((2.0, 0.01), (4.0, 0.005))):
        yield Cell("fast", head=head, rate=rate, gamma=gamma, steps=4, seed=seed)


def screening() -> Iterator[Cell]:
    """A fractional factorial of resolution IV, eight factors of two levels in sixteen runs, on two tasks and two seeds.

    Generators E = BCD, F = ACD, G = ABC, H = ABD.
    """
    for seed, task in itertools.product((0, 1), ("spooky_author", "authors")):
        for a, b, c, d in itertools.product((-1, 1), repeat=4):
            e, f, g, h = b * c * d, a * c * d, a * b * c, a * b * d
            clients = 4 if c < 0 else 16
            yield Cell(
                "screening",
                task=task,
                head="pooler" if a < 0 else "distilbert",
                gamma=1.0 if b < 0 else 2.0,
                clients=clients,
                steps=None if d < 0 else 8,
                rounds=6 if d < 0 else 6 * STEPS // (8 * clients),  # six epochs either way
                every=1 if d < 0 or clients == 16 else 2,
                mask=e < 0,
                shuffle=f < 0,
                dropout=0.0 if g < 0 else 0.1,
                optimizer="sgd" if h < 0 else "adamw",
                rate=0.05 if h < 0 else 1e-4,
                seed=seed,
            )


PARTS = {
    "dose": dose, "clients": clients, "remedies": remedies, "screening": screening, "last_layer": last_layer, "fast": fast,
}  # fmt: skip


def run(cell: Cell, folder: Path) -> str:
    """Train one cell and write its record."""
    import torch

    torch.set_num_threads(1)
    import fedtune

    started = time.perf_counter()
    options = {"validation": 0.02} if cell.task == "spooky_author" else {}
    own: dict[str, Any] = {"padding": "max_length"} if not cell.mask else {}
    data = fedtune.FederatedDataModule(
        cell.task, task_options=options, limit=SENTENCES, num_clients=cell.clients, batch_size=BATCH, max_length=48,
        mask=cell.mask, shuffle=cell.shuffle, model="minilm", seed=cell.seed, **own,
    )  # fmt: skip
    data.setup()
    module = _module(cell, data)
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
        last = {id(weight) for weight in module.network.classifier.parameters()}
        for weight in module.parameters():
            weight.requires_grad_(id(weight) in last)
    loop.fit(module, data)
    majority = max(_shares(data, "validation"))
    rounds = [
        {"round": one.round, "accuracy": one.metrics["accuracy"], "loss_nats": one.metrics["loss_nats"]}
        for one in loop.history
        if one.metrics
    ]
    record = dataclasses.asdict(cell) | {
        "name": cell.name,
        "majority": majority,
        "train_entropy": _entropy(_shares(data, "train")),
        "entropy": _cross(_shares(data, "validation"), _shares(data, "train")),
        "seconds": time.perf_counter() - started,
        "rounds_evaluated": rounds,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cell.name}.json"
    path.with_suffix(".part").write_text(json.dumps(record))
    path.with_suffix(".part").replace(path)
    return f"{cell.name}: {record['seconds']:.0f} s, accuracy {rounds[-1]['accuracy']:.3f} (majority {majority:.3f})"


def _module(cell: Cell, data: Any) -> Any:
    from fedtune.randomness import seeded

    sys.path.insert(0, str(HERE))
    import heads

    given: dict[str, Any] = {"gamma": cell.gamma, "optimizer": cell.optimizer, "dropout": cell.dropout}
    given["learning_rate"] = cell.rate
    with seeded(cell.seed, "model"):
        if cell.head in heads.HEADS:
            return heads.Bert("minilm", data.num_labels, head=cell.head, **given)
        return heads.DistilBert("minilm-distilbert", data.num_labels, scaled_start=cell.head == "orthogonal", **given)


def _probe(module: Any, data: Any, cell: Cell) -> None:
    """A warm start: so many federated rounds in which the head alone learns, at ten times the rate."""
    import fedtune

    rate, trained = module.hparams["learning_rate"], [one for one in module.parameters() if one.requires_grad]
    head = {id(weight) for part in module.head for weight in module.network.get_submodule(part).parameters()}
    for weight in trained:
        weight.requires_grad_(id(weight) in head)
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
    for weight in trained:
        weight.requires_grad_(True)


def _shares(data: Any, part: str) -> list[float]:
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
    parser.add_argument("--quick", action="store_true", help="six runs: each head at one rate")
    parser.add_argument("--collect", action="store_true", help="write records.jsonl from what is there, run nothing")
    options = parser.parse_args()
    if options.collect:
        print(f"{collect(FOLDER)} runs: {RECORDS}")
        return
    cells = [cell for part in options.only for cell in PARTS[part]() if cell.seed < options.seeds]
    if options.quick:
        main = [cell for cell in cells if cell.part == "dose" and cell.seed == 0 and cell.gamma == 1]
        cells = [cell for cell in main if cell.rate == (0.02 if cell.head in ("none", "orthogonal") else 0.05)]
    there = {} if options.quick else known()  # --quick is to see for oneself
    left = [cell for cell in dict.fromkeys(cells) if cell.name not in there and not (FOLDER / f"{cell.name}.json").exists()]
    left.sort(key=lambda cell: cell.seed)  # a whole replicate before the next
    print(f"{len(cells)} runs, {len(left)} of them to do", flush=True)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for done in pool.map(run, left, [FOLDER] * len(left)):
            print(done, flush=True)


if __name__ == "__main__":
    main()
