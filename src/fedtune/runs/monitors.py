"""Callbacks that watch a metric or the learning rate, in the manner of Lightning's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from safetensors.torch import save_file

from fedtune.errors import UsageError, at_least, one_of
from fedtune.federated.messages import ClientReport
from fedtune.files import append_line, read_lines, replaced, write_lines
from fedtune.runs.callbacks import FederatedCallback, Run
from fedtune.storage.records import RoundRecord
from fedtune.storage.summary import MODES
from fedtune.tensors import Tensors, assign_, snapshot, travelling


class _Watching(FederatedCallback):
    """What watches a metric.

    Args:
        monitor: a metric of the rounds; by default the run's.
        mode: whether it should be "max" or "min"; by default the run's, where the metric is the run's, too.
    """

    def __init__(self, monitor: str | None = None, mode: str | None = None) -> None:
        self.monitor, self.mode = monitor, mode
        if mode is not None and mode not in MODES:
            raise one_of(f"{type(self).__name__}.mode", mode, MODES)

    def on_fit_start(self, run: Run, module: pl.LightningModule) -> None:
        """Take up what the run monitors."""
        of_run = run.config["loop"]
        if self.mode is None and self.monitor not in (None, of_run["monitor"]):
            allowed = f"max or min, as {self.monitor} is not the run's own metric, {of_run['monitor']}"
            raise UsageError(f"{type(self).__name__}.mode", None, allowed)
        self.monitor, self.mode = self.monitor or of_run["monitor"], self.mode or of_run["mode"]

    def value_of(self, record: RoundRecord) -> float | None:
        """The metric of a round; None where that was not evaluated.

        Raises:
            UsageError: it was, without this metric.
        """
        if record.metrics and self.monitor not in record.metrics:
            raise one_of(f"{type(self).__name__}.monitor", self.monitor, record.metrics)
        return record.metrics.get(str(self.monitor))

    def is_better(self, value: float, than: float | None, by: float = 0.0) -> bool:
        """Whether a value is better than another one, by more than so much."""
        if not math.isfinite(value):
            return False
        return than is None or (value - than > by if self.mode == "max" else than - value > by)


class EarlyStopping(_Watching):
    """Ends a run whose metric no longer improves, as Lightning's callback of this name does for epochs.

    Args:
        monitor, mode: the metric and whether it should be "max" or "min"; by default the run's.
        min_delta: what counts as an improvement is larger than this.
        patience: evaluated rounds without an improvement after which the run ends.
        check_finite: end when the metric is no finite number.
        stopping_threshold: end once the metric is better than this.
        divergence_threshold: end once it is worse than this.
    """

    def __init__(
        self,
        monitor: str | None = None,
        min_delta: float = 0.0,
        patience: int = 3,
        mode: str | None = None,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
    ) -> None:
        super().__init__(monitor, mode)
        at_least("EarlyStopping.patience", patience, 1)
        self.min_delta, self.patience, self.check_finite = abs(min_delta), patience, check_finite
        self.stopping_threshold, self.divergence_threshold = stopping_threshold, divergence_threshold
        self.best_score: float | None = None
        self.wait_count = self.stopped_round = 0

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and for how many rounds there was no better one."""
        return {"best_score": self.best_score, "wait_count": self.wait_count, "stopped_round": self.stopped_round}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Know that again."""
        self.best_score, self.wait_count = state["best_score"], state["wait_count"]
        self.stopped_round = state["stopped_round"]

    def on_round_end(self, run: Run, module: pl.LightningModule, record: RoundRecord) -> None:
        """Look at the metric."""
        value = self.value_of(record)
        if value is None:
            return
        reason = self._reason(value)
        if reason is not None:
            run.should_stop, self.stopped_round = True, record.round
            run.print(f"EarlyStopping: {self.monitor} {value:.4f} after round {record.round}: {reason}")

    def _reason(self, value: float) -> str | None:
        if self.check_finite and not math.isfinite(value):
            return "no finite number"
        if self.stopping_threshold is not None and self.is_better(value, self.stopping_threshold):
            return f"better than the stopping threshold {self.stopping_threshold}"
        if self.divergence_threshold is not None and self.is_better(self.divergence_threshold, value):
            return f"worse than the divergence threshold {self.divergence_threshold}"
        if self.is_better(value, self.best_score, self.min_delta):
            self.best_score, self.wait_count = value, 0
            return None
        self.wait_count += 1
        best = "" if self.best_score is None else f" than {self.best_score:.4f}"
        return f"not better{best} for {self.wait_count} rounds" if self.wait_count >= self.patience else None


class BestWeights(_Watching):
    """Keeps the averaged weights of the best round, beside the last rounds' checkpoints: in `best.safetensors` of the run
    directory, with the round and its value in the file's metadata, or in memory where there is no directory.

    Args:
        monitor, mode: the metric and whether it should be "max" or "min"; by default the run's.
        restore: after the run the module holds these weights, and not those of the last round.

    After a round: `best_round`, `best_score`. `load(module)` gives a module the weights.
    """

    def __init__(self, monitor: str | None = None, mode: str | None = None, restore: bool = False) -> None:
        super().__init__(monitor, mode)
        self.restore = restore
        self.best_round: int | None = None
        self.best_score: float | None = None
        self._file: Path | None = None
        self._weights: Tensors = {}

    def state_dict(self) -> dict[str, Any]:
        """The best round so far and its value."""
        return {"best_round": self.best_round, "best_score": self.best_score}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Know that again."""
        self.best_round, self.best_score = state["best_round"], state["best_score"]

    def on_fit_start(self, run: Run, module: pl.LightningModule) -> None:
        """Find the place."""
        super().on_fit_start(run, module)
        self._file = Path(run.run_dir) / "best.safetensors" if run.run_dir else None

    def on_round_end(self, run: Run, module: pl.LightningModule, record: RoundRecord) -> None:
        """Keep the weights where they are the best."""
        value = self.value_of(record)
        replay = record.round == self.best_round
        if value is None or not (replay or self.is_better(value, self.best_score)):
            return
        self.best_round, self.best_score = record.round, value
        if self._file is None:
            self._weights = {name: tensor.cpu() for name, tensor in snapshot(travelling(module)).items()}
            return
        about = {"format": "pt", "round": str(record.round), "monitor": str(self.monitor), "value": repr(value)}
        with replaced(self._file) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in travelling(module).items()}, temporary, about)

    def on_fit_end(self, run: Run, module: pl.LightningModule) -> None:
        """Give the module the weights, where that is wanted."""
        if self.restore and self.best_round is not None:
            self.load(module)
            run.print(f"BestWeights: the module holds round {self.best_round}, {self.monitor} {self.best_score:.4f}")

    def load(self, module: pl.LightningModule) -> None:
        """Give a module the best weights.

        Raises:
            UsageError: no round was the best yet.
        """
        from safetensors.torch import load_file

        if self.best_round is None:
            raise UsageError("BestWeights.load", None, "after a round that was evaluated")
        weights = self._weights if self._file is None else load_file(self._file)
        assign_(travelling(module), weights)


