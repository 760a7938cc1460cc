"""The model of one client of a run, where clients keep a part of it, or a whole one, to themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.errors import RunError, UsageError, shown
from fedtune.federated.memory import MemoryOnDisk
from fedtune.storage import checkpoint
from fedtune.storage.records import read_rounds
from fedtune.tensors import Tensors


def own_weights(run: Path, config: Mapping[str, Any], number: int, which: str, client: int | None) -> Tensors:
    """What a client has in place of the server's weights after the last round; nothing where no client is chosen.

    Raises:
        UsageError: no such client, one that has nothing of its own, or none chosen of a run whose server has no whole model.
        RunError: the files of the client's memory are damaged.
    """
    parts, clients = _parts(config), (config.get("data") or {}).get("num_clients")
    if client is None and not parts:
        return {}
    if type(clients) is not int or clients < 1:
        raise RunError(f"{run / 'config.yaml'} has {shown(clients)} for data.num_clients, which is no number of clients")
    if client is None:
        where = f"{shown(parts)} stay with each client, and the server has nothing trained in their place"
        raise UsageError("client", None, f"a number from 0 to {clients - 1}, whose model is meant: {where}")
    if type(client) is not int or not 0 <= client < clients:
        raise UsageError("client", client, f"a number from 0 to {clients - 1}")
    if which != "last":
        raise UsageError("which", which, "last, as of earlier rounds a client's own weights are not kept")
    memory = MemoryOnDisk(run / "clients", clients)
    memory.expect(checkpoint.clients(run / "checkpoints", number))
    own = memory.after(client, number).get("personal")
    if own is None:
        taking = "has not taken part yet" if parts else "has no weights of its own: all are the server's"
        raise UsageError("client", client, f"a client with a model of its own; this one {taking}")
    return own


def whose(run: Path, config: Mapping[str, Any], number: int, client: int) -> str:
    """A sentence of the card: whose model it is, and how good it is for its owner."""
    own = read_rounds(run / "rounds.jsonl", number)[-1].own_accuracy
    parts = ", ".join(f"`{part}`" for part in _parts(config))
    what = f": {parts} are its own, the rest is the server's" if parts else ""
    accuracy = own[client] if client < len(own) else None
    part = (config.get("loop") or {}).get("evaluate_on")
    known = "" if accuracy is None else f" On its own share of the {part} part its accuracy is {accuracy:.4f}."
    return f"This is the model of client {client}{what}.{known} The metrics below are of the server's weights."


def _parts(config: Mapping[str, Any]) -> list[str]:
    """Which tensors stay with each client, as patterns."""
    algorithm = (config.get("loop") or {}).get("algorithm")
    found = algorithm.get("personal") if isinstance(algorithm, Mapping) else None
    return [str(part) for part in found or []]
