"""Data sets of the Hugging Face hub, and folders in its format, as tables."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedtune.data.formats import Columns, Format, Table, check_columns, check_names
from fedtune.data.opening import named_like_data, source_of
from fedtune.data.parts import SplitChoice, with_hints
from fedtune.data.reading import peek, read
from fedtune.data.values import check_schema
from fedtune.errors import UsageError, warn
from fedtune.files import printable, said

_NO_FORM = {"name", "version", "description", "data_dir", "data_files", "sep", "delimiter", "features"}  # of a CSV file
_NOTES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")  # about data, not data
_MANY = 10  # names of files in a message
_PLAIN = (".csv", ".tsv", ".txt", ".gz", ".bz2", ".xz")  # `datasets` opens others, for example archives


def read_hub(path: str, config: str | None, wanted: Columns, choice: SplitChoice) -> dict[str, Table]:
    """The parts of a data set. What is known of it beforehand is checked before anything is read in full.

    CSV files of a local folder are read as `TextTask.from_csv` reads them, so that every value is what stands in the file.

    Args:
        path: hub name or folder.
        config: the configuration, where there are several.
        wanted: role -> column.
        choice: which split is which part.

    Raises:
        UsageError: no such data set, split or column; a column of a wrong type.
    """
    if not isinstance(path, str) or not path.strip():
        raise UsageError("path", path, "a data set of the hub or a local folder")
    for role, name in wanted.items():
        if not isinstance(name, str):
            raise UsageError(role, name, "the name of a column")
    check_names(wanted)
    choice.check()
    builder = _builder(path, config)
    if builder is not None and config is None:
        _say_what_is_left_out(Path(path), builder)
    files = _local_csv(builder) if builder is not None else None
    if files is not None:
        found = choice.of(list(files), path)
        tables = _read_files(files, found, wanted, builder.config.sep)
        if not builder.info.features:  # else its columns have types, which `datasets` gives them
            return with_hints(tables, found, list(files))
    if builder is not None:
        _check_beforehand(path, builder, wanted, choice)
    loaded = load(path, config)
    found = choice.of(list(loaded), path)
    for split in found.values():
        check_split(path, split, loaded[split], wanted)
    tables = {part: table_of(path, split, loaded[split], wanted) for part, split in found.items()}
    return with_hints(tables, found, list(loaded))


def columns_of_hub(path: str, config: str | None, choice: SplitChoice) -> list[str]:
    """The names of the columns of a data set's training split.

    Raises:
        UsageError: no such data set or split.
    """
    if not isinstance(path, str) or not path.strip():
        raise UsageError("path", path, "a data set of the hub or a local folder")
    choice.check()
    builder = _builder(path, config)
    if builder is not None and builder.info.features:
        return list(builder.info.features)
    loaded = load(path, config)
    return list(loaded[choice.of(list(loaded), path)["train"]].column_names)


def _check_beforehand(path: str, builder: Any, wanted: Columns, choice: SplitChoice) -> None:
    """Check splits and columns as far as they are known before the data set is read, or downloaded."""
    if builder.info.splits:
        choice.of(list(builder.info.splits), path)
    if builder.info.features:
        check_columns(path, wanted, list(builder.info.features))
        check_schema(builder.info.features.arrow_schema, wanted, path)
    elif builder.name == "parquet":
        files = {str(split): Path(str(found[0])) for split, found in (builder.config.data_files or {}).items() if found}
        for split in choice.of(list(files), path).values() if files else ():
            if files[split].is_file():
                peek(source_of("path", files[split], "parquet"), wanted, Format())


def load(path: str, config: str | None = None) -> Any:
    """The data set, with all its splits.

    Raises:
        UsageError: it cannot be had: no such data set or configuration, no network, damaged files, no package `datasets`.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError("task", path, "after: pip install datasets (the package is not installed)") from error
    try:
        with _quiet():
            return datasets.load_dataset(path, config)
    except Exception as error:  # whatever it is: of a reader of YAML, of archives, of one of many file systems
        why = said(error.__cause__ or error)
        raise UsageError("task", path, f"a data set of the hub or a local folder ({why})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that `datasets` logs beside its errors, which say the same."""
    import datasets

    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)


