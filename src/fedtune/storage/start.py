"""What a run begins with: the weights that travel, and what belongs to the module and stays where it is.

start/round-0000/            the first state of the server, a checkpoint
start/resting.safetensors    frozen parameters and counters, but for those that come from files of a pretrained model
start/resting.json           the digest of each of them, those from files included
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from fedtune.errors import RunError, UsageError, shown
from fedtune.federated.state import ServerState
from fedtune.files import read_object, replaced, said, write_text
from fedtune.storage import checkpoint
from fedtune.tensors import Tensors, assign_, digest, read_file


def begin(folder: Path, state: ServerState, resting: Tensors, from_files: Collection[str]) -> None:
    """Keep what a run begins with; where an earlier start has kept it, give the module what it then was.

    Args:
        resting: what does not travel, live: in a continued run it becomes what it was.
        from_files: names among them that are identified by files, and so are not kept.

    Raises:
        UsageError: the module has other resting tensors, or others from files, than the run began with.
        RunError: the folder is damaged, or cannot be written.
    """
    digests = {name: digest({name: tensor}) for name, tensor in resting.items()}
    if checkpoint.latest(folder) is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = {name: tensor.contiguous().cpu() for name, tensor in resting.items() if name not in from_files}
            with replaced(folder / "resting.safetensors") as temporary:
                save_file(kept, temporary)
            write_text(folder / "resting.json", json.dumps(digests, indent=1) + "\n")
        except (OSError, SafetensorError) as error:
            raise RunError(f"{folder} could not be written ({error})") from error
        checkpoint.save(folder, state, keep=1)
        return
    before, kept = read(folder)
    strange = sorted(before.keys() ^ digests.keys())
    if strange:
        allowed = f"a module with the frozen parameters and counters that the run began with ({shown(strange)} differ)"
        raise UsageError("run_dir", str(folder.parent), allowed)
    for name in (name for name in digests if digests[name] != before[name]):
        if name not in kept:
            allowed = f"a module whose {name} is what the run began with; its content is another (were its files replaced?)"
            raise UsageError("run_dir", str(folder.parent), allowed)
        if (kept[name].shape, kept[name].dtype) != (resting[name].shape, resting[name].dtype):
            raise UsageError("run_dir", str(folder.parent), f"a module whose {name} has the shape {tuple(kept[name].shape)}")
        assign_({name: resting[name]}, kept)


def read(folder: Path) -> tuple[dict[str, str], Tensors]:
    """What does not travel: the digest of each tensor, and the tensors that are kept here.

    Raises:
        RunError: the folder is damaged.
    """
    try:
        before: dict[str, str] = read_object(folder / "resting.json")
        kept, _ = read_file(folder / "resting.safetensors")
    except (OSError, ValueError, RunError, SafetensorError) as error:
        raise RunError(f"{folder} cannot be read: {said(error)}; start again in a new run directory") from error
    for name, tensor in kept.items():
        if before.get(name) != digest({name: tensor}):
            raise RunError(
                f"{folder / 'resting.safetensors'}: {name} is not what was written; start again in a new run directory"
            )
    return before, kept
