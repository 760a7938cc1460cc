"""`FederatedLoop`: a `LightningModule` and clients' data in, round records and averaged weights out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl

from fedtune.algorithms.specification import algorithm_of, specification_of
from fedtune.errors import UsageError
from fedtune.federated.adapted import adapted, resting_factors
from fedtune.federated.adapters import Adapters
from fedtune.federated.base import moving
from fedtune.federated.cohorts import cohort, max_weight
from fedtune.federated.evaluation import Evaluator
from fedtune.federated.messages import ClientReport, Context, Position
from fedtune.federated.parts import Algorithm
from fedtune.federated.personal import personal_names
from fedtune.federated.remote import Remote
from fedtune.federated.round import RoundOptions
from fedtune.federated.state import RoundResult, ServerState
from fedtune.federated.trainer import check_module
from fedtune.privacy.checks import privacy_with
from fedtune.privacy.examples import ExamplePlan
from fedtune.privacy.mechanisms import for_rounds, plain_privacy
from fedtune.privacy.plan import PrivacyPlan
from fedtune.runs.arguments import check_arguments, check_data
from fedtune.runs.baselines import BASELINES, Baselines
from fedtune.runs.callbacks import FederatedCallback, MonitorCheck, Run, exceptions_reported, watched
from fedtune.runs.conclusion import conclude
from fedtune.runs.counterparts import check_callbacks
from fedtune.runs.forecast import Plan
from fedtune.runs.hardware import resolve_precision
from fedtune.runs.loggers import mirror_of
from fedtune.runs.options import RunOptions
from fedtune.runs.prepared import evaluated, given, look_over, plan_trainer, prepared, round_of, watch_the_end, worker_of
from fedtune.runs.privately import planned, played
from fedtune.runs.progress import Progress
from fedtune.runs.renamed import taken
from fedtune.runs.rounds import Rounds
from fedtune.runs.sharing import check_same, check_weights, share
from fedtune.runtimes.faulty import faults_of, plain_faults, runtime_of
from fedtune.runtimes.processes import ranks_of
from fedtune.secure.parts import plain_secure, secure_of
from fedtune.storage.config import describe, identified
from fedtune.storage.directory import RunDirectory
from fedtune.storage.history import History
from fedtune.storage.locks import locked
from fedtune.storage.records import RoundRecord
from fedtune.tensors import assign_, buffers, carried, resting, restore_counters, snapshot, travelling, without

_NOT_CONFIG = ("callbacks", "run_dir", "logger", "runtime")  # not a plain value, or no part of what makes the numbers


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
        faults: what goes wrong on purpose with some clients: names of `fedtune.FAULTS`, or dictionaries with a name and values
            ({"name": "Drop", "rate": 0.3}).
        privacy: differential privacy of clients, or of the examples of each: a name of `fedtune.PRIVACY`, or a dictionary with
            it and its values ({"name": "Gaussian", "noise": 1.0}). That of clients draws `clients_per_round` in the mean.
        secure_sums: a name of `fedtune.SECURE_SUMS`, or a dictionary with it and its values ({"name": "PairwiseMasks",
            "threshold": 0.67}): the server has masked messages, and their sum. The same weights, to the bit.
        algorithm: a name of `fedtune.ALGORITHMS`, an `Algorithm`, or a dictionary as in `fedtune.algorithms.specification`.
        precision: "auto" (bf16 mixed where the hardware has it, else fp32), "32-true" or 32, "bf16-mixed".
        accelerator: as in Lightning: "auto", "cpu", "gpu".
        gradient_clip_val, gradient_clip_algorithm, accumulate_grad_batches, deterministic: as in a `Trainer`, for the steps of
            each client.
        evaluate_on: the part that the rounds are evaluated on: "validation", or "test" as in the paper.
        baselines: what the result is compared with: "centralised" (pooled data, the same number of examples a round)
            and "local" (each client alone, its own epochs). They run after the rounds; () leaves them out.
        logger: "wandb" to mirror the run, a logger of Lightning, or a list of them; "none", None or False is none.
        callbacks: hooks into the run, see `FederatedCallback`.
        monitor, mode: the metric of the rounds that says which is the best, and whether it should be "max" or "min". Where that
            is "accuracy", and the module has an attribute `monitor` of its own, (metric, mode), as `CausalLM` has, it is that.
        limit_train_batches, limit_val_batches, limit_test_batches: at most so many batches of each loader (of a client's, in an
            epoch), or that share of them.
        check_val_every_n_rounds: the averaged model is evaluated after every so many rounds.
        fast_dev_run: one round with so many batches (True: one) of every loader, and nothing written, to see that all works.
        options: details, see `RunOptions`.
        runtime: "serial" (one process is one client after the other), "torchrun" (the processes that torchrun, or Slurm, has
            started share the clients of a round; the same numbers, to the bit), or "auto": what the environment says.

    Raises:
        UsageError: a value outside of what is allowed; in `fit` also a run directory of another configuration.

    After `fit`: `data`, `history` (round records), `summary` (as in summary.json), `baseline_runs` (name -> records), `plan`
    (of the privacy, or None).
    """

    max_rounds: int = 10
    local_epochs: int = 1
    clients_per_round: int | None = None
    seed: int = 0
    run_dir: str | None = None
    algorithm: str | Mapping[str, Any] | Algorithm = "fedavg"
    faults: Sequence[Any] = ()
    privacy: Any = None
    secure_sums: Any = None
    precision: str = "auto"
    accelerator: str = "auto"
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str | None = None
    accumulate_grad_batches: int = 1
    limit_train_batches: int | float = 1.0
    limit_val_batches: int | float = 1.0
    limit_test_batches: int | float = 1.0
    check_val_every_n_rounds: int = 1
    fast_dev_run: bool | int = False
    deterministic: bool | Literal["warn"] = False
    evaluate_on: str = "validation"
    baselines: Sequence[str] = BASELINES
    logger: Any = "none"
    callbacks: Sequence[FederatedCallback] = ()
    monitor: str = "accuracy"
    mode: str = "max"
    options: RunOptions = field(default_factory=RunOptions)
    runtime: str = "auto"

    config: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    data: Any = field(default=None, init=False, repr=False)
    history: list[RoundRecord] = field(default_factory=History, init=False, repr=False)
    baseline_runs: dict[str, list[Any]] = field(default_factory=dict, init=False, repr=False)
    summary: dict[str, Any] = field(default_factory=dict, init=False, repr=False)
    plan: PrivacyPlan | ExamplePlan | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_arguments(self)
        check_callbacks(self.callbacks, FederatedCallback)
        self._position = Position()
        resolve_precision(self.precision, self.accelerator)
        self._algorithm, self._faults = algorithm_of(self.algorithm), faults_of(self.faults)
        self._privacy = for_rounds(privacy_with(self.privacy, self._algorithm), self.max_rounds)
        self._secure = secure_of(self.secure_sums)
        if self.fast_dev_run:
            self.max_rounds, self.check_val_every_n_rounds, self.run_dir, self.logger = 1, 1, None, "none"
            self.limit_train_batches = self.limit_val_batches = self.limit_test_batches = int(self.fast_dev_run)
            self.options = dataclasses.replace(self.options, baseline_dir=None)
        self._callbacks = [*self.callbacks, MonitorCheck(), *mirror_of(self.logger)]

    def fit(self, module: pl.LightningModule, data: Any = None, *, datamodule: Any = None) -> list[RoundRecord]:
        """Run the rounds, then the baselines; afterwards `module` holds the averaged weights.

        Args:
            module: any module with `training_step`, `validation_step` and `configure_optimizers`. What it logs in
                `validation_step` is in the records, averaged over examples. docs/lightning.md lists the hooks that are called.
            data, datamodule: a data module with `num_clients`, `client_dataloader(k)`, `val_dataloader()` and, if there is one,
                `test_dataloader()`; for the centralised baseline also `train_dataloader()`.

        Returns:
            one record a round, those before a resume included.

        Raises:
            UsageError: the data lack one of these, the cohort is larger than `num_clients` or smaller than the algorithm needs,
                `run_dir` cannot be used, or the module needs what only a `Trainer` does.
            RunError: the run had to stop; every complete round is kept.
        """
        ranks, data = ranks_of(self.runtime), given(data, datamodule)
        with ranks.together():
            check_module(module, data)
            check_data(self, data)
            progress = Progress(self.options.progress and ranks.leads)
            run = self._new_run(module, data, progress)
            check_same(run.config, ranks)
            self._hooked = [one for one in self._callbacks if ranks.leads or one.everywhere]
            with (
                locked(self.run_dir if ranks.leads else None),
                prepared(self, module, data, "fit", progress, ranks) as evaluator,
                adapted(module, self._algorithm, data.num_clients, self.seed) as adapters,
                exceptions_reported(self._hooked, run, module),
            ):
                self._fit(run, evaluator, adapters, progress)
        return self.history

    def validate(self, module: pl.LightningModule, data: Any = None, *, datamodule: Any = None) -> list[dict[str, float]]:
        """Evaluate a module, as it stands, on the validation part; a dictionary for each loader, as from a `Trainer`."""
        return evaluated(self, module, given(data, datamodule), "validation")

    def test(self, module: pl.LightningModule, data: Any = None, *, datamodule: Any = None) -> list[dict[str, float]]:
        """Evaluate a module, as it stands, on the test part; a dictionary for each loader, as from a `Trainer`."""
        return evaluated(self, module, given(data, datamodule), "test")

    def _fit(self, run: Run, evaluator: Evaluator, adapters: Adapters, progress: Progress) -> None:
        """Set up, rounds, test, baselines, conclude."""
        training, module, ranks = evaluator.training, evaluator.training.module, evaluator.ranks
        self.plan = planned(self, training, run, ranks)
        plan_trainer(self, training, run.data, run.max_rounds)  # by now it is known when a privacy budget is used up
        path = Path(self.run_dir) if self.run_dir else None
        memory = run.data.memory if isinstance(run.data, Remote) else None
        directory = RunDirectory(path, run.config, self.options.keep, run.data.num_clients, ranks, memory, run.max_rounds)
        if isinstance(run.data, Remote):
            run.data.begin(directory)
        elif evaluator.loader(self.evaluate_on) is None:
            raise UsageError("evaluate_on", self.evaluate_on, "a part that the data have")
        module.on_fit_start()
        look_over(module, self.evaluate_on, run)
        watch_the_end(training.trainer, directory, run)
        run.base = base = moving(self._algorithm, adapters)
        kept = without(resting(module), base), getattr(module, "from_files", ())
        again = bool(self.baselines) + bool(self._algorithm.client.seeds)
        directory.begin(ServerState(0, snapshot(carried(module, base))), again, *kept)  # no name keeps the copy
        share(module, ranks)
        personal = bool(self._algorithm.personal or self._algorithm.client.personal)
        rounds = Rounds(evaluator, progress, directory, self.check_val_every_n_rounds, personal, base)
        progress.plan(self._plan(run, ranks.size))
        final = self._federated(rounds, run, adapters)
        training.trainer.at(final.position)
        self._position = final.position
        test = evaluator.metrics("test")
        baselines = self._baselines(evaluator, progress, run)
        conclude(self, run, directory, test, baselines)  # a baseline that fails must not take the result with it
        if self.baselines:
            start = ranks.from_first(directory.start)
            assign_(carried(module, base), start.weights)
            baselines.play(self.baselines, dataclasses.replace(start, weights=without(start.weights, base)))
            assign_(carried(module, base), final.weights)
            conclude(self, run, directory, test, baselines)
        training.trainer.at(final.position)
        module.on_fit_end()
        for callback in self._hooked:
            callback.on_fit_end(run, module)
        share(module, ranks)  # one of them may have changed that of rank 0

    def _new_run(self, module: pl.LightningModule, data: Any, progress: Progress) -> Run:
        """What callbacks see; the loop has the same history and summary."""
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.init}
        own["algorithm"] = specification_of(self._algorithm, strict=self.run_dir is not None)
        own["faults"] = plain_faults(self._faults, strict=self.run_dir is not None)
        own["privacy"] = plain_privacy(self._privacy, strict=self.run_dir is not None)
        own["secure_sums"] = plain_secure(self._secure, strict=self.run_dir is not None)
        own["options"] = dataclasses.asdict(self.options)
        # a continuation on other hardware must not change the precision in silence
        own["precision"] = resolve_precision(self.precision, self.accelerator)
        own["monitor"], own["mode"] = watched(module, self.monitor, self.mode)
        self.config = describe(module, data, {name: value for name, value in own.items() if name not in _NOT_CONFIG})
        if self.run_dir is not None:
            identified(self.config)
        run = Run(self.config, data, self.max_rounds, self.run_dir, progress.line)
        self.data, self.history, self.summary, self.baseline_runs = data, run.history, run.summary, {}
        return run

    def _federated(self, rounds: Rounds, run: Run, adapters: Adapters) -> ServerState:
        """The rounds of the federation."""
        training, data, algorithm, plan = rounds.evaluator.training, run.data, self._algorithm, self.plan
        hooks = [one for one in self._hooked if type(one).on_client_end is not FederatedCallback.on_client_end]

        def client_ended(report: ClientReport) -> None:
            for callback in hooks:
                callback.on_client_end(run, training.module, report)

        names, ended = personal_names(algorithm.personal, travelling(training.module)), client_ended if hooks else None
        ranks, worker = rounds.evaluator.ranks, worker_of(self, training, data, rounds.directory.memory, ended, rounds.base)
        if isinstance(data, Remote):
            runtime, most = data.runtime(), data.max_weight()
        else:
            runtime = runtime_of(worker, ranks, self.options.on_client_error, self._faults)
            most = max_weight(data, self.local_epochs)
        play = round_of(self, training.module, rounds.directory, ranks, played(self._secure))
        algorithm = algorithm if plan is None else plan.algorithm(algorithm, frozenset(buffers(training.module)), names)
        lenient, hidden = bool(self._faults) or self.options.on_client_error == "drop", plan is not None and plan.hides_clients
        options = RoundOptions(
            self.local_epochs,
            frozenset(buffers(training.module)),
            names,
            self.options.agreement and not hidden,  # of updates as they came, which say little of a mean with noise
            0 if hidden else self.options.min_clients or (1 if lenient else None),
            rounds.progress.client,
            resting_factors(training.module, adapters),
        )

        def next_round(state: ServerState) -> RoundResult:
            number, size = state.round + 1, self.clients_per_round
            drawn = plan.cohort(self.seed, number) if plan else cohort(self.seed, number, data.num_clients, size)
            context = Context(self.seed, number, data.num_clients, tuple(drawn), most, adapters=adapters)
            worker.personal.update({name: state.weights[name] for name in names})  # the server's stay as they were at first
            result = play(state, algorithm, context, runtime, options)
            if ranks.size > 1:
                check_weights(result.state.weights, number, ranks)
            restore_counters(training.module, worker.counters)  # those of the last client mean nothing to the average
            return result if plan is None else plan.noted(result, state)

        with rounds.progress.phase("federated", run.max_rounds, self.clients_per_round or data.num_clients):
            return rounds.play(run, rounds.directory.start, next_round, self._hooked)

    def _plan(self, run: Run, processes: int) -> Plan:
        """What is to be done, for the time left."""
        num_clients = run.data.num_clients
        baselines = tuple(name for name in BASELINES if name in self.baselines)
        alone = min(num_clients, self.options.local_clients)
        return Plan(run.max_rounds, self.clients_per_round or num_clients, num_clients, baselines, alone, processes)

    def _baselines(self, evaluator: Evaluator, progress: Progress, run: Run) -> Baselines:
        folder = (self.options.baseline_dir and os.path.expanduser(self.options.baseline_dir)) or (
            self.run_dir and str(Path(self.run_dir) / "baselines")
        )
        everyone = self.clients_per_round is None or self.clients_per_round >= run.data.num_clients
        path = Path(folder) if folder else None
        found = Baselines(
            evaluator, progress, run, self.local_epochs, everyone, path, self.options.keep, self.check_val_every_n_rounds
        )
        self.baseline_runs = run.baselines = found.records
        return found


FederatedLoop.__init__ = taken(FederatedLoop.__init__)  # type: ignore[method-assign]  # old names, for one version
