"""`FederatedLoop`: a `LightningModule` and clients' data in, round records and averaged weights out.

One round is four files: this one, which drives it and keeps its record; `aggregation`, where the algorithm stands as in
the paper; `client`, the local epochs; `weights`, the arithmetic.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from fedtune.algorithms.fedavg import ALGORITHMS, Averaging
from fedtune.errors import UsageError, at_least, one_of
from fedtune.federated.cohorts import cohort
from fedtune.federated.evaluation import attached
from fedtune.federated.messages import ClientReport
from fedtune.federated.session import Session
from fedtune.federated.state import RoundResult, ServerState
from fedtune.federated.training import Resident
from fedtune.runs.baselines import centralised, local
from fedtune.runs.callbacks import FederatedCallback, told_of_exceptions
from fedtune.runs.hardware import fabric_of, freed_memory_kept, peak_memory_bytes, resolve_precision
from fedtune.runs.progress import Progress
from fedtune.runs.rounds import Course
from fedtune.runs.wandb import LOGGERS, WandbMirror
from fedtune.storage.config import baseline_config, describe, fingerprint
from fedtune.storage.directory import RunDirectory
from fedtune.storage.locks import held
from fedtune.storage.records import RoundRecord
from fedtune.storage.summary import mean_of, summarise
from fedtune.tensors import assign_, digest, snapshot, travelling

BASELINES = ("centralised", "local")
PARTS = ("validation", "test")
EVALUATIONS = ("pooled", "clients")
WEIGHTINGS = ("examples", "uniform")
_NOT_CONFIG = ("callbacks", "run_dir", "logger")  # not a plain value, or no part of what makes the numbers
Advance = Callable[[ServerState], RoundResult]


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

    should_stop: bool = field(default=False, init=False)
    config: dict[str, Any] = field(default_factory=dict, init=False)
    data: Any = field(default=None, init=False, repr=False)
    history: list[RoundRecord] = field(default_factory=list, init=False)
    baseline_runs: dict[str, list[Any]] = field(default_factory=dict, init=False)
    summary: dict[str, Any] = field(default_factory=dict, init=False)
    _centralised_test: dict[str, float] = field(default_factory=dict, init=False, repr=False)

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
        self.display = Progress(self.progress)
        self._hooks = [*self.callbacks, *([WandbMirror()] if self.logger == "wandb" else [])]

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
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.init}
        own["precision"] = precision  # a continuation on other hardware must not change it in silence
        self.config = describe(module, data, {name: value for name, value in own.items() if name not in _NOT_CONFIG})
        self.history, self.baseline_runs, self.should_stop, self.data = [], {}, False, data
        hooks = told_of_exceptions(self._hooks, self, module)
        with held(self.run_dir), attached(fabric, module), freed_memory_kept(), hooks:
            run = RunDirectory(Path(self.run_dir) if self.run_dir else None, self.config, self.keep)
            resident = Resident(fabric, module, self.seed, self.gradient_clip_val, self.fast_dropout)
            session = Session(resident, data, self.evaluate_on, self.evaluation)
            if session.loader(self.evaluate_on) is None:
                raise UsageError("evaluate_on", self.evaluate_on, "a part that the data have")
            run.begin(ServerState(0, snapshot(travelling(module))), again=bool(self.baselines))
            final = self._federated(session, run)
            test = session.evaluate("test").metrics
            self._conclude(session, run, test)  # a baseline that fails must not take the result with it
            if self.baselines:
                self._baselines(session, run.start())
                assign_(travelling(module), final.weights)
                self._conclude(session, run, test)
            for hook in self._hooks:
                hook.on_fit_end(self, module)
        return self.history

    def _federated(self, session: Session, run: RunDirectory) -> ServerState:
        def told(report: ClientReport) -> None:
            self.display.client(report)
            for hook in self._hooks:
                hook.on_client_end(self, session.resident.module, report)

        def advance(state: ServerState) -> RoundResult:
            clients = self._cohort(session.data, state.round + 1)
            loader_of, averaging = session.data.client_dataloader, Averaging(self.weighting, self.agreement)
            return algorithm(session.resident, state, clients, loader_of, self.local_epochs, told, averaging)

        algorithm = ALGORITHMS[self.algorithm] if isinstance(self.algorithm, str) else self.algorithm

        size = min(self.clients_per_round or session.data.num_clients, session.data.num_clients)
        course = Course(run, self.max_rounds, self.history, self._hooks)
        with self.display.phase("federated", self.max_rounds, size):
            return self._rounds(session, course, run.start, advance)

    def _rounds(self, session: Session, course: Course, start: Callable[[], ServerState], advance: Advance) -> ServerState:
        """Rounds one after the other, each evaluated, recorded and kept; from where the run stopped, if it did."""
        module = session.resident.module
        found, course.history[:] = course.run.resume()
        state = start() if found is None else found
        assign_(travelling(module), state.weights)
        memory = {name: tensor.to(module.device) for name, tensor in state.optimizer.items()}
        state = dataclasses.replace(state, weights=snapshot(travelling(module)), optimizer=memory)
        if state.round > course.rounds:
            raise UsageError("max_rounds", course.rounds, f"{state.round} or more, the rounds that {self.run_dir} has")
        self.display.resumed(state.round)
        for hook in course.hooks:
            hook.on_fit_start(self, module)
        while state.round < course.rounds and not self.should_stop:
            for hook in course.hooks:
                hook.on_round_start(self, module, state.round + 1)
            began = time.perf_counter()
            result = advance(state)
            state = result.state
            assign_(travelling(module), state.weights)
            record = session.record(result, began)
            course.run.complete(record, state)
            course.history.append(record)
            self.display.round(record)
            for hook in course.hooks:
                hook.on_round_end(self, module, record)
        return state

    def _baselines(self, session: Session, start: ServerState) -> None:
        self.should_stop = False
        if "centralised" in self.baselines:
            self._centralised(session, start)
        if "local" in self.baselines:
            self.baseline_runs["local"] = self._local(session, start)

    def _centralised(self, session: Session, start: ServerState) -> None:
        def advance(state: ServerState) -> RoundResult:
            examples = self.history[state.round].num_examples
            return centralised(session.resident, state, session.data.train_dataloader(), examples, self.local_epochs)

        history: list[RoundRecord] = []
        everyone = self.clients_per_round is None or self.clients_per_round >= session.data.num_clients
        rounds = self.history[-1].round
        with self._baseline_run("centralised", start, not everyone) as run, self.display.phase("centralised", rounds, 1):
            final = self._rounds(session, Course(run, rounds, history), lambda: start, advance)
        assign_(travelling(session.resident.module), final.weights)
        self.baseline_runs["centralised"], self._centralised_test = history, session.evaluate("test").metrics

    def _local(self, session: Session, start: ServerState) -> list[dict[str, Any]]:
        taken = [client for number in range(1, self.history[-1].round + 1) for client in self._cohort(session.data, number)]
        clients = session.data.num_clients
        with self._baseline_run("local", start, split_matters=True) as run, self.display.phase("local", 1, clients):
            done = run.read("local.jsonl")
            for client in range(len(done), clients):
                epochs, loader = self.local_epochs * max(1, taken.count(client)), session.data.client_dataloader(client)
                record = local(session.resident, start.weights, client, loader, epochs, session.loaders())
                run.append("local.jsonl", record)
                done.append(record)
                self.display.local(record)
        return done

    @contextlib.contextmanager
    def _baseline_run(self, name: str, start: ServerState, split_matters: bool) -> Iterator[RunDirectory]:
        """The directory of a baseline, named after all that its numbers depend on; who shares it waits for its turn."""
        folder = self.baseline_dir or (self.run_dir and str(Path(self.run_dir) / "baselines"))
        if not folder:
            yield RunDirectory(None, {}, self.keep)
            return
        about = {"name": name, "examples": [record.num_examples for record in self.history], "start": digest(start.weights)}
        config = baseline_config(self.config, about, split_matters)
        path = Path(folder) / f"{name}-{fingerprint(config)}"
        with held(path, wait=True):
            yield RunDirectory(path, config, self.keep)

    def _conclude(self, session: Session, run: RunDirectory, test: dict[str, float]) -> None:
        """Sum up what is known by now."""
        majority = getattr(session.data, "majority_accuracy", None)
        found = dict(self.baseline_runs) | {"majority_accuracy": majority("test") if majority else None}
        if "centralised" in found:
            found["centralised_test"] = self._centralised_test
        self.summary = summarise(self.history, self.evaluate_on, test, found)
        self.summary["peak_memory_bytes"] = peak_memory_bytes(session.resident.fabric.device)
        curves = {"federated": self.history, "centralised": self.baseline_runs.get("centralised", [])}
        alone = mean_of(self.baseline_runs.get("local", []), self.evaluate_on, "accuracy")
        levels = {} if alone is None else {"each client alone, mean": alone}
        run.draw({name: history for name, history in curves.items() if history}, levels, self.evaluate_on)
        run.write_json("summary.json", self.summary)

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
