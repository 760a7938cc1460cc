"""What every phase of a fit works with."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.model_helpers import is_overridden

from fedtune.federated.evaluation import Evaluation, evaluate
from fedtune.federated.state import RoundResult
from fedtune.federated.training import Resident
from fedtune.randomness import seeded
from fedtune.storage.records import RoundRecord


@dataclass(frozen=True)
class Session:
    """What every phase of a fit works with: the resident module, the data, and the part that rounds are evaluated on."""

    resident: Resident
    data: Any
    part: str
    evaluation: str = "pooled"

    def loader(self, part: str) -> Any:
        """The batches of a part, or None where the data have no such part."""
        name, stage = ("test_dataloader", "test") if part == "test" else ("val_dataloader", "validate")
        if isinstance(self.data, pl.LightningDataModule):
            if not is_overridden(name, self.data):
                return None
            self.data.setup(stage)
        return getattr(self.data, name)() if hasattr(self.data, name) else None

    def loaders(self) -> dict[str, Any]:
        """Part -> its batches: the part that rounds are evaluated on, and the test part where there is one."""
        found = {part: self.loader(part) for part in dict.fromkeys((self.part, "test"))}
        return {part: batches for part, batches in found.items() if batches is not None}

    def evaluate(self, part: str) -> Evaluation:
        """The module on a part, as it stands; nothing where the data have no such part."""
        loader = self.loader(part)
        if loader is None:
            return Evaluation({})
        with seeded(self.resident.seed, "evaluate"):  # a loader draws a seed, even when nothing is random
            return evaluate(self.resident.fabric, self.resident.module, loader)

    def measure(self) -> tuple[dict[str, float], list[float | None]]:
        """The metrics of a round, and the accuracy for each client where it is known."""
        if self.evaluation == "pooled":
            metrics, correct_N = self.evaluate(self.part)
            of_client = getattr(self.data, "client_accuracy", None)
            return metrics, of_client(self.part, correct_N) if of_client and correct_N is not None else []
        of_clients = self.evaluate_clients()
        return _mean(of_clients), [one.get("accuracy") for one in of_clients]

    def evaluate_clients(self) -> list[dict[str, float]]:
        """For each client the mean of batches, on its share of the test part."""
        fabric, module = self.resident.fabric, self.resident.module
        of_clients = []
        with seeded(self.resident.seed, "evaluate"):
            for client in range(self.data.num_clients):
                loader = self.data.client_test_dataloader(client)
                of_clients.append(_mean([evaluate(fabric, module, [batch]).metrics for batch in loader]))
        return of_clients

    def record(self, result: RoundResult, began: float) -> RoundRecord:
        """Evaluate the module, which holds the round's result, and put down all that is known of the round."""
        trained = time.perf_counter()
        metrics, client_accuracy = self.measure()
        ended = time.perf_counter()
        reports = result.clients
        examples = sum(report.num_examples for report in reports)
        return RoundRecord(
            round=result.state.round,
            metrics=metrics,
            train_loss_nats=sum(report.train_loss_nats * report.num_examples for report in reports) / examples,
            num_clients=len(reports),
            num_examples=examples,
            num_steps=sum(report.num_steps for report in reports),
            num_tokens=sum(report.num_tokens for report in reports),
            seconds=ended - began,
            seconds_train=trained - began - result.seconds_aggregate,
            seconds_aggregate=result.seconds_aggregate,
            seconds_evaluate=ended - trained,
            bytes_up=result.bytes_up,
            bytes_down=result.bytes_down,
            update_norm=result.agreement.update_norm,
            update_cosine=result.agreement.update_cosine,
            drift=result.agreement.drift,
            clients=reports,
            client_accuracy=client_accuracy,
        )


def _mean(metrics: list[dict[str, float]]) -> dict[str, float]:
    return {name: sum(one[name] for one in metrics) / len(metrics) for name in metrics[0]}
