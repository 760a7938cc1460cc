"""Checkpoints that are either whole or not there: safetensors and JSON, no pickle.

    checkpoints/round-0003/weights.safetensors     the server's weights
                           memory.safetensors      only where something outlives its round: momentum, an optimizer
                           state.json              counters, the sha256 of each file, and its own

A checkpoint is written under another name, synchronised to the disk and then renamed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedtune.errors import RunError
from fedtune.federated.messages import Position
from fedtune.federated.state import ServerState
from fedtune.files import content, opened, present, replaced, said, synchronise, write_text
from fedtune.storage import checks
from fedtune.tensors import Tensors, joined, parted

_NAME = re.compile(r"round-[0-9]{4,}", re.ASCII)


def save(folder: Path, state: ServerState, keep: int) -> Path:
    """Write `folder`/round-NNNN and drop all but the newest `keep` checkpoints.

    Raises:
        RunError: the disk is full or the folder cannot be written; earlier checkpoints are as they were.
    """
    path = folder / _name(state.round)
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".round-*.tmp"):  # of a process that was killed while writing
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        _write(temporary, state)
        if os.path.lexists(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        os.replace(temporary, path)
        synchronise(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(
            f"round {state.round}: its checkpoint could not be written to {folder} ({error}); the one before is intact"
        ) from error
    for old in _numbered(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


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
            warnings.warn(f"DAMAGED CHECKPOINT, the one before is used instead: {error}", stacklevel=2)
    if found:
        raise RunError(f"every checkpoint of {folder} is damaged; start again in a new run directory")
    return None


def load(path: Path) -> ServerState:
    """Read one checkpoint.

    Raises:
        RunError: a file is missing, unreadable or not the one that was written, or it is a checkpoint of another round.
    """
    try:
        notes = json.loads(content(path / "state.json"))
        if not isinstance(notes, dict) or notes.pop("check", None) != _check(notes):
            raise RunError(f"{path / 'state.json'} is not the one that was written")
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
            tensors[name] = load_file(file)
        memory = {step: parted(groups) for step, groups in parted(tensors["memory"]).items()}
        position = Position(notes["steps"], notes["epochs"])
        return ServerState(notes["round"], tensors["weights"], position, notes["examples"], memory)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {type(error).__name__}: {said(error)}") from error


def rounds(folder: Path) -> list[int]:
    """The rounds whose checkpoints a folder has, oldest first."""
    return [int(path.name.partition("-")[2]) for path in _numbered(folder)]


def _write(folder: Path, state: ServerState) -> None:
    hashes: dict[str, str] = {}
    memory = joined({step: joined(groups) for step, groups in state.memory.items()})
    for name, tensors in (("weights", state.weights), ("memory", memory)):
        if tensors:
            file = folder / f"{name}.safetensors"
            with replaced(file) as temporary:
                save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, temporary)
            hashes[name] = _sha256(file)
    notes = {"round": state.round, "examples": state.examples, **dataclasses.asdict(state.position), "sha256": hashes}
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
    try:
        names = os.listdir(folder) if present(folder) else []
    except OSError as error:
        raise RunError(f"{folder} cannot be read: {said(error)}") from error
    found = [folder / name for name in names if _NAME.fullmatch(name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _sha256(file: Path) -> str:
    with opened(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
