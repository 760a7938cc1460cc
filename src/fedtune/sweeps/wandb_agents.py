"""A sweep as a W&B sweep: W&B hands out the cells, and agents on any number of machines run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.errors import RunError, UsageError, warn
from fedtune.runs.launcher import threads_of
from fedtune.runs.wandb_start import import_wandb, is_online, out_of_reach
from fedtune.sweeps.files import File, load, said_of
from fedtune.sweeps.grid import check
from fedtune.sweeps.metric import for_wandb
from fedtune.sweeps.runner import gpu
from fedtune.sweeps.several import EACH, of_wandb, runs_at_a_time

# the agent writes a cell's values into a JSON file, which the command line reads like any configuration
_COMMAND = ["${env}", "fedtune", "run", "--config", "${args_json_file}", "--logger", "wandb", "--runs_dir"]
_PATIENCE = 60  # seconds that an agent has to end its run, which keeps its last complete round


def online() -> bool:
    """Whether W&B is to hand out the runs: there is a key, W&B is not switched off, and its server can be reached; a warning
    says where it cannot.

    Raises:
        UsageError: wandb is not installed.
    """
    wandb = import_wandb("--wandb")
    if not is_online(wandb):
        return False
    why = out_of_reach(wandb)
    if why is not None:
        warn(f"W&B cannot be reached ({why}): the sweep is done here, and its runs are written into offline files")
    return why is None


def registered(file: File, runs_dir: str, imports: Sequence[str] = ()) -> dict[str, Any]:
    """The content of a sweep file as W&B takes it: with the command that an agent runs for a cell."""
    content = load(file)
    try:
        fixed = check(content, with_wandb=True)
    except UsageError as error:
        raise UsageError(f"{said_of(file)}: {error.argument}", error.came, error.allowed) from error
    more = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in fixed.items()]
    each = content.get(EACH, 1)
    more += [f"--workers={each}"] if each > 1 else []
    more += [f"--import={name}" for name in imports]
    found = of_wandb(content) | {"command": [*_COMMAND, runs_dir, *more]}
    if "metric" in content:
        found["metric"] = for_wandb(content["metric"], fixed, content["parameters"])
    return found


def run(file: File, runs_dir: str, workers: int, only: Sequence[str], imports: Sequence[str] = ()) -> int:
    """Register the file as a W&B sweep and run as many agents here as there are workers, until the sweep is done.

    Returns:
        the number of runs that W&B has as failed or crashed.

    Raises:
        UsageError: `only` is given, which W&B does not know.
        RunError: W&B refused the sweep, or an agent failed.
    """
    if only:
        raise UsageError("--only", " ".join(only), "nothing, in a W&B sweep; take the part out of the file")
    wandb, content = import_wandb("--wandb"), registered(file, runs_dir, imports)
    workers = runs_at_a_time(workers, load(file).get(EACH, 1))
    project = content.get("project") or os.environ.get("WANDB_PROJECT", "fedtune")
    try:
        sweep_id = wandb.sweep(content, project=project, entity=content.get("entity"))
        path = "/".join(wandb.Api().sweep("/".join([*filter(None, [content.get("entity")]), project, sweep_id])).path)
    except wandb.Error as error:
        raise RunError(f"W&B did not take the sweep: {error}") from error
    print(f"other machines join, and this one goes on after an interruption, with: wandb agent {path}")
    codes = _agents(path, workers)
    if any(codes):
        raise RunError(f"{sum(map(bool, codes))} of {workers} W&B agents failed; go on with: wandb agent {path}")
    return sum(one.state in ("failed", "crashed") for one in wandb.Api().sweep(path).runs)


def _agents(path: str, workers: int) -> list[int]:
    """Run agents until there is nothing left to hand out; they and their runs end with this process."""
    command = [sys.executable, "-m", "wandb", "agent", "--forward-signals", path]
    agents = [subprocess.Popen(command, env=_environment(number, workers), start_new_session=True) for number in range(workers)]
    try:
        return [agent.wait() for agent in agents]
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.send_signal(signal.SIGINT)
        for agent in agents:
            try:
                agent.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                agent.kill()


def _environment(number: int, workers: int) -> dict[str, str]:
    import torch

    found = os.environ | {"OMP_NUM_THREADS": str(threads_of(workers))}
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # where the command fedtune is
    count = torch.cuda.device_count()
    return found | ({"CUDA_VISIBLE_DEVICES": gpu(number, count)} if count > 1 else {})
