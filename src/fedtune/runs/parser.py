"""Flags whose every error is one line, and flags that go into a dictionary."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from fedtune.errors import UsageError
from fedtune.runs import renamed
from fedtune.storage.config import nested

Change = tuple[list[str], bool, Any]  # where in a dictionary, whether to append, the value


class Parser(ArgumentParser):
    """A parser whose every error is one line.

    `deep` names an argument that is a name, or a dictionary of any depth; its flags may name what is in it:
    `--loop.algorithm fedavgm --loop.algorithm.beta 0.5 --loop.algorithm.up+=Quantise`.
    """

    deep: str | None = None

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """The values of all flags; those within `deep` change what a configuration file says of it."""
        given = [renamed.flag(word) for word in (sys.argv[1:] if args is None else args)]
        if self.deep is not None:
            given, changes = _parted(given, f"--{self.deep}")
            if changes:
                plain = [flag for flag in given if not flag.startswith("--print_config")]
                value = super().parse_args(plain, *more, **options)[self.deep]
                for change in changes:
                    value = _changed(value, *change)
                given.append(f"--{self.deep}={value if isinstance(value, str) else json.dumps(value)}")
        return super().parse_args(given, *more, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the message, as one line."""
        text = " ".join(message.split())
        text = re.sub(r"^Group '(\S+)' does not accept option '(\S+)'.*", r"unrecognized arguments: --\1.\2", text)
        text = re.sub(r"^Option '(\S+)' is not accepted.*", r"unrecognized arguments: --\1", text)
        unknown = re.match(r"[Uu]nrecognized arguments: (--\S+)", text)
        if unknown:
            came = unknown.group(1).split("=")[0]
            near = difflib.get_close_matches(came, [flag for action in self._actions for flag in action.option_strings], n=3)
            text = f"{came}: no such flag; nearest: {', '.join(near) or 'none, see --help'}"
        text = re.sub(r'^Parser key "([^"]+)":', r"--\1:", text)
        text = re.sub(r"Expected an? <class '(\w+)'>\.? Got value: (\S+)", r"got '\2'; allowed: \1", text)
        print(f"fedtune: {text}", file=sys.stderr)
        raise SystemExit(2)


class ConfigFile(ActionConfigFile):
    """A YAML or JSON file with values of flags, nested or with dotted names (as an agent of W&B writes them)."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Take the values of a file."""
        try:
            content = yaml.safe_load(Path(values).read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise UsageError("--config", values, "a file with names and values")
            named = renamed.in_configuration(nested({str(key): value for key, value in content.items()}), values)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            parser.error(f"--config: got {values!r}; allowed: a YAML or JSON file that can be read ({error})")
        except UsageError as error:
            parser.error(str(error))
        super().__call__(parser, cfg, json.dumps(named, default=str), option_string)


def _parted(given: list[str], flag: str) -> tuple[list[str], list[Change]]:
    """The flags that have nothing to do with `flag`, and what those say that have.

    >>> _parted(["--seed", "1", "--a.b", "0.5", "--a=x", "--a.up+=Q"], "--a")
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
            changes.append(([part for part in path.split(".") if part], bool(append), _read(value)))
    return rest, changes


def _read(value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _changed(value: Any, path: list[str], append: bool, new: Any) -> Any:
    """A value after one flag. A text stands for {"name": text}; in a list of parts, the last one is meant.

    >>> _changed("fedavgm", ["beta"], False, 0.5)
    {'name': 'fedavgm', 'beta': 0.5}
    >>> _changed({"up": ["Quantise"]}, ["up", "bits"], False, 4)
    {'up': [{'name': 'Quantise', 'bits': 4}]}
    """
    if not path:
        parts = [] if value is None else value if isinstance(value, list) else [value]
        return [*parts, new] if append else new
    if isinstance(value, list):
        return [*value[:-1], _changed(value[-1] if value else None, path, append, new)]
    before = {"name": value} if isinstance(value, str) else dict(value or {})
    return {**before, path[0]: _changed(before.get(path[0]), path[1:], append, new)}
