"""Flags whose every error is one line, and flags that go into a dictionary."""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_dumper, set_loader

from fedtune import yaml_files
from fedtune.errors import UsageError, shown
from fedtune.experiments import located
from fedtune.runs import renamed
from fedtune.runs.words import IMPORT, changed, imports_as_one, parted
from fedtune.storage.config import nested

_IMPORTING = ("class_path", "init_args", "dict_kwargs")  # with these, jsonargparse imports what a value names
_OWN_MODULE = ("model.class_path", "model.init_args")  # the one place where a value names a class: that of the module
_BY_CLASS_PATH = "a module that a command can build: --model.class_path, with --model.init_args; or go on in Python"
_SEEDS = ("data.seed", "model.seed", "loop.seed")
_LONGEST = 500  # characters of a message
_MODE = "fedtune"

set_loader(_MODE, yaml_files.parse, (yaml.YAMLError,))
set_dumper(_MODE, yaml_files.dump)


class Refusal(SystemExit):
    """The end of a command whose arguments cannot be used, with exit code 2.

    Args:
        text: why, in a line.
    """

    def __init__(self, text: str) -> None:
        super().__init__(2)
        self.text = text


class Parser(ArgumentParser):
    """A parser whose every error is one line, and whose values are plain.

    `deep` names arguments that are a name, or a dictionary of any depth; their flags may name what is in it:
    `--loop.algorithm fedavgm --loop.algorithm.beta 0.5 --loop.algorithm.up+=Quantise`.
    """

    deep: tuple[str, ...] = ()
    where: str | None = None  # the file that is being read
    of_data: bool = False  # whether the command looks at the data alone, so that any module's configuration will do

    def __init__(self, *positional: Any, **options: Any) -> None:
        super().__init__(*positional, parser_mode=_MODE, **options)

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """The values of all flags; those within `deep` change what a configuration file says of it."""
        given = [renamed.flag(word) for word in (sys.argv[1:] if args is None else args)]
        self._check_words(given)
        given = imports_as_one(self._whole_sections(given))
        for name in self.deep:
            given, changes = parted(given, f"--{name}")
            if changes:
                plain = [flag for flag in given if not flag.startswith("--print_config")]
                value = super().parse_args(plain, *more, **options)[name]
                for change in changes:
                    value = changed(value, *change)
                given.append(f"--{name}={value if isinstance(value, str) else yaml_files.dump(value)}")
        plain = [word for word in given if not word.startswith("--print_config")]
        found = self.checked(super().parse_args(plain, *more, **options))
        return found if plain == given else super().parse_args(given, *more, **options)

    def check_content(self, content: Mapping[str, Any], where: str, prefix: str = "") -> None:
        """Check nested values of flags: their names, that a section has names, that no value is missing or imported.

        Args:
            where: what the line names: the file.

        Raises:
            UsageError, Refusal: for another content.
        """
        self.where = where
        if not prefix and content.get("seed") is not None:
            for section in (one.partition(".")[0] for one in _SEEDS):
                if (
                    isinstance(content.get(section), Mapping)
                    and content[section].get("seed", content["seed"]) != content["seed"]
                ):
                    raise UsageError(
                        f"{where}: {section}.seed", content[section]["seed"], "nothing beside seed, which sets all three"
                    )
        if prefix == "model." and "class" in content:
            raise UsageError(f"{where}: model", _class_of(content), _BY_CLASS_PATH)
        known, sections = {action.dest: action for action in self._actions}, self._sections()
        for key, value in content.items():
            name = f"{prefix}{key}"
            if name in sections:
                if not isinstance(value, Mapping):
                    raise UsageError(f"{where}: {name}", value, f"names and values, as in {{{name}: {{name: value}}}}")
                self.check_content(value, where, f"{name}.")
            elif name not in known:
                self.error(f"unrecognized arguments: --{name}")
            else:
                self._check_value(known[name], value)
        for name in _names(content, prefix):
            if name in _IMPORTING:
                raise UsageError(where, name, "names of flags, with plain values")
        self.where = None

    def checked(self, found: Namespace) -> Namespace:
        """The values, none of them missing where one is needed, nor one that no run could use or keep."""
        for action in self._actions:
            if action.dest in found:
                self._check_value(action, found[action.dest])
        return found

    def _check_value(self, action: Any, value: Any) -> None:
        hint = getattr(action, "_typehint", None)
        if hint is None:
            return
        try:
            check_plain(f"--{action.dest}", value)
        except UsageError as error:
            self.error(str(error))
        if value is None and action.default is not None and type(None) not in typing.get_args(hint):
            self.error(f"--{action.dest}: got null; allowed: {_named(hint)}")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `Refusal` with the message, as one line."""
        text = " ".join(message.split())
        text = re.sub(r"^Group '(\S+)' does not accept option '(\S+)'.*", r"unrecognized arguments: --\1.\2", text)
        text = re.sub(r"^Option '(\S+)' is not accepted.*", r"unrecognized arguments: --\1", text)
        unknown = re.match(r"[Uu]nrecognized arguments: (--\S+)", text)
        if unknown:
            came = unknown.group(1).split("=")[0]
            near = difflib.get_close_matches(
                came[:_LONGEST], [one for known in self._actions for one in known.option_strings], 3
            )
            text = f"{cut(came)}: no such flag; nearest: {', '.join(near) or 'none, see --help'}"
        text = re.sub(r'^Parser key "([^"]+)":', r"--\1:", text)
        text = re.sub(r"Does not validate against any of .*? Subtypes: \[(.*?)\] Errors: .* Given value: ?(.*)", _of_many, text)
        text = re.sub(r"Expected an? <class '([\w.]+)'>\.? Got value: ?(.*)", _of_one, text)
        raise Refusal(f"{cut(f'{self.where}: ' if self.where else '')}{cut(text, _LONGEST)}") from ex

    def _sections(self) -> list[str]:
        return [action.dest for action in self._actions if type(action).__name__ == "_ActionConfigLoad"]

    def _whole_sections(self, words: list[str]) -> list[str]:
        """Words whose values of whole sections (`--loop.options '{keep: 3}'`, or a file with it) are plain dictionaries."""
        sections = {f"--{name}" for name in self._sections()}
        found, waiting = [], iter(words)
        for word in waiting:
            flag, separator, value = word.partition("=")
            if flag in sections:
                value = value if separator else next(waiting, "")
                try:
                    is_file = Path(value).is_file()
                except (OSError, ValueError):
                    is_file = False
                content = yaml_files.read(value, flag) if is_file else yaml_files.parse_or_text(value)
                if not isinstance(content, dict):
                    self.error(str(UsageError(flag, content, "a dictionary of names and values, or a file with one")))
                self.check_content(nested({f"{flag[2:]}.{key}": one for key, one in content.items()}), flag)
                word = f"{flag}={json.dumps(content)}"
            found.append(word)
        return found

    def _check_words(self, words: Sequence[str]) -> None:
        """End for a flag that is given twice with different values, and for words that are no text."""
        for word in words:
            flag = cut(word.partition("=")[0])
            if len(word) > yaml_files.LARGEST or yaml_files.CONTROL.search(word):
                self.error(str(UsageError(flag, word, "text in UTF-8 without control characters, at most 1 MB")))
            if re.fullmatch(r"(--[\w.]+=)?[-+]?[0-9_]{80,}", word):
                self.error(str(UsageError(flag, word, "whole numbers below 2**63")))
        before: dict[str, str | None] = {}
        waiting = iter(words)
        for word in waiting:
            flag, separator, value = word.partition("=")
            action = self._option_string_actions.get(flag)
            once = flag.startswith("--") and not flag.endswith("+") and not isinstance(action, ActionConfigFile)
            once = once and flag != IMPORT
            if not once or type(action).__name__ in ("_AppendAction", "_StoreTrueAction") or (action and action.nargs == 0):
                continue
            came = value if separator else next(waiting, None)
            if flag in before and before[flag] != came:
                self.error(f"{cut(flag)}: got {shown(before[flag])} and {shown(came)}; allowed: one value")
            before[flag] = came
        for flag in _SEEDS:
            if "--seed" in before and before.get(f"--{flag}", before["--seed"]) != before["--seed"]:
                self.error(f"--{flag}: got {shown(before[f'--{flag}'])}; allowed: nothing beside --seed, which sets all three")


class ConfigFile(ActionConfigFile):
    """A YAML or JSON file with values of flags, nested or with dotted names (as an agent of W&B writes them)."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Take the values of a file."""
        try:
            content = yaml_files.read(located(values, "--config"), "--config", "a YAML or JSON file that can be read")
            if not isinstance(content, dict):
                raise UsageError("--config", values, "a file with names and values")
            named = renamed.in_configuration(nested({str(key): value for key, value in content.items()}), values)
            named = _as_data(named, values) if parser.of_data else named
            parser.check_content(named, values)
        except UsageError as error:
            parser.error(str(error))
        parser.where = values
        super().__call__(parser, cfg, yaml_files.dump(named), option_string)
        parser.where = None


