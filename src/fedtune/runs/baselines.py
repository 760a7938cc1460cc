"""What a federated result is compared with: the majority class, each client alone, and pooled training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedtune.federated.agreement import Agreement
from fedtune.federated.evaluation import evaluate
from fedtune.federated.pieces import norm
from fedtune.federated.state import RoundResult, ServerState
from fedtune.federated.training import Optimisation, Training, exactly, run_steps, train_client
from fedtune.randomness import seeded
from fedtune.runs.callbacks import Run
from fedtune.runs.rounds import Rounds
from fedtune.tensors import Tensors, assign_, snapshot, subtract_, travelling


def centralised_rounds(rounds: Rounds, run: Run, start: ServerState, examples: Sequence[int], epochs: int) -> ServerState:
    """The centralised baseline: a run of as many rounds as `examples` has, on the pooled training data.

    Args:
        rounds: where it is kept and how it is evaluated.
        run: takes the records.
        start: the state that the federation began with, too.
        examples: examples of each federated round.
        epochs: local epochs of a federated round.
    """
    training, loader = rounds.evaluator.training, rounds.evaluator.data.train_dataloader

    def advance(state: ServerState) -> RoundResult:
        return centralised(training, state, loader(), examples[state.round], epochs)

    with rounds.progress.phase("centralised", len(examples), 1):
        return rounds.play(run, lambda: start, advance)


def local_records(rounds: Rounds, start: ServerState, epochs: Sequence[int]) -> list[dict[str, Any]]:
    """The local baseline: each client alone, as many epochs as it has in `epochs`; the clients done before are read back."""
    evaluator, directory = rounds.evaluator, rounds.directory
    with rounds.progress.phase("local", 1, len(epochs)):
        done = directory.read("local.jsonl")
        for client in range(len(done), len(epochs)):
            loader = evaluator.data.client_dataloader(client)
            record = local(evaluator.training, start.weights, client, loader, epochs[client], evaluator.loaders())
            directory.append("local.jsonl", record)
            done.append(record)
            rounds.progress.local(record)
    return done


def centralised(training: Training, state: ServerState, loader: Any, examples: int, epochs: int) -> RoundResult:
    """One "round" of ordinary training on the pooled data, over as many examples as the federated round sees.

    That is the paper's fixed compute budget. The optimizer keeps its state from round to round, as in ordinary training.

    Args:
        examples: examples of the federated round.
        epochs: its local epochs, by which schedules over epochs advance here, too.
    """
    number = state.round + 1
    here = travelling(training.module)
    assign_(here, state.weights)
    optimisation = Optimisation(training.module, state.steps, state.epochs)
    restore(optimisation.optimizer, state.optimizer)
    with seeded(training.seed, "centralised", number):
        report = run_steps(training, optimisation, exactly(loader, examples), f"centralised, round {number}")
    after = ServerState(
        round=number,
        weights=snapshot(here),
        steps=state.steps + report.num_steps,
        epochs=state.epochs + epochs,
        examples=state.examples + report.num_examples,
        optimizer=flatten(optimisation.optimizer),
    )
    subtract_(here, state.weights)
    return RoundResult(after, [report], Agreement(norm(here)))


def local(
    training: Training, initial: Tensors, client: int, loader: Any, epochs: int, evaluations: dict[str, Any]
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
    assign_(travelling(training.module), initial)
    report = train_client(replace(training, phase="each client alone, "), client, loader, epochs, (0, 0, 0))
    with seeded(training.seed, "evaluate"):
        parts = {part: evaluate(training.fabric, training.module, batches).metrics for part, batches in evaluations.items()}
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
