"""The numbers of a round as loggers get them, in sections: `validation/accuracy`, `train/loss_nats`, `time/round_seconds`.

W&B and TensorBoard make a section of charts of what stands before the first slash.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.runs.callbacks import Run
from fedtune.storage.records import RoundRecord
from fedtune.storage.summary import best_round, mean_of, spread

FINAL = "final/"  # what the summary says, the test part among it
BEST = "best/"  # the round that is the best by the run's monitor, and its metrics


def section_of(config: Mapping[str, Any]) -> str:
    """The section of what rounds are evaluated for: the part of the data, "validation" or "test"."""
    return str(config["loop"]["evaluate_on"])


def numbers_of(run: Run, record: RoundRecord) -> dict[str, float]:
    """Every number of a round by its name; traffic in bytes, `traffic/bytes_total` up and down since the first round."""
    total = sum(one.bytes_up + one.bytes_down for one in run.history if one.round <= record.round)
    found: dict[str, float | None] = {f"{section_of(run.config)}/{name}": value for name, value in record.metrics.items()}
    found |= {f"train/{_apart(name)}": value for name, value in record.train_metrics.items()}
    found |= {
        "train/loss_nats": record.train_loss_nats,
        "train/examples": record.num_examples,
        "train/steps": record.num_steps,
        "train/tokens": record.num_tokens,
        "time/round_seconds": record.seconds,
        "time/train_seconds": record.seconds_train,
        "time/aggregate_seconds": record.seconds_aggregate,
        "time/evaluate_seconds": record.seconds_evaluate,
        "traffic/bytes_up": record.bytes_up,
        "traffic/bytes_down": record.bytes_down,
        "traffic/bytes_total": total,
        "clients/trained": record.num_clients,
        "clients/failed": len(record.failures),
        "clients/mean_update_norm": record.mean_update_norm,
        "clients/update_cosine": record.update_cosine,
    }
    found |= {f"clients/accuracy_{name}": value for name, value in spread(record.client_accuracy).items()}
    found |= {f"clients/injected_{kind}": len(clients) for kind, clients in record.injected.items()}
    found |= {f"drift/{layer}": value for layer, value in record.drift.items()}
    found |= {f"diagnostics/{name}": value for name, value in record.diagnostics.items()}
    return {name: value for name, value in (found | run.logged).items() if value is not None}


def pooled_numbers(record: RoundRecord) -> dict[str, float]:
    """What is compared of a round of the centralised baseline."""
    return {
        f"centralised/{name}": value for name, value in (record.metrics | {"train_loss_nats": record.train_loss_nats}).items()
    }


def best_numbers(run: Run) -> dict[str, float]:
    """The best round so far, and its metrics; nothing before one was evaluated."""
    of_run = run.config["loop"]
    best = best_round(run.history, of_run["monitor"], of_run["mode"])
    return {} if best is None else {f"{BEST}round": best.round} | {f"{BEST}{name}": one for name, one in best.metrics.items()}


def final_numbers(run: Run) -> dict[str, float]:
    """The numbers of the summary."""
    known = {name: value for name, value in run.summary.items() if isinstance(value, (int, float))}
    return {f"{FINAL}{name}": value for name, value in known.items()}


def levels_of(run: Run) -> dict[str, float]:
    """Name -> value of what the monitored metric is compared with beside pooled training."""
    monitor, part = run.config["loop"]["monitor"], section_of(run.config)
    alone = [mean_of(run.baselines.get("local", ()), measured, monitor) for measured in (part, "test")]
    found = {"each client alone, mean": next((one for one in alone if one is not None), None)}
    if monitor == "accuracy":
        found["majority class"] = run.summary.get("majority_accuracy")
    return {name: value for name, value in found.items() if value is not None}


def _apart(name: str) -> str:
    """The name of what a module logs in training; where another number of a round has it, it says that this one is of the last
    epoch, as all of them are."""
    return f"last_epoch_{name}" if name in ("loss_nats", "examples", "steps", "tokens") else name
