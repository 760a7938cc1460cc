"""One run of a sweep, and what it is called."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from fedtune.runs import flags


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Args:
        arguments: of data module, model and loop, complete.
        varied: flat key -> value, of what differs between cells.
    """

    arguments: dict[str, dict[str, Any]]
    varied: dict[str, Any]

    @functools.cached_property
    def name(self) -> str:
        """The name of its directory."""
        return flags.name_of(self.arguments)

    @property
    def title(self) -> str:
        """What it is, for a reader: the values that differ between cells."""
        return ", ".join(f"{key.removesuffix('.name').rpartition('.')[2]} {value}" for key, value in self.varied.items())
