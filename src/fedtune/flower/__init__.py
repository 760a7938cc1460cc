"""Federations across real sites, carried by Flower: an app for the server, and one for each site (docs/sites.md).

client_app.py       from fedtune.flower import client_app;  app = client_app()
server_app.py       from fedtune.flower import server_app;  app = server_app()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedtune.errors import UsageError

if TYPE_CHECKING:
    from fedtune.flower.client import client_app
    from fedtune.flower.server import server_app

__all__ = ["client_app", "server_app"]
_HOME = {"client_app": "client", "server_app": "server"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedtune.flower' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"fedtune.flower.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "flwr":
            raise
        raise UsageError("fedtune.flower", "no package flwr", "after: pip install 'fedtune[flower]'") from error
