"""Checkpoints that are either whole or not there: safetensors and JSON, no pickle.

    checkpoints/round-0003/weights.safetensors     the server's weights
                           memory.safetensors      only where something outlives its round: momentum, an optimizer
                           state.json              counters, the sha256 of each file, and its own; which round each client
                                                   remembers

A checkpoint is written under another name, synchronised to the disk and then renamed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from fedtune.errors import RunError, warn
from fedtune.federated.messages import Position
from fedtune.federated.state import ServerState
from fedtune.files import content, entries, opened, present, removed, replaced, said, synchronise, write_text
from fedtune.storage import checks
from fedtune.tensors import Tensors, joined, parted, read_file

_NAME = re.compile(r"round-[0-9]{4,}", re.ASCII)
_TEMPORARY = ".round-*.tmp"


def save(folder: Path, state: ServerState, keep: int) -> Path:
    """Write `folder`/round-NNNN and drop all but the newest `keep` checkpoints.

    Raises:
        RunError: the disk is full or the folder cannot be written; earlier checkpoints are as they were.
    """
    with saving(folder, state, keep):
        pass
    return folder / _name(state.round)


@contextlib.contextmanager
def saving(folder: Path, state: ServerState, keep: int, clients: Mapping[int, int] | None = None) -> Iterator[None]:
    """As `save`; inside the block the checkpoint is on the disk under another name, at its end it gets its own and counts.

    Args:
        clients: client -> the last round of which it has kept something, where that is known.
    """
    path = folder / _name(state.round)
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        with _reported(folder, state.round):
            new = not present(folder)
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(_TEMPORARY):  # of a process that was killed while writing
                _gone(leftover)
            temporary.mkdir()
            _write(temporary, state, clients)
            for changed in [folder, folder.parent] if new else [folder]:
                synchronise(changed)
        yield
        with _reported(folder, state.round):
            removed(path)
            os.replace(temporary, path)
            synchronise(folder)
    except BaseException:
        _gone(temporary)
        raise
    drop(folder, state.round, keep)


def _gone(path: Path) -> None:
    with contextlib.suppress(OSError):  # it is in nobody's way
        removed(path)


@contextlib.contextmanager
def _reported(folder: Path, round: int) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"round {round}: its checkpoint could not be written to {folder} ({error}); the one before is intact"
        ) from error


def drop(folder: Path, round: int, keep: int) -> None:
    """Drop all but the newest `keep` of the checkpoints up to a round."""
    numbered = _numbered(folder)
    known = [path for path in numbered if _round(path) <= round]
    for old in known[:-keep]:
        _gone(old)


def begun(folder: Path) -> bool:
    """Whether a checkpoint was begun in a folder: there is one, or the beginning of one."""
    return any(_NAME.fullmatch(name) or fnmatch.fnmatch(name, _TEMPORARY) for name in entries(folder))


def latest(folder: Path) -> ServerState | None:
    """The newest checkpoint that is undamaged, or None. A damaged one is named in a warning, loudly.

    Raises:
        RunError: there are checkpoints, but all are damaged.
    """
    found = _numbered(folder)
    for path in reversed(found):
        try:
            return load(path)
        except RunError as error:
            warn(f"DAMAGED CHECKPOINT, the one before is used instead: {error}")
    if found:
        raise RunError(f"every checkpoint of {folder} is damaged; start again in a new run directory")
    return None


def load(path: Path) -> ServerState:
    """Read one checkpoint.

    Raises:
        RunError: a file is missing, unreadable or not the one that was written, or it is a checkpoint of another round.
    """
    try:
        notes = _noted(path)
        checks.checked(notes, dict.fromkeys(("round", "steps", "epochs", "examples"), checks.count))
        if not {"weights"} <= notes["sha256"].keys() <= {"weights", "memory"}:
            raise RunError(f"{path / 'state.json'} names other files than the weights and the memory")
        if path.name != _name(notes["round"]):
            raise RunError(f"{path} holds the checkpoint of round {notes['round']}")
        tensors: dict[str, Tensors] = {"memory": {}}
        for name, expected in notes["sha256"].items():
            file = path / f"{name}.safetensors"
            found = _sha256(file)
            if found != expected:
                raise RunError(f"{file} has sha256 {found[:12]}…, {expected[:12]}… was written")
            tensors[name], _ = read_file(file)
        memory = {step: parted(groups) for step, groups in parted(tensors["memory"]).items()}
        position = Position(notes["steps"], notes["epochs"])
        return ServerState(notes["round"], tensors["weights"], position, notes["examples"], memory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {type(error).__name__}: {said(error)}") from error


def clients(folder: Path, round: int) -> dict[int, int] | None:
    """Client -> the last round of which it has kept something; None where the checkpoint of the round doesn't say so.

    Raises:
        RunError: it cannot be read.
    """
    path = folder / _name(round)
    try:
        by_round = _noted(path).get("clients")
        return None if by_round is None else {int(client): int(round) for round, those in by_round.items() for client in those}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} cannot be read: {type(error).__name__}: {said(error)}") from error


def _noted(path: Path) -> dict[str, Any]:
    notes = json.loads(content(path / "state.json"))
    if not isinstance(notes, dict) or notes.pop("check", None) != _check(notes):
        raise RunError(f"{path / 'state.json'} is not the one that was written")
    return notes


def rounds(folder: Path) -> list[int]:
    """The rounds whose checkpoints a folder has, oldest first."""
    return [_round(path) for path in _numbered(folder)]


def _write(folder: Path, state: ServerState, clients: Mapping[int, int] | None) -> None:
    hashes: dict[str, str] = {}
    memory = joined({step: joined(groups) for step, groups in state.memory.items()})
    for name, tensors in (("weights", state.weights), ("memory", memory)):
        if tensors:
            file = folder / f"{name}.safetensors"
            with replaced(file) as temporary:
                save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, temporary)
            hashes[name] = _sha256(file)
    notes = {"round": state.round, "examples": state.examples, **dataclasses.asdict(state.position), "sha256": hashes}
    if clients is not None:
        by_round: dict[str, list[int]] = {}
        for client in sorted(clients):
            by_round.setdefault(str(clients[client]), []).append(client)
        notes["clients"] = by_round
    write_text(folder / "state.json", json.dumps(notes | {"check": _check(notes)}, indent=1) + "\n")
    synchronise(folder)


def _name(round: int) -> str:
    return f"round-{round:04d}"


def _check(notes: dict[str, Any]) -> str:
    """What names the content of state.json."""
    return hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()


def _numbered(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first; what else lies there (a copy, another name) is none.

    Raises:
        RunError: the folder cannot be seen.
    """
    found = [folder / name for name in entries(folder) if _NAME.fullmatch(name)]
    return sorted(found, key=_round)


def _round(path: Path) -> int:
    return int(path.name.partition("-")[2])


def _sha256(file: Path) -> str:
    with opened(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
