"""Messages of a federation as records of Flower, and back.

A request to train, or to evaluate, has tensors as array records, one for each group ("group/weights"), and one configuration
record with the numbers that a client needs. An answer is alike. What may be in them is listed here, and nothing else is sent:
no text, no label, no memory of a client. bfloat16, which Flower has not, travels as fp32 and comes back without loss.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedtune.errors import RunError, shown
from fedtune.federated.messages import ClientReport, Context, Position, Reply, Request
from fedtune.federated.remote import Share
from fedtune.tensors import Groups, Tensors

ABOUT, GROUP, HALVED = "fedtune", "group/", "halved"
_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16)}
_TYPES |= {f"{kind}int{bits}": getattr(torch, f"{kind}int{bits}") for kind in ("", "u") for bits in (8, 16, 32, 64)}
_TYPES["bool"] = torch.bool

# the names in the configuration record of each message, and their types
REQUEST = {
    "run": str,
    "round": int,
    "client": int,
    "cohort": list,
    "num_clients": int,
    "seed": int,
    "max_weight": int,
    "steps": int,
    "epochs": int,
    "newest": int,
    "oldest": int,
}
EVALUATION = {
    "run": str,
    "client": int,
    "num_clients": int,
    "part": str,
    "steps": int,
    "epochs": int,
    "newest": int,
    "oldest": int,
}
REPLY = {"client": int, "round": int, "weight": int, "bytes_up": int, "kept": bool, "report": str}
SHARE = {"client": int, "examples": int, "metrics": str, "own_accuracy": float}
STOPPED = {"client": int, "stopped": str, "ends": bool}
SITE = {
    "client": int,
    "name": str,
    "own": bool,
    "examples": int,
    "max_weight": int,
    "num_clients": int,
    "data": str,
    "facts": str,
}


@dataclass(frozen=True)
class Memory:
    """What of a client's memory counts.

    Args:
        run: names the run.
        newest: the last round of which it has kept something that counts; 0: none.
        oldest: what it kept of rounds before this one nobody needs any more; 0: nobody knows.
    """

    run: str
    newest: int = 0
    oldest: int = 0


def arrays_of(groups: Groups) -> dict[str, ArrayRecord]:
    """Groups of tensors as records.

    Raises:
        RunError: a type of numbers that neither NumPy nor this module has.
    """
    return {f"{GROUP}{name}": ArrayRecord(_arrays(group)) for name, group in groups.items()}


def _arrays(tensors: Tensors) -> dict[str, Array]:
    found = {}
    for name, tensor in tensors.items():
        half = tensor.dtype == torch.bfloat16
        if not half and str(tensor.dtype).removeprefix("torch.") not in _TYPES:
            raise RunError(f"{name} is of the type {tensor.dtype}, which cannot travel; allowed: {', '.join(_TYPES)}, bfloat16")
        # a scalar would lose its type in NumPy's own hands, so its shape is said, too
        values = (tensor.float() if half else tensor).detach().cpu().contiguous().numpy()
        found[f"{HALVED}/{name}" if half else f"full/{name}"] = Array(np.ascontiguousarray(values).reshape(tensor.shape))
    return found


def groups_of(content: RecordDict) -> Groups:
    """The groups of tensors in a message.

    Raises:
        RunError: what is there is no array of numbers.
    """
    found: Groups = {}
    for key, record in content.array_records.items():
        if not key.startswith(GROUP):
            raise RunError(f"the record {shown(key)} is not expected")
        found[key.removeprefix(GROUP)] = dict(_tensor(name, array) for name, array in record.items())
    return found


def _tensor(key: str, array: Array) -> tuple[str, torch.Tensor]:
    kind, _, name = key.partition("/")
    try:
        values = array.numpy()
    except (TypeError, ValueError, OSError) as error:
        raise RunError(f"{shown(name)} cannot be read") from error
    if str(values.dtype) not in _TYPES or kind not in (HALVED, "full") or not name:
        raise RunError(f"{shown(key)} is of the type {shown(str(values.dtype))}")
    tensor = torch.from_numpy(values if values.flags.writeable else values.copy())
    return name, tensor.bfloat16() if kind == HALVED else tensor


def values_of(content: RecordDict, form: Mapping[str, type]) -> dict[str, Any]:
    """The configuration record of a message, which has these names and no others.

    Raises:
        RunError: it has others, or values of other types.
    """
    record = dict(content.config_records.get(ABOUT, {}))
    wrong = sorted(record.keys() ^ form.keys()) or [name for name, kind in form.items() if type(record[name]) is not kind]
    if wrong:
        raise RunError(
            f"a message with another content than belongs there ({shown(wrong)}); is it the same version of fedtune?"
        )
    return record


def is_stopped(content: RecordDict) -> bool:
    """Whether an answer says why there is none."""
    return "stopped" in content.config_records.get(ABOUT, {})


def request_record(request: Request, context: Context, memory: Memory) -> ConfigRecord:
    """All of a request but its tensors."""
    return ConfigRecord(
        {
            "run": memory.run,
            "round": request.round,
            "client": request.client,
            "cohort": list(request.cohort),
            "num_clients": context.num_clients,
            "seed": context.seed,
            "max_weight": context.max_weight,
            "steps": request.position.steps,
            "epochs": request.position.epochs,
            "newest": memory.newest,
            "oldest": memory.oldest,
        }
    )


def read_request(content: RecordDict) -> tuple[Request, Context, Memory]:
    """What `request_record` and `arrays_of` wrote."""
    values = values_of(content, REQUEST)
    cohort, position = tuple(values["cohort"]), Position(values["steps"], values["epochs"])
    context = Context(values["seed"], values["round"], values["num_clients"], cohort, values["max_weight"])
    request = Request(values["round"], values["client"], position, cohort, groups_of(content))
    return request, context, Memory(values["run"], values["newest"], values["oldest"])


def evaluation_record(part: str, position: Position, client: int, num_clients: int, memory: Memory) -> ConfigRecord:
    """All of a request to evaluate but the weights."""
    return ConfigRecord(
        {
            "run": memory.run,
            "client": client,
            "num_clients": num_clients,
            "part": part,
            "steps": position.steps,
            "epochs": position.epochs,
            "newest": memory.newest,
            "oldest": memory.oldest,
        }
    )


def reply_content(reply: Reply, round: int, kept: bool) -> RecordDict:
    """An answer to a request to train.

    Args:
        kept: whether the client has kept something of the round.
    """
    values = {
        "client": reply.client,
        "round": round,
        "weight": reply.weight,
        "bytes_up": reply.bytes_up,
        "kept": kept,
        "report": json.dumps(dataclasses.asdict(reply.report)),
    }
    return RecordDict({ABOUT: ConfigRecord(values), **arrays_of(reply.groups)})


def read_reply(content: RecordDict) -> tuple[Reply, bool]:
    """What `reply_content` wrote, and whether the client has kept something.

    Raises:
        RunError: it is no answer.
    """
    values = values_of(content, REPLY)
    report = _report(values["report"])
    if report.client != values["client"]:
        raise RunError(f"its report is of client {report.client}")
    return Reply(values["client"], values["weight"], groups_of(content), report, values["bytes_up"]), values["kept"]


def _report(text: str) -> ClientReport:
    """A report of numbers, of which there are not fewer than none.

    Raises:
        RunError: it is none.
    """
    try:
        found = json.loads(text)
        fields = {field.name: str(field.type) for field in dataclasses.fields(ClientReport)}
        if found.keys() != fields.keys():
            raise ValueError(sorted(found.keys() ^ fields.keys()))
        for name, kind in fields.items():
            value = found[name]
            numbers = value.values() if kind.startswith("dict") else [value]
            kinds = (int,) if kind == "int" else (int, float)
            if any(type(one) not in kinds for one in numbers) or (kind == "int" and value < 0):
                raise ValueError(name)
        if not math.isfinite(found["train_loss_nats"]) or not found["seconds"] >= 0:
            raise ValueError("train_loss_nats")
        return ClientReport(**found)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"its report cannot be read ({shown(str(error))})") from error


def share_content(client: int, share: Share) -> RecordDict:
    """An answer to a request to evaluate; without an own model its accuracy is NaN."""
    own = math.nan if share.own_accuracy is None else share.own_accuracy
    values = {"client": client, "examples": share.examples, "metrics": json.dumps(share.metrics), "own_accuracy": own}
    return RecordDict({ABOUT: ConfigRecord(values)})


def read_share(content: RecordDict) -> Share:
    """What `share_content` wrote.

    Raises:
        RunError: it is no such answer.
    """
    values = values_of(content, SHARE)
    try:
        metrics = {str(name): float(value) for name, value in json.loads(values["metrics"]).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise RunError("its metrics cannot be read") from error
    if values["examples"] < 0:
        raise RunError(f"it says that it has {values['examples']} examples")
    return Share(values["examples"], metrics, None if math.isnan(values["own_accuracy"]) else values["own_accuracy"])


def stopped_content(client: int, why: str, ends: bool) -> RecordDict:
    """Why there is no answer, in a line; `ends` where it would be so in every round, so that the run has to stop."""
    return RecordDict({ABOUT: ConfigRecord({"client": client, "stopped": why, "ends": ends})})
