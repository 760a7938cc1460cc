"""Values of a column as texts, class numbers, authors and documents; what cannot be one is refused with its place."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from fedtune.data.contract import IntArray, fault_of_text
from fedtune.data.formats import Columns, Table
from fedtune.errors import UsageError, shown

_TEXTS = ("text", "second_text", "title", "prompt", "answer", "input", "system")
_NO_LABEL = frozenset(("nan", "NaN", "<NA>"))  # how pandas writes a missing value as text; no class has such a name
_NO_ID = _NO_LABEL | {"None", "null", "NULL", "\\N"}  # others write these for a missing author
_MULTI = "one label for each text; multi-label data are not offered"
_REGRESSION = "classes: words or whole numbers; regression is not offered"


def check_schema(schema: Any, wanted: Columns, where: str) -> None:
    """Check the types of columns before any value is read.

    Args:
        schema: the columns' types (a `pyarrow.Schema`).
        wanted: role -> name of the column.
        where: the file or split, for the error.

    Raises:
        UsageError: texts that are not texts; other columns that hold lists, dictionaries, bytes or times.
    """
    from pyarrow import types as kinds  # type: ignore[import-untyped] # it has no types

    for role, name in wanted.items():
        kind = schema.field(name).type
        kind = kind.value_type if kinds.is_dictionary(kind) else kind
        text = kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind) or kinds.is_null(kind)
        number = kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_boolean(kind)
        listed = kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind)
        if role == "messages" and not listed and not kinds.is_struct(kind):
            allowed = "a column of lists of messages, each with role and content"
            raise UsageError(role, name, f"{allowed} (in {where} this column holds {shown(str(kind))[1:-1]})")
        if role != "messages" and not text and (role in _TEXTS or not number):
            allowed = _MULTI if role == "label" and listed else _wanted_of(role)
            raise UsageError(role, name, f"{allowed} (in {where} this column holds {shown(str(kind))[1:-1]})")


def _wanted_of(role: str) -> str:
    return "a column of texts" if role in _TEXTS else "a column of words or whole numbers"


def missing(value: Any, spelt: frozenset[str] = frozenset()) -> bool:
    """Whether a value is none: absent, NaN, blank, or a word that stands for none (`spelt`)."""
    if isinstance(value, str) and value.strip() in spelt:
        return True
    return value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())


def check_texts(table: Table) -> None:
    """Raise `UsageError` for the first text that is none, is empty, or is no text but a number, a list, a dictionary."""
    for role in _TEXTS[:2]:
        for row, value in enumerate(table.columns.get(role, ())):
            if missing(value):
                raise UsageError(role, table.named[role], f"a column without empty values ({table.place(row)} is empty)")
            fault = fault_of_text(value)
            if fault:
                kind = "" if isinstance(value, str) else f" holds {type(value).__name__}:"
                raise UsageError(role, table.named[role], f"a column of {fault} ({table.place(row)}{kind} {shown(value)})")


def labels_of(table: Table) -> list[Any]:
    """The labels of one part, as words, whole numbers or truth values.

    Raises:
        UsageError: a part without labels; a row without a label, or with several, or with a number that is not whole.
    """
    values, name = table.columns["label"], table.named["label"]
    _check_labelled(table, values)
    known = table.names.get("label")
    for row, value in enumerate(values):
        fault = ""
        if missing(value, _NO_LABEL):
            fault = "a column without empty values"
        elif _is_list(value):
            fault = _MULTI
        elif isinstance(value, float) and not value.is_integer():
            fault = _REGRESSION
        elif not isinstance(value, (str, int, float)):
            fault = _wanted_of("label")
        elif isinstance(value, str):
            fault = fault_of_text(value)
        elif known is not None and value not in range(len(known)):
            fault = f"a label 0 .. {len(known) - 1} for each text (a text without a label is -1)"
        if fault:
            has = "is empty" if missing(value) else f"holds {shown(value)}"
            raise UsageError("label", name, f"{fault} ({table.place(row)} {has})")
    _check_whole(table, values)
    return [int(value) if isinstance(value, float) else value for value in values]


def _check_labelled(table: Table, values: Sequence[Any]) -> None:
    """Raise `UsageError` for a part of which no text has a label."""
    if all(missing(value, _NO_LABEL) or str(value).strip() in ("-1", "-1.0") for value in values):
        said = "empty" if missing(values[0], _NO_LABEL) else "-1"
        option, came = table.option or ("label", str(table.named["label"]))
        allowed = f"data with labels (all {len(values)} labels from {table.place(0)} on are {said})"
        raise UsageError(option, came, allowed + (f"; choose another, {table.others}" if table.others else ""))


def _is_list(value: Any) -> bool:
    """Whether a value is a list, or is spelt like one in a CSV file."""
    return _spelt_as_list(value) if isinstance(value, str) else isinstance(value, (list, tuple, set, np.ndarray))


@functools.lru_cache(maxsize=1024)
def _spelt_as_list(text: str) -> bool:
    """Whether a text is a list as JSON, Python or NumPy writes one: [A] is a word, and [] and [1 0] are lists.

    >>> _spelt_as_list("[A]"), _spelt_as_list("[A, B]"), _spelt_as_list("['A']"), _spelt_as_list("[1]")
    (False, True, True, True)
    """
    if text[:1] + text[-1:] != "[]":
        return False
    return not text[1:-1].strip("0123456789. \n") or any(mark in text for mark in ",'\"")


def _check_whole(table: Table, values: Sequence[Any]) -> None:
    """Refuse a CSV file's labels that all are numbers, of which one is not whole."""
    try:
        part = next((value for value in set(values) if isinstance(value, str) and not float(value).is_integer()), None)
        if part is not None and all(math.isfinite(float(value)) for value in set(values)):
            row = values.index(part)
            place = table.place(row).rstrip(",")
            raise UsageError("label", table.named["label"], f"{_REGRESSION} ({place} holds {shown(part)})")
    except (ValueError, OverflowError) as error:
        if isinstance(error, UsageError):
            raise


