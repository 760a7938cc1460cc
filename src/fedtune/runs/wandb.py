"""A run mirrored into Weights & Biases; no number depends on it."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import WandbLogger
from safetensors.torch import save_file

from fedtune.errors import warn
from fedtune.files import present, said
from fedtune.runs.callbacks import FederatedCallback, Run
from fedtune.runs.figures import drawn_metrics, plot_split
from fedtune.runs.sections import best_numbers, levels_of, numbers_of, pooled_numbers, section_of
from fedtune.runs.wandb_start import import_wandb, log_model, opened, sync_command
from fedtune.storage.records import RoundRecord
from fedtune.tensors import carried

_OF_A_CHECKPOINT = ("config.yaml", "rounds.jsonl", "summary.json", "best.safetensors")  # beside the round's own folder


class WandbMirror(FederatedCallback):
    """Mirrors a run into Weights & Biases: the round is the only step axis. Without a key it writes offline files.

    W&B's own variables say more: WANDB_PROJECT, WANDB_NAME, WANDB_RUN_GROUP, WANDB_JOB_TYPE, WANDB_TAGS, WANDB_DIR, WANDB_MODE,
    and WANDB_LOG_MODEL: "true" for the last checkpoint as an artifact, "all" for that of every round.

    Args:
        logger: Lightning's, whose arguments come before those variables; its run stays open, as after a `Trainer`.

    Raises:
        UsageError: wandb is not installed, or an unknown WANDB_LOG_MODEL.
    """

    everywhere = False
    replayed = False  # it mirrors the last round again whenever it starts

    def __init__(self, logger: WandbLogger | None = None) -> None:
        self._wandb = import_wandb("logger")
        self._logger = logger
        self._log_model = log_model() if logger is None else (logger._log_model or log_model())
        self._mirror: Any = None

    def on_fit_start(self, run: Run, module: pl.LightningModule) -> None:
        """Open the run; a resumed run directory continues the same W&B run. A W&B that fails is left alone from then on."""
        with self._no_harm("the run is not mirrored, W&B could not be started"):
            self._mirror = self._opened(run)
        if self._mirror is None:
            return
        with self._no_harm():
            if self._logger is None:
                module.trainer.loggers.append(WandbLogger(experiment=self._mirror))
            self._mirror.define_metric("round")
            self._mirror.define_metric("*", step_metric="round")
            if hasattr(run.data, "describe") and not run.history:
                self._log_split(run)
        if run.history:  # a kill may have come between its checkpoint and its mirror
            self.on_round_end(run, module, run.history[-1])

    def _opened(self, run: Run) -> Any:
        if self._logger is None:
            return opened(self._wandb, run.config, run.run_dir, {})
        if self._logger._experiment is None and self._wandb.run is None:
            self._logger._experiment = opened(self._wandb, run.config, run.run_dir, _arguments(self._logger))
        else:  # the user has begun the run
            self._logger.experiment.config.update(run.config, allow_val_change=True)
        return self._logger.experiment

    @contextlib.contextmanager
    def _no_harm(self, what: str = "the run is no longer mirrored, W&B failed") -> Iterator[None]:
        """Inside the block an error of W&B is a warning, the only one: from then on it is left alone, and what is lost can be
        sent later."""
        try:
            yield
        except Exception as error:  # whatever it is, the run is not about it
            folder = getattr(self._mirror, "dir", None)
            later = f"; send what it lacks with: {sync_command(folder)}" if folder else ""
            self._mirror = None
            warn(f"{what}: {type(error).__name__}: {said(error)}{later}")

    def _log_split(self, run: Run) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "split.png"
            plot_split(run.data.describe(), path)
            self._mirror.log({"clients/split": self._wandb.Image(str(path)), "round": len(run.history)})

    def on_round_end(self, run: Run, module: pl.LightningModule, record: RoundRecord) -> None:
        """Log every number of the record, and in the summary what the best round is."""
        if self._mirror is None:
            return
        with self._no_harm():
            self._mirror.log({"round": record.round} | numbers_of(run, record))
            self._mirror.summary.update(best_numbers(run))
            if self._log_model == "all":
                self._log_checkpoint(run, module)

    def on_fit_end(self, run: Run, module: pl.LightningModule) -> None:
        """Log the last round's clients as a table, the baselines beside the rounds, and the summary; close the run."""
        if self._mirror is None:
            return
        with self._no_harm():
            if run.history:
                self._mirror.log({"clients/last_round": self._clients(run.history[-1]), "round": run.history[-1].round})
            self._log_baselines(run)
            self._mirror.summary.update({f"final/{name}": value for name, value in run.summary.items()})
            if self._log_model and run.history:
                self._log_checkpoint(run, module)
            self._close(run)

    def _clients(self, last: RoundRecord) -> Any:
        flat = last.to_dict()
        accuracy = dict(enumerate(flat["client_accuracy"]))
        rows = [_plain(report) | {"accuracy": accuracy.get(report["client"])} for report in flat["clients"]]
        columns = list(dict.fromkeys(name for row in rows for name in row if any(one.get(name) is not None for one in rows)))
        return self._wandb.Table(columns=columns, data=[[row.get(name) for name in columns] for row in rows])

    def _log_baselines(self, run: Run) -> None:
        """The centralised rounds as numbers, and in one chart with the federated ones; the other baselines are level lines."""
        pooled = run.baselines.get("centralised", [])
        for record in pooled:
            self._mirror.log({"round": record.round} | pooled_numbers(record))
        curves = {"federated": run.history, "centralised": pooled}
        for place, metric in enumerate(drawn_metrics(curves, run.config["loop"]["monitor"])):
            lines = {name: _points(history, metric) for name, history in curves.items()}
            if place == 0:
                lines |= {name: [(1, level), (len(run.history), level)] for name, level in levels_of(run).items()}
            lines = {name: points for name, points in lines.items() if points}
            xs, ys = ([[point[axis] for point in points] for points in lines.values()] for axis in (0, 1))
            chart = self._wandb.plot.line_series(
                xs, ys, list(lines), f"{metric} beside the baselines", "round", split_table=True
            )
            if len(lines) > 1:
                self._mirror.log({f"{section_of(run.config)}/{metric}_and_baselines": chart, "round": len(run.history)})

    def _log_checkpoint(self, run: Run, module: pl.LightningModule) -> None:
        """The last round's checkpoint as an artifact that `fedtune export` opens; without a run directory the weights alone."""
        last = run.history[-1]
        artifact = self._wandb.Artifact(f"model-{self._mirror.id}", "model", metadata={"round": last.round} | last.metrics)
        with tempfile.TemporaryDirectory() as folder:
            if run.run_dir is None:
                weights = {name: tensor.cpu().contiguous() for name, tensor in carried(module, run.base).items()}
                save_file(weights, Path(folder) / "weights.safetensors", {"format": "pt"})
                artifact.add_file(str(Path(folder) / "weights.safetensors"))
            else:
                place = Path(run.run_dir)
                for name in filter(lambda name: present(place / name), _OF_A_CHECKPOINT):
                    artifact.add_file(str(place / name), name)
                for part in (f"checkpoints/round-{last.round:04d}", "start"):
                    for file in filter(Path.is_file, sorted((place / part).rglob("*"))):
                        artifact.add_file(str(file), str(file.relative_to(place)))
            best = best_numbers(run).get("best/round") == last.round
            aliases = ["latest", f"round-{last.round}", *(["best"] if best else [])]
            self._mirror.log_artifact(artifact, aliases=aliases)

    def _close(self, run: Run, exit_code: int = 0) -> None:
        """Close the run, but one that a user's logger has; and say how offline files are sent."""
        folder, offline = self._mirror.dir, self._mirror.settings.mode == "offline"
        if self._logger is not None:
            self._logger.finalize("failed" if exit_code else "success")
        else:
            self._mirror.finish(exit_code=exit_code)
        if offline:
            run.print(f"W&B wrote offline files; send them with: {sync_command(folder)}")

    def on_exception(self, run: Run, module: pl.LightningModule, error: BaseException) -> None:
        """Close the run as a failed one."""
        if self._mirror is not None:
            with self._no_harm():
                self._close(run, exit_code=1)


def _arguments(logger: WandbLogger) -> dict[str, Any]:
    """What a logger was given for `wandb.init`; where it says nothing of the folder, ours comes first."""
    given = {name: value for name, value in logger._wandb_init.items() if (name, value) != ("dir", ".")}
    return given | ({"mode": "offline"} if logger._offline else {})


def _points(history: list[RoundRecord], metric: str) -> list[tuple[int, float]]:
    """The rounds of which a metric is known, and its values."""
    values = [record.train_loss_nats if metric == "train_loss_nats" else record.metrics.get(metric) for record in history]
    return [
        (record.round, value)
        for record, value in zip(history, values, strict=True)
        if value is not None and math.isfinite(value)
    ]


def _plain(report: Mapping[str, Any]) -> dict[str, Any]:
    """A client's report as a row: what it logged and its learning rates have columns of their own."""
    row = {name: value for name, value in report.items() if not isinstance(value, dict)}
    return row | {name: value for part in report.values() if isinstance(part, dict) for name, value in part.items()}
