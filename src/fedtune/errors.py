"""The two errors a user can meet: what they asked for is not possible, or a run had to stop."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable

_LONGEST, _NAME, _ALLOWED = 200, 40, 1000  # characters in a message: of a value, of a name, of what is allowed


class UsageError(ValueError):
    """A value that the user chose cannot be used.

    Args:
        argument: name of the constructor argument (the command line turns it into a flag).
        came: what was given.
        allowed: what may be given instead, in words.
    """

    def __init__(self, argument: str, came: object, allowed: str) -> None:
        self.argument, self.came, self.allowed = argument, came, _line(allowed, _ALLOWED)
        super().__init__(f"{argument}: got {shown(came)}; allowed: {self.allowed}")


class Refused(UsageError):
    """Values of flags that a parser cannot use, from Python; its line says all, the file, too.

    Args:
        text: the line.
        where: the file, or what else the values are from.
    """

    def __init__(self, text: str, where: str) -> None:
        super().__init__(where, where, text)
        self.args = (text,)


def shown(value: object) -> str:
    """A value as a message shows it: on one line, and cut.

    >>> len(shown(list(range(10**6))))
    201
    """
    return _line(repr(value), _LONGEST)


def _line(text: str, most: int) -> str:
    """A text on one line, and cut."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[:most] + "…"


class RunError(RuntimeError):
    """A run stopped for a reason outside its configuration (a loss that became NaN, a full disk, damaged files)."""


class RenamedWarning(FutureWarning):
    """A name that still works for a while, and its new one."""


def one_of(argument: str, came: object, names: Iterable[str], also: str = "", most: int | None = None) -> UsageError:
    """The error for a name that is in no registry; the nearest names come first, and at most so many are listed.

    >>> print(one_of("split", "idd", ["iid", "by_author"]))
    split: got 'idd'; allowed: iid (nearest), by_author
    """
    known = list(names)
    near = difflib.get_close_matches(str(came), known, n=2, cutoff=0.5)
    listed = [f"{_line(name, _NAME)} (nearest)" for name in near] + [_line(name, _NAME) for name in known if name not in near]
    more = f" and {len(listed) - most} more" if most is not None and len(listed) > most else ""
    return UsageError(argument, came, ", ".join(listed[:most]) + more + also)


def at_least(argument: str, came: int | float, least: int | float) -> None:
    """Raise `UsageError` when the number `came` is below `least` (or is not a number at all)."""
    if not isinstance(came, numbers.Real) or not came >= least:
        raise UsageError(argument, came, f"{least} or more")


class ClientError(RunError):
    """A client's training had to stop.

    Args:
        where: the round and the client.
        reason: why; it may say where.
    """

    def __init__(self, where: str, reason: str) -> None:
        self.reason = " ".join(reason.removeprefix(where).lstrip(":, ").split())[:200]
        super().__init__(reason if reason.startswith(where) else f"{where}: {reason}")


class Elsewhere(RunError):
    """Another process of the run had to stop; it is the one that says why.

    Args:
        rank: which.
        text: why, in a line.
        code: with which exit code a command ends that one.
    """

    def __init__(self, rank: int, text: str, code: int = 2) -> None:
        self.code = code
        super().__init__(f"rank {rank}: {text}")
