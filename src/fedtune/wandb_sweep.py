"""A sweep as a W&B sweep: W&B hands out the cells, and agents on any number of machines run them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from fedtune.errors import RunError, UsageError, at_least
from fedtune.grid import flat, load
from fedtune.tracking import import_wandb, is_online

# the agent writes a cell's values into a JSON file, which the command line reads like any configuration
_COMMAND = ["${env}", "fedtune", "run", "--config", "${args_json_file}", "--logger", "wandb", "--runs_dir"]


def online() -> bool:
    """Whether W&B can be reached with a key (and is not switched off by WANDB_MODE).

    Raises:
        UsageError: wandb is not installed.
    """
    return is_online(import_wandb("--wandb"))


def registered(file: str, runs_dir: str) -> dict[str, Any]:
    """The content of a sweep file as W&B takes it: with the command that an agent runs for a cell."""
    content = load(file)
    flat(content["parameters"])  # refuses what is no parameter
    return content | {"command": [*_COMMAND, runs_dir]}


def run(file: str, runs_dir: str, workers: int, only: Sequence[str]) -> None:
    """Register the file as a W&B sweep and run as many agents here as there are workers, until the sweep is done.

    Raises:
        UsageError: `only` is given, which W&B does not know.
        RunError: W&B refused the sweep, or an agent failed.
    """
    at_least("--workers", workers, 1)
    if only:
        raise UsageError("--only", " ".join(only), "nothing, in a W&B sweep; take the part out of the file")
    wandb = import_wandb("--wandb")
    try:
        project = os.environ.get("WANDB_PROJECT", "fedtune")
        sweep_id = wandb.sweep(registered(file, runs_dir), project=project)
    except wandb.Error as error:
        raise RunError(f"W&B did not take the sweep: {error}") from error
    address = f"{project}/{sweep_id}"
    print(f"other machines join with: wandb agent {address}")
    threads = str(max(1, len(os.sched_getaffinity(0)) // workers))
    command = [sys.executable, "-m", "wandb", "agent", address]
    agents = [subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": threads}) for _ in range(workers)]
    codes = [agent.wait() for agent in agents]
    if any(codes):
        raise RunError(f"{sum(map(bool, codes))} of {workers} W&B agents failed")