class LearningRateMonitor(FederatedCallback):
    """Keeps the learning rates of each round: for every parameter group the rate after the last step of the client with most.

    They go to the run's logger, and with a run directory into `learning_rates.jsonl`. After a round: `rates`, a dictionary a
    round, with "round" and a name for each group, as Lightning's callback has them ("lr-AdamW", "lr-AdamW/pg1" and so on).
    """

    def __init__(self) -> None:
        self.rates: list[dict[str, Any]] = []
        self._now: dict[str, float] = {}
        self._most = 0
        self._file: Path | None = None

    def on_fit_start(self, run: Run, module: pl.LightningModule) -> None:
        """Know the rates of the rounds before."""
        self._file = Path(run.run_dir) / "learning_rates.jsonl" if run.run_dir else None
        known = read_lines(self._file) if self._file else []
        self.rates = [one for one in known if one.get("round", math.inf) <= len(run.history)]
        if self._file is not None and len(self.rates) < len(known):
            write_lines(self._file, self.rates)

    def on_round_start(self, run: Run, module: pl.LightningModule, number: int) -> None:
        """A new round."""
        self._now, self._most = {}, 0

    def on_client_end(self, run: Run, module: pl.LightningModule, report: ClientReport) -> None:
        """Look at the optimizer of a client."""
        if report.num_steps <= self._most:
            return
        self._most = report.num_steps
        (optimizer,) = module.trainer.optimizers
        groups = optimizer.param_groups
        name = f"lr-{type(optimizer).__name__}"
        names = [name] if len(groups) == 1 else [f"{name}/pg{number}" for number in range(1, len(groups) + 1)]
        self._now = {name: float(group["lr"]) for name, group in zip(names, groups, strict=True)}

    def on_round_end(self, run: Run, module: pl.LightningModule, record: RoundRecord) -> None:
        """Keep the rates."""
        if not self._now:  # shown again after a crash: what it would keep is known by then
            return
        self.rates.append({"round": record.round, **self._now})
        run.logged.update(self._now)
        if self._file is not None:
            append_line(self._file, self.rates[-1])
