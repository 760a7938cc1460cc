"""A sweep file, wherever it comes from: a path, one that comes with fedtune, or its content from Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune import yaml_files
from fedtune.errors import UsageError
from fedtune.experiments import located

File = str | Path | Mapping[str, Any]
_ARGUMENT = "sweep file"


def load(file: File) -> dict[str, Any]:
    """The content of a sweep file. Raises `UsageError` when it is none."""
    if isinstance(file, Mapping):
        content = yaml_files.as_read(file, _ARGUMENT)
    else:
        content = yaml_files.read(located(str(file), _ARGUMENT), _ARGUMENT)
    if not isinstance(content, dict) or not isinstance(content.get("parameters"), dict):
        raise UsageError(_ARGUMENT, said_of(file), "YAML with `method` and `parameters`")
    return content


def said_of(file: File) -> str:
    """What a line calls the file."""
    return "the sweep" if isinstance(file, Mapping) else str(file)


def stem(file: File) -> str:
    """What a sweep without a name of its own is called.

    >>> stem("fedtune:first_results/spooky"), stem("mine/small.yaml"), stem({})
    ('spooky', 'small', 'sweep')
    """
    return "sweep" if isinstance(file, Mapping) else Path(located(str(file), _ARGUMENT)).stem
