"""Where progress is shown: a terminal, a pipe or a file, or a notebook, in which a run has one display."""

from __future__ import annotations

import html
import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

from fedtune.runs.forecast import duration

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 10_000  # characters of a line where nobody's window is the limit
_LINES = 25  # that a notebook shows
_SECONDS = 0.2  # between two updates in a notebook


class Display(Protocol):
    """Shows lines, which stay, and below them how far a phase is."""

    live: bool  # whether `show` is seen

    def line(self, text: str) -> None:
        """Print a line."""

    def show(self, text: str, done: int, total: int, left: float | None) -> None:
        """Say how far a phase is: pieces of work, and seconds that are left of the whole run (None: not known)."""

    def clear(self) -> None:
        """The phase is over."""


def new_console(**options: Any) -> Console:
    """A console of `rich`; what does not go to a terminal has all the width it needs."""
    from rich.console import Console

    found = Console(**options)
    return found if found.is_terminal or found.is_jupyter else Console(**{"width": _WIDE} | options)


def display(enabled: bool) -> Display:
    """The display for where this process runs; nothing is shown by one that is not enabled."""
    out = new_console(quiet=not enabled, highlight=False)
    return Notebook() if enabled and out.is_jupyter else Terminal(out)


class Terminal:
    """Lines, and on a terminal a bar below them."""

    def __init__(self, out: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
        from rich.text import Text

        outer = self

        class Left(ProgressColumn):
            """The time left, which passes between two pieces of work, too."""

            def render(self, _: Any) -> Text:
                left = None if outer._until is None else max(0.0, outer._until - time.monotonic())
                return Text("" if left is None else f"{duration(left)} left in all")

        self._out, self.live = out, out.is_terminal and not out.quiet
        self._until: float | None = None
        self._task: Any = None
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), Left())
        self._bar = Progress(*columns, console=out, transient=True, disable=not self.live)

    def line(self, text: str) -> None:
        """Print a line, above the bar."""
        self._out.print(text, markup=False, soft_wrap=True)

    def show(self, text: str, done: int, total: int, left: float | None) -> None:
        """Move the bar."""
        self._until = None if left is None else time.monotonic() + left
        if self._task is None:
            self._task = self._bar.add_task(text, total=total)
            self._bar.start()
        self._bar.update(self._task, completed=done, total=total, description=text)

    def clear(self) -> None:
        """Take the bar away."""
        if self._task is not None:
            self._bar.stop()
            self._bar.remove_task(self._task)
            self._task = None


class Notebook:
    """One display that is updated: the last lines, and below them a bar."""

    live = True

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._status = ""
        self._handle: Any = None
        self._updated = 0.0

    def line(self, text: str) -> None:
        """Add a line."""
        self._lines.append(text)
        self._update()

    def show(self, text: str, done: int, total: int, left: float | None) -> None:
        """Move the bar, unless it was moved a moment ago."""
        time_left = "" if left is None else f" {duration(left)} left in all"
        self._status = f"<progress max='{max(1, total)}' value='{done}'></progress> {html.escape(text)}{time_left}"
        if time.monotonic() - self._updated >= _SECONDS:
            self._update()

    def clear(self) -> None:
        """Take the bar away."""
        self._status = ""
        self._update()

    def _update(self) -> None:
        from IPython.display import HTML
        from IPython.display import display as shown

        self._updated = time.monotonic()
        before = len(self._lines) - _LINES
        lines = [*([f"… {before} lines before"] if before > 0 else []), *self._lines[-_LINES:]]
        text = html.escape("\n".join(lines))
        page = HTML(f"<pre style='white-space: pre-wrap; margin: 0'>{text}</pre>{self._status}")
        if self._handle is None:
            sys.stdout.flush()
            self._handle = shown(page, display_id=True)
        else:
            self._handle.update(page)
