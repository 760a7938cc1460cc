"""Where runs are below a folder, which may be anybody's: links are followed once, and what cannot be read is named."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedtune.errors import RunError, shown
from fedtune.files import present, printable, read_object
from fedtune.storage.summary import MODES

_OF_A_RUN = {"config.yaml", "rounds.jsonl", "status.json"}
_WITHIN = {"checkpoints", "clients", "start", "wandb"}  # folders of a run that have no runs in them
_DEPTH = 3  # levels below a link to a folder of runs


def directories(folder: Path, damaged: dict[str, str] | None = None) -> Iterator[tuple[str, Path]]:
    """The name and path of each directory below a folder, and of the folder itself; each once, whatever links lead to it.

    Args:
        damaged: name -> reason, of those that cannot be read; without it that is an error.

    Raises:
        RunError: a directory cannot be read, where `damaged` is not given.
    """
    seen: set[tuple[int, int]] = set()
    queue: list[tuple[Path, int | None]] = [(folder, None)] if os.path.isdir(folder) else []  # a name may be too long to ask
    links: list[tuple[Path, int | None]] = []  # after all the others, so that a run has its own name
    while queue or links:
        path, depth = queue.pop() if queue else links.pop(0)
        name = str(path.relative_to(folder))
        with left_out(name, damaged):
            try:
                found = os.stat(path)
                with os.scandir(path) as entries:
                    inside = sorted(entries, key=lambda entry: entry.name, reverse=True)  # the last one is taken first
            except OSError as error:
                raise RunError(f"{path} cannot be read: {error.strerror}") from error
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            yield name, path
            of_a_run = not _OF_A_RUN.isdisjoint(entry.name for entry in inside)
            below = None if depth is None else depth - 1
            for entry in inside:
                if entry.is_dir(follow_symlinks=False):
                    if below != 0 and not (of_a_run and entry.name in _WITHIN):
                        queue.append((path / entry.name, below))
                elif not of_a_run:
                    with left_out(str((path / entry.name).relative_to(folder)), damaged):
                        links += _followed(path / entry.name)


def _followed(path: Path) -> list[tuple[Path, int | None]]:
    """A link to a run, or to a folder of runs; nothing where it is a file, or leads to another place.

    Raises:
        RunError: it leads nowhere, or is neither a file nor a folder.
    """
    if not present(path) or path.is_file():
        return []
    if not path.is_dir():
        raise RunError(f"{path} is neither a file nor a directory")
    try:
        if _is_run(path):
            return [(path, None)]
        return [(path, _DEPTH)] if any(_is_run(path / name) for name in os.listdir(path)) else []
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error


def _is_run(path: Path) -> bool:
    return any(os.path.lexists(path / name) for name in _OF_A_RUN)


def has_rounds(path: Path) -> bool:
    """Whether a folder is that of a run, or of a baseline, with files that a report could write over."""
    return any(os.path.lexists(path / name) for name in ("config.yaml", "rounds.jsonl"))


@contextlib.contextmanager
def left_out(name: str, damaged: dict[str, str] | None) -> Iterator[None]:
    """Inside the block what is damaged is noted, and left out; without a place for notes it is an error."""
    try:
        yield
    except RunError as error:
        if damaged is None:
            raise
        damaged.setdefault(name, printable(error))


def failures(folder: str | Path, damaged: dict[str, str] | None = None) -> dict[str, str]:
    """Directory -> reason, of the runs that a sweep recorded as failed.

    Args:
        folder, damaged: as in `read_runs`.

    Raises:
        RunError: a record of a sweep is damaged, where `damaged` is not given.
    """
    found = {}
    for name, path in directories(Path(folder), damaged):
        with left_out(name, damaged):
            status = read_object(path / "status.json") if present(path / "status.json") else {}
            if status.get("state") == "failed":
                found[name] = str(status.get("error"))
    return found


def check(file: Path, config: Mapping[str, Any]) -> None:
    """Raise `RunError` where a configuration, as dotted names, says something that no run has."""
    mode, examples = config.get("loop.mode", "max"), config.get("baseline.examples")
    rounds = config.get("loop.max_rounds") if examples is None else 0
    wrong = {
        "loop.mode": None if isinstance(mode, str) and mode in MODES else mode,
        "loop.max_rounds": None if rounds is None or type(rounds) is int else rounds,
        "baseline.examples": None if examples is None or isinstance(examples, list) else examples,
    }
    for key, value in wrong.items():
        if value is not None:
            raise RunError(f"{file}: {key} is {shown(value)}, which no run has")
