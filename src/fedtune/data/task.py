"""`TextTask`: one text-classification problem in memory, from a CSV file, the hub, or a builder of `fedtune.TASKS`."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import UsageError
from fedtune.randomness import stream

IntArray = NDArray[np.int64]
TASK_PARTS = ("train", "validation", "test")
_HELD_OUT = {"test": 0.2, "validation": 0.1}  # shares of the documents, where the source has no such part


@dataclass(frozen=True)
class TextTask:
    """Texts with their labels, divided once and for all into train, validation and test.

    Args:
        name: short name, as in `TASKS`.
        texts: N texts.
        labels: (N,) class numbers, 0 .. C-1.
        label_names: C names.
        parts: row numbers of "train", "validation" (may be empty) and "test", disjoint.
        authors: (N,) author numbers, or None where the source names no authors.
        author_names: A names.
        source: where the texts come from.
        licence: the terms under which they may be used.

    Raises:
        UsageError: an empty text, fewer than two labels, an empty part, a class without any training text.
    """

    name: str
    texts: Sequence[str]
    labels: IntArray
    label_names: tuple[str, ...]
    parts: Mapping[str, IntArray]
    authors: IntArray | None = None
    author_names: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""

    def __post_init__(self) -> None:
        empty = next((row for row, text in enumerate(self.texts) if not text or not text.strip()), None)
        if empty is not None:
            raise UsageError("task", self.name, f"texts that are not empty (text {empty + 1} of {len(self.texts)} is)")
        if len(self.label_names) < 2:
            raise UsageError("task", self.name, f"at least two labels (the only one is {list(self.label_names)})")
        for part in ("train", "test"):
            if not len(self.parts[part]):
                raise UsageError("task", self.name, f"a {part} part that is not empty ({len(self.texts)} texts in all)")
        unseen = set(self.labels.tolist()) - set(self.labels[self.parts["train"]].tolist())
        if unseen:
            names = sorted(self.label_names[label] for label in unseen)
            raise UsageError("task", self.name, f"classes that occur in the train part (these do not: {names})")

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        *,
        text: str = "text",
        label: str = "label",
        author: str | None = None,
        document: str | None = None,
        test_path: str | Path | None = None,
    ) -> TextTask:
        """Read a CSV file with a header line, plain or gzip, UTF-8.

        Args:
            path: the file.
            text, label, author: names of the columns.
            document: column that says which texts belong together; they stay in one part.
            test_path: a second file that is the test part; otherwise 20 % of the documents become it.
                10 % of the remaining documents become the validation part.

        Raises:
            UsageError: the file is absent or not UTF-8, a column is missing, and all that `TextTask` refuses.
        """
        columns = {"text": text, "label": label, "author": author, "document": document}
        wanted = {key: name for key, name in columns.items() if name is not None}
        tables = {"train": _read_csv(Path(path), wanted)}
        if test_path is not None:
            tables["test"] = _read_csv(Path(test_path), wanted)
        return _task_of_tables(Path(path).name, tables, source=str(path))

    @classmethod
    def from_hub(
        cls,
        path: str,
        *,
        config: str | None = None,
        text: str = "text",
        label: str = "label",
        author: str | None = None,
        document: str | None = None,
    ) -> TextTask:
        """Load a data set of the Hugging Face hub, or a local folder of CSV, JSON lines or Parquet files, with `datasets`.

        Args:
            path: hub name ("ag_news") or folder.
            config: the data set's configuration, where it has several.
            text, label, author, document: names of the columns, as in `from_csv`.

        The data set's own validation and test splits are used where it has them.

        Raises:
            UsageError: the data set or a column is missing, and all that `TextTask` refuses.
        """
        import datasets

        try:
            found = datasets.load_dataset(path, config)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:  # not found, no network, bad files
            raise UsageError("task", path, f"a data set of the hub or a local folder ({_first_line(error)})") from error
        columns = {"text": text, "label": label, "author": author, "document": document}
        wanted = {key: name for key, name in columns.items() if name is not None}
        tables: dict[str, dict[str, list[Any]]] = {}
        names: dict[str, list[str]] = {}
        for part in TASK_PARTS:
            if part not in found:
                continue
            rows = found[part]
            _check_columns(path, wanted, rows.column_names)
            tables[part] = {key: list(rows[name]) for key, name in wanted.items()}
            names |= {key: rows.features[name].names for key, name in wanted.items() if hasattr(rows.features[name], "names")}
        if "train" not in tables:
            raise UsageError("task", path, f"a data set with a split named train (it has {sorted(found)})")
        return _task_of_tables(Path(path).name, tables, source=path, names=names)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _check_columns(source: object, wanted: Mapping[str, str], present: Sequence[str]) -> None:
    for key, name in wanted.items():
        if name not in present:
            raise UsageError(key, name, f"a column of {source}: {', '.join(present)}")


def _read_csv(path: Path, wanted: Mapping[str, str]) -> dict[str, list[Any]]:
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    csv.field_size_limit(10**9)  # a document is a field
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            _check_columns(path, wanted, reader.fieldnames or [])
            rows = list(reader)
    except UnicodeDecodeError as error:  # also a ValueError, so it comes first
        raise UsageError("path", str(path), f"a file in UTF-8 (byte {error.start} of a block is not)") from error
    except (OSError, EOFError, csv.Error, zlib.error) as error:
        raise UsageError("path", str(path), f"a readable CSV file, plain or gzip ({error})") from error
    table = {key: [row[name] for row in rows] for key, name in wanted.items()}
    for key in ("text", "label"):
        bad = next((number for number, value in enumerate(table[key]) if not (value or "").strip()), None)
        if bad is not None:
            raise UsageError(key, wanted[key], f"a column without empty values (row {bad + 1} of {path} is empty)")
    return table


def _task_of_tables(
    name: str, tables: Mapping[str, Mapping[str, list[Any]]], source: str, names: Mapping[str, list[str]] | None = None
) -> TextTask:
    """Join the tables of the given parts, number labels and authors, and cut the parts that are missing from train."""
    joined = {key: [value for table in tables.values() for value in table[key]] for key in tables["train"]}
    bounds = np.cumsum([0, *(len(table["text"]) for table in tables.values())])
    parts = {part: np.arange(bounds[i], bounds[i + 1]) for i, part in enumerate(tables)}
    for part in ("test", "validation"):
        if part not in parts:
            documents = [joined.get("document", joined["text"])[row] for row in parts["train"]]
            held_out = hold_out(documents, _HELD_OUT[part], stream(0, f"parts/{part}"))
            parts[part], parts["train"] = parts["train"][held_out], parts["train"][~held_out]
    if any(value is None for value in joined["label"]):
        raise UsageError("label", None, f"a column without empty values, in {source}")
    labels, label_names = _numbered(joined["label"], (names or {}).get("label"), "label")
    authors: IntArray | None = None
    author_names: tuple[str, ...] = ()
    if "author" in joined:
        authors, author_names = _numbered(joined["author"], (names or {}).get("author"), "author")
    return TextTask(name, joined["text"], labels, label_names, parts, authors, author_names, source=source)


def _numbered(values: Sequence[Any], names: Sequence[str] | None, column: str) -> tuple[IntArray, tuple[str, ...]]:
    """Numbers 0 .. C-1 for the values, in the order of `names`, or sorted (as numbers where all are).

    Raises:
        UsageError: NaN, or values that a reader would take for one: "1" and "1.0", "spam" and "spam ".
    """
    if names is not None:
        return np.asarray(values, dtype=np.int64), tuple(names)
    spelt: dict[str, str] = {}
    for name in sorted({str(value) for value in values}):
        one = spelt.setdefault(_same_as(name), name)
        if one != name:
            raise UsageError(column, f"{one} and {name}", "one spelling for each value")
    try:
        order = sorted(spelt.values(), key=lambda name: (float(name), name))
        if any(math.isnan(float(name)) for name in order):
            raise UsageError(column, "nan", "a column without missing values; NaN is no value")
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        order = sorted(spelt.values())
    number = {name: index for index, name in enumerate(order)}
    return np.asarray([number[str(value)] for value in values], dtype=np.int64), tuple(order)


def _same_as(name: str) -> str:
    """What a reader takes a value for: without blanks around it, and a whole number without its .0.

    >>> _same_as(" 1.0 ") == _same_as("1"), _same_as("1.5")
    (True, '1.5')
    """
    text = " ".join(name.split())
    whole, point, rest = text.partition(".")
    return whole if point and whole.lstrip("+-").isdigit() and not rest.strip("0") else text


def hold_out(documents: Sequence[Hashable], share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Mark the texts of about `share` of the documents, at least one document; no document is cut through.

    Args:
        documents: (N,) the document that each text belongs to.
    """
    names = list(dict.fromkeys(documents))
    count = min(max(1, round(share * len(names))), len(names) - 1)
    chosen = {names[i] for i in rng.permutation(len(names))[:count]}
    return np.asarray([document in chosen for document in documents], dtype=bool)
