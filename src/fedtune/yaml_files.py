"""YAML that somebody hands in, read by one set of rules, wherever it comes from.

Plain values only: mappings, lists, text, numbers, true, false, null. Each key once, no value left empty, no tags, no control
characters; at most 1 MB, 50 levels and 100,000 values, those behind aliases counted each time. Numbers are read as they are
meant, `1e-5` among them, which YAML 1.1 takes for text; dates and times stay text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedtune.errors import UsageError, shown

LARGEST, DEEPEST, MOST = 1_000_000, 50, 100_000  # bytes, levels, values
WHOLE = 2**63  # whole numbers are below it
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
# six digits before e: a hash like 12345678901234e5 is text; PyYAML itself wants a point, and a sign behind the e
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]{1,3})?
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]{1,3})?
    |[-+]?[0-9]{1,6}[eE][-+]?[0-9]{1,3}
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)
_INT = re.compile(r"^(?:[-+]?0b[01_]+|[-+]?0[0-7_]+|[-+]?(?:0|[1-9][0-9_]*)|[-+]?0x[0-9a-fA-F_]+)$")
_OWN = {"float": _FLOAT, "int": _INT, "timestamp": None}  # what of YAML 1.1 is read in another way


class YamlError(yaml.YAMLError):
    """What a text has that the rules do not allow; one line."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    yaml_implicit_resolvers = {  # noqa: RUF012 - the name is PyYAML's
        first: [(tag, found) for tag, found in resolvers if tag.rpartition(":")[2] not in _OWN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        known = set()
        for key in (self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
            if not isinstance(key, (str, int, float)):
                raise YamlError(f"the key {shown(key)}, line {node.start_mark.line + 1}: a name is text")
            if key in known:
                raise YamlError(f"the key {shown(key)} is there twice, in what begins at line {node.start_mark.line + 1}")
            known.add(key)
        for key, value in node.value:
            _not_empty(value, f"{shown(key.value)} has no value")
        return super().construct_mapping(node, deep=deep)

    def construct_sequence(self, node: Any, deep: bool = False) -> Any:
        for value in node.value:
            _not_empty(value, "an item of a list has no value")
        return super().construct_sequence(node, deep=deep)

    def construct_int(self, node: Any) -> Any:
        if len(node.value) > 80 or abs(number := self.construct_yaml_int(node)) >= WHOLE:
            raise YamlError(f"the number {shown(node.value)}, line {node.start_mark.line + 1}: whole numbers are below 2**63")
        return number


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that a reader by these rules, or by YAML 1.1, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value out wherever it is: readers refuse what stands for another."""
        return True


for _name, _pattern in _OWN.items():
    if _pattern is not None:
        for _class in (_Loader, _Dumper):
            _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


def read(file: str | Path, argument: str, allowed: str = "a YAML file that can be read") -> Any:
    """The content of a file; of one named .json by the rules of JSON, as W&B's agents write it.

    Raises:
        UsageError: about `argument`, with the file: it cannot be read, or breaks a rule.
    """
    try:
        path = Path(file)
        if path.exists() and not path.is_file():
            raise YamlError("no file, but a folder or a device")
        with open(path, "rb") as stream:
            raw = stream.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise YamlError(f"it is larger than {LARGEST // 10**6} MB")
        text = raw.decode("utf-8-sig")
        return parse(_rewritten(text) if path.suffix == ".json" else text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(argument, str(file), f"{allowed} ({_said(error)})") from error


def as_read(values: Any, argument: str) -> Any:
    """Values from Python as they would be read from a file; the rules are the same.

    Raises:
        UsageError: about `argument`: they are no plain values, or break a rule.
    """
    try:
        return parse(dump(values if not isinstance(values, Mapping) else dict(values)))
    except yaml.YAMLError as error:
        raise UsageError(argument, values, f"plain values, as a YAML file has them ({_said(error)})") from error


def parse(text: str) -> Any:
    """The value that a text in YAML means; None for an empty text.

    Raises:
        YamlError: it breaks a rule.

    >>> parse("{rate: 1e-5, day: 2020-01-01, sides: [no, 3]}")
    {'rate': 1e-05, 'day': '2020-01-01', 'sides': [False, 3]}
    """
    try:
        if len(text) > LARGEST:
            raise YamlError(f"it is longer than {LARGEST} characters")
        _measure(text)
        return yaml.load(text, Loader=_Loader)
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise YamlError(_said(error)) from error


def parse_or_text(text: str) -> Any:
    """The value that a text in YAML means, or the text itself where it is no YAML that can be read."""
    try:
        return parse(text)
    except YamlError:
        return text


def dump(values: Any) -> str:
    """Plain values as YAML, which `read` and every reader by YAML 1.1 take for the same values."""
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def _measure(text: str) -> None:
    """Look at a text without building anything: how many values it means and how deep they are, tags, odd characters."""
    known: dict[str, tuple[int, int]] = {}  # anchor -> values and levels of what it names
    opened: list[list[Any]] = [[None, 0, 0]]  # anchor, values, levels
    event: Any
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) is not None:
            raise YamlError(f"the tag {shown(event.tag)}, line {line}: values are plain")
        if isinstance(event, yaml.CollectionStartEvent):
            opened.append([event.anchor, 0, 0])
            values, levels = 0, len(opened)
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values, levels = opened.pop()
            values, levels = values + 1, levels + 1
            known |= {anchor: (values, levels)} if anchor else {}
        elif isinstance(event, yaml.ScalarEvent):
            if CONTROL.search(event.value):
                raise YamlError(f"a control character in {shown(event.value)}, line {line}")
            values, levels = 1, 0
            known |= {event.anchor: (1, 0)} if event.anchor else {}
        elif isinstance(event, yaml.AliasEvent):
            if any(event.anchor == anchor for anchor, _, _ in opened):
                raise YamlError(f"*{event.anchor} is within what it names, line {line}")
            values, levels = known.get(str(event.anchor), (1, 0))
        else:
            continue
        if not isinstance(event, yaml.CollectionStartEvent):
            opened[-1][1] += values
            opened[-1][2] = max(opened[-1][2], levels)
        if opened[-1][1] > MOST:
            raise YamlError(f"more than {MOST} values, line {line}")
        if len(opened) + levels > DEEPEST:
            raise YamlError(f"more than {DEEPEST} levels, line {line}")


def _not_empty(node: Any, said: str) -> None:
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null" and node.value == "":
        raise YamlError(f"{said}, line {node.start_mark.line + 1} (null is the word for none)")


def _rewritten(text: str) -> str:
    """JSON as YAML takes it: its surrogate pairs as the characters that they mean."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise YamlError("a key is there twice")
        return found

    whole: Callable[[str], Any] = lambda digits: int(digits) if len(digits) < 80 else _too_large(digits)  # noqa: E731
    try:
        return json.dumps(json.loads(text, object_pairs_hook=once, parse_int=whole), ensure_ascii=False)
    except json.JSONDecodeError:
        return text  # it may be YAML all the same
    except RecursionError as error:
        raise YamlError(f"more than {DEEPEST} levels") from error


def _too_large(digits: str) -> Any:
    raise YamlError(f"the number {shown(digits)}: whole numbers are below 2**63")


def _said(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, YamlError):
        return str(error)
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        return f"{error.problem}, line {mark.line + 1}" if mark else str(error.problem)
    if isinstance(error, UnicodeError):
        return "it is no text in UTF-8"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + "…"
