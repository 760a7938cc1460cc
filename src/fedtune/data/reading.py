"""Columns of a CSV, JSON lines or Parquet file: every row or none, and where each row stands in the file."""

from __future__ import annotations

import contextlib
import io
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedtune.data.formats import Columns, Format, Table, check_columns, check_names
from fedtune.data.opening import Lines, Source, opened, source_of
from fedtune.data.parts import SplitChoice, by_column
from fedtune.data.rows import Rows, check_header, check_swallowed
from fedtune.data.values import check_schema
from fedtune.errors import UsageError
from fedtune.files import said

_NEEDED = ("text", "label", "second_text", "split", "prompt", "answer", "messages")  # a row without an author is possible

_PART_OF = {"path": "train", "validation_path": "validation", "test_path": "test"}


@contextlib.contextmanager
def _content(source: Source, how: Format) -> Iterator[Any]:
    """The lines of a file, or its bytes where it has none."""
    with opened(source) as file:
        if source.kind == "parquet":
            yield file
        else:
            with contextlib.closing(Lines(source, file, how.encoding)) as lines:
                yield lines


def peek(source: Source, wanted: Columns, how: Format) -> None:
    """Check what costs nothing to check: the options, and whether the columns are there."""
    how.check(source)
    with _content(source, how) as file:
        if source.kind == "csv":
            Rows(source, file, how, wanted)
        elif source.kind == "jsonl":
            _, first = next(_objects(source, file), (0, {}))
            if first:
                check_columns(source.path, {role: name for role, name in wanted.items() if role in _NEEDED}, list(first))
        else:
            _parquet(source, file, wanted)


def columns_of(source: Source, how: Format) -> list[str]:
    """The names of the columns of a file; of JSON lines, those of its first object.

    Raises:
        UsageError: it has none: a CSV file without a header; and as `peek`.
    """
    how.check(source)
    with _content(source, how) as file:
        if source.kind == "csv":
            rows = Rows(source, file, how, {})
            if rows.names is None:
                raise source.error("a file with a header, or with its columns named by number (prompt: 0, answer: 1)")
            return rows.names
        if source.kind == "jsonl":
            return [str(name) for name in next(_objects(source, file), (0, {}))[1]]
        return list(_parquet(source, file, {}).schema_arrow.names)


def read(source: Source, wanted: Columns, how: Format) -> Table:
    """The wanted columns of a file.

    Raises:
        UsageError: the file is damaged or not what it is said to be; a row that is not like the others, by its line.
    """
    reader = {"csv": _read_csv, "jsonl": _read_jsonl, "parquet": _read_parquet}[source.kind]
    with _content(source, how) as file:
        columns, lines = reader(source, file, wanted, how)
    if not len(next(iter(columns.values()))):
        raise source.error("a file with at least one row of data (there is none)")

    def place(row: int) -> str:
        return f"row {row + 1} of {source.path}" + (f", line {lines[row]}," if lines is not None else "")

    return Table(columns, wanted, place)


def _read_csv(source: Source, file: Any, wanted: Columns, how: Format) -> tuple[dict[str, list[Any]], Sequence[int]]:
    rows = Rows(source, file, how, wanted)
    columns: dict[str, list[Any]] = {role: [] for role in wanted}
    starts = array("q")
    suspects: list[tuple[int, list[str]]] = []
    classes = {"text", "label"} <= columns.keys()  # texts of several lines, as answers are, look like none
    takers = [(columns[role].append, place) for role, place in rows.places.items()]
    for row in rows:
        for take, place in takers:
            take(row[place])
        starts.append(rows.start)
        would_be = rows.would_be_labels() if classes else []
        if would_be:
            suspects.append((rows.start, would_be))
    if not rows.quoted and classes:
        check_swallowed(source, suspects, set(columns["label"]))
    if len(starts) and classes:
        check_header(source, rows, columns, starts)
    return columns, starts


