"""What a federated result is compared with: each client alone, and pooled training."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.data.splits import DEFAULTS, WHOLE
from fedtune.federated.agreement import Agreement
from fedtune.federated.batches import exactly
from fedtune.federated.cohorts import cohort
from fedtune.federated.evaluation import Evaluator
from fedtune.federated.messages import Position
from fedtune.federated.optimisation import Optimisation, flatten, restore
from fedtune.federated.passes import pooled_steps, steps_in
from fedtune.federated.ranks import ALONE
from fedtune.federated.state import RoundResult, ServerState
from fedtune.federated.training import Training, train, train_epochs
from fedtune.randomness import seeded
from fedtune.runs.callbacks import Run
from fedtune.runs.progress import Progress
from fedtune.runs.rounds import Rounds
from fedtune.storage.config import baseline_config, fingerprint, without
from fedtune.storage.directory import RunDirectory
from fedtune.storage.locks import locked
from fedtune.storage.records import RoundRecord
from fedtune.tensors import Tensors, assign_, counters, digest, distance, resting, restore_counters, snapshot, travelling

BASELINES = ("centralised", "local")


@dataclass
class Baselines:
    """The baselines of a run, each with a directory of its own, so that it is resumed, and shared by runs that may.

    Args:
        evaluator: evaluates the module on the parts of the data.
        progress: what the terminal says.
        run: the federated run, all its rounds done.
        local_epochs: epochs of a client in a round.
        everyone: whether every client takes part in every round; else the split decides how many examples a round has.
        folder: where the directories are; None keeps everything in memory.
        keep: checkpoints that stay.
        evaluated_every: pooled training is evaluated after every so many rounds, as the federation is.

    After `play`: `records` (name -> records), `centralised_test` (metrics of pooled training on the test part).
    """

    evaluator: Evaluator
    progress: Progress
    run: Run
    local_epochs: int
    everyone: bool
    folder: Path | None
    keep: int
    evaluated_every: int = 1
    records: dict[str, list[Any]] = field(default_factory=dict)
    centralised_test: dict[str, float] = field(default_factory=dict)

    def play(self, names: Sequence[str], start: ServerState) -> None:
        """Do the named ones, from the state that the federation began with, which the module's counters have now."""
        module = self.evaluator.training.module
        first = snapshot(counters(module))
        ranks = self.evaluator.ranks
        if "centralised" in names:  # one training, which cannot be shared out
            self.records["centralised"], self.centralised_test = ranks.from_first(lambda: self._centralised(start))
        if "local" in names:
            self.records["local"] = self._local(start, first)
        restore_counters(module, first)

    def _centralised(self, start: ServerState) -> tuple[list[RoundRecord], dict[str, float]]:
        """As many rounds on the pooled data, each with as many examples as the federated one; and metrics on the test part."""
        evaluator = dataclasses.replace(self.evaluator, ranks=ALONE)
        training, data = self.evaluator.training, self.evaluator.data
        examples = [record.num_examples for record in self.run.history]

        def next_round(state: ServerState) -> RoundResult:
            with self.evaluator.ranks.watched():
                return centralised(training, state, data.train_dataloader(), examples[state.round], self.local_epochs)

        def steps() -> float:
            return pooled_steps(training, data.train_dataloader(), sum(examples))

        training.trainer.plan(len(examples) * self.local_epochs, steps)
        with (
            self._directory("centralised", start, split_matters=not self.everyone) as (directory, run),
            self.progress.phase("centralised", len(examples), 1),
        ):
            rounds = Rounds(evaluator, self.progress, directory, self.evaluated_every)
            final = rounds.play(run, lambda: start, next_round)
        assign_(travelling(training.module), final.weights)
        return run.history, evaluator.metrics("test")

    def _local(self, start: ServerState, first: Tensors) -> list[dict[str, Any]]:
        """Some clients, each alone, with the epochs that it had in the federation, or a round's; those done before are read.

        Each is evaluated once, on the test part where there is one.
        """
        taken = Counter(client for record in self.run.history for client in record.cohort)
        training, clients = self.evaluator.training, self._sample()
        ranks, evaluator = self.evaluator.ranks, dataclasses.replace(self.evaluator, ranks=ALONE)
        part = "test" if evaluator.loader("test") is not None else evaluator.part
        with (
            self._directory("local", start, split_matters=True, clients=clients, part=part) as (directory, _),
            self.progress.phase("local", len(clients), 1),
        ):
            if len(clients) < self.evaluator.data.num_clients:
                self.progress.line(
                    f"local: {len(clients)} of {self.evaluator.data.num_clients} clients, drawn (options.local_clients)"
                )
            done = ranks.from_first(lambda: directory.read("local.jsonl", "client", clients))
            self.progress.resumed(done)
            left = clients[len(done) :]
            for place in range(0, len(left), ranks.size):  # a client a rank
                own = []
                for client in ranks.mine(left[place : place + ranks.size]):
                    epochs, loader = self.local_epochs * max(1, taken[client]), evaluator.data.client_dataloader(client)
                    restore_counters(training.module, first)
                    training.trainer.plan(epochs, functools.partial(steps_in, training, loader, epochs))
                    with ranks.watched():
                        record = local(training, start.weights, client, loader, epochs)
                        record[part] = evaluator.metrics(part)
                    own.append(record)
                for record in ranks.gather(own):
                    directory.append("local.jsonl", record)
                    done.append(record)
                    self.progress.local(record)
        return done

    def _sample(self) -> list[int]:
        """The clients that train alone."""
        clients, most = self.evaluator.data.num_clients, self.run.config["loop"]["options"]["local_clients"]
        return cohort(self.evaluator.training.seed, 0, clients, most)

    @contextlib.contextmanager
    def _directory(self, name: str, start: ServerState, split_matters: bool, **more: Any) -> Iterator[tuple[RunDirectory, Run]]:
        """A directory named after all that the baseline's numbers depend on; who shares it waits."""
        about: dict[str, Any] = {
            "name": name,
            "examples": [record.num_examples for record in self.run.history],
            "start": digest(start.weights),
        }
        about["still"] = digest(resting(self.evaluator.training.module))
        if self.run.config["content"]["task"] is None:  # nobody could tell whether other runs have the same data
            about["of"] = self.run.run_dir
        about |= more
        config = baseline_config(self.run.config if split_matters else self._pooled(), about, split_matters)
        leads = self.evaluator.ranks.leads
        path = None if self.folder is None or not leads else self.folder / f"{name}-{fingerprint(config)}"
        with locked(path, wait=True):
            directory = RunDirectory(path, config, self.keep)
            directory.take()  # nothing refuses a baseline
            yield directory, Run(config, self.run.data, len(self.run.history))

    def _pooled(self) -> dict[str, Any]:
        """The configuration without the parameters of our splits that leave no text out: pooled, their texts are the same."""
        data = self.run.config["data"]
        ours = "class" not in data and data.get("split") in WHOLE
        return without(self.run.config, {f"data.{option}" for option in DEFAULTS} if ours else ())


