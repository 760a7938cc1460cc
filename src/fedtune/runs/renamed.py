"""Arguments of `FederatedLoop` that have moved. Their old names work until version 0.3, with a line that says so."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from fedtune.errors import RenamedWarning, warn
from fedtune.runs.counterparts import from_trainer
from fedtune.runs.options import RunOptions

MOVED = {
    **{name: f"options.{name}" for name in ("keep", "progress", "baseline_dir", "agreement", "fast_dropout", "evaluation")},
    "weighting": "algorithm.weighting",
}


def in_configuration(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A configuration whose section `loop` has new names.

    Args:
        where: what the line names: the file.
    """
    loop = values.get("loop")
    old = [name for name in MOVED if isinstance(loop, Mapping) and name in loop]
    if not isinstance(loop, Mapping) or not old:
        return dict(values)
    _say([f"loop.{name}" for name in old], where)
    return {**values, "loop": _moved(loop, old)}


def flag(word: str) -> str:
    """A word of a command, its flag by its new name.

    >>> flag("--loop.options.keep=3"), flag("3")
    ('--loop.options.keep=3', '3')
    """
    found = re.fullmatch(r"--loop\.(\w+)(=.*)?", word, flags=re.DOTALL)
    if not found or found[1] not in MOVED:
        return word
    _say([f"--loop.{found[1]}"], "the command")
    return f"--loop.{MOVED[found[1]]}{found[2] or ''}"


def taken(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor of `FederatedLoop` that takes old names, too."""

    @functools.wraps(init)
    def __init__(self: Any, *positional: Any, **given: Any) -> None:
        old = [name for name in MOVED if name in given]
        if old:
            _say(old, "FederatedLoop")
            given = _moved(given, old)
            if isinstance(given.get("options"), Mapping):
                given["options"] = RunOptions(**given["options"])
        init(self, *positional, **from_trainer(given))

    return __init__


def _moved(loop: Mapping[str, Any], old: list[str]) -> dict[str, Any]:
    found = {name: value for name, value in loop.items() if name not in old}
    for name in old:
        part, _, last = MOVED[name].partition(".")
        before = found.get(part)
        if isinstance(before, str):
            before = {"name": before}
        elif isinstance(before, RunOptions):
            before = vars(before)
        found[part] = {**(before or {}), last: loop[name]}
    return found


def _say(old: list[str], where: str) -> None:
    names = ", ".join(f"{name} is now {_whole(name)}" for name in old)
    warn(f"{where}: {names}; the old name works until version 0.3", RenamedWarning)


def _whole(name: str) -> str:
    before, _, last = name.rpartition("loop.")
    return f"{before}loop.{MOVED[last]}" if "loop." in name else MOVED[last]
