"""Values that were read from a file, each as it was written: of the right type, and in its range."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedtune.errors import shown

Check = Callable[[str, Any], Any]


def checked(found: Mapping[str, Any], form: Mapping[str, Check], optional: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a form, each checked under its name; what is `optional` may be missing.

    Raises:
        ValueError: a value is missing, or is none of those allowed.
    """
    if not form.keys() <= found.keys():
        missing = [name for name in form if name not in found and name not in optional]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing")
    return {name: check(name, found[name]) for name, check in form.items() if name in found}


def count(name: str, value: Any) -> int:
    """A whole number, 0 or more, which 64 bits hold."""
    if type(value) is int and 0 <= value < 2**63:
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise _wrong(name, value, "a whole number, 0 or more,")
    return value


def finite(name: str, value: Any) -> float:
    """A finite number."""
    if type(value) is float and math.isfinite(value):  # nearly all are
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _is_finite(value):
        raise _wrong(name, value, "a finite number")
    return value


def not_negative(name: str, value: Any) -> float:
    """A finite number, 0 or more."""
    if finite(name, value) < 0:
        raise _wrong(name, value, "a number, 0 or more,")
    return float(value)


def measured(name: str, value: Any) -> float:
    """A number that need not be finite; files have null for those that are not."""
    if value is None or isinstance(value, float):
        return math.nan if value is None else value
    return float(finite(name, value))


def length(name: str, value: Any) -> float:
    """A number, 0 or more, that need not be finite."""
    if measured(name, value) < 0:
        raise _wrong(name, value, "a number, 0 or more,")
    return measured(name, value)


def finite_or_none(name: str, value: Any) -> float | None:
    """A finite number, or null where it is not known."""
    return None if value is None else finite(name, value)


def text(name: str, value: Any) -> str:
    """Text."""
    if not isinstance(value, str):
        raise _wrong(name, value, "text")
    return value


def listed(name: str, value: Any) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise _wrong(name, value, "a list")
    return value


def finite_or_none_each(name: str, value: Any) -> list[float | None]:
    """A list of finite numbers, null where one is not known."""
    return [
        one if type(one) is float and math.isfinite(one) else finite_or_none(f"{name}[{number}]", one)  # nearly all are
        for number, one in enumerate(listed(name, value))
    ]


def measured_by_name(name: str, value: Any) -> dict[str, float]:
    """Numbers by name."""
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object")
    return {key: one if type(one) is float else measured(f"{name}.{key}", one) for key, one in value.items()}


def clients_by_name(name: str, value: Any) -> dict[str, list[int]]:
    """Numbers of clients by name."""
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object")
    return {key: [count(f"{name}.{key}", one) for one in listed(f"{name}.{key}", many)] for key, many in value.items()}


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that is too large for a float
        return False


def _wrong(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{name} is {shown(value)}, where {allowed} belongs")
