"""How a file is to be read, and the columns that come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedtune.data.opening import KINDS, Source
from fedtune.errors import UsageError, one_of, shown

_SHARED: tuple[set[str], ...] = ({"author", "label"}, {"author", "document"}, {"text", "document"}, {"prompt", "document"})
_MANY = 20  # names of columns in a message
Columns = Mapping[str, str | int]  # role (text, label, author, prompt, answer, ...) -> name or number of the column


@dataclass(frozen=True)
class Format:
    """How a file is to be read.

    Args:
        delimiter: one character between two fields; by default a comma, in .tsv files a tab.
        quote: the character around fields; None where quotes are letters like others.
        header: whether the first line names the columns; without it they are named by number, from 0.
        encoding: of the text.
        kind: "csv", "jsonl" or "parquet", whatever the file's ending says.
        width: how many columns the file must have; any number by default.

    Raises:
        UsageError: a value that cannot be.
    """

    delimiter: str | None = None
    quote: str | None = '"'
    header: bool = True
    encoding: str = "utf-8"
    kind: str | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if self.delimiter == "\\t":
            object.__setattr__(self, "delimiter", "\t")
        if self.quote == "":
            object.__setattr__(self, "quote", None)
        for option in ("delimiter", "quote"):
            value = getattr(self, option)
            if value is not None and (not isinstance(value, str) or len(value) != 1 or value in "\r\n\0"):
                raise UsageError(option, value, "one character" + (", or null for none" if option == "quote" else ""))
        if self.quote == " ":
            raise UsageError("quote", self.quote, "another character than the blank")
        if not isinstance(self.header, bool):
            raise UsageError("header", self.header, "true or false")
        if self.kind is not None and self.kind not in KINDS:
            raise one_of("format", self.kind, KINDS)
        try:
            "".encode(self.encoding)
        except (LookupError, TypeError, ValueError):
            raise UsageError("encoding", self.encoding, "a name of an encoding, for example utf-8, latin-1, cp1252") from None

    def check(self, source: Source) -> None:
        """Raise `UsageError` for an option that says nothing about a file of this kind."""
        unfit = {"csv": (), "jsonl": ("delimiter", "quote", "header"), "parquet": ("delimiter", "quote", "header", "encoding")}
        for option in unfit[source.kind]:
            if getattr(self, option) != getattr(Format(), option):
                raise UsageError(option, getattr(self, option), f"no such option for {KINDS[source.kind]} ({source.path})")


@dataclass(frozen=True)
class Table:
    """Some columns of a file or of a split.

    Args:
        columns: values by role, all of one length.
        named: name or number of each column, for errors.
        place: says of a row, from 0, where it stands.
        option: the option that chose this part of the data, and what it was; for errors.
        others: what may be chosen instead.
        names: for columns of numbers with names (`ClassLabel`), the names.
    """

    columns: dict[str, list[Any]]
    named: Columns
    place: Callable[[int], str]
    option: tuple[str, str] | None = None
    others: str = ""
    names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def check_names(columns: Columns) -> None:
    """Raise `UsageError` for columns that are named by neither text nor number, or one column in two roles.

    An author may be the label (then one tells authors apart), or the document.
    """
    for role, name in columns.items():
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise UsageError(role, name, "the name of a column, or its number from 0")
    roles = list(columns)
    for place, role in enumerate(roles):
        for other in roles[place + 1 :]:
            if columns[role] == columns[other] and {role, other} not in _SHARED:
                raise UsageError(other, columns[other], f"another column than that of {role}")


def check_columns(source: object, wanted: Columns, present: Sequence[str], hint: str = "") -> None:
    """Raise `UsageError` for a column that is not there, with the nearest names first, or that is there twice."""
    for role, name in wanted.items():
        if name not in present:
            listed = one_of(role, name, present, most=_MANY).allowed
            raise UsageError(role, name, f"a column of {source}: {listed or 'it has none'}{hint}")
        if list(present).count(str(name)) > 1:
            raise UsageError(role, name, f"a column whose name is there once; {source} has it twice: {shown(list(present))}")
