"""Arguments of Lightning's `Trainer` that `FederatedLoop` has under another name, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from fedtune.errors import UsageError

# what a user of a `Trainer` writes -> what takes its place; docs/lightning.md has the whole table
COUNTERPARTS = {
    "barebones": "options with progress=False and agreement=False",
    "benchmark": "torch.backends.cudnn.benchmark",
    "default_root_dir": "run_dir",
    "detect_anomaly": "torch.autograd.set_detect_anomaly(True)",
    "devices": "accelerator; a run has one device, and runs of a sweep are divided among GPUs",
    "enable_autolog_hparams": "logger; the configuration is always logged",
    "enable_checkpointing": "run_dir, without which nothing is written, and options.keep",
    "enable_model_summary": "nothing; pytorch_lightning.utilities.model_summary.summarize(module) makes one",
    "enable_progress_bar": "options.progress",
    "inference_mode": "nothing; evaluation uses torch.no_grad",
    "limit_predict_batches": "nothing; a federation predicts nothing",
    "log_every_n_steps": "nothing; a round is logged when it is complete",
    "max_epochs": "max_rounds for the federation, local_epochs for a client's epochs in a round",
    "max_steps": "max_rounds, local_epochs and limit_train_batches",
    "max_time": "a FederatedCallback that sets run.should_stop",
    "min_epochs": "max_rounds",
    "min_steps": "max_rounds",
    "model_registry": "nothing",
    "num_nodes": "nothing; a run has one process",
    "num_sanity_val_steps": "fast_dev_run",
    "overfit_batches": "limit_train_batches",
    "plugins": "precision",
    "profiler": "nothing; torch.profiler can be put around fit",
    "reload_dataloaders_every_n_epochs": "nothing; loaders are made anew in every round",
    "strategy": "algorithm; a run has one process",
    "sync_batchnorm": "nothing; buffers are averaged over clients after each round",
    "use_distributed_sampler": "nothing; a client has one process",
    "val_check_interval": "check_val_every_n_rounds",
}


def from_trainer(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a loop, of which `check_val_every_n_epoch` may have its name from the `Trainer`: an epoch of it is a round.

    Raises:
        UsageError: an argument that only a `Trainer` has; its counterpart is named.
    """
    found = dict(given)
    if "check_val_every_n_epoch" in found:
        every = found.pop("check_val_every_n_epoch")
        if "check_val_every_n_rounds" in found:
            raise UsageError("check_val_every_n_epoch", every, "one of check_val_every_n_epoch and check_val_every_n_rounds")
        found["check_val_every_n_rounds"] = every
    for name, instead in COUNTERPARTS.items():
        if name in found:
            raise UsageError(name, found[name], f"{instead} (a FederatedLoop has no {name})")
    return found


def check_callbacks(callbacks: Any, wanted: type) -> None:
    """Raise `UsageError` where a callback is none of ours; for one of Lightning's the counterpart is named."""
    for one in callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]:
        if isinstance(one, wanted):
            continue
        name, allowed = type(one).__name__, f"objects of {wanted.__name__}"
        if isinstance(one, type) and issubclass(one, wanted):
            name, allowed = f"the class {one.__name__}", f"an object of it, {one.__name__}(…)"
        elif isinstance(one, pl.Callback):
            instead = {"EarlyStopping": "fedtune.EarlyStopping", "ModelCheckpoint": "fedtune.BestWeights"}
            instead |= {"LearningRateMonitor": "fedtune.LearningRateMonitor"}
            allowed += f"; the counterpart of {name} is {instead.get(name, 'a subclass of it with the hooks of rounds')}"
        raise UsageError("callbacks", name, allowed)
    keys = (
        [one.state_key for one in callbacks if getattr(one, "only_one", False)] if isinstance(callbacks, (list, tuple)) else []
    )
    for key in (one for one in keys if keys.count(one) > 1):
        raise UsageError("callbacks", key.rpartition(".")[2], "each once, or for different metrics")
    if not isinstance(callbacks, (list, tuple)):
        raise UsageError("callbacks", type(callbacks).__name__, "a list of them")
