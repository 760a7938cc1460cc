"""Files that are whole or not there: a reader, or a power cut, finds the old content or the new one.

A folder may be somebody else's: what is written never follows a link, and a FIFO, a socket or a device is never opened.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedtune.errors import RunError, shown

_KINDS = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
_KINDS |= {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link"}
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_TEMPORARY = re.compile(r"\.(.+\.)?[0-9]+\.tmp|\.tmp[A-Za-z0-9]{6}", re.ASCII | re.DOTALL)  # ours, safetensors'
_LONGEST = 200  # characters of what a file or the system says, in a message


def printable(value: object, most: int | None = None) -> str:
    """A value as text that no terminal takes for a command: on one line, without control characters, and cut where it is long.

    >>> printable("a\\x1b[31m\\n b")
    'a\ufffd[31m b'
    """
    text = _UNPRINTABLE.sub("\ufffd", " ".join(str(value).split()))
    return text if most is None or len(text) <= most else text[:most] + "…"


def said(error: BaseException) -> str:
    """What an error says, for a message: on one line, and cut."""
    return printable(error, _LONGEST) or type(error).__name__


def present(path: Path) -> bool:
    """Whether there is something at a path.

    Raises:
        RunError: that cannot be seen: there is no permission, or a link leads nowhere.
    """
    try:
        os.stat(path)
        return True
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.path.islink(path):
            raise RunError(f"{path} cannot be read: it is a link to something that is not there") from error
        return False
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from error


def regular(path: Path, follow: bool = True) -> None:
    """Nothing where a path is a file, or nothing yet.

    Args:
        follow: whether a link to a file is one.

    Raises:
        OSError: it is something else; it says what.
    """
    try:
        mode = (os.stat if follow else os.lstat)(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, where a file belongs", str(path))


def is_folder(path: Path) -> bool:
    """Whether there is a folder, or a link to one, at a path; not where there is nothing.

    Raises:
        RunError: it is something else, or cannot be seen.
    """
    if not present(path):
        return False
    mode = os.stat(path).st_mode
    if not stat.S_ISDIR(mode):
        raise RunError(f"{path} cannot be read: it is {_KINDS.get(stat.S_IFMT(mode), 'a file')}, where a folder belongs")
    return True


def entries(folder: Path) -> list[str]:
    """The names in a folder, in no order; none where it is not there. Raises `RunError` as `is_folder`."""
    try:
        return os.listdir(folder) if is_folder(folder) else []
    except OSError as error:
        raise RunError(f"{folder} cannot be read: {said(error)}") from error


@contextlib.contextmanager
def opened(file: Path, flags: int = os.O_RDONLY, mode: Any = "rb") -> Iterator[Any]:
    """Inside the block a file, open; what is no file is not waited for. For writing no link is followed.

    Raises:
        OSError: it cannot be opened, or is no file.
    """
    reads = flags & os.O_ACCMODE == os.O_RDONLY
    regular(file, follow=reads)
    handle = os.open(file, flags | os.O_NONBLOCK | os.O_CLOEXEC | (0 if reads else os.O_NOFOLLOW), 0o666)
    with os.fdopen(handle, mode) as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):  # it was changed since
            raise OSError(errno.EINVAL, "it is no file", str(file))
        yield stream


def content(file: Path) -> bytes:
    """What a file holds. Raises `OSError` where it cannot be read, or is no file."""
    with opened(file) as stream:
        return bytes(stream.read())


@contextlib.contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """Inside the block a path to write to; at its end what was written is on the disk and takes the place of `file`.

    An error leaves `file` as it was, and nothing beside it. Whatever writes it (safetensors makes files for their owner alone),
    its permissions are those of any new file: what the umask leaves. A link is replaced, and what it leads to stays as it is.

    Raises:
        OSError: it cannot be written, or something else than a file has this name.
    """
    if not file.is_symlink():
        regular(file)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed while writing
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        permissions = temporary.stat().st_mode & 0o777
        yield temporary
        temporary.chmod(permissions)
        synchronise(temporary)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):  # what is raised is what matters
            temporary.unlink(missing_ok=True)
        raise
    synchronise(file.parent)


def removed(path: Path) -> None:
    """Remove whatever has this name: a folder with all that is in it, a file, a link (not what it leads to), a FIFO.

    Raises:
        OSError: it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)  # which would open a FIFO, and wait
    else:
        path.unlink(missing_ok=True)


def clear(folder: Path) -> None:
    """Remove what processes that were killed in `replaced` have left in a folder in which nobody else writes now."""
    with contextlib.suppress(RunError, OSError):  # it is in nobody's way; what is wrong with the folder its reader says
        for name in filter(_TEMPORARY.fullmatch, entries(folder)):
            (folder / name).unlink()


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
    """Replace a text file at once; what is no Unicode (in the name of a file) is "?"."""
    with replaced(file) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))


def free_name(path: Path, why: str) -> Path:
    """The first path of the name, `why` and a number at which there is nothing."""
    number = 1
    while os.path.lexists(place := path.with_name(f"{path.name}.{why}-{number}")):
        number += 1
    return place


def put_aside(path: Path, why: str) -> Path:
    """Rename what is damaged, to the path that is returned, so that a new one can take its place. Raises `OSError`."""
    place = free_name(path, why)
    os.rename(path, place)
    return place


def synchronise(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_line(file: Path, record: dict[str, Any]) -> None:
    """Add a record to a JSON-lines file and wait until it is on the disk. It takes the place of a last line that a crash left
    unfinished. A link is not followed."""
    new = not os.path.lexists(file)
    with opened(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, "ab+") as stream:
        end = stream.seek(0, os.SEEK_END)
        if end:
            stream.seek(end - 1)
            if stream.read(1) != b"\n":
                stream.seek(0)
                stream.truncate(stream.read().rfind(b"\n") + 1)
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
        lines = content(file).split(b"\n") if present(file) else []
    except OSError as error:
        raise RunError(f"{file} cannot be read: {said(error)}") from error
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
        found = json.loads(content(file))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{file} cannot be read: {said(error)}") from error
    if not isinstance(found, dict):
        raise RunError(f"{file} has no JSON object{no_object(found)}")
    return found


def write_lines(file: Path, records: list[dict[str, Any]]) -> None:
    """Replace a JSON-lines file at once."""
    write_text(file, "".join(map(json_line, records)))
