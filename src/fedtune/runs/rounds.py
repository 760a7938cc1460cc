"""A sequence of rounds: where it is kept, how long it is, and who follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.runs.callbacks import FederatedCallback
from fedtune.storage.directory import RunDirectory
from fedtune.storage.records import RoundRecord


@dataclass
class Course:
    """A sequence of rounds: where it is kept, how long it is, its records so far, and who is told."""

    run: RunDirectory
    rounds: int
    history: list[RoundRecord]
    hooks: Sequence[FederatedCallback] = ()
