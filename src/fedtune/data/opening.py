"""Files of texts: what kind they are by their ending, and their lines, decompressed, decoded and counted."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fedtune.errors import UsageError
from fedtune.files import regular, said

KINDS = {"csv": "CSV", "jsonl": "JSON lines", "parquet": "Parquet"}
_ENDINGS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
_FAULTS = (OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, NotImplementedError, RuntimeError)
_UNREAD = re.compile("[\udc80-\udcff]")  # how a byte that is not in the encoding is kept until its line is known


@dataclass(frozen=True)
class Source:
    """A file, and what it is.

    Args:
        argument: the option that names the file, for errors.
        path: the file.
        kind: "csv", "jsonl" or "parquet".
        tabs: whether its ending says that fields are separated by tabs.
    """

    argument: str
    path: Path
    kind: str
    tabs: bool = False

    def error(self, allowed: str) -> UsageError:
        """The error about this file."""
        return UsageError(self.argument, str(self.path), allowed)


def source_of(argument: str, path: Any, kind: str | None = None) -> Source:
    """Say of a file what it is, without reading it.

    Args:
        argument: the option that names the file.
        path: the file.
        kind: what it is, whatever its ending says.

    Raises:
        UsageError: no file has that name, or its ending says nothing.
    """
    if not isinstance(path, (str, Path)) or not str(path).strip() or "\0" in str(path):
        raise UsageError(argument, path, "the name of a file")
    file = Path(path)
    fault = _no_file(file)
    endings = [ending.lower() for ending in file.suffixes]
    tabs = False
    if endings and endings[-1] == ".zip":
        known = kind or (len(endings) > 1 and _ENDINGS.get(endings[-2]))
        inside = "" if fault else _inside(argument, file, bool(known))
        tabs = inside == ".tsv"
        endings = endings[:-1] if known else [inside]
    elif endings and endings[-1] in _UNPACKED:
        endings.pop()
    found = _ENDINGS.get(endings[-1]) if endings else None
    if kind is None and found is None:
        allowed = f"a file whose name ends in {', '.join(_ENDINGS)}, and after it perhaps {', '.join(_UNPACKED)} or .zip; "
        raise UsageError(argument, str(file), f"{allowed}or name the format ({', '.join(KINDS)})")
    source = Source(argument, file, kind or found or "", tabs or (bool(endings) and endings[-1] == ".tsv"))
    if fault:
        raise source.error(f"a readable {KINDS[source.kind]} file ({fault})")
    return source


def _no_file(path: Path) -> str:
    """Why nothing can be read at a path; empty where a file is."""
    try:
        path.stat()
        regular(path)
    except FileNotFoundError:
        return "there is none"
    except (OSError, ValueError) as error:
        return (error.strerror if isinstance(error, OSError) else "") or said(error)
    return ""


def named_like_data(path: Path) -> bool:
    """Whether the ending of a file says that it is one of those that are read."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in (*_UNPACKED, ".zip"):
        endings.pop()
    return bool(endings) and endings[-1] in _ENDINGS