def _read_jsonl(source: Source, file: Any, wanted: Columns, how: Format) -> tuple[dict[str, list[Any]], Sequence[int]]:
    columns: dict[str, list[Any]] = {role: [] for role in wanted}
    numbers = array("q")
    present: dict[str, None] = {}
    for number, found in _objects(source, file):
        present |= dict.fromkeys(found)
        numbers.append(number)
        for role, name in wanted.items():
            columns[role].append(found.get(name))
    if len(numbers):
        check_columns(source.path, wanted, list(present))
    return columns, numbers


def _objects(source: Source, lines: Lines) -> Iterator[tuple[int, dict[Any, Any]]]:
    """Objects of a JSON lines file and their lines."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a name is there twice")
        return dict(pairs)

    def whole(digits: str) -> int | float:
        try:
            return int(digits)
        except ValueError:  # more digits than Python takes: no label and no author, and elsewhere nobody minds
            return math.inf

    for line in lines:
        lines.of_row.clear()
        if not line.strip():
            continue
        try:
            found = json.loads(line, object_pairs_hook=once, parse_int=whole)
        except (ValueError, RecursionError) as error:
            if line.lstrip().startswith("["):
                raise _array(source, lines.number) from error
            raise source.error(f"one JSON object in each line (line {lines.number}: {error})") from error
        if isinstance(found, list):
            raise _array(source, lines.number)
        if not isinstance(found, dict):
            raise source.error(f"one JSON object in each line (line {lines.number} is a {type(found).__name__})")
        yield lines.number, found


def _array(source: Source, number: int) -> UsageError:
    return source.error(f"one JSON object in each line (line {number} begins an array; one object a line is wanted)")


def _parquet(source: Source, file: Any, wanted: Columns) -> Any:
    """The file, opened, its columns and their types checked."""
    with _arrow(source) as parquet:
        content = file if source.path.suffix.lower() == ".parquet" else io.BytesIO(file.read())
        found = parquet.ParquetFile(content, page_checksum_verification=True)
        schema = found.schema_arrow
    check_columns(source.path, wanted, schema.names)
    check_schema(schema, wanted, str(source.path))
    return found


def _read_parquet(source: Source, file: Any, wanted: Columns, how: Format) -> tuple[dict[str, list[Any]], None]:
    found = _parquet(source, file, wanted)
    with _arrow(source):
        table = found.read(columns=sorted({str(name) for name in wanted.values()}))
        return {role: table.column(name).to_pylist() for role, name in wanted.items()}, None


@contextlib.contextmanager
def _arrow(source: Source) -> Iterator[Any]:
    """The reader of Parquet files; what it says of a file, as one line."""
    try:
        import pyarrow  # type: ignore[import-untyped] # it has no types
        from pyarrow import parquet
    except ImportError as error:
        raise source.error("after: pip install pyarrow (the package that reads Parquet is not installed)") from error
    try:
        yield parquet
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise source.error(f"a readable Parquet file ({said(error)})") from error


def read_files(files: Mapping[str, str | Path], wanted: Columns, how: Format, choice: SplitChoice) -> dict[str, Table]:
    """The parts of a task from a file for each, or from one file by its column `split`; options are checked first."""
    check_names(wanted)
    choice.check()
    if "split" not in wanted and choice != SplitChoice():
        raise UsageError("split", None, "the column that has the names of train_split, validation_split and test_split")
    if "split" in wanted and len(files) > 1:
        raise UsageError("split", wanted["split"], "a column of a single file, without validation_path and test_path")
    sources = {argument: source_of(argument, file, how.kind) for argument, file in files.items()}
    for argument, source in sources.items():
        if argument != "path" and source.path.samefile(sources["path"].path):
            raise source.error("another file than path")
        peek(source, wanted, how)
    if "split" in wanted:
        return by_column(read(sources["path"], wanted, how), choice, str(files["path"]))
    tables = {_PART_OF[argument]: read(source, wanted, how) for argument, source in sources.items()}
    for argument in set(files) - {"path"}:
        part, hint = _PART_OF[argument], f"or leave {argument} out: the part is then cut from the training texts"
        tables[part] = replace(tables[part], option=(argument, str(files[argument])), others=hint)
    return tables
