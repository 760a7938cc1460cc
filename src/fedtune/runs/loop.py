"""`FederatedLoop`: a `LightningModule` and clients' data in, round records and averaged weights out.

One round is four files: this one, which drives it and keeps its record; `aggregation`, where the algorithm stands as in
the paper; `client`, the local epochs; `weights`, the arithmetic.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from fedtune.algorithms.fedavg import ALGORITHMS, Averaging
from fedtune.errors import UsageError, at_least, one_of
from fedtune.federated.cohorts import cohort, max_weight
from fedtune.federated.evaluation import Evaluator, attached
from fedtune.federated.messages import ClientReport
from fedtune.federated.state import RoundResult, ServerState
from fedtune.federated.training import Training
from fedtune.runs.baselines import centralised_rounds, local_records
from fedtune.runs.callbacks import FederatedCallback, Run, exceptions_reported
from fedtune.runs.figures import plot_curves
from fedtune.runs.hardware import fabric_of, freed_memory_kept, peak_memory_bytes, resolve_precision
from fedtune.runs.progress import Progress
from fedtune.runs.rounds import Rounds
from fedtune.runs.wandb import LOGGERS, WandbMirror
from fedtune.storage.config import baseline_config, describe, fingerprint
from fedtune.storage.directory import RunDirectory, writing
from fedtune.storage.locks import locked
from fedtune.storage.records import RoundRecord
from fedtune.storage.summary import mean_of, summarise
from fedtune.tensors import assign_, digest, snapshot, travelling

BASELINES = ("centralised", "local")
PARTS = ("validation", "test")
EVALUATIONS = ("pooled", "clients")
WEIGHTINGS = ("examples", "uniform")
_NOT_CONFIG = ("callbacks", "run_dir", "logger")  # not a plain value, or no part of what makes the numbers


@dataclass(eq=False)
class FederatedLoop:
    """Federated averaging of any `LightningModule`, used like a `Trainer`.

    Args:
        max_rounds: rounds in all, those before a resume included.
        local_epochs: epochs of a client in a round.
        clients_per_round: size of the cohort drawn each round; every client by default.
        seed: seed of the cohorts, of the order of batches and of dropout.
        run_dir: directory of the run: configuration, records, checkpoints, picture. Where it holds an interrupted run of
            the same configuration, that run goes on. None writes nothing.
        precision: "auto" (bf16 mixed where the hardware has it, else fp32), "32-true" or "bf16-mixed".
        accelerator: as in Lightning: "auto", "cpu", "gpu".
        evaluate_on: the part that the rounds are evaluated on: "validation", or "test" as in the paper.
        evaluation: "pooled" (metrics over all examples), or "clients" as in the code of Hilmkil et al. 2021: the test part
            divided like the training part, mean of batches within a client, then mean over clients.
        weighting: of the average: "examples" (McMahan et al. 2017), or "uniform".
        algorithm: a name of `fedtune.ALGORITHMS`, or a function with the signature of `fedavg`.
        agreement: record how the clients' updates agree (norm and cosine of their updates, drift per layer), for a copy of the
            weights and some 0.5 % of the time; False records the norms only.
        gradient_clip_val: largest norm of a gradient; no clipping by default.
        fast_dropout: on a CPU, dropout masks of the same distribution at less than half the cost
            (`fedtune.federated.dropout`); False takes torch's own.
        baselines: what the result is compared with: "centralised" (pooled data, the same number of examples a round)
            and "local" (each client alone, its own epochs). They run after the rounds; () leaves them out.
        baseline_dir: where baselines are kept, so that runs that differ only in the split share the centralised one; by
            default within `run_dir`.
        keep: checkpoints that stay.
        logger: "none", or "wandb" to mirror the run.
        progress: a line a round and a progress bar.
        callbacks: told how it goes.

    Raises:
        UsageError: a value outside of what is allowed; in `fit` also a run directory of another configuration.

    After `fit`: `data`, `history` (round records), `summary` (as in summary.json), `baseline_runs` (name -> records).
    """

    max_rounds: int = 10
    local_epochs: int = 1
    clients_per_round: int | None = None
    seed: int = 0
    run_dir: str | None = None
    precision: str = "auto"
    accelerator: str = "auto"
    evaluate_on: str = "validation"
    evaluation: str = "pooled"
    weighting: str = "examples"
    algorithm: str | Callable[..., RoundResult] = "fedavg"
    agreement: bool = True
    gradient_clip_val: float | None = None
    fast_dropout: bool = True
    baselines: Sequence[str] = BASELINES
    baseline_dir: str | None = None
    keep: int = 2
    logger: str = "none"
    progress: bool = True
    callbacks: Sequence[FederatedCallback] = ()

    config: dict[str, Any] = field(default_factory=dict, init=False)
    data: Any = field(default=None, init=False, repr=False)
    history: list[RoundRecord] = field(default_factory=list, init=False)
    baseline_runs: dict[str, list[Any]] = field(default_factory=dict, init=False)
    summary: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name in ("max_rounds", "local_epochs", "keep"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        if self.clients_per_round is not None:
            at_least("clients_per_round", self.clients_per_round, 1)
        if self.gradient_clip_val is not None and not self.gradient_clip_val > 0:
            raise UsageError("gradient_clip_val", self.gradient_clip_val, "a number above 0")
        for name, values, allowed in (
            ("evaluate_on", [self.evaluate_on], PARTS),
            ("evaluation", [self.evaluation], EVALUATIONS),
            ("weighting", [self.weighting], WEIGHTINGS),
            ("logger", [self.logger], LOGGERS),
            ("baselines", self.baselines, BASELINES),
        ):
            for value in values:
                if value not in allowed:
                    raise one_of(name, value, allowed)
        if isinstance(self.algorithm, str) and self.algorithm not in ALGORITHMS:
            raise one_of("algorithm", self.algorithm, ALGORITHMS)
        resolve_precision(self.precision, self.accelerator)
        self._callbacks = [*self.callbacks, *([WandbMirror()] if self.logger == "wandb" else [])]

    def fit(self, module: pl.LightningModule, data: Any) -> list[RoundRecord]:
        """Run the rounds, then the baselines; afterwards `module` holds the averaged weights.

        Args:
            module: any module with `training_step`, `validation_step` and `configure_optimizers`. What it logs in
                `validation_step` is in the records, averaged over examples.
            data: a data module with `num_clients`, `client_dataloader(k)` and `val_dataloader()`, and where there is one
                `test_dataloader()`; for the centralised baseline also `train_dataloader()`.

        Returns:
            one record a round, those before a resume included.

        Raises:
            UsageError: the data lack one of these, the cohort is larger than `num_clients`, `run_dir` cannot be used.
            RunError: the run had to stop; every complete round is kept.
        """
        self._check(data)
        if isinstance(data, pl.LightningDataModule):
            data.prepare_data()
            data.setup("fit")
        precision = resolve_precision(self.precision, self.accelerator)
        fabric = fabric_of(self.accelerator, precision)
        if fabric.device.type == "cuda" and hasattr(data, "keep_on"):
            data.keep_on(fabric.device)
        training = Training(fabric, module, self.seed, self.gradient_clip_val, self.fast_dropout)
        evaluator, progress = Evaluator(training, data, self.evaluate_on, self.evaluation), Progress(self.progress)
        run = self._new_run(module, data, precision, progress)
        with (
            locked(self.run_dir),
            attached(fabric, module),
            freed_memory_kept(),
            exceptions_reported(self._callbacks, run, module),
        ):
            directory = RunDirectory(Path(self.run_dir) if self.run_dir else None, run.config, self.keep)
            rounds = Rounds(evaluator, progress, directory)
            if evaluator.loader(self.evaluate_on) is None:
                raise UsageError("evaluate_on", self.evaluate_on, "a part that the data have")
            directory.begin(ServerState(0, snapshot(travelling(module))), again=bool(self.baselines))
            final = self._federated(rounds, run)
            test = evaluator.evaluate("test").metrics
            self._conclude(rounds, run, test, {})  # a baseline that fails must not take the result with it
            if self.baselines:
                centralised_test = self._baselines(rounds, run)
                assign_(travelling(module), final.weights)
                self._conclude(rounds, run, test, centralised_test)
            for callback in self._callbacks:
                callback.on_fit_end(run, module)
        return self.history

    def _new_run(self, module: pl.LightningModule, data: Any, precision: str, progress: Progress) -> Run:
        """What callbacks see; the loop has the same history and summary."""
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.init}
        own["precision"] = precision  # a continuation on other hardware must not change it in silence
        self.config = describe(module, data, {name: value for name, value in own.items() if name not in _NOT_CONFIG})
        run = Run(self.config, data, self.max_rounds, self.run_dir, progress.line)
        self.data, self.history, self.summary, self.baseline_runs = data, run.history, run.summary, {}
        return run

    def _federated(self, rounds: Rounds, run: Run) -> ServerState:
        training, data = rounds.evaluator.training, rounds.evaluator.data
        algorithm = ALGORITHMS[self.algorithm] if isinstance(self.algorithm, str) else self.algorithm

        most = max_weight(data, self.local_epochs)

        def ended(report: ClientReport) -> None:
            rounds.progress.client(report)
            for callback in self._callbacks:
                callback.on_client_end(run, training.module, report)

        def advance(state: ServerState) -> RoundResult:
            clients = self._cohort(data, state.round + 1)
            averaging = Averaging(self.weighting, self.agreement, most)
            return algorithm(training, state, clients, data.client_dataloader, self.local_epochs, ended, averaging)

        size = min(self.clients_per_round or data.num_clients, data.num_clients)
        with rounds.progress.phase("federated", self.max_rounds, size):
            return rounds.play(run, rounds.directory.start, advance, self._callbacks)

    def _baselines(self, rounds: Rounds, run: Run) -> dict[str, float]:
        """Do them; returns what the centralised one reaches on the test part."""
        start, data, test = rounds.directory.start(), run.data, {}
        everyone = self.clients_per_round is None or self.clients_per_round >= data.num_clients
        if "centralised" in self.baselines:
            examples = [record.num_examples for record in run.history]
            with self._baseline("centralised", rounds, run, start, split_matters=not everyone) as (there, beside):
                final = centralised_rounds(there, beside, start, examples, self.local_epochs)
            assign_(travelling(rounds.evaluator.training.module), final.weights)
            self.baseline_runs["centralised"], test = beside.history, rounds.evaluator.evaluate("test").metrics
        if "local" in self.baselines:
            taken = Counter(client for record in run.history for client in self._cohort(data, record.round))
            epochs = [self.local_epochs * max(1, taken[client]) for client in range(data.num_clients)]
            with self._baseline("local", rounds, run, start, split_matters=True) as (there, _):
                self.baseline_runs["local"] = local_records(there, start, epochs)
        return test

    @contextlib.contextmanager
    def _baseline(
        self, name: str, rounds: Rounds, run: Run, start: ServerState, split_matters: bool
    ) -> Iterator[tuple[Rounds, Run]]:
        """A run beside this one. Its directory is named after all that its numbers depend on; who shares it waits."""
        about = {"name": name, "examples": [record.num_examples for record in run.history], "start": digest(start.weights)}
        config = baseline_config(run.config, about, split_matters)
        folder = self.baseline_dir or (self.run_dir and str(Path(self.run_dir) / "baselines"))
        path = Path(folder) / f"{name}-{fingerprint(config)}" if folder else None
        with locked(path, wait=True):
            directory = RunDirectory(path, config, self.keep)
            yield dataclasses.replace(rounds, directory=directory), Run(config, run.data, len(run.history))

    def _conclude(self, rounds: Rounds, run: Run, test: dict[str, float], centralised_test: dict[str, float]) -> None:
        """Sum up what is known by now."""
        majority, path = getattr(run.data, "majority_accuracy", None), rounds.directory.path
        found: dict[str, Any] = {**self.baseline_runs, "majority_accuracy": majority("test") if majority else None}
        if "centralised" in found:
            found["centralised_test"] = centralised_test
        run.summary.update(summarise(run.history, self.evaluate_on, test, found))
        run.summary["peak_memory_bytes"] = peak_memory_bytes(rounds.evaluator.training.fabric.device)
        if path is not None:
            curves = {"federated": run.history, "centralised": self.baseline_runs.get("centralised", [])}
            alone = mean_of(self.baseline_runs.get("local", []), self.evaluate_on, "accuracy")
            levels = {} if alone is None else {"each client alone, mean": alone}
            with writing(path / "curves.png"):
                drawn = {name: history for name, history in curves.items() if history}
                plot_curves(drawn, path / "curves.png", levels, title=f"{path.name}: {self.evaluate_on} part")
        rounds.directory.write_json("summary.json", run.summary)

    def _cohort(self, data: Any, number: int) -> list[int]:
        return cohort(self.seed, number, data.num_clients, self.clients_per_round)

    def _check(self, data: Any) -> None:
        needed = ["client_dataloader", "num_clients", "val_dataloader"]
        needed += ["client_test_dataloader"] if self.evaluation == "clients" else []
        needed += ["train_dataloader"] if "centralised" in self.baselines else []
        missing = [name for name in needed if not hasattr(data, name)]
        if missing:
            raise UsageError("data", type(data).__name__, f"a data module that has {', '.join(missing)}")
        if self.evaluation == "clients" and self.evaluate_on != "test":
            raise UsageError("evaluate_on", self.evaluate_on, "test, with evaluation by clients")
        if self.clients_per_round is not None and self.clients_per_round > data.num_clients:
            raise UsageError("clients_per_round", self.clients_per_round, f"at most num_clients, {data.num_clients}")
