"""What becomes of an aggregate: server steps, and the server's next weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedtune.errors import RunError
from fedtune.federated.base import moved_base
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm, ServerStep
from fedtune.federated.pieces import Pieces, moved
from fedtune.federated.state import ServerState
from fedtune.tensors import Groups, Tensors, mapped


def stepped(groups: Groups, state: ServerState, algorithm: Algorithm, context: Context) -> tuple[Groups, dict[str, Groups]]:
    """The aggregate after all server steps, and what they remember, in the types of the weights, fp32 at least."""
    aggregator = algorithm.aggregator
    memory = {type(aggregator).__name__: {group: groups[group] for group in aggregator.keeps}} if aggregator.keeps else {}
    groups = {group: tensors for group, tensors in groups.items() if group not in aggregator.keeps}
    for step in algorithm.server:
        name = type(step).__name__
        groups, memory[name] = _step(step, groups, state.memory.get(name, {}), context)

    def as_weights(name: str, tensor: Tensor) -> Tensor:
        if name not in state.weights:
            return tensor
        return tensor.to(torch.promote_types(state.weights[name].dtype, torch.float32))

    return groups, {name: mapped(kept, as_weights) for name, kept in memory.items()}


def _step(step: ServerStep, groups: Groups, memory: Groups, context: Context) -> tuple[Groups, Groups]:
    """One step. Where a round trains a part of the tensors only, those that the step knows go apart from those that it does
    not, and what it remembers of the others stays."""
    if groups["update"].keys() == context.weights.keys():
        return step(groups, memory, context)
    known = {name for tensors in memory.values() for name in tensors}
    update, kept = Tensors(), {group: dict(tensors) for group, tensors in memory.items()}
    for part in (known, groups["update"].keys() - known):
        mine = {name: tensor for name, tensor in groups["update"].items() if name in part}
        before = {group: {name: tensors[name] for name in tensors if name in mine} for group, tensors in memory.items()}
        if mine:
            found, after = step({"update": mine}, before if part is known else {}, context)
            update |= found["update"]
            for group, tensors in after.items():
                kept.setdefault(group, {}).update(tensors)
    return {"update": update}, kept


def lengths(memory: dict[str, Groups]) -> dict[str, float]:
    """The Euclidean length of each group that server steps remember."""
    return {
        f"{name}_norm": math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
        for groups in memory.values()
        for name, tensors in groups.items()
    }


def moved_weights(weights: Tensors, groups: Groups, mean: Pieces, context: Context) -> Tensors:
    """The server's next weights; `mean` may be the pieces of the update."""
    left = [name for name in groups if name not in ("update", "buffers", "set", "base.left", "base.right")]
    if left:
        raise RunError(f"the algorithm has no server step for the groups {', '.join(left)}")
    new: Tensors = {}
    for group in (groups[name] for name in ("update", "buffers") if name in groups):
        pieces = mean if mean.are(group) else Pieces(group)
        new |= moved({name: weights[name] for name in group}, pieces)
    new |= {name: tensor.to(weights[name]) for name, tensor in groups.get("set", {}).items()}
    new |= moved_base(weights, groups, context.adapters)
    return {name: new.get(name, tensor) for name, tensor in weights.items()}
