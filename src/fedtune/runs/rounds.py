"""Rounds one after the other, each evaluated, recorded and kept; from where they stopped, if they did."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fedtune.errors import RunError
from fedtune.federated.evaluation import Evaluator
from fedtune.federated.logs import unusable
from fedtune.federated.personal import over_clients, own_accuracy
from fedtune.federated.state import RoundResult, ServerState
from fedtune.runs.callbacks import FederatedCallback, Run, restore_states, states_of
from fedtune.runs.progress import Progress
from fedtune.storage.directory import RunDirectory
from fedtune.storage.records import RoundRecord
from fedtune.tensors import assign_, carried, mapped, misfit


@dataclass(frozen=True)
class Rounds:
    """What goes with every round, whatever is done in it.

    Args:
        evaluator: evaluates the module after each round.
        progress: what the terminal says.
        directory: where records and checkpoints are kept.
        evaluated_every: the module is evaluated after every so many rounds.
        personal: whether clients have models of their own, which are then evaluated, too.
        base: the names of frozen weights that the server moves.
    """

    evaluator: Evaluator
    progress: Progress
    directory: RunDirectory
    evaluated_every: int = 1
    personal: bool = False
    base: frozenset[str] = frozenset()

    def play(
        self,
        run: Run,
        start: Callable[[], ServerState],
        next_round: Callable[[ServerState], RoundResult],
        callbacks: Sequence[FederatedCallback] = (),
    ) -> ServerState:
        """Do the rounds that are left of a run; `run.history` then has all of them.

        Args:
            start: the state before the first round; called where no round was done before.
            next_round: one round.

        Raises:
            RunError: a round had to stop; every complete one is kept.
        """
        module, ranks = self.evaluator.training.module, self.evaluator.ranks
        found, run.history[:] = ranks.from_first(self.directory.resume)
        newest = ranks.from_first(lambda: self.directory.memory.newest)
        if not ranks.leads:
            self.directory.memory.expect(newest)
        state = self._loaded(ranks.from_first(start) if found is None else found)
        self._restore(run, callbacks)
        self.directory.take(run.history)
        self.progress.resumed(run.history)
        while state.round < run.max_rounds and not run.should_stop:
            for callback in callbacks:
                callback.on_round_start(run, module, state.round + 1)
            began = time.perf_counter()
            result = next_round(state)
            state = result.state
            assign_(carried(module, self.base), state.weights)
            record = self._of_first(self._measured(result, time.perf_counter() - began))
            self.directory.complete(record, state)
            run.history.append(record)
            self.progress.round(record)
            run.logged.clear()
            for callback in callbacks:
                callback.on_round_end(run, module, record)
            run.should_stop = any(ranks.gather([run.should_stop]))
            self._keep(run, callbacks)
        return state

    def _restore(self, run: Run, callbacks: Sequence[FederatedCallback]) -> None:
        """Begin, or go on, with callbacks that know what they knew after the last round."""
        module, done = self.evaluator.training.module, len(run.history)
        lines = self.evaluator.ranks.from_first(lambda: self.directory.read("callbacks.jsonl", "round", itertools.count(1)))
        known = [one for one in lines if one["round"] <= done]
        self.directory.rewrite("callbacks.jsonl", known)
        restore_states(callbacks, json.loads(known[-1]["states"]) if known else {})
        for callback in callbacks:
            callback.on_fit_start(run, module)
        if callbacks and len(known) < done:  # a crash came after the last round's checkpoint
            for callback in (one for one in callbacks if one.replayed):
                callback.on_round_end(run, module, run.history[-1])
            for number in range(len(known) + 1, done):
                self.directory.append("callbacks.jsonl", {"round": number, "stopped_at": None, "states": "{}"})
            self._keep(run, callbacks)
        elif known and run.max_rounds <= (known[-1]["stopped_at"] or 0):
            run.should_stop = True
            run.print(f"stopped by a callback after round {done}; a larger max_rounds goes on")

    def _keep(self, run: Run, callbacks: Sequence[FederatedCallback]) -> None:
        """Keep what callbacks know after a round, and whether one has stopped the run."""
        if callbacks:
            stopped_at = run.max_rounds if run.should_stop else None
            line = {"round": len(run.history), "stopped_at": stopped_at, "states": json.dumps(states_of(callbacks))}
            self.directory.append("callbacks.jsonl", line)

    def _loaded(self, state: ServerState) -> ServerState:
        """The state on the module's device (on the CPU where that has no fp64), its weights in the module, too."""
        module = self.evaluator.training.module
        device = torch.device("cpu") if module.device.type == "mps" else module.device
        here = carried(module, self.base)
        wrong = misfit(state.weights, here)
        if wrong:
            raise RunError(f"the weights of round {state.round} in {self.directory.path} do not fit the module: {wrong}")
        assign_(here, state.weights)
        weights = {name: tensor.to(device, copy=True) for name, tensor in here.items()}
        memory = {step: mapped(groups, lambda _, tensor: tensor.to(device)) for step, groups in state.memory.items()}
        return dataclasses.replace(state, weights=weights, memory=memory)

    def _measured(self, result: RoundResult, seconds: float) -> RoundRecord:
        """The record of a round that took so long, the module holding its result."""
        began = time.perf_counter()
        self.evaluator.training.trainer.at(result.state.position)
        evaluated = result.state.round % self.evaluated_every == 0
        metrics, client_accuracy = self.evaluator.measure() if evaluated else ({}, [])
        own = self._own(result.state, client_accuracy) if evaluated and self.personal else []
        if own:
            metrics |= over_clients("own_accuracy", own) | over_clients("shared_accuracy", client_accuracy)
        for name in unusable(metrics):
            self.progress.line(f"round {result.state.round}: {name} is {metrics[name]}, no finite number; records have null")
        times = {"train": seconds - result.seconds_aggregate, "evaluate": time.perf_counter() - began}
        return dataclasses.replace(RoundRecord.of(result, metrics, client_accuracy, times), own_accuracy=own)

    def _of_first(self, record: RoundRecord) -> RoundRecord:
        """The record of rank 0: in its own each rank has other times."""
        return self.evaluator.ranks.from_first(lambda: record)

    def _own(self, state: ServerState, shared: list[float | None]) -> list[float | None]:
        """The accuracy of each client's own model."""
        if self.evaluator.remote is not None:
            return self.evaluator.remote.own_accuracy()
        shared = shared or [None] * self.evaluator.data.num_clients
        return own_accuracy(self.evaluator, self.directory.memory, state.weights, state.round, shared)
