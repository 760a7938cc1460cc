"""An algorithm in plain values, as configurations, sweep files and flags say it, and back.

    fedavgm                                                    a name of ALGORITHMS
    {name: fedavgm, beta: 0.5}                                 with its parameters
    {client: {name: LocalTraining}, aggregator: {weighting: uniform}, up: [Quantise]}       FedAvg with other parts

Parts are named as in ALGORITHM_PARTS. A part without a name is the one that is there, with other values.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedtune.algorithms import ALGORITHM_PARTS, ALGORITHMS
from fedtune.errors import UsageError, one_of
from fedtune.federated.parts import ROLES, Algorithm

MANY = ("server", "up", "down")  # roles of which an algorithm has any number of parts


def algorithm_of(given: Any) -> Algorithm:
    """The algorithm that a name, plain values or an `Algorithm` mean.

    Raises:
        UsageError: an unknown name, part or parameter, or a value that it does not take.
    """
    if isinstance(given, Algorithm):
        return given
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping):
        raise UsageError("algorithm", given, f"a name ({', '.join(ALGORITHMS)}), or a dictionary with parts and their values")
    name = given.get("name", "fedavg")
    if name not in ALGORITHMS:
        raise one_of("algorithm", name, ALGORITHMS)
    takes = inspect.signature(ALGORITHMS[name]).parameters
    parts = {role: given[role] for role in (*ROLES, "personal") if role not in takes and given.get(role) is not None}
    values = {key: value for key, value in given.items() if key not in ROLES and key not in parts and key != "name"}
    found = _made(ALGORITHMS[name], values, "algorithm", also=(*ROLES, "personal"))
    if not isinstance(found, Algorithm):
        raise UsageError("algorithm", name, "a function that returns a fedtune.Algorithm")
    return dataclasses.replace(found, **{role: _role(role, one, getattr(found, role)) for role, one in parts.items()})


def specification_of(algorithm: Algorithm, strict: bool = True) -> dict[str, Any]:
    """The plain values of an algorithm: all its parts, with all their values.

    A part that is registered goes by its name, another by the name of its module, too.

    Args:
        strict: refuse what could not be told from something else; else it goes by what it prints.

    Raises:
        UsageError: a part is no dataclass of plain values, or its class is defined within a function.
    """
    found = {role: getattr(algorithm, role) for role in ROLES}
    personal = {"personal": list(algorithm.personal)} if algorithm.personal else {}
    return personal | {
        role: [_plain(role, one, strict) for one in part] if role in MANY else _plain(role, part, strict)
        for role, part in found.items()
    }


def _plain(role: str, part: Any, strict: bool) -> dict[str, Any]:
    allowed = "a dataclass of plain values (numbers, text, lists of them) from the top of a module"
    if strict and not (dataclasses.is_dataclass(part) and "<locals>" not in type(part).__qualname__):
        raise UsageError(f"algorithm.{role}", part, allowed)
    fields = dataclasses.fields(part) if dataclasses.is_dataclass(part) else ()
    values = {field.name: getattr(part, field.name) for field in fields}
    for name, value in values.items():
        if strict and not _is_plain(value):
            raise UsageError(f"algorithm.{role}.{name}", value, allowed)
    registered = ALGORITHM_PARTS.get(type(part).__name__) is type(part)
    name = type(part).__name__ if registered else f"{type(part).__module__}.{type(part).__qualname__}"
    return {"name": name} | {
        key: list(value) if isinstance(value, tuple) else value if _is_plain(value) else repr(value)
        for key, value in values.items()
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (int, float, str, bool, type(None)))


def _role(role: str, given: Any, before: Any) -> Any:
    """The part, or parts, of a role."""
    if role == "personal":
        return _typed(given, tuple[str, ...], "algorithm.personal")
    if role not in MANY:
        return _part(role, given, before)
    parts = [given] if isinstance(given, (str, Mapping)) else given
    if not isinstance(parts, Sequence):
        raise UsageError(f"algorithm.{role}", given, "a list of parts")
    return tuple(_part(role, one, None) for one in parts)


def _part(role: str, given: Any, before: Any) -> Any:
    base = ROLES[role]
    if isinstance(given, base):
        return given
    values = {"name": given} if isinstance(given, str) else given
    fitting = [name for name, part in ALGORITHM_PARTS.items() if issubclass(part, base)]
    if not isinstance(values, Mapping):
        raise UsageError(f"algorithm.{role}", given, f"a part ({', '.join(fitting)}), or a dictionary with its name and values")
    others = {key: value for key, value in values.items() if key != "name"}
    if "name" not in values and before is not None:
        mine = {field.name: getattr(before, field.name) for field in dataclasses.fields(before)}
        return _made(type(before), mine | others, f"algorithm.{role}")
    if values.get("name") not in fitting:
        raise one_of(f"algorithm.{role}", values.get("name"), fitting)
    return _made(ALGORITHM_PARTS[values["name"]], others, f"algorithm.{role}")


def _made(make: Callable[..., Any], values: Mapping[str, Any], where: str, also: Sequence[str] = ()) -> Any:
    """Call a class or function with values of the types that it wants."""
    parameters, hints = inspect.signature(make).parameters, typing.get_type_hints(make)
    for name in values:
        if name not in parameters:
            raise one_of(f"{where}.{name}", values[name], [*parameters, *also] or ["nothing"], also=f" of {make.__name__}")
    try:
        return make(**{name: _typed(value, hints.get(name), f"{where}.{name}") for name, value in values.items()})
    except UsageError as error:
        if error.argument.startswith("algorithm"):
            raise
        raise UsageError(f"{where}.{error.argument}", error.came, error.allowed) from error


def _typed(value: Any, hint: Any, where: str) -> Any:
    """A value as its type wants it; YAML takes 1e-3 for text, and lists stand for tuples."""
    if hint in (float, int) and not isinstance(value, bool):
        try:
            number = hint(value)
        except (TypeError, ValueError) as error:
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
    return tuple(value) if isinstance(value, list) and typing.get_origin(hint) is tuple else value