def check_split(path: str, split: str, rows: Any, wanted: Columns) -> None:
    """Raise `UsageError` where a split lacks a column, or one holds what cannot be a text, a label, an author."""
    check_columns(f"{path}, split {split}", wanted, rows.column_names)
    check_schema(rows.features.arrow_schema, wanted, f"split {split} of {path}")


def table_of(path: str, split: str, rows: Any, wanted: Columns) -> Table:
    """The columns of one split."""
    columns = {role: list(rows[name]) for role, name in wanted.items()}
    kinds = {role: rows.features[name] for role, name in wanted.items()}
    names = {role: [str(name) for name in kind.names] for role, kind in kinds.items() if hasattr(kind, "names")}
    if not len(rows):
        raise UsageError("task", path, f"a data set without empty splits (split {split} is)")
    return Table(columns, wanted, lambda row: f"row {row + 1} of split {split} of {path}", names=names)


def _builder(path: str, config: str | None) -> Any:
    """What is known of the data set before it is read; None where nothing is: `load` then says why."""
    try:
        import datasets

        with _quiet():
            return datasets.load_dataset_builder(path, config)
    except Exception:  # whatever it is, loading meets it again and says so
        return None


def _say_what_is_left_out(folder: Path, builder: Any) -> None:
    """Warn of files of a local folder that `datasets` leaves out for others, unless the folder's card says which it has."""
    if not folder.is_dir() or (folder / "README.md").exists():
        return
    used = {Path(str(file)).resolve() for found in (builder.config.data_files or {}).values() for file in found}
    others = []
    for file in sorted(folder.rglob("*")):
        own = file.relative_to(folder)
        hidden = any(part.startswith((".", "__")) for part in own.parts) or file.name in _NOTES
        if named_like_data(file) and not hidden and file.is_file() and file.resolve() not in used:
            others.append(str(own))
    if others:
        more = f" and {len(others) - _MANY} more" if len(others) > _MANY else ""
        names = printable(", ".join(others[:_MANY]), 500)
        warn(f"not read of {folder}: {names}{more}; other files there are its parts, by name or kind")


def _local_csv(builder: Any) -> dict[str, list[str]] | None:
    """Split -> files, where all are CSV files of this machine, with nothing said of their form but the delimiter."""
    if builder.name != "csv":
        return None
    default = type(builder.config)()
    said = [one.name for one in dataclasses.fields(default) if getattr(builder.config, one.name) != getattr(default, one.name)]
    if set(said) - _NO_FORM:
        return None
    files = {str(split): [str(file) for file in found] for split, found in (builder.config.data_files or {}).items()}
    plain = [Path(file).is_file() and Path(file).suffix.lower() in _PLAIN for found in files.values() for file in found]
    return files if plain and all(plain) else None


def _read_files(files: dict[str, list[str]], found: dict[str, str], wanted: Columns, delimiter: str) -> dict[str, Table]:
    how = Format(delimiter=delimiter)
    sources = {part: [source_of("path", file, "csv") for file in files[split]] for part, split in found.items()}
    for source in (source for several in sources.values() for source in several):
        peek(source, wanted, how)
    return {part: _joined([read(source, wanted, how) for source in several]) for part, several in sources.items()}


def _joined(tables: list[Table]) -> Table:
    """Tables of several files, one after the other."""
    if len(tables) == 1:
        return tables[0]
    columns = {role: [value for table in tables for value in table.columns[role]] for role in tables[0].columns}
    places = [(table, row) for table in tables for row in range(len(table))]
    return Table(columns, tables[0].named, lambda row: places[row][0].place(places[row][1]))
