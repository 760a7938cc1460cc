"""Rows of a CSV file, strictly: a file of which a row would be lost or guessed at is refused, by the line."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from typing import Any

from fedtune.data.formats import Columns, Format, check_columns, check_names
from fedtune.data.opening import Lines, Source
from fedtune.errors import UsageError, shown


class Rows:
    """The rows of a CSV file as lists of fields, each of as many as the first has; blank lines are none."""

    def __init__(self, source: Source, lines: Lines, how: Format, wanted: Columns) -> None:
        csv.field_size_limit(10**9)  # a document is a field
        self.source, self.lines = source, lines
        quote = self._quote = how.quote
        self.delimiter = how.delimiter or ("\t" if source.tabs else ",")
        if quote == self.delimiter:
            raise UsageError("quote", quote, f"another character than the delimiter {self.delimiter!r}")
        self._reader = csv.reader(
            self.lines,
            delimiter=self.delimiter,
            quotechar=quote,
            quoting=csv.QUOTE_NONE if quote is None else csv.QUOTE_MINIMAL,
            strict=True,
        )
        field = f"[^{re.escape(self.delimiter + (quote or ''))}\r\n]*+"
        if quote is not None:
            field = f"(?:{{0}}[^{{0}}]*+(?:{{0}}{{0}}[^{{0}}]*+)*+{{0}}|{field})".format(re.escape(quote))
        self._strict = re.compile(f"{field}(?:{re.escape(self.delimiter)}{field})*+")
        self.start = 1  # line where the last row begins
        self._real, self._bare = False, 0  # quoting that no stray quotes look like; rows without a quote
        first = self._next()
        if first is None:
            raise source.error("a file that is not empty")
        self.width = len(first)
        if how.width not in (None, self.width):
            raise source.error(f"a file of {how.width} columns (line {self.start} has {self.width})")
        self.waiting = None if how.header else first
        if how.header:  # the row of names does not count
            self._bare = 0
        self.names = [name.strip() for name in first] if how.header else None
        self.by_name = all(isinstance(wanted.get(role), str) for role in ("text", "label"))
        self.places = {role: self._place(role, name) for role, name in wanted.items()}
        check_names(self.places)

    def __iter__(self) -> Iterator[list[str]]:
        row = self.waiting if self.waiting is not None else self._next()
        while row is not None:
            if len(row) != self.width:
                raise self.source.error(f"rows of {self.width} fields like the first (line {self.start} has {len(row)})")
            yield row
            row = self._next()

    def would_be_labels(self) -> list[str]:
        """What would be the labels if each line of the last row were a row; none where the lines have other numbers of fields.

        The line that does have the row's label is left out: the last one where the label follows the field of several lines.
        """
        lines, place = self.lines.of_row, self.places["label"]
        if len(lines) == 1:
            return []
        complete = next(csv.reader(lines[:1], delimiter=self.delimiter, quotechar=self._quote))
        others = lines[:-1] if place > len(complete) - 1 else lines[1:]
        would_be = [line.replace(self._quote or "", "").rstrip("\r\n").split(self.delimiter) for line in others]
        return [row[place] for row in would_be] if {len(row) for row in would_be} == {self.width} else []

    @property
    def quoted(self) -> bool:
        """Whether the rows so far show that fields are quoted by rule: each has quotes, or one has quotes for a reason.

        That is a delimiter between them in one line, a doubled quote, or several fields in a row of several lines.
        """
        return self._real or not self._bare

    def _next(self) -> list[str] | None:
        while True:
            self.lines.of_row.clear()
            self.start = self.lines.number + 1
            try:
                row = next(self._reader)
            except StopIteration:
                return None
            except csv.Error as error:
                at = f"the row that begins in line {self.start} breaks in line {self.lines.number}"
                raise self.source.error(f"quotes that are closed, and doubled within a field ({at}: {error})") from error
            if row:
                self._check_quotes(row)
                return row

    def _check_quotes(self, row: list[str]) -> None:
        """Refuse a quote within a field that has none around it: its writer took quotes for letters, perhaps elsewhere, too."""
        lines, quote = self.lines.of_row, self._quote
        if quote is None or (len(lines) == 1 and quote not in lines[0]):
            self._bare += 1
            return
        if not self._strict.fullmatch("".join(lines).rstrip("\r\n")):
            allowed = f"quotes around whole fields, doubled within them (line {self.start} has another one)"
            raise self.source.error(f"{allowed}; or quote: null, if quotes are letters here")
        if not self._real and len(lines) == 1:
            self._real = any(quote in field or self.delimiter in field for field in row)
        elif not self._real:
            self._real = sum(line.count(quote) for line in lines) > 2

    def _place(self, role: str, name: str | int) -> int:
        if isinstance(name, int):
            if not 0 <= name < self.width:
                raise UsageError(role, name, f"a number of a column of {self.source.path}, 0 .. {self.width - 1}")
            return name
        if self.names is None:
            allowed = f"the number of a column, 0 .. {self.width - 1}, as {self.source.path} is read without a header"
            raise UsageError(role, name, allowed)
        hint = " (only one column: is the delimiter right?)" if self.width == 1 else ""
        check_columns(self.source.path, {role: name.strip()}, self.names, hint)
        return self.names.index(name.strip())


def check_header(source: Source, rows: Rows, columns: dict[str, list[Any]], starts: Sequence[int]) -> None:
    """Raise `UsageError` where the first line is a header and was taken for data, or the other way round, or comes again.

    A header that was taken for data is known by its label, a word that is in no other row, and by its text, one word.
    """
    labels, texts = columns["label"], columns["text"]
    if rows.names is not None:
        named = rows.names[rows.places["label"]]
        again = next((row for row, label in enumerate(labels) if label.strip() == named), None)
        if again is not None and texts[again].strip() == rows.names[rows.places["text"]]:
            raise source.error(f"a file with one header (line {starts[again]} repeats it)")
        if again is not None and named and not rows.by_name:
            raise UsageError("header", True, f"false, as {source.path} has none (the first line has the label {shown(named)})")
        return
    word = len(texts[0].split()) == 1 and labels[0].strip() and not _is_number(labels[0])
    if word and len(labels) > 2 and labels[0] not in labels[1:]:
        raise UsageError(
            "header", False, f"true, as {source.path} has one (its first line: {shown(texts[0])}, {shown(labels[0])})"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def check_swallowed(source: Source, suspects: list[tuple[int, list[str]]], labels: set[Any]) -> None:
    """Raise `UsageError` where quoted fields of several lines have swallowed rows: each of their lines would be one.

    Only asked where no field of the file shows that its writer quotes by rule: then one such line is enough.

    Args:
        suspects: for each row of several lines its first line's number, and what would be labels (`Rows.would_be_labels`).
        labels: all labels of the file.
    """
    found = [(start, would_be) for start, would_be in suspects if labels.issuperset(would_be)]
    if found:
        start, would_be = found[0]
        allowed = f"quotes that are closed in their row (a quote that opens in line {start} swallows {len(would_be)} "
        raise source.error(f"{allowed}lines that are rows themselves, with the label {shown(would_be[0])})")
