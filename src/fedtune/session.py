"""What every phase of a fit works with."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.model_helpers import is_overridden

from fedtune.aggregation import RoundResult
from fedtune.client import Resident
from fedtune.evaluation import evaluate
from fedtune.randomness import seeded
from fedtune.records import RoundRecord


@dataclass(frozen=True)
class Session:
    """What every phase of a fit works with: the resident module, the data, and the part that rounds are evaluated on."""

    resident: Resident
    data: Any
    part: str

    def loaders(self) -> dict[str, Any]:
        """Part -> its batches, for the parts that the data have."""
        has_test = not isinstance(self.data, pl.LightningDataModule) or is_overridden("test_dataloader", self.data)
        names = {"validation": "val_dataloader"} | ({"test": "test_dataloader"} if has_test else {})
        return {part: getattr(self.data, name)() for part, name in names.items()}

    def evaluate(self, part: str) -> dict[str, float]:
        """What the module logs on a part, as it stands; nothing where the data have no such part."""
        loader = self.loaders().get(part)
        if loader is None:
            return {}
        with seeded(self.resident.seed, "evaluate"):  # a loader draws a seed, even when nothing is random
            return evaluate(self.resident.fabric, self.resident.module, loader)

    def record(self, result: RoundResult, began: float) -> RoundRecord:
        """Evaluate the module, which holds the round's result, and put down all that is known of the round."""
        trained = time.perf_counter()
        metrics = self.evaluate(self.part)
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
            clients=reports,
        )
