"""Evaluation shared out: each rank takes some of the batches, and the numbers are those of one process, to the bit.

Values that a module logs are added up in the order of the batches, whoever had them; metrics count in whole numbers, which add
up exactly. What else a module keeps from batch to batch nobody can know, so a module says that there is nothing else
(`evaluates_by_batch = True`, as ours do; its metrics are attributes of it or of its parts). Without that, or with hooks of
evaluation, with other metrics or several loaders, every rank evaluates all batches.
"""

from __future__ import annotations

import pytorch_lightning as pl
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_sum

from fedtune.federated.logs import Entry, Key, LogRecorder
from fedtune.federated.ranks import Ranks

_HOOKS = ("start", "epoch_start", "batch_start", "batch_end", "epoch_end", "end")


def is_shared(module: pl.LightningModule, stage: str) -> bool:
    """Whether the batches of a stage ("validation" or "test") may be shared out."""
    if not getattr(module, "evaluates_by_batch", False):
        return False
    if any(is_overridden(f"on_{stage}_{hook}", module) for hook in _HOOKS):
        return False
    if any(isinstance(part, MetricCollection) for part in module.modules()):  # its metrics may have one state
        return False
    return all(map(_counts, _metrics(module).values()))


def _metrics(module: pl.LightningModule) -> dict[str, Metric]:
    return {name: part for name, part in module.named_modules() if isinstance(part, Metric)}


def _counts(metric: Metric) -> bool:
    """Whether a metric is made of whole numbers that are added up."""
    states = [getattr(metric, name) for name in metric._defaults]
    whole = all(isinstance(one, Tensor) and not one.is_floating_point() and not one.is_complex() for one in states)
    sums = all(reduction is dim_zero_sum for reduction in metric._reductions.values())
    return bool(states) and whole and sums and not any(isinstance(one, Metric) for one in metric.children())


def join(recorder: LogRecorder, module: pl.LightningModule, correct: dict[int, Tensor], ranks: Ranks) -> dict[int, Tensor]:
    """Let the recorder and the metrics know what all ranks have; returns what was answered rightly, by batch, of all."""
    metrics = _metrics(module)
    path_of = {id(metric): path for path, metric in metrics.items()}
    sent: list[tuple[int, Key, str, float, Tensor | str]] = [
        (*entry[:4], path_of[id(entry.value)] if isinstance(entry.value, Metric) else entry.value.cpu())
        for entry in recorder.journal or []
    ]
    recorder.journal = None
    logged = set[str]()
    for entry in sorted(ranks.gather(sent), key=lambda one: one[0]):  # stable: a batch is one rank's, in its order
        value = entry[4]
        logged |= {value} if isinstance(value, str) else set()
        recorder.take(Entry(*entry[:4], metrics[value] if isinstance(value, str) else value))
    metrics = {path: metrics[path] for path in sorted(logged)}
    states = [getattr(metric, name) for metric in metrics.values() for name in sorted(metric._defaults)]
    if states:
        ranks.add_up_(states)
    updates = ranks.gather([{path: metric._update_count for path, metric in metrics.items()}])
    for path, metric in metrics.items():
        metric._update_count, metric._computed = sum(one[path] for one in updates), None
    return dict(ranks.gather([(index, right.cpu()) for index, right in correct.items()]))