def check_plain(name: str, value: Any) -> None:
    """Raise `UsageError` for what no run can use or keep, at any depth: NaN, infinity, numbers without end, no text."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            check_plain(f"{name}.{cut(str(key))}", one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            check_plain(name, one)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UsageError(name, value, "a finite number")
    elif isinstance(value, int) and abs(value) >= yaml_files.WHOLE:
        raise UsageError(name, float(value) if abs(value) < 10**300 else "a number of many digits", "below 2**63")
    elif isinstance(value, str) and re.search("[\x00\ud800-\udfff]", value):
        raise UsageError(name, value, "text in UTF-8")


def cut(text: str, longest: int = 200) -> str:
    """A text of at most so many characters, and a sign where there were more.

    >>> cut("abcdef", 3)
    'abc…'
    """
    return text if len(text) <= longest else text[:longest] + "…"


def _names(content: Any, prefix: str = "") -> typing.Iterator[Any]:
    """All names in nested values, but those that name the module's class."""
    if isinstance(content, Mapping):
        yield from (name for name in content if f"{prefix}{name}" not in _OWN_MODULE)
        for name, one in content.items():
            yield from _names(one, f"{prefix}{name}.")
    elif isinstance(content, list):
        for one in content:
            yield from _names(one, "[].")


def _class_of(model: Mapping[str, Any]) -> str:
    """The class that a run's configuration names, where the run was begun in Python."""
    return ".".join(str(model[key]) for key in ("from", "class") if key in model)


