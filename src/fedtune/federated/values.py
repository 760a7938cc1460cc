"""Parts, which are dataclasses, in plain values, as configurations, sweep files and flags say them, and back."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedtune.errors import UsageError, one_of


def plain(part: Any, where: str, registered: Mapping[str, type[Any]], strict: bool = True) -> dict[str, Any]:
    """The plain values of a part, with its name: that of its module, too, where it is not registered.

    Args:
        where: what an error names.
        strict: refuse what could not be told from something else; else it goes by what it prints.

    Raises:
        UsageError: it is no dataclass of plain values, or its class is defined within a function.
    """
    allowed = "a dataclass of plain values (numbers, text, lists of them) from the top of a module"
    if strict and not (dataclasses.is_dataclass(part) and "<locals>" not in type(part).__qualname__):
        raise UsageError(where, part, allowed)
    fields = dataclasses.fields(part) if dataclasses.is_dataclass(part) else ()
    values = {field.name: getattr(part, field.name) for field in fields}
    for name, value in values.items():
        if strict and not _is_plain(value):
            raise UsageError(f"{where}.{name}", value, allowed)
    known = registered.get(type(part).__name__) is type(part)
    name = type(part).__name__ if known else f"{type(part).__module__}.{type(part).__qualname__}"
    return {"name": name} | {key: _listed(value) if _is_plain(value) else repr(value) for key, value in values.items()}


def _listed(value: Any) -> Any:
    """Tuples as lists, which files have."""
    return [_listed(one) for one in value] if isinstance(value, (list, tuple)) else value


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (int, float, str, bool, type(None)))


def made(make: Callable[..., Any], values: Mapping[str, Any], where: str, also: Sequence[str] = ()) -> Any:
    """Call a class or function with values of the types that it wants.

    Args:
        where: what an error names.
        also: more names that are allowed there.

    Raises:
        UsageError: an unknown name, or a value that it does not take.
    """
    parameters, hints = inspect.signature(make).parameters, typing.get_type_hints(make)
    for name in values:
        if name not in parameters:
            raise one_of(f"{where}.{name}", values[name], [*parameters, *also] or ["nothing"], also=f" of {make.__name__}")
    try:
        return make(**{name: typed(value, hints.get(name), f"{where}.{name}") for name, value in values.items()})
    except UsageError as error:
        root = where.partition(".")[0]
        raise error.renamed(lambda name: name if name.startswith(root) else f"{where}.{name}") from error


def kind_and_values(given: Any, where: str, registered: Mapping[str, type[Any]]) -> tuple[type[Any], dict[str, Any]]:
    """The class that a name, or a dictionary with it and its values, means; and the values.

    Raises:
        UsageError: an unknown name, which is looked for in `where`.
    """
    values = {"name": given} if isinstance(given, str) else given
    if not isinstance(values, Mapping):
        raise UsageError(where, given, f"a name ({', '.join(registered)}), or a dictionary with it and its values")
    name = values.get("name")
    if not isinstance(name, str) or name not in registered:
        raise one_of(where, name, registered)
    return registered[name], {key: one for key, one in values.items() if key != "name"}


def named(given: Any, where: str, registered: Mapping[str, type[Any]], base: type[Any]) -> Any:
    """The part that a name, or a dictionary with it and its values, means; a part, and None, are what they are.

    Args:
        where: what an error names.
        base: what all such parts are.

    Raises:
        UsageError: an unknown name or parameter, or a value that it does not take.
    """
    if given is None or isinstance(given, base):
        return given
    return made(*kind_and_values(given, where, registered), where)


def typed(value: Any, hint: Any, where: str) -> Any:
    """A value as its type wants it; YAML takes 1e-3 for text, and lists stand for tuples."""
    if hint in (float, int) and not isinstance(value, bool):
        try:
            number = hint(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise UsageError(where, value, f"a number ({hint.__name__})") from error
        if number == value or isinstance(value, str):
            return number
    if hint in (float, int, bool, str):
        if type(value) is not hint:
            raise UsageError(where, value, {float: "a number", int: "a whole number", bool: "true or false", str: "text"}[hint])
        return value
    if hint == tuple[str, ...]:
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, (list, tuple)) or not all(isinstance(one, str) for one in given):
            raise UsageError(where, value, "texts")
        return tuple(given)
    if typing.get_origin(hint) is tuple and not isinstance(value, Mapping):
        if not isinstance(value, (list, tuple)):
            raise UsageError(where, value, "a list")
        return tuple(value)
    return value
