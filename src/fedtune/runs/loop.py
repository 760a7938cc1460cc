"""`FederatedLoop`: a `LightningModule` and clients' data in, round records and averaged weights out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from fedtune.algorithms.specification import algorithm_of, specification_of
from fedtune.errors import UsageError, at_least, one_of
from fedtune.federated.client import Worker
from fedtune.federated.cohorts import cohort, max_weight
from fedtune.federated.evaluation import Evaluator, attached
from fedtune.federated.messages import ClientReport, Context
from fedtune.federated.parts import Algorithm
from fedtune.federated.round import RoundOptions, run_round
from fedtune.federated.state import RoundResult, ServerState
from fedtune.federated.training import Training
from fedtune.runs.baselines import BASELINES, Baselines
from fedtune.runs.callbacks import FederatedCallback, MonitorCheck, Run, exceptions_reported
from fedtune.runs.figures import plot_run
from fedtune.runs.hardware import Resolved, fabric_of, freed_memory_kept, peak_memory_bytes, resolve_precision
from fedtune.runs.options import RunOptions
from fedtune.runs.progress import Progress
from fedtune.runs.renamed import taken
from fedtune.runs.rounds import Rounds
from fedtune.runs.wandb import LOGGERS, WandbMirror
from fedtune.runtimes.serial import Serial
from fedtune.storage.config import describe, identified
from fedtune.storage.directory import RunDirectory, writing
from fedtune.storage.locks import locked
from fedtune.storage.records import RoundRecord
from fedtune.storage.summary import MODES, summarise, with_known_baselines
from fedtune.tensors import assign_, buffers, counters, resting, snapshot, travelling

EVALUATED_ON = ("validation", "test")
_NOT_CONFIG = ("callbacks", "run_dir", "logger")  # not a plain value, or no part of what makes the numbers


@dataclass(eq=False)
class FederatedLoop:
    """Federated training of any `LightningModule`, used like a `Trainer`.

    Args:
        max_rounds: rounds in all, those before a resume included.
        local_epochs: epochs of a client in a round.
        clients_per_round: size of the cohort drawn each round; every client by default.
        seed: seed of the cohorts, of the order of batches and of dropout.
        run_dir: directory of the run: configuration, records, checkpoints, picture. Where it holds an interrupted run of
            the same configuration, that run goes on. None writes nothing.
        algorithm: a name of `fedtune.ALGORITHMS`, an `Algorithm`, or a dictionary as in `fedtune.algorithms.specification`.
        precision: "auto" (bf16 mixed where the hardware has it, else fp32), "32-true" or "bf16-mixed".
        accelerator: as in Lightning: "auto", "cpu", "gpu".
        gradient_clip_val: largest norm of a gradient; no clipping by default.
        evaluate_on: the part that the rounds are evaluated on: "validation", or "test" as in the paper.
        baselines: what the result is compared with: "centralised" (pooled data, the same number of examples a round)
            and "local" (each client alone, its own epochs). They run after the rounds; () leaves them out.
        logger: "none", or "wandb" to mirror the run.
        callbacks: hooks into the run, see `FederatedCallback`.
        monitor, mode: the metric of the rounds that says which is the best, and whether it should be "max" or "min".
        options: details, see `RunOptions`.

    Raises:
        UsageError: a value outside of what is allowed; in `fit` also a run directory of another configuration.

    After `fit`: `data`, `history` (round records), `summary` (as in summary.json), `baseline_runs` (name -> records).
    """

    max_rounds: int = 10
    local_epochs: int = 1
    clients_per_round: int | None = None
    seed: int = 0
    run_dir: str | None = None
    algorithm: str | Mapping[str, Any] | Algorithm = "fedavg"
    precision: str = "auto"
    accelerator: str = "auto"
    gradient_clip_val: float | None = None
    evaluate_on: str = "validation"
    baselines: Sequence[str] = BASELINES
    logger: str = "none"
    callbacks: Sequence[FederatedCallback] = ()
    monitor: str = "accuracy"
    mode: str = "max"
    options: RunOptions = field(default_factory=RunOptions)

    config: dict[str, Any] = field(default_factory=dict, init=False)
    data: Any = field(default=None, init=False, repr=False)
    history: list[RoundRecord] = field(default_factory=list, init=False)
    baseline_runs: dict[str, list[Any]] = field(default_factory=dict, init=False)
    summary: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for name in ("max_rounds", "local_epochs"):
            at_least(name, getattr(self, name), 1)
        at_least("seed", self.seed, 0)
        if self.clients_per_round is not None:
            at_least("clients_per_round", self.clients_per_round, 1)
        if self.gradient_clip_val is not None and not self.gradient_clip_val > 0:
            raise UsageError("gradient_clip_val", self.gradient_clip_val, "a number above 0")
        for name, values, allowed in (
            ("evaluate_on", [self.evaluate_on], EVALUATED_ON),
            ("mode", [self.mode], MODES),
            ("logger", [self.logger], LOGGERS),
            ("baselines", self.baselines, BASELINES),
        ):
            for value in values:
                if value not in allowed:
                    raise one_of(name, value, allowed)
        resolve_precision(self.precision, self.accelerator)
        self._algorithm = algorithm_of(self.algorithm)
        self._callbacks = [*self.callbacks, MonitorCheck(self.monitor), *([WandbMirror()] if self.logger == "wandb" else [])]

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
        precision, progress = resolve_precision(self.precision, self.accelerator), Progress(self.options.progress)
        fabric = fabric_of(self.accelerator, precision)
        if fabric.device.type == "cuda" and hasattr(data, "keep_on"):
            data.keep_on(fabric.device)
        training = Training(fabric, module, self.seed, self.gradient_clip_val, self.options.fast_dropout)
        evaluator = Evaluator(training, data, self.evaluate_on, self.options.evaluation)
        run = self._new_run(module, data, precision, progress)
        with (
            locked(self.run_dir),
            attached(fabric, module),
            freed_memory_kept(),
            exceptions_reported(self._callbacks, run, module),
        ):
            path = Path(self.run_dir) if self.run_dir else None
            directory = RunDirectory(path, run.config, self.options.keep, data.num_clients)
            if evaluator.loader(self.evaluate_on) is None:
                raise UsageError("evaluate_on", self.evaluate_on, "a part that the data have")
            first = ServerState(0, snapshot(travelling(module)))
            directory.begin(first, bool(self.baselines), resting(module), getattr(module, "from_files", ()))
            final = self._federated(Rounds(evaluator, progress, directory), run)
            test = evaluator.evaluate("test").metrics
            baselines = self._baselines(evaluator, progress, run)
            self._conclude(run, directory, test, baselines)  # a baseline that fails must not take the result with it
            if self.baselines:
                baselines.play(self.baselines, directory.start())
                assign_(travelling(module), final.weights)
                self._conclude(run, directory, test, baselines)
            for callback in self._callbacks:
                callback.on_fit_end(run, module)
        return self.history

    def _new_run(self, module: pl.LightningModule, data: Any, precision: Resolved, progress: Progress) -> Run:
        """What callbacks see; the loop has the same history and summary."""
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.init}
        own["algorithm"] = specification_of(self._algorithm, strict=self.run_dir is not None)
        own["options"] = dataclasses.asdict(self.options)
        own["precision"] = precision  # a continuation on other hardware must not change it in silence
        self.config = describe(module, data, {name: value for name, value in own.items() if name not in _NOT_CONFIG})
        if self.run_dir is not None:
            identified(self.config)
        run = Run(self.config, data, self.max_rounds, self.run_dir, progress.line)
        self.data, self.history, self.summary, self.baseline_runs = data, run.history, run.summary, {}
        return run

    def _federated(self, rounds: Rounds, run: Run) -> ServerState:
        """The rounds of the federation."""
        training, data, algorithm = rounds.evaluator.training, run.data, self._algorithm
        hooks = [one for one in self._callbacks if type(one).on_client_end is not FederatedCallback.on_client_end]

        def client_ended(report: ClientReport) -> None:
            for callback in hooks:
                callback.on_client_end(run, training.module, report)

        worker = Worker(
            training,
            data,
            algorithm.client,
            rounds.directory.memory,
            self.local_epochs,
            snapshot(counters(training.module)),
            algorithm.up,
            algorithm.down,
            client_ended if hooks else None,
        )
        runtime, most = Serial(worker), max_weight(data, self.local_epochs)
        options = RoundOptions(
            self.local_epochs,
            frozenset(buffers(training.module)),
            self.options.agreement,
            self.options.min_clients,
            rounds.progress.client,
        )

        def next_round(state: ServerState) -> RoundResult:
            number = state.round + 1
            drawn = cohort(self.seed, number, data.num_clients, self.clients_per_round)
            context = Context(self.seed, number, data.num_clients, tuple(drawn), most)
            return run_round(state, algorithm, context, runtime, options)

        with rounds.progress.phase("federated", self.max_rounds, self.clients_per_round or data.num_clients):
            final = rounds.play(run, rounds.directory.start, next_round, self._callbacks)
        assign_(counters(training.module), worker.counters)
        return final

    def _baselines(self, evaluator: Evaluator, progress: Progress, run: Run) -> Baselines:
        folder = self.options.baseline_dir or (self.run_dir and str(Path(self.run_dir) / "baselines"))
        everyone = self.clients_per_round is None or self.clients_per_round >= run.data.num_clients
        path = Path(folder) if folder else None
        found = Baselines(evaluator, progress, run, self.local_epochs, everyone, path, self.options.keep)
        self.baseline_runs = found.records
        return found

    def _conclude(self, run: Run, directory: RunDirectory, test: dict[str, float], baselines: Baselines) -> None:
        """Sum up what is known by now."""
        majority = getattr(run.data, "majority_accuracy", None)
        found: dict[str, Any] = {**baselines.records, "majority_accuracy": majority("test") if majority else None}
        if "centralised" in found:
            found["centralised_test"] = baselines.centralised_test
        known = summarise(run.history, self.evaluate_on, test, found, self.monitor, self.mode)
        run.summary.update(with_known_baselines(known, directory.read_json("summary.json")))
        run.summary["peak_memory_bytes"] = peak_memory_bytes(baselines.evaluator.training.fabric.device)
        if directory.path is not None:
            with writing(directory.path / "curves.png"):
                plot_run(directory.path, run.history, baselines.records, self.evaluate_on)
        directory.write_json("summary.json", run.summary)

    def _check(self, data: Any) -> None:
        needed = ["client_dataloader", "num_clients", "val_dataloader"]
        needed += ["client_test_dataloader"] if self.options.evaluation == "clients" else []
        needed += ["train_dataloader"] if "centralised" in self.baselines else []
        missing = [name for name in needed if not hasattr(data, name)]
        if missing:
            raise UsageError("data", type(data).__name__, f"a data module that has {', '.join(missing)}")
        if self.options.evaluation == "clients" and self.evaluate_on != "test":
            raise UsageError("evaluate_on", self.evaluate_on, "test, with evaluation by clients")
        if self.clients_per_round is not None and self.clients_per_round > data.num_clients:
            raise UsageError("clients_per_round", self.clients_per_round, f"at most num_clients, {data.num_clients}")


FederatedLoop.__init__ = taken(FederatedLoop.__init__)  # type: ignore[method-assign]  # old names, for one version
