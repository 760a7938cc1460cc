"""A round in which scalars travel in the place of weights (`federated.directions`).

The round itself is that of any algorithm, whose weights are the K scalars: they are sent, moved, clipped, compressed and
counted as weights are. Around it stands the run, whose weights are the module's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fedtune.errors import RunError
from fedtune.federated.directions import SCALARS, Directions
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm, Runtime
from fedtune.federated.round import RoundOptions, run_round
from fedtune.federated.state import RoundResult, ServerState
from fedtune.tensors import without

MEMORY = "directions"  # the namespace of the server's memory for a, which says all of the weights


def run_rebuilt(
    state: ServerState,
    algorithm: Algorithm,
    context: Context,
    runtime: Runtime,
    options: RoundOptions,
    *,
    directions: Directions,
    play: Callable[..., RoundResult] = run_round,
) -> RoundResult:
    """As `play`, which is as `run_round`; the weights before and after are the module's.

    Raises:
        RunError: as `run_round`, and where the weights are not those that the scalars come to here.
    """
    here = replace(context, directions=directions)
    result = play(_of_scalars(state, directions), algorithm, here, runtime, options)
    return replace(result, state=_of_weights(result.state, directions))


def _of_scalars(state: ServerState, directions: Directions) -> ServerState:
    """The state with the scalars in the place of the weights that they make."""
    known = state.memory.get(MEMORY)
    scalars = directions.zeros() if known is None else known["sum"][SCALARS]
    weights = directions.weights(scalars)
    for name, tensor in weights.items():
        if tensor is not state.weights[name] and not torch.equal(tensor, state.weights[name]):
            raise RunError(
                f"round {state.round + 1}: {name} is not what the scalars of round {state.round} come to here; allowed: the "
                "version of NumPy with which the run began"
            )
    memory = {name: groups for name, groups in state.memory.items() if name != MEMORY}
    return replace(state, weights={SCALARS: scalars} | without(state.weights, weights), memory=memory)


def _of_weights(state: ServerState, directions: Directions) -> ServerState:
    """The state with the weights in the place of the scalars, which it remembers."""
    scalars = state.weights[SCALARS]
    weights = directions.weights(scalars) | without(state.weights, (SCALARS,))
    return replace(state, weights=weights, memory=state.memory | {MEMORY: {"sum": {SCALARS: scalars}}})
