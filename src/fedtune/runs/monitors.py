"""Callbacks that watch a metric or the learning rate, in the manner of Lightning's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import pytorch_lightning as pl
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedtune.errors import RunError, UsageError, at_least, one_of
from fedtune.federated.evaluation import step_of
from fedtune.files import replaced
from fedtune.runs.callbacks import FederatedCallback, Run
from fedtune.storage.records import RoundRecord
from fedtune.storage.summary import MODES
from fedtune.tensors import Tensors, assign_, carried, misfit, snapshot


class _Watching(FederatedCallback):
    """What watches a metric.

    Args:
        monitor: a metric of the rounds; by default the run's.
        mode: whether it should be "max" or "min"; by default the run's, where the metric is the run's, too.
    """

    fresh: ClassVar[dict[str, Any]]  # what is known before the first round

    def __init__(self, monitor: str | None = None, mode: str | None = None) -> None:
        self.monitor, self.mode = monitor, mode
        self._given = monitor, mode
        self._known: dict[str, Any] | None = None
        if mode is not None and mode not in MODES:
            raise one_of(f"{type(self).__name__}.mode", mode, MODES)

    def on_fit_start(self, run: Run, module: pl.LightningModule) -> None:
        """Take up what the run monitors, and what was known of it; of another run's nothing."""
        of_run, (self.monitor, self.mode) = run.config["loop"], self._given
        if self.mode is None and self.monitor not in (None, of_run["monitor"]):
            allowed = f"max or min, as {self.monitor} is not the run's own metric, {of_run['monitor']}"
            raise UsageError(f"{type(self).__name__}.mode", None, allowed)
        self.monitor, self.mode = self.monitor or of_run["monitor"], self.mode or of_run["mode"]
        if of_run["check_val_every_n_rounds"] > run.max_rounds or step_of(module, of_run["evaluate_on"]) is None:
            raise UsageError("callbacks", type(self).__name__, "a run whose rounds are evaluated (none of this one's is)")
        known, self._known = self._known, None
        if known is None or not run.history or (known.get("monitor"), known.get("mode")) != (self.monitor, self.mode):
            known = self.fresh
        for name, value in self.fresh.items():
            setattr(self, name, known.get(name, value))

    @property
    def state_key(self) -> str:
        """The class, the metric and the mode."""
        return f"{super().state_key} {self._given[0]} {self._given[1]}"

    def state_dict(self) -> dict[str, Any]:
        """What is known by now of the metric."""
        return {"monitor": self.monitor, "mode": self.mode} | {name: getattr(self, name) for name in self.fresh}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Know that again, where the metric is still the same; `on_fit_start` sees to that."""
        self._known = state

    def value_of(self, record: RoundRecord) -> float | None:
        """The metric of a round; None where that was not evaluated.

        Raises:
            UsageError: it was, without this metric.
        """
        if record.metrics and self.monitor not in record.metrics:
            raise one_of(f"{type(self).__name__}.monitor", self.monitor, record.metrics)
        return record.metrics.get(str(self.monitor))

    def is_better(self, value: float, than: float | None, by: float = 0.0) -> bool:
        """Whether a value is better than another one, by more than so much; what is no number is not."""
        if math.isnan(value):
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

    fresh: ClassVar[dict[str, Any]] = {"best_score": None, "wait_count": 0, "stopped_round": 0}

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

    After a round: `best_round`, `best_score`. `load(module)` gives a module the weights. For another metric than the run's the
    file is `best-METRIC-MODE.safetensors`.
    """

    fresh: ClassVar[dict[str, Any]] = {"best_round": None, "best_score": None}
    everywhere, only_one = False, True

    def __init__(self, monitor: str | None = None, mode: str | None = None, restore: bool = False) -> None:
        super().__init__(monitor, mode)
        self.restore = restore
        self.best_round: int | None = None
        self.best_score: float | None = None
        self._file: Path | None = None
        self._weights: Tensors = {}

    def on_fit_start(self, run: Run, module: pl.LightningModule) -> None:
        """Find the place."""
        super().on_fit_start(run, module)
        of_run = run.config["loop"]
        own = (self.monitor, self.mode) == (of_run["monitor"], of_run["mode"])
        name = "best.safetensors" if own else f"best-{quote(str(self.monitor), safe='')}-{self.mode}.safetensors"
        self._file, self._weights = Path(run.run_dir) / name if run.run_dir else None, {}
        done = [(self.value_of(record), record.round) for record in run.history]
        gone = [(value, number) for value, number in done if value is not None and self.is_better(value, self.best_score)]
        if gone:
            run.print(
                f"BestWeights: the weights of rounds up to {len(run.history)} are not known; it watches the rounds from here on"
            )

    def on_round_end(self, run: Run, module: pl.LightningModule, record: RoundRecord) -> None:
        """Keep the weights where they are the best."""
        value = self.value_of(record)
        replay = record.round == self.best_round
        if value is None or not math.isfinite(value) or not (replay or self.is_better(value, self.best_score)):
            return
        self.best_round, self.best_score = record.round, value
        if self._file is None:
            self._weights = {name: tensor.cpu() for name, tensor in snapshot(carried(module, run.base)).items()}
            return
        about = {"format": "pt", "round": str(record.round), "monitor": str(self.monitor), "value": repr(value)}
        with replaced(self._file) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in carried(module, run.base).items()}, temporary, about)

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
        if self.best_round is None:
            raise UsageError("BestWeights.load", None, "after a round that was evaluated")
        weights = self._weights if self._file is None else self._read(self._file)
        here = carried(module, weights)
        wrong = misfit(weights, here)
        if wrong:
            raise RunError(f"{self._file or 'BestWeights'}: the weights do not fit the module: {wrong}")
        assign_(here, weights)

    @staticmethod
    def _read(file: Path) -> Tensors:
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{file} cannot be read ({error})") from error


class LearningRateMonitor(FederatedCallback):
    """Gives the learning rates of each round to the run's logger: for every parameter group the rate after the last step of the
    client with most.

    They are in the records, too: `record.clients[k].learning_rates`. After a round: `rates`, a dictionary a round, with "round"
    and a name for each group, as Lightning's callback has them ("lr-AdamW", "lr-AdamW/pg1" and so on); of a round that nobody
    answered, as there may be with privacy of clients, "round" alone.
    """

    only_one = True

    def __init__(self) -> None:
        self.rates: list[dict[str, Any]] = []

    def on_fit_start(self, run: Run, module: pl.LightningModule) -> None:
        """Know the rates of the rounds before."""
        self.rates = [self._of(record) for record in run.history]

    def on_round_end(self, run: Run, module: pl.LightningModule, record: RoundRecord) -> None:
        """Hand on the rates."""
        self.rates[record.round - 1 :] = [self._of(record)]
        run.logged.update({name: rate for name, rate in self.rates[-1].items() if name != "round"})

    @staticmethod
    def _of(record: RoundRecord) -> dict[str, Any]:
        longest = max(record.clients, key=lambda report: report.num_steps, default=None)
        return {"round": record.round} | (longest.learning_rates if longest else {})
