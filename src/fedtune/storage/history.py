"""`History`: the records of a run, which show themselves as a table."""

from __future__ import annotations

from typing import Any, final

from fedtune.storage.records import RoundRecord
from fedtune.tables import Shown


@final
class History(Shown[RoundRecord]):
    """The rounds of a run, a list of `RoundRecord`; shown with a row for each: metrics, losses in nats, seconds, megabytes."""

    def cells(self, record: RoundRecord) -> dict[str, Any]:
        """What is shown of a round."""
        return {
            "round": record.round,
            **record.metrics,
            "train_loss_nats": record.train_loss_nats,
            "clients": record.num_clients,
            "seconds": record.seconds,
            "megabytes": (record.bytes_up + record.bytes_down) / 1e6,
        }