def _as_data(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The configuration of a run of any module, for who looks at the data alone: of the module only whose tokens they are.

    Raises:
        UsageError: the data are of a class of one's own.
    """
    data, model = values.get("data"), values.get("model")
    if isinstance(data, Mapping) and "class" in data:
        raise UsageError(f"{where}: data", _class_of(data), "data of a FederatedDataModule")
    if not isinstance(model, Mapping) or "class" not in model:
        return values
    name = data.get("tokenizer") if isinstance(data, Mapping) else None
    return {**values, "model": {} if name is None else {"name": name}}


_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}


def _named(hint: Any) -> str:
    """A type in words."""
    name = getattr(hint, "__name__", str(hint))
    return _WORDS.get(name, str(hint))


def _of_many(found: re.Match[str]) -> str:
    names = [name.rpartition(".")[2] for name in re.findall(r"[\w.]+(?=')|(?<= )[\w.]+(?=\[)|^[\w.]+(?=\[)", found[1])]
    allowed = [_WORDS.get(name, {"dict": "a dictionary"}.get(name, name)) for name in names if name not in ("class", "Literal")]
    return f"got {cut(found[2])!r}; allowed: {', '.join(allowed) or cut(found[1])}"


def _of_one(found: re.Match[str]) -> str:
    name = found[1].rpartition(".")[2]
    return f"got {cut(found[2])!r}; allowed: {_WORDS.get(name, {'Sequence': 'a list'}.get(name, name))}"
