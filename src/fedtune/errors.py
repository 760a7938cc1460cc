"""The two errors a user can meet: what they asked for is not possible, or a run had to stop; and warnings."""

from __future__ import annotations

import contextlib
import difflib
import logging
import numbers
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

_LONGEST, _NAME, _ALLOWED = 200, 40, 1000  # characters in a message: of a value, of a name, of what is allowed
_WITHIN = ("fedtune", "functools", "contextlib")  # packages whose lines are not what a warning is about


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

    def renamed(self, name: Callable[[str], str], also: str = "") -> UsageError:
        """The same error, with the argument as others call it (a flag, a place in a file), and what they add at the end."""
        return UsageError(name(self.argument), self.came, self.allowed + also)


class NotGiven(UsageError):
    """A value is needed that the user did not choose.

    Args:
        argument: name of the constructor argument.
        needed: what must be given, in words.
    """

    def __init__(self, argument: str, needed: str) -> None:
        super().__init__(argument, None, needed)
        self.args = (f"{argument}: not given; needed: {self.allowed}",)

    def renamed(self, name: Callable[[str], str], also: str = "") -> NotGiven:
        """As of a `UsageError`."""
        return NotGiven(name(self.argument), self.allowed + also)


class Several(UsageError):
    """Several values cannot be used; one line says all, and `argument`, `came` and `allowed` are those of the first.

    Args:
        errors: at least one.
    """

    def __init__(self, errors: Sequence[UsageError]) -> None:
        self.errors = tuple(errors)
        super().__init__(errors[0].argument, errors[0].came, errors[0].allowed)
        self.args = ("; also ".join(map(str, errors)),)

    def renamed(self, name: Callable[[str], str], also: str = "") -> Several:
        """As of a `UsageError`, for each of them."""
        *first, last = self.errors
        return Several([*(one.renamed(name) for one in first), last.renamed(name, also)])


def raise_all(errors: Iterable[UsageError]) -> None:
    """Raise what is wrong, all at once; nothing where nothing is."""
    found = [one for error in errors for one in (error.errors if isinstance(error, Several) else (error,))]
    if found:
        raise found[0] if len(found) == 1 else Several(found)


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


class FedtuneWarning(UserWarning):
    """What a user would want to know of a run that goes on: something is left out, made anew, or other than one may expect."""


class RenamedWarning(FutureWarning):
    """A name that still works for a while, and its new one."""


def warn(text: str, category: type[Warning] = FedtuneWarning) -> None:
    """Warn of something at the line of the caller's own code, and in rank 0 alone, as Lightning does."""
    from lightning_utilities.core.rank_zero import rank_zero_only

    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _WITHIN:
        level, frame = level + 1, frame.f_back
    if not getattr(rank_zero_only, "rank", None):
        warnings.warn(text, category, stacklevel=level)


@contextlib.contextmanager
def unsaid(logger: logging.Logger, begin: str) -> Iterator[None]:
    """Inside the block a logger of another package leaves out what begins with some words; whatever else it says is heard."""

    def other(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(begin)

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


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


def whole(argument: str, came: object, least: int) -> None:
    """Raise `UsageError` when `came` is no whole number, or below `least`."""
    if isinstance(came, bool) or not isinstance(came, int):
        raise UsageError(argument, came, f"a whole number, {least} or more")
    at_least(argument, came, least)


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
