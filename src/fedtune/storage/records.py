"""The records of a run, and the file they live in."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.errors import RunError, shown
from fedtune.federated.messages import ClientReport, Failure
from fedtune.federated.state import RoundResult
from fedtune.files import read_lines
from fedtune.storage import checks
from fedtune.storage.checks import Check, checked


@dataclass(frozen=True, repr=False)
class RoundRecord:
    """What is known of one round. Times in seconds, losses in nats, traffic in bytes over all clients of the round.

    Args:
        metrics: what the module logged when the averaged model was evaluated; `record.accuracy` reads it, too.
        train_loss_nats: mean training loss over the examples of the round; no number where nobody answered, or drew an example.
        train_metrics: what else the module logged in training, means over the examples of the round.
        num_clients, num_examples, num_steps, num_tokens: trained in this round (tokens without padding).
        bytes_up, bytes_down: sent by the clients, and to them.
        mean_update_norm, update_cosine, drift: how the clients' updates relate, as in `federated.agreement.Agreement`.
        clients: a report for each client whose reply counts.
        failures: for each of the others its number and the reason.
        client_accuracy: accuracy of the averaged model for each client of the federation, where data and module know it, as
            in `FederatedDataModule.client_accuracy`.
        own_accuracy: the same for each client's own model, where the algorithm has such.
        injected, diagnostics: as in `federated.state.RoundResult`, the clients by kind of fault.
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
    mean_update_norm: float
    update_cosine: float | None
    drift: dict[str, float]
    clients: list[ClientReport] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    client_accuracy: list[float | None] = field(default_factory=list)
    own_accuracy: list[float | None] = field(default_factory=list)
    train_metrics: dict[str, float] = field(default_factory=dict)
    injected: dict[str, list[int]] = field(default_factory=dict)
    diagnostics: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, result: RoundResult, metrics: dict[str, float], client_accuracy: list[float | None], seconds: Mapping[str, float]
    ) -> RoundRecord:
        """The record of a round.

        Args:
            result: of the round.
            metrics, client_accuracy: as measured after it.
            seconds: "train" (averaging apart) and "evaluate".
        """
        reports = result.clients
        examples = sum(report.num_examples for report in reports)
        known = [report for report in reports if not math.isnan(report.train_loss_nats)]  # where examples are drawn, or nobody
        return cls(
            round=result.state.round,
            metrics=metrics,
            train_loss_nats=(
                sum(report.train_loss_nats * report.num_examples for report in known)
                / sum(report.num_examples for report in known)
                if known
                else math.nan
            ),
            num_clients=len(reports),
            num_examples=examples,
            num_steps=sum(report.num_steps for report in reports),
            num_tokens=sum(report.num_tokens for report in reports),
            seconds=seconds["train"] + result.seconds_aggregate + seconds["evaluate"],
            seconds_train=seconds["train"],
            seconds_aggregate=result.seconds_aggregate,
            seconds_evaluate=seconds["evaluate"],
            bytes_up=result.bytes_up,
            bytes_down=result.bytes_down,
            mean_update_norm=result.agreement.mean_update_norm,
            update_cosine=result.agreement.update_cosine,
            drift=result.agreement.drift,
            clients=reports,
            failures=result.failures,
            client_accuracy=client_accuracy,
            train_metrics=_over_examples(reports),
            injected={
                kind: [client for client, one in result.injected.items() if one == kind]
                for kind in dict.fromkeys(result.injected.values())
            },
            diagnostics=result.diagnostics,
        )

    def __getattr__(self, name: str) -> float:
        metrics = self.__dict__.get("metrics", {})
        if name in metrics:
            return float(metrics[name])
        raise AttributeError(f"a round record has no {name!r}; the module logged {sorted(metrics)}")

    def __repr__(self) -> str:
        values = self.metrics | {"train_loss_nats": self.train_loss_nats, "seconds": self.seconds}
        said = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
        return f"RoundRecord(round={self.round}, {said}, {self.num_clients} clients, {self.num_examples} examples)"

    @property
    def cohort(self) -> list[int]:
        """The clients that took part, those that failed among them."""
        return sorted([report.client for report in self.clients] + [failure.client for failure in self.failures])

    def to_dict(self) -> dict[str, Any]:
        """One flat dictionary, as in `rounds.jsonl`."""
        own = dataclasses.asdict(self)
        return {"round": own.pop("round")} | own.pop("metrics") | own

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any]) -> RoundRecord:
        """The record that `to_dict` made flat.

        Raises:
            ValueError: it is none: something is missing, or of another type or range, or numbers contradict each other.
        """
        own = checked(flat, _FORM, optional=("client_accuracy", "own_accuracy", "train_metrics", "injected", "diagnostics"))
        own["clients"] = [
            ClientReport(**_part(one, "clients", _REPORT, ("update_norm", "metrics", "learning_rates")))
            for one in flat["clients"]
        ]
        _check_losses(flat, private="epsilon_rdp" in own.get("diagnostics", {}))
        own["failures"] = [Failure(**_part(one, "failures", _FAILURE)) for one in flat["failures"]]
        metrics = {str(name): checks.measured(name, value) for name, value in flat.items() if name not in RESERVED}
        found = cls(metrics=metrics, **own)
        _agrees(found)
        return found


