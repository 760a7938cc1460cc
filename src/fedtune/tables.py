"""Lists of records that show themselves as tables: as text in a terminal, as HTML in a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex, TypeVar, overload

from fedtune.files import printable

Record = TypeVar("Record")
_MOST, _END = 40, 10  # rows that are all shown; of more the first and the last
_NAME = 120  # characters of a cell that is text


class Shown(list[Record]):
    """A list of records. What it is printed as has one row for each, or for the first and the last where there are many.

    It is compared, indexed and written as any list; a slice is shown in the same way.
    """

    def cells(self, record: Record) -> Mapping[str, Any]:
        """A record as it is shown: name of the column -> number or text."""
        raise NotImplementedError

    @overload
    def __getitem__(self, place: SupportsIndex) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> Shown[Record]: ...
    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return type(self)(found) if isinstance(place, slice) else found

    def __repr__(self) -> str:
        columns, rows = self._table()
        lines = [columns, *rows]
        widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
        return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines) if self else "[]"

    def _repr_html_(self) -> str:
        columns, rows = self._table()
        parts = ["".join(f"<th>{html.escape(name)}</th>" for name in columns)]
        parts += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        return f"<table>{''.join(f'<tr>{part}</tr>' for part in parts)}</table>"

    def _table(self) -> tuple[Sequence[str], list[list[str]]]:
        """Columns and rows, all as text; a column that one record has is there for all."""
        left_out = len(self) - 2 * _END if len(self) > _MOST else 0
        shown = [*self[:_END], *self[-_END:]] if left_out else list(self)
        records = list(map(self.cells, shown))
        columns = list(dict.fromkeys(name for record in records for name in record))
        rows = [[_text(record.get(name)) for name in columns] for record in records]
        if left_out:
            rows.insert(_END, [f"… {left_out} more", *[""] * (len(columns) - 1)])
        return [printable(name, _NAME) for name in columns], rows


def _text(value: Any) -> str:
    """A cell: a fraction with four digits, whole numbers in groups of three.

    >>> _text(0.12345678), _text(12345), _text(None)
    ('0.1235', '12,345', '')
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else printable(value, _NAME)
