"""Words of a command that are put together before they are parsed: flags into a dictionary, and what is imported."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fedtune import yaml_files

IMPORT = "--import"
Change = tuple[list[str], bool, Any]  # where in a dictionary, whether to append, the value


def listed(names: list[str] | str | None) -> list[str]:
    """What a flag or a file says of `import`, as a list.

    >>> listed("mine"), listed(None)
    (['mine'], [])
    """
    return [names] if isinstance(names, str) else list(names or ())


def imports_as_one(words: list[str]) -> list[str]:
    """Words in which all that is to be imported is one flag.

    >>> imports_as_one(["--import", "mine", "--seed=1", "--import=yours"])
    ['--seed=1', '--import=["mine", "yours"]']
    """
    found, imported, waiting = [], [], iter(words)
    for word in waiting:
        flag, separator, value = word.partition("=")
        if flag != IMPORT:
            found.append(word)
            continue
        came = value if separator else next(waiting, None)
        if came is None:
            return [*found, word]  # no value follows; the parser says so
        imported.append(came)
    return [*found, f"{IMPORT}={json.dumps(imported)}"] if imported else found


def parted(given: list[str], flag: str) -> tuple[list[str], list[Change]]:
    """The flags that have nothing to do with `flag`, and what those say that have.

    >>> parted(["--seed", "1", "--a.b", "0.5", "--a=x", "--a.up+=Q"], "--a")
    (['--seed', '1'], [(['b'], False, 0.5), ([], False, 'x'), (['up'], True, 'Q')])
    """
    rest: list[str] = []
    changes: list[Change] = []
    waiting = iter(given)
    for word in waiting:
        found = re.fullmatch(re.escape(flag) + r"((?:\.\w+)*)(\+?)(?:=(.*))?", word, flags=re.DOTALL)
        if not found:
            rest.append(word)
            continue
        path, append, value = found.groups()
        value = next(waiting, None) if value is None else value
        if value is None:
            rest.append(word)  # no value follows; the parser says so
        else:
            changes.append(([part for part in path.split(".") if part], bool(append), yaml_files.parse_or_text(value)))
    return rest, changes


def changed(value: Any, path: list[str], append: bool, new: Any) -> Any:
    """A value after one flag. A text stands for {"name": text}; in a list of parts, the last one is meant.

    >>> changed("fedavgm", ["beta"], False, 0.5)
    {'name': 'fedavgm', 'beta': 0.5}
    >>> changed({"up": ["Quantise"]}, ["up", "bits"], False, 4)
    {'up': [{'name': 'Quantise', 'bits': 4}]}
    """
    if not path:
        parts = [] if value is None else value if isinstance(value, list) else [value]
        return [*parts, new] if append else new
    if isinstance(value, list):
        return [*value[:-1], changed(value[-1] if value else None, path, append, new)]
    if value is not None and not isinstance(value, (str, Mapping)):
        return value  # a number has nothing in it; who takes the value says so
    before = {"name": value} if isinstance(value, str) else dict(value or {})
    return {**before, path[0]: changed(before.get(path[0]), path[1:], append, new)}
