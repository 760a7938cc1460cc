"""Finished run directories as `FederatedLoop` leaves them, without training: for reports of many runs.

The curves are made up: a run climbs from chance to what its clients, split and learning rate allow, with noise from its seed.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from fedtune.federated.messages import ClientReport
from fedtune.storage.records import RoundRecord
from fedtune.storage.summary import summarise

CLASSES = {"imdb": 2, "yelp": 5, "agnews": 4, "spooky_author": 3}
TESTED = 2000  # examples of a test part


@dataclass(frozen=True)
class Made:
    """What one made-up run is.

    Args:
        settings: dotted names -> values, beside those below.
        causal: a decoder, which has a loss but no accuracy.
        baselines: write a centralised baseline, too.
        bytes_up: of a client in a round.
    """

    task: str = "spooky_author"
    model: str = "bert"
    split: str = "iid"
    clients: int = 4
    seed: int = 0
    rounds: int = 5
    rate: float = 1e-3
    settings: tuple[tuple[str, Any], ...] = ()
    causal: bool = False
    baselines: bool = False
    bytes_up: int = field(default=45_000_000, repr=False)  # what a run says goes into its curves

    def config(self) -> dict[str, Any]:
        """As in config.yaml."""
        monitor = {"monitor": "loss_nats", "mode": "min"} if self.causal else {"monitor": "accuracy", "mode": "max"}
        found: dict[str, Any] = {
            "model": {"name": self.model, "learning_rate": self.rate, "seed": self.seed},
            "data": {"task": self.task, "num_clients": self.clients, "split": self.split, "skew": 0.8, "alpha": 0.5},
            "loop": {"seed": self.seed, "max_rounds": self.rounds, "evaluate_on": "validation", **monitor},
            "versions": {"torch": "2"},
        }
        for name, value in self.settings:
            *path, last = name.split(".")
            place = found
            for part in path:
                place = place.setdefault(part, {})
            place[last] = value
        return found

    @property
    def chance(self) -> float:
        """The accuracy of the most frequent class."""
        return 1 / CLASSES.get(self.task, 16)

    def reach(self) -> float:
        """The accuracy that the run comes to, from 0 to 1: lower with more clients, by author, and off the best rate."""
        worse = 0.04 * (self.clients - 1) ** 0.5 + (0.12 if "iid" not in self.split and self.clients > 1 else 0)
        worse += 0.15 * abs({3e-4: -1, 1e-3: 0, 3e-3: 1}.get(self.rate, 0) + (0.6 if self.clients > 4 else 0))
        return max(self.chance, 0.9 - 0.05 * (len(self.model) % 3) - worse)


def write_made(folder: Path, made: Made) -> None:
    """Write the directory of one run."""
    rng = random.Random(repr(made))
    history = [_record(made, number, made.clients, made.reach(), rng) for number in range(1, made.rounds + 1)]
    baselines: dict[str, Any] = {"majority_accuracy": None if made.causal else made.chance}
    if made.baselines:
        one = replace(made, clients=1, split="iid")  # pooled, the split does not matter
        drawn = random.Random(f"pooled/{one}")
        pooled = [_record(one, number, 1, one.reach() + 0.02, drawn) for number in range(1, made.rounds + 1)]
        config = made.config()
        for name in ("num_clients", "split", "skew", "alpha"):
            del config["data"][name]
        del config["loop"]["max_rounds"]
        config["baseline"] = {"name": "centralised", "examples": [400] * made.rounds}
        _write(folder / "baselines" / "centralised-0", config, pooled)
        baselines["centralised"], baselines["centralised_test"] = pooled, dict(pooled[-1].metrics)
        alone = _record(made, 1, 1, (made.chance + made.reach()) / 2, rng).metrics
        baselines["local"] = [{"client": client, "test": alone} for client in range(made.clients)]
    monitor, mode = made.config()["loop"]["monitor"], made.config()["loop"]["mode"]
    summary = summarise(history, "validation", dict(history[-1].metrics), baselines, monitor, mode)
    sizes = {
        "examples_test": TESTED,
        "examples_validation": TESTED,
        "majority_validation_accuracy": summary["majority_accuracy"],
    }
    _write(folder, made.config(), history)
    (folder / "summary.json").write_text(json.dumps(summary | sizes))


def grid(**values: Sequence[Any]) -> list[Made]:
    """All combinations of some values."""
    return [Made(**dict(zip(values, cell, strict=True))) for cell in itertools.product(*values.values())]


def paper() -> list[Made]:
    """The 432 runs of `fedtune:paper`, 100 rounds each."""
    splits, clients = ("hilmkil_iid", "hilmkil_sorted"), (1, 2, 4, 8, 16, 32)
    models = ("bert", "albert", "distilbert")
    return grid(task=list(CLASSES), model=models, clients=clients, split=splits, seed=(0, 1, 2), rounds=(100,), rate=(2e-5,))


def write_all(folder: Path, runs: Sequence[Made]) -> None:
    """A directory for each run."""
    for number, made in enumerate(runs):
        write_made(folder / f"{number:04}", made)


def _record(made: Made, number: int, clients: int, reach: float, rng: random.Random) -> RoundRecord:
    share = 1 - 0.5 ** (number / (1 + 0.05 * made.rounds))
    accuracy = min(1.0, max(0.0, made.chance + (reach - made.chance) * share + rng.gauss(0, 0.01)))
    metrics: Mapping[str, float] = {"loss_nats": 2.2 - 2 * accuracy, "accuracy": accuracy, "macro_f1": accuracy * 0.97}
    if made.causal:
        metrics = {"loss_nats": 2.2 - accuracy, "perplexity": 2.718281828 ** (2.2 - accuracy), "token_accuracy": accuracy / 2}
    steps, examples = 3, 25
    reports = [
        ClientReport(client, examples, steps, 1600, metrics["loss_nats"] + 0.1, 0.4, 0.5, {}, {"lr-SGD/pg1": made.rate})
        for client in range(clients)
    ]
    return RoundRecord(
        round=number,
        metrics=dict(metrics),
        train_loss_nats=metrics["loss_nats"] + 0.1,
        num_clients=clients,
        num_examples=examples * clients,
        num_steps=steps * clients,
        num_tokens=1600 * clients,
        seconds=2.0,
        seconds_train=1.5,
        seconds_aggregate=0.1,
        seconds_evaluate=0.4,
        bytes_up=made.bytes_up * clients,
        bytes_down=45_000_000 * clients,
        mean_update_norm=1.0,
        update_cosine=rng.uniform(-0.1, 0.5) if clients > 1 else None,
        drift={f"network.bert.encoder.layer.{layer}": rng.random() for layer in range(12)},
        clients=reports,
        client_accuracy=[] if made.causal else [accuracy + rng.uniform(-0.1, 0.1) for _ in range(clients)],
    )


def _write(folder: Path, config: Mapping[str, Any], history: Sequence[RoundRecord]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "rounds.jsonl").write_text("".join(json.dumps(record.to_dict()) + "\n" for record in history))
