"""A run mirrored into Weights & Biases; no number depends on it."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import WandbLogger

from fedtune.errors import UsageError
from fedtune.files import content, regular, said, write_text
from fedtune.runs.callbacks import FederatedCallback, Run
from fedtune.runs.figures import plot_split
from fedtune.storage.records import RoundRecord
from fedtune.storage.summary import spread

LOGGERS = ("none", "wandb")
_PATIENCE = 60.0  # seconds that the end of a run waits for W&B, unless WANDB_FINISH_TIMEOUT says otherwise


class WandbMirror(FederatedCallback):
    """Mirrors a run into Weights & Biases: the round is the only step axis. Without a key it writes offline files.

    Runs of one sweep are grouped by wandb's own variable WANDB_RUN_GROUP.

    Raises:
        UsageError: wandb is not installed.
    """

    everywhere = False
    replayed = False  # it mirrors the last round again whenever it starts

    def __init__(self) -> None:
        self._wandb = import_wandb("logger")
        self._mirror: Any = None

    def on_fit_start(self, run: Run, module: pl.LightningModule) -> None:
        """Open the run; a resumed run directory continues the same W&B run. A W&B that fails is left alone from then on."""
        with self._no_harm("the run is not mirrored, W&B could not be started"):
            self._mirror = self._opened(run)
        if self._mirror is None:
            return
        with self._no_harm():
            module.trainer.logger = WandbLogger(experiment=self._mirror)
            self._mirror.define_metric("round")
            self._mirror.define_metric("*", step_metric="round")
            if hasattr(run.data, "describe") and not run.history:
                self._log_split(run)
        if run.history:  # a kill may have come between its checkpoint and its mirror
            self.on_round_end(run, module, run.history[-1])

    def _opened(self, run: Run) -> Any:
        """The W&B run. Where W&B is wanted and cannot be reached, one with offline files, and a warning says so."""
        wanted = os.environ.get("WANDB_MODE") or ("online" if is_online(self._wandb) else "offline")
        try:
            return self._init(run, wanted)
        except Exception as error:
            if wanted != "online":
                raise
            why = f"{type(error).__name__}: {said(error)}"
        self._wandb.teardown()  # it holds on to the run
        mirror = self._init(run, "offline")
        warnings.warn(
            f"W&B could not be started ({why}): nothing is sent, the run is written into offline files; send them with: "
            f"wandb sync {os.path.dirname(mirror.dir)}",
            stacklevel=5,
        )
        return mirror

    def _init(self, run: Run, mode: str) -> Any:
        config, tagged = run.config, (("model", "name"), ("data", "task"), ("data", "split"))
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fedtune"),
            dir=run.run_dir,
            id=_run_id(run.run_dir),
            resume="allow",
            reinit="finish_previous",
            config=config,
            mode=mode,
            settings=self._patience(),
            tags=[str(config[part][key])[:64] for part, key in tagged if key in config.get(part, {})],
        )

    def _patience(self) -> Any:
        """W&B's settings for an end that comes even where W&B cannot be reached; none where it is too old for that."""
        known = getattr(self._wandb.Settings, "model_fields", {})
        wanted: dict[str, Any] = {"finish_timeout_raises": True}
        if "WANDB_FINISH_TIMEOUT" not in os.environ:
            wanted["finish_timeout"] = _PATIENCE
        return self._wandb.Settings(**{name: value for name, value in wanted.items() if name in known})

    @contextlib.contextmanager
    def _no_harm(self, what: str = "the run is no longer mirrored, W&B failed") -> Iterator[None]:
        """Inside the block an error of W&B is a warning, the only one: from then on it is left alone, and what is lost can be
        sent later."""
        try:
            yield
        except Exception as error:  # whatever it is, the run is not about it
            folder = getattr(self._mirror, "dir", None)
            later = f"; send what it lacks with: wandb sync {os.path.dirname(folder)}" if folder else ""
            self._mirror = None
            warnings.warn(f"{what}: {type(error).__name__}: {said(error)}{later}", stacklevel=4)

    def _log_split(self, run: Run) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "split.png"
            plot_split(run.data.describe(), path)
            self._mirror.log({"split": self._wandb.Image(str(path)), "round": len(run.history)})

    def on_round_end(self, run: Run, module: pl.LightningModule, record: RoundRecord) -> None:
        """Log every number of the record."""
        if self._mirror is None:
            return
        with self._no_harm():
            flat = record.to_dict()
            drift = {f"drift/{layer}": value for layer, value in flat.pop("drift").items()}
            clients = {f"client_accuracy/{name}": value for name, value in spread(flat.pop("client_accuracy")).items()}
            clients |= {f"train/{name}": value for name, value in flat.pop("train_metrics").items()}
            del flat["clients"]
            numbers = flat | clients | drift | run.logged
            self._mirror.log({name: value for name, value in numbers.items() if value is not None})

    def on_fit_end(self, run: Run, module: pl.LightningModule) -> None:
        """Log the last round's clients as a table and the summary, and close the run."""
        if self._mirror is None:
            return
        with self._no_harm():
            if run.history:
                last = run.history[-1].to_dict()
                accuracy = dict(enumerate(last["client_accuracy"]))
                rows = [report | {"accuracy": accuracy.get(report["client"])} for report in last["clients"]]
                table = self._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
                self._mirror.log({"clients": table, "round": last["round"]})
            self._mirror.summary.update({f"final/{name}": value for name, value in run.summary.items()})
            folder, offline = self._mirror.dir, self._mirror.settings.mode == "offline"
            self._mirror.finish()
            if offline:
                run.print(f"W&B wrote offline files; send them with: wandb sync {os.path.dirname(folder)}")

    def on_exception(self, run: Run, module: pl.LightningModule, error: BaseException) -> None:
        """Close the run as a failed one."""
        if self._mirror is not None:
            with self._no_harm():
                self._mirror.finish(exit_code=1)


def import_wandb(argument: str) -> Any:
    """The package wandb. Raises `UsageError` about `argument` when it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UsageError(argument, "wandb", "after: pip install wandb (it is not installed)") from error
    return wandb


def is_online(wandb: Any) -> bool:
    """Whether runs go to W&B: WANDB_MODE decides it, or that there is a key."""
    mode = os.environ.get("WANDB_MODE")
    return mode == "online" if mode else bool(wandb.api.api_key)


def _run_id(run_dir: str | None) -> str | None:
    """The W&B run that a run directory belongs to; drawn at its first start. An agent of a W&B sweep gives its own."""
    if run_dir is None or os.environ.get("WANDB_SWEEP_ID"):
        return None
    file = Path(run_dir) / "wandb_id"
    try:
        regular(file, follow=False)  # what a link leads to is nobody's business
        known = content(file).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        known = ""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", known):
        if known:
            warnings.warn(f"{file} is damaged; the run is mirrored as a new one", stacklevel=5)
        known = uuid.uuid4().hex[:12]
        write_text(file, known)
    return known
