"""What torchrun, Slurm's srun, or `fedtune run --workers`, tell a process about the others: variables of its environment.

torchrun    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
srun        SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID; MASTER_ADDR (and MASTER_PORT) are the user's to set
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fedtune.errors import UsageError, one_of

RUNTIMES = ("auto", "serial", "torchrun")
TIMEOUT, STARTER = "FEDTUNE_RANK_TIMEOUT", "FEDTUNE_STARTER"
_DEFAULT_TIMEOUT = 600.0  # seconds
_DEFAULT_PORT = 29500  # as torchrun's
_NAMES = {  # of the rank, how many there are, and the rank within the machine
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of a run.

    Args:
        rank, size, local_rank: as in `Ranks`.
        address, port: where they meet.
        hosted: whether whoever started them keeps the meeting point; else rank 0 does.
        attempt: how often torchrun has started them before.
        starter: the process that has started them on this machine, without which they end; 0 where there is none.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int
    hosted: bool = False
    attempt: int = 0
    starter: int = 0


def place_of(runtime: str, environment: Mapping[str, str] | None = None) -> Place | None:
    """Where this process stands; None where it is the only one.

    Args:
        runtime: "auto", "serial" or "torchrun".

    Raises:
        UsageError: another runtime, "torchrun" in a process that nobody has started so, or a variable that is no number.
    """
    given = os.environ if environment is None else environment
    if not isinstance(runtime, str) or runtime not in RUNTIMES:
        raise one_of("runtime", runtime, RUNTIMES)
    if runtime == "serial":
        return None
    for names in _NAMES.values():
        needed = (*names[:2], "MASTER_ADDR")
        if all(name in given for name in needed):
            rank, size = (_number(given, name) for name in names[:2])
            local = _number(given, names[2]) if names[2] in given else rank
            if not 0 <= rank < size:
                raise UsageError(names[0], rank, f"a number from 0 to {size - 1}, as {names[1]} says")
            port = _number(given, "MASTER_PORT") if "MASTER_PORT" in given else _DEFAULT_PORT
            hosted = given.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            more = (_number(given, name) if name in given else 0 for name in ("TORCHELASTIC_RESTART_COUNT", STARTER))
            return Place(rank, size, local, given["MASTER_ADDR"], port, hosted, *more) if size > 1 else None
    if runtime == "torchrun":
        wanted = " or ".join(f"{kind} sets {', '.join(names)} (and MASTER_ADDR)" for kind, names in _NAMES.items())
        raise UsageError("runtime", runtime, f"auto or serial, in a process that neither has started: {wanted}")
    return None


def has_others(and_follows: bool = False) -> bool:
    """Whether this process is one of several of a run; and, if that is asked, another one than rank 0."""
    try:
        place = place_of("auto")
    except UsageError:
        return False
    return place is not None and (place.rank > 0 or not and_follows)


def timeout() -> float:
    """Seconds after which a rank that gives no sign counts as lost: `FEDTUNE_RANK_TIMEOUT`, else ten minutes.

    Raises:
        UsageError: it is no number above 0.
    """
    given = os.environ.get(TIMEOUT, str(_DEFAULT_TIMEOUT))
    try:
        found = float(given)
    except ValueError:
        found = 0.0
    if not 0 < found < 1e9:
        raise UsageError(TIMEOUT, given, "seconds, a number above 0")
    return found


def _number(given: Mapping[str, str], name: str) -> int:
    try:
        return int(given[name])
    except ValueError as error:
        raise UsageError(name, given[name], "a whole number, as torchrun or srun sets it") from error
