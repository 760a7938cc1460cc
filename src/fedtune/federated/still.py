"""What must not move while a client is trained, as it neither travels nor is kept: found out by looking."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import pytorch_lightning as pl
from torch import nn

from fedtune.errors import RunError
from fedtune.tensors import counters, digest, frozen

_LOG = logging.getLogger("fedtune")
_LIGHTNING = {*vars(pl.LightningModule()), "training"}  # what every module has


class Still:
    """Frozen parameters and plain attributes of a module, as they were before the first client.

    In-place changes are seen at every client by torch's count of them; those that it does not count (through `.data`), and
    those of plain attributes, at the first client.

    Args:
        moving: names of frozen parameters that each client gets from the server, so that they must not move within one.
    """

    def __init__(self, module: pl.LightningModule, moving: Collection[str] = ()) -> None:
        self._module, self._moving = module, moving
        self._versions = {name: tensor._version for name, tensor in frozen(module).items()}
        self._before: tuple[dict[str, str], dict[str, Any]] | None = None
        self._looked = False

    def begin(self) -> None:
        """Before a client."""
        if self._before is None:
            self._before = self._digests(), self._attributes()
        if self._moving:
            self._versions |= {name: one._version for name, one in frozen(self._module).items() if name in self._moving}

    def check(self, where: str) -> None:
        """After a client.

        Raises:
            RunError: a frozen parameter has moved; it is named.
        """
        now = frozen(self._module)
        moved = [name for name, version in self._versions.items() if name in now and now[name]._version != version]
        if self._before is not None and (moved or not self._looked):  # what was counted may have changed no value
            found = self._digests()
            given = [name for name in moved if name in self._moving] if self._looked else []  # since `begin`
            still = {name: value for name, value in self._before[0].items() if not (self._looked and name in self._moving)}
            moved = given + [name for name, value in still.items() if name in found and found[name] != value]
            self._versions = {name: tensor._version for name, tensor in now.items()}
            if not self._looked:
                self._looked = True
                self._say(self._before[1], where)
        if moved:
            raise RunError(
                f"{where}: training changed {moved[0]}, which is frozen, so it neither travels nor is kept; "
                "allowed: a buffer of floating-point numbers, which travels and is averaged"
            )

    def _say(self, before: dict[str, Any], where: str) -> None:
        now = self._attributes()
        changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
        if changed:
            _LOG.warning(
                f"{where}: training changed {', '.join(changed[:3])} of the module, which does not travel: a buffer that is no "
                "floating-point number starts alike for every client, an attribute is what the last client left"
            )

    def _digests(self) -> dict[str, str]:
        return {name: digest({name: tensor}) for name, tensor in frozen(self._module).items()}

    def _attributes(self) -> dict[str, Any]:
        """Numbers, extra state and counters of the module and its parts, but those of batch norms, which nothing depends on."""
        found: dict[str, Any] = {
            name: digest({name: tensor})
            for name, tensor in counters(self._module).items()
            if not name.endswith("num_batches_tracked")
        }
        for path, part in self._module.named_modules():
            for name, value in vars(part).items():
                if type(value) in (int, float, bool) and name not in _LIGHTNING and not name.startswith("_"):
                    found[f"{path}.{name}".lstrip(".")] = value
            if type(part).get_extra_state is not nn.Module.get_extra_state:
                found[f"{path}.extra_state".lstrip(".")] = repr(part.get_extra_state())
        return found
