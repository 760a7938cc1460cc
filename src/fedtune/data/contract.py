"""What a `TextTask` holds its fields to, whoever made them."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.errors import UsageError, at_least, shown

IntArray = NDArray[np.int64]
TASK_PARTS = ("train", "validation", "test")
_INTEGERS = (int, np.integer)
_FAR = 2**62
_HALF = re.compile("[\ud800-\udfff]")


def texts_of(task: str, field: str, texts: Any) -> Sequence[str]:
    """The texts as a list or tuple.

    Raises:
        UsageError: a field that is no sequence, or a text that is no text, empty, or not to be written in UTF-8.
    """
    if isinstance(texts, (str, bytes)) or not hasattr(texts, "__iter__") or isinstance(texts, Mapping):
        raise UsageError("task", task, f"{field} that are a list of texts (this is a {type(texts).__name__})")
    found: Sequence[str] = texts if isinstance(texts, (list, tuple)) else getattr(texts, "tolist", lambda: list(texts))()
    for row, text in enumerate(found):
        fault = fault_of_text(text)
        if fault:
            raise UsageError("task", task, f"{field} that are {fault} (text {row + 1} of {len(found)} is {shown(text)})")
    return found


def fault_of_text(text: Any) -> str:
    """What a text should be and is not; empty where it is right.

    >>> fault_of_text("a"), fault_of_text(" "), fault_of_text(1)
    ('', 'not empty', 'text')
    """
    if not isinstance(text, str):
        return "text"
    if not text.strip():
        return "not empty"
    if not text.isascii() and _HALF.search(text):
        return "whole characters (half of a UTF-16 pair is none)"
    return ""


def numbers_of(task: str, field: str, values: Any, count: int, limit: int) -> IntArray:
    """(N,) whole numbers 0 .. limit - 1, as int64.

    Args:
        task: name of the task, for the error.
        field: what is numbered, in the plural.
        count: N.
        limit: one more than the largest number that is allowed.
    """
    found = whole("task", task, field, values)
    if not limit:
        raise UsageError("task", task, f"a name for each number of {field} (there are no names)")
    if len(found) != count:
        raise UsageError("task", task, f"as many {field} as texts, {count} (these are {len(found)})")
    wrong = np.flatnonzero((found < 0) | (found >= limit))
    if len(wrong):
        allowed = f"{field} that are whole numbers 0 .. {limit - 1}, one for each name (of text {wrong[0] + 1} it is "
        raise UsageError("task", task, f"{allowed}{found[wrong[0]]})")
    return found


def whole(argument: str, came: object, field: str, values: Any) -> IntArray:
    """One-dimensional whole numbers: neither floats nor truth values nor text are taken for them."""
    listed = isinstance(values, (list, tuple))
    try:
        found = np.asarray(values)
    except ValueError:  # lists of different lengths
        found = np.empty((0, 0), dtype=object)
    if found.ndim != 1:
        also = "; multi-label data are not offered" if field == "labels" and found.ndim else ""
        raise UsageError(argument, came, f"{field} with one whole number for each text (shape {found.shape} is not that{also})")
    if not len(found):
        return np.empty(0, dtype=np.int64)
    given = values if listed else found.tolist() if found.dtype.kind == "O" else ()
    kinds = [type(value).__name__ for value in given if isinstance(value, (bool, np.bool_)) or not isinstance(value, _INTEGERS)]
    if kinds or found.dtype.kind not in "iuO":
        also = "; regression is not offered" if field == "labels" and found.dtype.kind == "f" else ""
        kind = kinds[0] if kinds else found.dtype.name
        raise UsageError(argument, came, f"{field} that are whole numbers (there is {kind}: {shown(found[:3].tolist())}{also})")
    if found.dtype.kind == "i":
        return found.astype(np.int64, copy=False)
    return np.asarray([min(max(int(value), -1), _FAR) for value in found], dtype=np.int64)  # what is beyond is out of any range


def names_of(task: str, field: str, names: Any) -> tuple[str, ...]:
    """The names as a tuple: texts, none empty, none twice."""
    if isinstance(names, (str, bytes)) or not hasattr(names, "__iter__"):
        raise UsageError("task", task, f"{field} that are a list of names (this is {shown(names)})")
    found = tuple(names)
    seen: set[str] = set()
    for name in found:
        if fault_of_text(name):
            raise UsageError("task", task, f"{field} that are texts and not empty, of whole characters (one is {shown(name)})")
        if name in seen:
            raise UsageError("task", task, f"{field} that differ ({shown(name)} is there twice)")
        seen.add(name)
    if field == "label_names" and len(found) < 2:
        raise UsageError(
            "task", task, f"at least two labels (the only one is {list(found)})" if found else "at least two labels"
        )
    return found


def parts_of(task: str, parts: Any, count: int) -> dict[str, IntArray]:
    """Row numbers of the three parts as int64: in range, none twice, no row in two parts; no validation part is an empty one.

    Args:
        task: name of the task, for the error.
        parts: row numbers by name of the part.
        count: number of texts.
    """
    if not isinstance(parts, Mapping) or set(parts) - set(TASK_PARTS) or not {"train", "test"} <= set(parts):
        came = list(parts) if isinstance(parts, Mapping) else type(parts).__name__
        raise UsageError("task", task, f"a dictionary with the parts {', '.join(TASK_PARTS)} (there is {shown(came)})")
    found = {part: whole("task", task, f"rows of the {part} part", parts.get(part, ())) for part in TASK_PARTS}
    owner = np.full(count, -1)
    for number, (part, rows) in enumerate(found.items()):
        if part != "validation" and not len(rows):
            raise UsageError("task", task, f"a {part} part that is not empty ({count} texts in all)")
        outside = rows[(rows < 0) | (rows >= count)]
        if len(outside):
            raise UsageError("task", task, f"parts with rows 0 .. {count - 1} (the {part} part has {outside[0]})")
        again = rows[owner[rows] >= 0]
        if len(again):
            other = TASK_PARTS[owner[again[0]]]
            raise UsageError("task", task, f"parts that share no row (row {again[0]} is in {other} and {part})")
        owner[rows] = number
        values, counts = np.unique(rows, return_counts=True)
        if len(values) != len(rows):
            raise UsageError("task", task, f"parts with no row twice (the {part} part has {values[counts > 1][0]} twice)")
    return found


def check_classes(task: str, labels: IntArray, names: Sequence[str], train: IntArray) -> None:
    """Raise `UsageError` where a class that occurs is not in the train part."""
    unseen = np.setdiff1d(labels, labels[train])
    if len(unseen):
        missing = sorted(names[label] for label in unseen)
        raise UsageError("task", task, f"classes that occur in the train part (these do not: {shown(missing)})")


def whole_at_least(argument: str, came: Any, least: int) -> None:
    """Raise `UsageError` for what is no whole number, or one below `least`."""
    at_least(argument, came, least)
    if isinstance(came, bool) or not isinstance(came, numbers.Integral):
        raise UsageError(argument, came, f"a whole number, {least} or more")


def task_said(task: Any, what: str) -> str:
    """A task in a line: its name, how many texts of which parts, labels and authors; not the texts themselves."""
    parts = ", ".join(f"{part} {len(task.parts[part]):,}" for part in TASK_PARTS)
    named = {"labels": len(task.label_names), "authors": len(task.author_names)}
    more = "".join(f", {count:,} {name}" for name, count in named.items() if count)
    source = f", source {shown(task.source)}" if task.source else ""
    return f"{type(task).__name__}({shown(task.name)}: {len(task):,} {what}, {parts}{more}{source})"