def centralised(training: Training, state: ServerState, loader: Any, examples: int, epochs: int) -> RoundResult:
    """One "round" of ordinary training on the pooled data, over as many examples as the federated round sees.

    That is the paper's fixed compute budget. The optimizer keeps its state from round to round, as in ordinary training.

    Args:
        examples: examples of the federated round; with none the weights stay as they are.
        epochs: its local epochs, by which schedules over epochs advance here, too.
    """
    number = state.round + 1
    here = travelling(training.module)
    assign_(here, state.weights)
    if "module" in state.memory:
        restore_counters(training.module, state.memory["module"]["counters"])
    if not examples:  # a federated round that nobody answered: there is nothing to train on, and time goes on
        position = Position(state.position.steps, state.position.epochs + epochs)
        return RoundResult(dataclasses.replace(state, round=number, position=position), [], Agreement(0.0))
    optimisation = Optimisation(training.trainer, state.position)
    restore(optimisation.optimizer, state.memory.get("optimizer", {}).get("state", {}))
    with seeded(training.seed, "centralised", number):
        report = train(training, optimisation, exactly(loader, examples), f"centralised, round {number}")
    after = ServerState(
        round=number,
        weights=snapshot(here),
        position=Position(state.position.steps + report.num_steps, state.position.epochs + epochs),
        examples=state.examples + report.num_examples,
        memory={
            "optimizer": {"state": flatten(optimisation.optimizer)},
            "module": {"counters": snapshot(counters(training.module))},
        },
    )
    return RoundResult(after, [report], Agreement(distance(after.weights, state.weights)))


def local(training: Training, initial: Tensors, client: int, loader: Any, epochs: int) -> dict[str, Any]:
    """One client alone: all its epochs on its own data with one optimizer.

    Args:
        initial: the weights from which the federation starts, too.
        epochs: as many as the client trains in the whole federation.

    Returns:
        a record: `client`, `num_examples`, `num_steps`, `train_loss_nats`, `seconds`.
    """
    assign_(travelling(training.module), initial)
    optimisation = Optimisation(training.trainer, Position())
    with seeded(training.seed, "client", 0, client):
        report = train_epochs(training, optimisation, loader, epochs, f"each client alone, client {client}", client)
    names = ("client", "num_examples", "num_steps", "train_loss_nats", "seconds")
    return {name: getattr(report, name) for name in names}
