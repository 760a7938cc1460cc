"""The `command` of a sweep file, which W&B's agents run as it is written: its flags hold here, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedtune.errors import UsageError
from fedtune.sweeps.parameters import OWN
from fedtune.yaml_files import parse_or_text

PROGRAMS = ("fedtune", "fedtune.cli")
_BEFORE = ("${env}", "/usr/bin/env", "${interpreter}", "${program}", "python", "python3", "-m", "run", *PROGRAMS)
_SHAPE = "words like ${env} fedtune run --config ${args_json_file} --data.limit=100 (or ${args}), with flags of fedtune run"


def words_of(command: Any) -> list[str]:
    """The flags in a command beside those by which a cell's values come.

    Raises:
        UsageError: it runs something else, or does not take the values of a cell.
    """
    if not isinstance(command, list) or not all(isinstance(word, (str, int, float)) for word in command):
        raise UsageError("command", command, _SHAPE)
    words = [str(word) for word in command]
    start = next(
        (number for number, word in enumerate(words) if word.startswith("--") or word.startswith("${args")), len(words)
    )
    before, after = words[:start], words[start:]
    if any(word not in _BEFORE for word in before) or before[-1:] != ["run"]:
        raise UsageError("command", command, _SHAPE)
    rest: list[str] = []
    taken = False
    while after:
        word = after.pop(0)
        if word == "${args}" or (word == "--config" and after[:1] == ["${args_json_file}"]):
            taken, after = True, after[1:] if word == "--config" else after
        elif word == "--config=${args_json_file}":
            taken = True
        else:
            rest.append(word)
    if not taken or any("${" in word for word in rest):
        raise UsageError("command", command, _SHAPE)
    return rest


def flags_of(words: Sequence[str]) -> dict[str, Any]:
    """Name -> value, of flags in a command.

    Raises:
        UsageError: a word that is no flag with a value, or one on which the sweep decides.

    >>> flags_of(["--data.limit=10", "--model.name", "bert"])
    {'data.limit': 10, 'model.name': 'bert'}
    """
    found: dict[str, Any] = {}
    waiting = iter(words)
    for word in waiting:
        flag, separator, value = word.partition("=")
        name = flag.removeprefix("--")
        given = value if separator else next(waiting, None)
        if name == flag or given is None or name.endswith("+"):
            raise UsageError("command", word, "flags of fedtune run, each with a value")
        if name in OWN:
            raise UsageError("command", word, f"flags of a run but {', '.join(OWN)}; fedtune sweep has --runs_dir and --wandb")
        if name in found:
            raise UsageError("command", word, "each flag once")
        found[name] = parse_or_text(given)
    return found
