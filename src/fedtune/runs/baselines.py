"""What a federated result is compared with: the majority class, each client alone, and pooled training."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedtune.federated.agreement import Agreement
from fedtune.federated.evaluation import evaluate
from fedtune.federated.state import RoundResult, ServerState
from fedtune.federated.training import Optimisation, Resident, exactly, run_steps, train_client
from fedtune.randomness import seeded
from fedtune.tensors import Weights, assign_, distance, snapshot, travelling


def centralised(resident: Resident, state: ServerState, loader: Any, examples: int, epochs: int) -> RoundResult:
    """One "round" of ordinary training on the pooled data, over as many examples as the federated round sees.

    That is the paper's fixed compute budget. The optimizer keeps its state from round to round, as in ordinary training.

    Args:
        examples: examples of the federated round.
        epochs: its local epochs, by which schedules over epochs advance here, too.
    """
    number = state.round + 1
    here = travelling(resident.module)
    assign_(here, state.weights)
    optimisation = Optimisation(resident.module, state.steps, state.epochs)
    restore(optimisation.optimizer, state.optimizer)
    with seeded(resident.seed, "centralised", number):
        report = run_steps(resident, optimisation, exactly(loader, examples), f"centralised, round {number}")
    after = ServerState(
        round=number,
        weights=snapshot(here),
        steps=state.steps + report.num_steps,
        epochs=state.epochs + epochs,
        examples=state.examples + report.num_examples,
        optimizer=flatten(optimisation.optimizer),
    )
    step = distance(after.weights, state.weights)
    return RoundResult(after, [report], Agreement(step))


def local(
    resident: Resident, initial: Weights, client: int, loader: Any, epochs: int, evaluations: dict[str, Any]
) -> dict[str, Any]:
    """One client alone: all its epochs on its own data with one optimizer, then evaluated.

    Args:
        initial: the weights from which the federation starts, too.
        epochs: as many as the client trains in the whole federation.
        evaluations: part -> loader.

    Returns:
        a record: `client`, `num_examples`, `num_steps`, `train_loss_nats`, `seconds`, and for each part what is logged.
    """
    start = time.perf_counter()
    assign_(travelling(resident.module), initial)
    report = train_client(replace(resident, phase="each client alone, "), client, loader, epochs, (0, 0, 0))
    with seeded(resident.seed, "evaluate"):
        parts = {part: evaluate(resident.fabric, resident.module, batches).metrics for part, batches in evaluations.items()}
    return {
        "client": client,
        "num_examples": report.num_examples,
        "num_steps": report.num_steps,
        "train_loss_nats": report.train_loss_nats,
        "seconds": time.perf_counter() - start,
    } | parts


def flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as named tensors, "parameter number.name"."""
    return {
        f"{index}.{name}": torch.as_tensor(value).detach().clone()
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if value is not None
    }


def restore(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    """Give a fresh optimizer the state that `flatten` took."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value.clone()  # the optimizer will write into it
    if state:
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
