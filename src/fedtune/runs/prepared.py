"""A module and data, set up for a loop as for a `Trainer`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl

from fedtune.errors import UsageError
from fedtune.federated.evaluation import Evaluator, Stages, attached
from fedtune.federated.trainer import Line
from fedtune.federated.training import Training
from fedtune.runs.hardware import deterministic_algorithms, fabric_of, freed_memory_kept, resolve_precision
from fedtune.runs.progress import Progress
from fedtune.storage.records import RESERVED


def given(data: Any, datamodule: Any) -> Any:
    """The one of the two that was given."""
    if (data is None) == (datamodule is None):
        came = "nothing" if data is None else "data and datamodule"
        raise UsageError("data", came, "one data module, as data or as datamodule")
    return datamodule if data is None else data


@contextlib.contextmanager
def prepared(loop: Any, module: pl.LightningModule, data: Any, stage: str, progress: Progress) -> Iterator[Evaluator]:
    """Inside the block module and data are set up for a stage ("fit", "validate" or "test"), and the module is attached."""
    fabric = fabric_of(loop.accelerator, resolve_precision(loop.precision, loop.accelerator))
    clip = loop.gradient_clip_val, loop.gradient_clip_algorithm
    limits = loop.limit_train_batches, loop.limit_val_batches, loop.limit_test_batches
    options = *clip, loop.accumulate_grad_batches, *limits, loop.options.fast_dropout
    training = Training(fabric, module, loop.seed, data, *options)
    training.trainer.default_root_dir = loop.run_dir or "."
    training.trainer.progress_bar_callback = Line(progress.line)
    stages = Stages(data, module)
    with attached(training), deterministic_algorithms(loop.deterministic), freed_memory_kept(), stages.reported():
        for part in (data, module):
            if hasattr(part, "prepare_data"):
                part.prepare_data()
        stages.begin(stage)
        module.configure_model()
        fabric.to_device(module)
        if fabric.device.type == "cuda" and hasattr(data, "keep_on"):
            data.keep_on(fabric.device)
        yield Evaluator(training, loop.evaluate_on, loop.options.evaluation, RESERVED, stages)
