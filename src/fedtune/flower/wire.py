"""Records of a message over a local socket, from one process of a site to another: lengths, a head in JSON, and bytes."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

_LENGTH = struct.Struct("<Q")


def send(to: socket.socket, about: Any, content: RecordDict) -> None:
    """Send plain values and records.

    Raises:
        OSError: the other process has gone.
    """
    arrays = [(key, name, array) for key, record in content.array_records.items() for name, array in record.items()]
    head = {
        "about": about,
        "records": {key: dict(record) for key, record in content.config_records.items()},
        "groups": list(content.array_records),
        "arrays": [[key, name, array.dtype, array.shape, array.stype] for key, name, array in arrays],
    }
    for data in (json.dumps(head).encode(), *(array.data for _, _, array in arrays)):
        to.sendall(_LENGTH.pack(len(data)))
        to.sendall(data)


def receive(source: socket.socket) -> tuple[Any, RecordDict]:
    """What `send` sent.

    Raises:
        OSError: the other process has gone.
    """
    head = json.loads(_bytes(source))
    groups: dict[str, dict[str, Array]] = {key: {} for key in head["groups"]}
    for key, name, dtype, shape, stype in head["arrays"]:
        groups[key][name] = Array(dtype, tuple(shape), stype, _bytes(source))
    configs = {key: ConfigRecord(values) for key, values in head["records"].items()}
    return head["about"], RecordDict({**configs, **{key: ArrayRecord(group) for key, group in groups.items()}})


def _bytes(source: socket.socket) -> bytes:
    (length,) = _LENGTH.unpack(_exactly(source, _LENGTH.size))
    return _exactly(source, length)


def _exactly(source: socket.socket, count: int) -> bytes:
    found, place = bytearray(count), 0
    view = memoryview(found)
    while place < count:
        got = source.recv_into(view[place:])
        if not got:
            raise ConnectionResetError("the other process has gone")
        place += got
    return bytes(found)