@contextlib.contextmanager
def opened(source: Source) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed.

    Raises:
        UsageError: the file is damaged, or a zip archive of more than one file.
    """
    ending = source.path.suffix.lower()
    with contextlib.ExitStack() as stack, readable(source):
        if ending == ".zip":
            archive = stack.enter_context(zipfile.ZipFile(source.path))
            yield stack.enter_context(archive.open(_member(source.argument, source.path)))
        else:
            file = stack.enter_context(open(source.path, "rb"))
            yield stack.enter_context(_UNPACKED[ending](file)) if ending in _UNPACKED else file


@contextlib.contextmanager
def readable(source: Source) -> Iterator[None]:
    """Turn what the system and the decompressors say of a file into one line."""
    try:
        yield
    except _FAULTS as error:
        raise source.error(f"a readable {KINDS[source.kind]} file, whole and not damaged ({said(error)})") from error


class _Streams(io.RawIOBase):
    """What a compressed file holds: all its streams, one after the other, and zeros behind them.

    The readers of the standard library take what is no stream, behind the first one, for the end of the file.

    Args:
        file: the bytes.
        new: makes what decompresses a stream.

    Raises:
        OSError, EOFError, lzma.LZMAError: while it is read: a stream is damaged, or ends too early.
    """

    def __init__(self, file: IO[bytes], new: Callable[[], Any]) -> None:
        self._file, self._new = file, new
        self._stream = new()

    def readable(self) -> bool:
        """It can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, or a part of it; the number of its bytes that are new, 0 at the end."""
        found = b""
        while not found:
            if self._stream.eof:
                given = self._stream.unused_data.lstrip(b"\0")
                while not given and (piece := self._file.read(io.DEFAULT_BUFFER_SIZE)):
                    given = piece.lstrip(b"\0")
                if not given:
                    return 0
                self._stream = self._new()
            else:
                given = self._file.read(io.DEFAULT_BUFFER_SIZE) if self._stream.needs_input else b""
                if self._stream.needs_input and not given:
                    raise EOFError("it ends before its end was marked")
            found = self._stream.decompress(given, len(buffer))
        buffer[: len(found)] = found
        return len(found)


_UNPACKED: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": lambda file: io.BufferedReader(_Streams(file, bz2.BZ2Decompressor)),
    ".xz": lambda file: io.BufferedReader(_Streams(file, lzma.LZMADecompressor)),
}


class Lines:
    """The physical lines of a file of text, with their ends.

    Args:
        source: the file, for errors.
        file: its bytes.
        encoding: of the text; a byte order mark of UTF-8 is dropped.

    Lines of blanks at the end are left out, and the 0x1A that DOS ends files with. `number` is the number of the last line,
    from 1; `of_row` are the lines since it was last emptied, those of a row.

    Raises:
        UsageError: a line holds a NUL, or a byte that is not in the encoding.
    """

    def __init__(self, source: Source, file: IO[bytes], encoding: str) -> None:
        named = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
        self._file = io.TextIOWrapper(file, encoding=named, errors="surrogateescape", newline="")
        self._lines = _without_end(self._file)
        self._source, self._encoding = source, encoding.upper()
        self.number = 0
        self.of_row: list[str] = []

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        try:
            line = next(self._lines)
        except UnicodeError as error:  # of UTF-16 and its like, which have more to refuse than a byte
            raise self._unread(f"after line {self.number}") from error
        self.number += 1
        if "\0" in line:
            raise self._source.error(f"a file of text (line {self.number} holds a NUL byte; UTF-16 needs its encoding named)")
        if not line.isascii() and _UNREAD.search(line):
            raise self._unread(f"line {self.number}")
        self.of_row.append(line)
        return line

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _unread(self, place: str) -> UsageError:
        return self._source.error(f"a file in {self._encoding}, or with its encoding named ({place} is not in it)")


def _without_end(lines: Iterable[str]) -> Iterator[str]:
    """The lines without blank ones at the end, and without the mark of the end that DOS writes."""
    blank: list[str] = []
    for line in lines:
        if line[0] in " \x1a\r\n" and not line.strip(" \x1a\r\n"):
            blank.append(line)
            continue
        yield from blank
        blank.clear()
        yield line.rstrip("\x1a") if line[-1] == "\x1a" else line


def _inside(argument: str, path: Path, known: bool) -> str:
    """The ending of the file in a zip archive; of a damaged one none, where it is known what it should be."""
    try:
        return Path(_member(argument, path)).suffix.lower()
    except UsageError:
        if not known:
            raise
        return ""  # `opened` meets it again and says so


def _member(argument: str, path: Path) -> str:
    """The name of the only file in a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        names = [name for name in names if not _of_finder(name)]
    except _FAULTS as error:
        raise UsageError(argument, str(path), f"a zip archive that can be read ({said(error)})") from error
    if len(names) != 1:
        raise UsageError(argument, str(path), f"a zip archive of one file (in this there are {len(names)})")
    return names[0]


def _of_finder(name: str) -> bool:
    """Whether a file of a zip archive is one that macOS adds."""
    own = name.rsplit("/", 1)[-1]
    return name.startswith("__MACOSX/") or own == ".DS_Store" or own.startswith("._")