def _over_examples(reports: Sequence[ClientReport]) -> dict[str, float]:
    """What clients logged in training, as means over the examples of those that did."""
    found = {}
    for name in dict.fromkeys(name for report in reports for name in report.metrics):
        known = [(report.metrics[name], report.num_examples) for report in reports if name in report.metrics]
        found[name] = sum(value * count for value, count in known) / sum(count for _, count in known)
    return found


RESERVED = frozenset(item.name for item in dataclasses.fields(RoundRecord))  # names that no metric can have
_COUNTS = ("num_clients", "num_examples", "num_steps", "num_tokens", "bytes_up", "bytes_down")
_TIMES = ("seconds", "seconds_train", "seconds_aggregate", "seconds_evaluate")
_FORM: dict[str, Check] = {  # of a line of rounds.jsonl, metrics apart
    "round": checks.count,
    **dict.fromkeys(_COUNTS, checks.count),
    **dict.fromkeys(_TIMES, checks.not_negative),
    "train_loss_nats": checks.measured,
    "mean_update_norm": checks.length,
    "update_cosine": checks.finite_or_none,
    "drift": checks.measured_by_name,
    "clients": checks.listed,
    "failures": checks.listed,
    "client_accuracy": checks.finite_or_none_each,
    "own_accuracy": checks.finite_or_none_each,
    "train_metrics": checks.measured_by_name,
    "injected": checks.clients_by_name,
    "diagnostics": checks.measured_by_name,
}
_REPORT: dict[str, Check] = {
    **dict.fromkeys(("client", "num_examples", "num_steps", "num_tokens"), checks.count),
    "train_loss_nats": checks.measured,
    "seconds": checks.not_negative,
    "update_norm": checks.length,
    "metrics": checks.measured_by_name,
    "learning_rates": checks.measured_by_name,
}
_FAILURE: dict[str, Check] = {"client": checks.count, "reason": checks.text}


def _part(found: Any, name: str, form: Mapping[str, Check], optional: Sequence[str] = ()) -> dict[str, Any]:
    """One of the objects in a list of a record, which has no other names."""
    if not isinstance(found, dict):
        raise ValueError(f"{name} have {shown(found)}, where an object belongs")
    if not found.keys() <= form.keys():
        strange = sorted(found.keys() - form.keys())
        raise ValueError(f"{name} have {shown(strange)}, which no record has")
    return checked(found, form, optional)


def _check_losses(flat: Mapping[str, Any], private: bool) -> None:
    """Raise `ValueError` where a training loss is no finite number; with privacy a client may have drawn no example."""
    known = [one for one in flat["clients"] if one["train_loss_nats"] is not None or not private or one["num_tokens"]]
    for one in [*known, *([flat] if known else [])]:
        checks.finite("train_loss_nats", one["train_loss_nats"])


def _agrees(record: RoundRecord) -> None:
    """Raise `ValueError` where the numbers of a round are not those of its clients."""
    if len(set(record.cohort)) < len(record.cohort):
        raise ValueError(f"clients are {shown(record.cohort)}, where each belongs once")
    sums = {name: sum(getattr(one, name) for one in record.clients) for name in ("num_examples", "num_steps", "num_tokens")}
    for name, value in {"num_clients": len(record.clients), **sums}.items():
        if getattr(record, name) != value:
            raise ValueError(f"{name} is {getattr(record, name)}, where its clients have {value}")


def record_in(file: Path, number: int, flat: Mapping[str, Any]) -> RoundRecord:
    """The record in a line of a file.

    Raises:
        RunError: it is none.
    """
    try:
        return RoundRecord.from_dict(flat)
    except ValueError as error:
        raise RunError(f"{file}, line {number}: no record of a round ({error})") from error


def read_rounds(file: Path, until: int | None = None) -> list[RoundRecord]:
    """The records of rounds 1, 2 and so on, each in its line.

    Args:
        until: the last round that is wanted, and must be there; later ones, of which a crash may have left some, don't count.

    Raises:
        RunError: a line is no record, or is of another round.
    """
    found = []
    for number, flat in enumerate(read_lines(file)[:until], start=1):
        record = record_in(file, number, flat)
        if record.round != number:
            raise RunError(f"{file}, line {number}: the record of round {record.round}, where round {number} belongs")
        found.append(record)
    if until is not None and len(found) < until:
        raise RunError(f"{file} lacks rounds up to {until}; it has {len(found)}")
    return found
