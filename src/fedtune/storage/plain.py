"""Values as YAML keeps them, each with a name by which another start knows it again."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtune.tensors import digest


class Unnamed(str):
    """What stands for a value that nobody could know again: a lambda, an object with an address."""


def plain(values: Any) -> Any:
    """Values as YAML keeps them: numbers, text, lists and dictionaries; functions and classes by their full name, tensors and
    arrays by shape, type and a digest of their content.

    >>> plain({"sizes": (1, 2.0), "names": {"b", "a"}})
    {'sizes': [1, 2.0], 'names': ['a', 'b']}
    """
    if isinstance(values, Mapping):
        return {str(key): plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    if isinstance(values, (set, frozenset)):  # their order is another one in each process
        return sorted(map(plain, values), key=lambda value: json.dumps(value, default=str))
    if isinstance(values, np.generic):
        return plain(values.item())
    if values is None or type(values) in (bool, int, float, str, Unnamed):
        return values
    if isinstance(values, (int, float, str)):  # of a class of its own, which YAML does not know
        own = getattr(values, "value", values)
        return int(own) if isinstance(values, int) else float(own) if isinstance(values, float) else str(own)
    if hasattr(values, "__array__"):
        return _of_array(values)
    name = f"{getattr(values, '__module__', None)}.{getattr(values, '__qualname__', '<')}"
    if "<" not in name:  # <lambda>, <locals>, or none
        return name
    return Unnamed(repr(values)) if " at 0x" in repr(values) else repr(values)


def class_of(part: Any) -> dict[str, str]:
    """The name of an object's class, and where that is from; nothing of the latter where it was typed in."""
    name = type(part).__module__
    if name in ("__main__", "__mp_main__"):
        main = sys.modules[name]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        name = spec.name if spec is not None else Path(file).stem if file else ""
    return {"class": type(part).__name__} | ({"from": name} if name else {})


def _of_array(values: Any) -> str:
    """What names a tensor, an array or a table."""
    if isinstance(values, torch.Tensor):
        whole = values.detach().to_dense() if values.layout != torch.strided else values.detach()
        return f"tensor {tuple(whole.shape)} {whole.dtype} {digest({'': whole})}"
    array = np.asarray(values)
    if array.dtype.hasobject:
        content = json.dumps(array.tolist(), default=repr).encode()
    else:
        content = np.ascontiguousarray(array).tobytes()
    return f"{type(values).__name__} {array.shape} {array.dtype} {hashlib.sha256(content).hexdigest()[:16]}"
