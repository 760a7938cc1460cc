"""`setup` and `teardown` of a module and its data, as a `Trainer` calls them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl


class Stages:
    """Calls `setup` of data and module once a stage, and `teardown` for each in the end.

    Args:
        parts: data and module, those that have such hooks.
    """

    def __init__(self, *parts: Any) -> None:
        self._parts = [part for part in parts if hasattr(part, "setup")]
        self._begun: list[str] = []
        self.used: list[Any] = []  # iterators that were gone through

    def begin(self, stage: str) -> None:
        """`setup` of a stage that has not begun."""
        if stage not in self._begun:
            self._begun.append(stage)
            for part in self._parts:
                part.setup(stage)

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """Inside the block an error is reported to the data; at its end comes `teardown` of all stages that have begun."""
        try:
            yield
        except BaseException as error:
            for part in self._parts:
                if isinstance(part, pl.LightningDataModule):
                    part.on_exception(error)
            raise
        finally:
            for stage in self._begun:
                for part in (one for one in self._parts if hasattr(one, "teardown")):
                    part.teardown(stage)