def ids_of(table: Table, role: str) -> list[Any]:
    """Authors or documents of one part; None for a text that has none.

    Raises:
        UsageError: a list, a dictionary, a number that is not whole.
    """
    found: list[Any] = []
    names = table.names.get(role)
    for row, value in enumerate(table.columns[role]):
        if missing(value, _NO_ID) or (names is not None and value == -1):
            found.append(None)
        elif (
            not isinstance(value, (str, int, float))
            or (isinstance(value, float) and not value.is_integer())
            or (isinstance(value, str) and fault_of_text(value))
            or (names is not None and value not in range(len(names)))
        ):
            place = table.place(row).rstrip(",")
            raise UsageError(role, table.named[role], f"{_wanted_of(role)} ({place} holds {shown(value)})")
        else:
            found.append(int(value) if isinstance(value, float) else value)
    return found


def numbered(values: Sequence[Any], names: Sequence[str] | None, column: str) -> tuple[IntArray, tuple[str, ...]]:
    """Numbers 0 .. C-1 for the values, in the order of `names`, or sorted (as numbers where all are).

    Raises:
        UsageError: NaN, or values that a reader would take for one: "1" and "1.0", "spam" and "spam ".
    """
    if names is not None:
        return np.asarray(values, dtype=np.int64), tuple(names)
    spelt: dict[str, str] = {}
    for name in sorted({str(value) for value in values}):
        one = spelt.setdefault(same_as(name), name)
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
    return np.asarray([number[str(value)] for value in values], dtype=np.int64), tuple(name.strip() for name in order)


def same_as(name: str) -> str:
    """What a reader takes a value for: without blanks around it and without what has no width, accents written in one way,
    and a whole number without its .0.

    >>> same_as(" 1.0 ") == same_as("1"), same_as("1.5"), same_as("cafe\u0301") == same_as("caf\u00e9")
    (True, '1.5', True)
    """
    text = " ".join(name.split())
    if not text.isascii():
        text = "".join(letter for letter in unicodedata.normalize("NFC", text) if unicodedata.category(letter) != "Cf")
    whole, point, rest = text.partition(".")
    return whole if point and whole.lstrip("+-").isdigit() and not rest.strip("0") else text


def authors_of(values: Sequence[Any], names: Sequence[str] | None) -> tuple[IntArray, tuple[str, ...]]:
    """Author numbers and names. A text without an author is one of an author of its own: nobody knows that it has another's."""
    known = [row for row, value in enumerate(values) if value is not None]
    numbers = np.empty(len(values), dtype=np.int64)
    found, named = numbered([values[row] for row in known], names, "author")
    numbers[known] = found
    nameless = np.setdiff1d(np.arange(len(values)), known)
    numbers[nameless] = len(named) + np.arange(len(nameless))
    taken = set(named)
    width = "unknown"
    while any(name.startswith(width) for name in taken):
        width = f"({width})"
    return numbers, (*named, *(f"{width} {number + 1}" for number in range(len(nameless))))


def documents_of(values: Sequence[Any]) -> list[Hashable]:
    """What stands for each text's document: equal for texts of one. A text without a document is one by itself."""
    return [(row,) if value is None else same_as(str(value)) for row, value in enumerate(values)]


def joined_names(tables: Mapping[str, Table], role: str) -> list[str] | None:
    """The names that a column's numbers have in all parts alike; None where they have none.

    Raises:
        UsageError: two parts name them differently.
    """
    found = [table.names.get(role) for table in tables.values()]
    if any(names != found[0] for names in found):
        raise UsageError(
            role, next(iter(tables.values())).named[role], f"the same names in all parts (here are {shown(found)})"
        )
    return found[0]
