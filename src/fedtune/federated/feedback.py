"""Error feedback: what a message lacks is made up for by the next one. C is what all stages of a direction leave of a tensor.

    up, at a client with the update D:      p = D + e;  send C(p);  remember e = p - C(p)
    down, at the server with the weights x: send C(x - y);  remember y = y + C(x - y), which clients have now

The second is the first for what the server changes, with e = x - y (Seide et al. 2014; Karimireddy et al. 2019, "Error Feedback
Fixes SignSGD"; Tang et al. 2019, "DoubleSqueeze", in both directions). A client adds what it gets to the y that it remembers.
So a change goes only to those who have the y of the last round, as their replies counted in it; others get the whole new y.
Groups beside the weights go the same way.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fedtune.errors import RunError
from fedtune.federated.messages import AS_THEY_ARE, Context, Stage, decoded, encoded
from fedtune.tensors import Groups, Tensors

MEMORY = "down"  # the namespace of the server's memory for what clients have
_CHANGE, _HAS, _LACKS, _HOLDERS = "change.", "down.", "up.", "holders"  # in names of groups


@torch.no_grad()
def fed_back(groups: Groups, stages: tuple[Stage, ...], context: Context) -> Groups:
    """Encoded groups of a client, with what its earlier messages lack; what this one lacks goes into the context's memory."""
    whole, mine = dict(groups), [group for group in groups if group not in AS_THEY_ARE]
    for group in mine:
        lacks = context.memory.get(_LACKS + group, {})
        whole[group] = {name: _plus(tensor, lacks.get(name)) for name, tensor in groups[group].items()}
    message = encoded(whole, stages, context)
    arrives = decoded(message, stages, context)
    for group in mine:
        lacks = {name: tensor - arrives[group][name] for name, tensor in whole[group].items() if _fits(name, tensor, context)}
        context.memory[_LACKS + group] = context.memory.get(_LACKS + group, {}) | lacks
    return message


@torch.no_grad()
def changes(groups: Groups, before: Groups, stages: tuple[Stage, ...], context: Context) -> tuple[Groups, Groups, Groups]:
    """What the server sends to those who have what it sent in the last round, what it sends to others, and what it remembers.

    Args:
        groups: what it would send.
        before: what it remembers since the last round; empty in the first.
    """
    new = {group: tensors for group, tensors in groups.items() if group not in AS_THEY_ARE}
    known = {group: before[group] for group in new if before.get(group, {}).keys() == new[group].keys()}
    here = replace(context, memory=dict(before))
    change = {group: {name: _plus(new[group][name], -one) for name, one in tensors.items()} for group, tensors in known.items()}
    message = encoded(change, stages, here)
    arrives = decoded(message, stages, here)
    has = {group: {name: _plus(tensor, None) for name, tensor in new[group].items()} for group in new if group not in known}
    first, as_they_are = dict(has), {group: groups[group] for group in groups if group in AS_THEY_ARE}
    has |= _added(known, arrives)
    small = {_CHANGE + group: tensors for group, tensors in message.items()}
    return small | first | as_they_are, has | as_they_are, here.memory | has


def holders(before: Groups) -> frozenset[int]:
    """The clients that have what the server sent in the last round."""
    return frozenset(before[_HOLDERS]["clients"].tolist()) if before else frozenset()


def held(memory: Groups, clients: tuple[int, ...]) -> dict[str, Groups]:
    """What the server remembers, in its namespace, when a round is over in which the replies of these clients counted."""
    return {MEMORY: memory | {_HOLDERS: {"clients": torch.tensor(clients, dtype=torch.int64)}}}


@torch.no_grad()
def received(groups: Groups, stages: tuple[Stage, ...], context: Context) -> Groups:
    """What a client makes of a message of the server; it goes into the context's memory, too.

    Raises:
        RunError: it is a change of what the client does not remember.
    """
    known = {name.removeprefix(_HAS): tensors for name, tensors in context.memory.items() if name.startswith(_HAS)}
    change = {name.removeprefix(_CHANGE): tensors for name, tensors in groups.items() if name.startswith(_CHANGE)}
    if change and "weights" not in known:
        raise RunError(f"round {context.round}: the server sent a change of weights that the client does not remember")
    arrives = decoded(change, stages, replace(context, weights=known.get("weights", {})))
    has = {name: tensors for name, tensors in groups.items() if not name.startswith(_CHANGE)} | _added(known, arrives)
    context.memory.update({_HAS + name: tensors for name, tensors in has.items() if name not in AS_THEY_ARE})
    return has


def _added(known: Groups, arrives: Groups) -> Groups:
    """What is known, and what is added to it."""
    return {
        group: {name: _plus(tensor, known[group][name]) for name, tensor in tensors.items()}
        for group, tensors in arrives.items()
    }


def _plus(tensor: Tensor, other: Tensor | None) -> Tensor:
    """tensor + other, in fp32 at least."""
    if tensor.is_floating_point():
        tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return tensor if other is None else tensor + other.to(tensor.device)


def _fits(name: str, tensor: Tensor, context: Context) -> bool:
    """Whether a tensor is like a weight: of others (a count, a length) each message says all that there is."""
    like: Tensors = context.weights
    return tensor.is_floating_point() and name in like and like[name].shape == tensor.shape
