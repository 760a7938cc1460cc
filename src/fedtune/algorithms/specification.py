"""An algorithm in plain values, as configurations, sweep files and flags say it, and back.

    fedavgm                                                    a name of ALGORITHMS
    {name: fedavgm, beta: 0.5}                                 with its parameters
    {client: {name: LocalTraining}, aggregator: {weighting: uniform}, up: [Quantise]}       FedAvg with other parts

Parts are named as in ALGORITHM_PARTS. A part without a name is the one that is there, with other values.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.algorithms import ALGORITHM_PARTS, ALGORITHMS
from fedtune.errors import UsageError, one_of
from fedtune.federated.parts import ROLES, Algorithm
from fedtune.federated.values import made, plain, typed

MANY = ("server", "up", "down")  # roles of which an algorithm has any number of parts
_NAMES = ("personal", "frozen")  # not parts, but names of tensors


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
    if not isinstance(name, str) or name not in ALGORITHMS:
        raise one_of("algorithm", name, ALGORITHMS)
    takes = inspect.signature(ALGORITHMS[name]).parameters
    parts = {role: given[role] for role in (*ROLES, *_NAMES) if role not in takes and given.get(role) is not None}
    values = {key: value for key, value in given.items() if key not in ROLES and key not in parts and key != "name"}
    found = made(ALGORITHMS[name], values, "algorithm", also=(*ROLES, *_NAMES))
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
    names = {role: list(getattr(algorithm, role)) for role in _NAMES if getattr(algorithm, role)}
    return names | {
        role: [plain(one, f"algorithm.{role}", ALGORITHM_PARTS, strict) for one in part]
        if role in MANY
        else plain(part, f"algorithm.{role}", ALGORITHM_PARTS, strict)
        for role, part in found.items()
    }


def _role(role: str, given: Any, before: Any) -> Any:
    """The part, or parts, of a role."""
    if role in _NAMES:
        return typed(given, tuple[str, ...], f"algorithm.{role}")
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
        return made(type(before), mine | others, f"algorithm.{role}")
    if not isinstance(values.get("name"), str) or values["name"] not in fitting:
        raise one_of(f"algorithm.{role}", values.get("name"), fitting)
    return made(ALGORITHM_PARTS[values["name"]], others, f"algorithm.{role}")
