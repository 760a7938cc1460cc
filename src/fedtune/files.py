"""Files that are whole or not there: a reader, or a power cut, finds the old content or the new one."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedtune.errors import RunError, shown


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Inside the block a path to write to; at its end what was written is on the disk and takes the place of `file`.

    An error leaves `file` as it was, and nothing beside it. Whatever writes it (safetensors makes files for their owner alone),
    its permissions are those of any new file: what the umask leaves.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed while writing
        temporary.touch(0o666)
        permissions = temporary.stat().st_mode & 0o777
        yield temporary
        temporary.chmod(permissions)
        synchronise(temporary)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    synchronise(file.parent)


def settled(folder: Path) -> None:
    """Give the files of a folder the permissions of new files, as `replaced`, and wait until all are on the disk."""
    probe = folder / f".{os.getpid()}.tmp"
    probe.touch(0o666)
    permissions = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.iterdir():
        file.chmod(permissions)
        synchronise(file)
    synchronise(folder)


def write_text(file: Path, text: str) -> None:
    """Replace a text file at once."""
    with replaced(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def synchronise(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_line(file: Path, record: dict[str, Any]) -> None:
    """Add a record to a JSON-lines file and wait until it is on the disk. It takes the place of a last line that a crash left
    unfinished."""
    new = not file.exists()
    with open(file, "ab+") as stream:
        end = stream.seek(0, os.SEEK_END)
        if end:
            stream.seek(end - 1)
            if stream.read(1) != b"\n":
                stream.truncate(file.read_bytes().rfind(b"\n") + 1)
        stream.write(json_line(record).encode())
        stream.flush()
        os.fsync(stream.fileno())
    if new:
        synchronise(file.parent)


def json_line(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON."""
    return json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """A value as JSON can say it: null for numbers that are not finite.

    >>> finite({"loss": [0.5, float("nan")]})
    {'loss': [0.5, None]}
    """
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line that a crash left unfinished does not count.

    Raises:
        RunError: another line is no JSON object, or the file cannot be read.
    """
    found = parsed_lines(file)
    for number, one in enumerate(found, start=1):
        if not isinstance(one, dict):
            raise RunError(f"{file}, line {number}: no record, which is a JSON object{no_object(one)}")
    return found


def parsed_lines(file: Path) -> list[Any]:
    """What the lines of a JSON-lines file say, `Unreadable` for one that is not JSON; without an unfinished last line.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        lines = file.read_bytes().split(b"\n") if file.exists() else []
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line.decode("utf-8")))
        except (ValueError, RecursionError):
            if number < len(lines):  # the last one has no end, so a crash came
                found.append(Unreadable(line.decode("utf-8", "replace")))
    return found


class Unreadable(str):
    """What stands in a file where JSON belongs."""


def no_object(found: object) -> str:
    """What stands where an object belongs, for the end of a message."""
    return f": {shown(str(found))}" if isinstance(found, Unreadable) else f", but {shown(found)}"


def read_object(file: Path) -> dict[str, Any]:
    """A file with one JSON object.

    Raises:
        RunError: it is something else, or cannot be read.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise RunError(f"{file} has no JSON object{no_object(found)}")
    return found


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    """Replace a JSON-lines file at once."""
    write_text(file, "".join(map(json_line, records)))
