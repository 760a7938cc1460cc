"""`TextTask`: one text-classification problem in memory, from a CSV file, the hub, or a builder of `fedtune.TASKS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedtune.data.contract import TASK_PARTS as TASK_PARTS
from fedtune.data.contract import IntArray as IntArray
from fedtune.data.contract import check_classes, names_of, numbers_of, parts_of, task_said, texts_of
from fedtune.data.formats import Format, Table
from fedtune.data.hub import read_hub
from fedtune.data.parts import SplitChoice, cut
from fedtune.data.parts import hold_out as hold_out
from fedtune.data.reading import read_files
from fedtune.data.values import authors_of, check_texts, documents_of, ids_of, joined_names, labels_of
from fedtune.data.values import numbered as _numbered
from fedtune.errors import UsageError


@dataclass(frozen=True, repr=False)
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
    second_texts: Sequence[str] | None = None
    kind: ClassVar[str] = "texts"

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return task_said(self, "pairs of texts" if self.second_texts is not None else "texts")

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UsageError("task", self.name, "a task with a name, a text that is not empty")
        found: dict[str, Any] = {"texts": texts_of(self.name, "texts", self.texts)}
        count = len(found["texts"])
        if self.second_texts is not None:
            found["second_texts"] = texts_of(self.name, "second_texts", self.second_texts)
            if len(found["second_texts"]) != count:
                raise UsageError(
                    "task", self.name, f"as many second_texts as texts, {count} ({len(self.second_texts)} are here)"
                )
        for numbers, names in (("labels", "label_names"), ("authors", "author_names")):
            found[names] = names_of(self.name, names, getattr(self, names))
            if numbers == "labels" or self.authors is not None:
                found[numbers] = numbers_of(self.name, numbers, getattr(self, numbers), count, len(found[names]))
            elif found[names]:
                raise UsageError("task", self.name, "author_names only with authors")
        found["parts"] = parts_of(self.name, self.parts, count)
        check_classes(self.name, found["labels"], found["label_names"], found["parts"]["train"])
        for field, value in found.items():
            object.__setattr__(self, field, value)  # in the types that are promised

    @classmethod
    def from_csv(
        cls,
        path: str | Path,
        *,
        text: str | int = "text",
        label: str | int = "label",
        author: str | int | None = None,
        document: str | int | None = None,
        test_path: str | Path | None = None,
        validation_path: str | Path | None = None,
        second_text: str | int | None = None,
        split: str | int | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        delimiter: str | None = None,
        quote: str | None = '"',
        header: bool = True,
        encoding: str = "utf-8",
        format: str | None = None,
    ) -> TextTask:
        """Read a file: CSV, JSON lines or Parquet, plain or compressed, by its ending.

        The endings are .csv, .tsv; .jsonl, .ndjson, .json (an object a line); .parquet; after them .gz, .bz2, .xz, .zip.

        Args:
            path: the file.
            text, label, author, document, second_text, split: columns by name; in a CSV file also by number, from 0.
                Texts of one document stay together where parts are cut. A text without an author, or without a document, is
                the only one of its author, of its document. `second_text` makes pairs. `split` says which part each text
                is in: train, validation, test, or names that mean the same (dev, val, ...).
            test_path, validation_path: other files that are these parts. Without them and without `split`, 20 % of the
                documents become the test part, and 10 % of the remaining ones the validation part.
            train_split, validation_split, test_split: with `split`, another part of the file in the place of this one; "train"
                cuts it from the training texts.
            delimiter: one character between fields; by default a comma, in .tsv files a tab.
            quote: the character around fields; None if quotes are letters like others.
            header: whether the first line names the columns.
            encoding: of CSV and JSON lines.
            format: "csv", "jsonl" or "parquet", whatever the ending.

        Raises:
            UsageError: an option that cannot be, before anything is read in full; a row with too many or too few fields, a
                quote that is not closed, a byte that is not text, an empty value, by its line; and what `TextTask` refuses.
        """
        wanted = {"text": text, "label": label} | _given(author=author, document=document, second_text=second_text, split=split)
        files = {"path": path} | _given(validation_path=validation_path, test_path=test_path)
        choice = SplitChoice(train_split, validation_split, test_split)
        tables = read_files(files, wanted, Format(delimiter, quote, header, encoding, format), choice)
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
        second_text: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
    ) -> TextTask:
        """Load a data set of the Hugging Face hub, or a local folder of CSV, JSON lines or Parquet files, with `datasets`.

        Args:
            path: hub name ("ag_news") or folder.
            config: the data set's configuration, where it has several.
            text, label, author, document, second_text: names of the columns, as in `from_csv`.
            train_split: the split to train on.
            validation_split, test_split: the splits that are these parts; by default those of that name (or dev, val, ...).
                Where there is none, or with the name of `train_split`, the part is cut from the training texts.

        Raises:
            UsageError: the data set, a split or a column is missing, or is not what it should be; a split without labels
                (all are -1); and all that `TextTask` refuses.
        """
        wanted = {"text": text, "label": label} | _given(author=author, document=document, second_text=second_text)
        choice = SplitChoice(train_split, validation_split, test_split)
        if path in (".", "./"):  # a folder without a name, which `datasets` does not take
            path = str(Path(path).resolve())
        return _task_of_tables(Path(str(path)).name, read_hub(path, config, wanted, choice), source=str(path))


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _task_of_tables(name: str, tables: Mapping[str, Table], source: str) -> TextTask:
    """Join the tables of the given parts, number labels and authors, and cut the parts that are missing from train."""
    labels = [label for table in tables.values() for label in labels_of(table)]
    for table in tables.values():
        check_texts(table)
    joined = {
        role: [value for table in tables.values() for value in table.columns[role]]
        for role in ("text", "second_text")
        if role in tables["train"].columns
    }
    ids = {
        role: [value for table in tables.values() for value in ids_of(table, role)]
        for role in ("author", "document")
        if role in tables["train"].columns
    }
    bounds = np.cumsum([0, *map(len, tables.values())])
    parts = {part: np.arange(bounds[i], bounds[i + 1]) for i, part in enumerate(tables)}
    documents = documents_of(ids["document"]) if "document" in ids else joined["text"]
    numbers, label_names = _numbered(labels, joined_names(tables, "label"), "label")
    authors: IntArray | None = None
    author_names: tuple[str, ...] = ()
    for role, values in ids.items():
        if None in values:
            source += f" ({values.count(None)} of {len(values)} texts without {role}: each its own)"
    if "author" in ids:
        authors, author_names = authors_of(ids["author"], joined_names(tables, "author"))
    second = joined.get("second_text")
    return TextTask(
        name, joined["text"], numbers, label_names, cut(parts, documents), authors, author_names, source, second_texts=second
    )
