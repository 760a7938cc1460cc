"""`workers_per_run` of a sweep file: processes that share the clients of each run. The key is our own, W&B does not have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.errors import UsageError

EACH = "workers_per_run"


def check_each(content: Mapping[str, Any]) -> None:
    """Raise `UsageError` where the key of a sweep file is no number of processes."""
    each = content.get(EACH, 1)
    if isinstance(each, bool) or not isinstance(each, int) or each < 1:
        raise UsageError(EACH, each, "a whole number, 1 or more: processes that share the clients of a run")


def runs_at_a_time(workers: int, each: int) -> int:
    """How many runs so many processes can do at a time, where each run takes some.

    Raises:
        UsageError: not even one.
    """
    if workers < each:
        raise UsageError("--workers", workers, f"{each} or more, the {EACH} of the sweep file")
    return workers // each


def of_wandb(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a sweep file as W&B takes it."""
    return {key: value for key, value in content.items() if key != EACH}
