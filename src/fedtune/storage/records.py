"""The records of a run, and the file they live in."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.federated.training import ClientReport
from fedtune.storage.checkpoint import synchronise, write_text


@dataclass(frozen=True)
class RoundRecord:
    """What is known of one round. Times in seconds, losses in nats, traffic in bytes over all clients of the round.

    Args:
        metrics: what the module logged when the averaged model was evaluated; `record.accuracy` reads it, too.
        train_loss_nats: mean training loss over the examples of the round.
        num_clients, num_examples, num_steps, num_tokens: trained in this round (tokens without padding).
        bytes_up, bytes_down: sent by the clients, and to them.
        update_norm, update_cosine, drift: how the clients' updates relate, as in `aggregation.Agreement`.
        clients: a report for each client of the round.
        client_accuracy: accuracy of the averaged model for each client of the federation, where data and module know it, as
            in `FederatedDataModule.client_accuracy`.
    """

    round: int
    metrics: dict[str, float]
    train_loss_nats: float
    num_clients: int
    num_examples: int
    num_steps: int
    num_tokens: int
    seconds: float
    seconds_train: float
    seconds_aggregate: float
    seconds_evaluate: float
    bytes_up: int
    bytes_down: int
    update_norm: float
    update_cosine: float | None
    drift: dict[str, float]
    clients: list[ClientReport] = field(default_factory=list)
    client_accuracy: list[float | None] = field(default_factory=list)

    def __getattr__(self, name: str) -> float:
        metrics = self.__dict__.get("metrics", {})
        if name in metrics:
            return float(metrics[name])
        raise AttributeError(f"a round record has no {name!r}; the module logged {sorted(metrics)}")

    def to_dict(self) -> dict[str, Any]:
        """One flat dictionary, as in `rounds.jsonl`."""
        own = dataclasses.asdict(self)
        return {"round": own.pop("round")} | own.pop("metrics") | own

    @classmethod
    def from_dict(cls, flat: dict[str, Any]) -> RoundRecord:
        """The record that `to_dict` made flat."""
        names = {item.name for item in dataclasses.fields(cls)}
        own = {name: value for name, value in flat.items() if name in names}
        own["clients"] = [ClientReport(**report) for report in flat["clients"]]
        return cls(metrics={name: value for name, value in flat.items() if name not in names}, **own)


def append(file: Path, record: dict[str, Any]) -> None:
    """Add a line to a JSON-lines file and wait until it is on the disk."""
    new = not file.exists()
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(record, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    if new:
        synchronise(file.parent)


def read(file: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line that a crash left unfinished does not count."""
    if not file.exists():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def read_rounds(file: Path) -> list[RoundRecord]:
    """The round records of a file, one a round, in order; of a round that is there twice the later one."""
    by_round = {flat["round"]: RoundRecord.from_dict(flat) for flat in read(file)}
    return [by_round[number] for number in sorted(by_round)]


def rewrite(file: Path, records: list[dict[str, Any]]) -> None:
    """Replace the file by these records, at once."""
    write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
