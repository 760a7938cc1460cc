"""Validation and test as a `Trainer` would run them: whatever a module logs comes out as one number a name."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from fedtune.errors import RunError
from fedtune.federated.batches import begin_epoch, call_step, is_whole, limited, loaders_of, num_batches
from fedtune.federated.logs import LogRecorder, logging_to
from fedtune.federated.ranks import ALONE, Ranks
from fedtune.federated.remote import Remote, pooled
from fedtune.federated.shared import is_shared, join
from fedtune.federated.stages import Stages
from fedtune.federated.training import Training
from fedtune.randomness import seeded


class Evaluation(NamedTuple):
    """What the module logged, by name, and (N,) whether each example was answered rightly, in the order of the loader; None
    where the module does not say (its `validation_step` may return {"correct": (B,) bool}), or there are several loaders."""

    metrics: dict[str, float]
    correct_N: Tensor | None = None


@contextlib.contextmanager
def attached(training: Training) -> Iterator[None]:
    """Inside the block the module is on the device, and `self.trainer` answers; afterwards it is free for a `Trainer` again."""
    module = training.module
    training.fabric.to_device(module)
    parts: list[Any] = [module, *([training.data] if isinstance(training.data, pl.LightningDataModule) else [])]
    before = [module._trainer, *(part.trainer for part in parts[1:])]
    for part in parts:
        part.trainer = training.trainer  # it stands in for one
    try:
        yield
    finally:
        for part, trainer in zip(parts, before, strict=True):
            part.trainer = trainer


def evaluate(
    training: Training, loader: Any, part: str = "validation", reserved: Collection[str] = (), ranks: Ranks = ALONE
) -> Evaluation:
    """Run `validation_step` over a loader, on the test part `test_step` where there is one, without gradients or dropout.

    The hooks of the stage are called in a `Trainer`'s order.

    Args:
        training: of the module, which is attached.
        loader: one, or several in a list.
        reserved: names that the module must not log.
        ranks: share out the batches, where the module allows it (`fedtune.federated.shared`); else each goes through all.

    Returns:
        what the module logs: numbers averaged over examples, torchmetrics computed over all examples; and what was right.
    """
    module, trainer, loaders = training.module, training.trainer, loaders_of(loader)
    stage = step_of(module, part) or "validation"
    shared = ranks.size > 1 and len(loaders) == 1 and is_shared(module, stage)
    pass_ = _Pass(training, stage, LogRecorder(reserved), ranks if shared else ALONE)
    check_loader_index(module, f"{stage}_step", len(loaders))
    trainer.validating, trainer.testing = stage == "validation", stage == "test"
    try:
        # one autocast around all, so that weights are cast once; hooks are outside of it
        with logging_to(trainer, pass_.recorder), torch.no_grad(), training.fabric.autocast(), pass_.mode():
            pass_.hook("start")
            pass_.hook("epoch_start")
            batches = sum(pass_.over(one, part, () if len(loaders) == 1 else (place,)) for place, one in enumerate(loaders))
            if not batches:
                trainer.progress_bar_callback.print(f"the {part} part has no batch")
            if shared:
                pass_.correct = join(pass_.recorder, module, pass_.correct, ranks)
            pass_.hook("epoch_end")
            metrics = pass_.recorder.results()
            pass_.hook("end")
    finally:
        trainer.validating = trainer.testing = False
    correct = [pass_.correct[index] for index in sorted(pass_.correct)]
    return Evaluation(metrics, torch.cat(correct).cpu() if correct and len(loaders) == 1 else None)


def check_loader_index(module: pl.LightningModule, step: str, loaders: int) -> None:
    """Raise `RunError` where a step needs the number of one loader, or does not take that of several."""
    parameter = inspect.signature(getattr(module, step)).parameters.get("dataloader_idx")
    takes = is_param_in_hook_signature(getattr(module, step), "dataloader_idx", min_args=3)
    if loaders > 1 and not takes:
        raise RunError(
            f"there are {loaders} loaders, and {step} takes no dataloader_idx; allowed: (batch, batch_idx, dataloader_idx)"
        )
    if loaders == 1 and parameter is not None and parameter.default is inspect.Parameter.empty:
        raise RunError(f"there is one loader, and {step} needs a dataloader_idx; allowed: a default for it, dataloader_idx=0")


def step_of(module: pl.LightningModule, part: str) -> str | None:
    """ "test" or "validation", whose step evaluates a part: `validation_step` stands in for a `test_step` that is not there."""
    steps = ("test", "validation") if part == "test" else ("validation",)
    return next((step for step in steps if is_overridden(f"{step}_step", module)), None)


def by_loader(metrics: Mapping[str, float]) -> list[dict[str, float]]:
    """Metrics of several loaders, a dictionary for each, as a `Trainer` returns them; what has no loader's number is in all.

    >>> by_loader({"a/dataloader_idx_0": 1.0, "a/dataloader_idx_1": 2.0, "b": 3.0})
    [{'a/dataloader_idx_0': 1.0, 'b': 3.0}, {'a/dataloader_idx_1': 2.0, 'b': 3.0}]
    """
    number_of = {name: name.rpartition("/dataloader_idx_")[2] if "/dataloader_idx_" in name else "" for name in metrics}
    numbers = sorted(set(number_of.values()) - {""}, key=int) or [""]
    return [{name: metrics[name] for name in metrics if number_of[name] in ("", number)} for number in numbers]


class _Pass:
    """One evaluation of a module.

    Args:
        stage: "validation" or "test": the step and the hooks.
        ranks: share out the batches.
    """

    def __init__(self, training: Training, stage: str, recorder: LogRecorder, ranks: Ranks) -> None:
        self._training, self._stage, self.recorder, self._ranks = training, stage, recorder, ranks
        self.correct: dict[int, Tensor] = {}  # by the number of the batch
        if ranks.size > 1:
            recorder.journal = []

    def hook(self, name: str, *values: Any) -> None:
        """Call the hook of the stage, without autocast."""
        with torch.autocast(self._training.fabric.device.type, enabled=False):
            self._training.trainer.call(f"on_{self._stage}_{name}", *values)

    @contextlib.contextmanager
    def mode(self) -> Iterator[None]:
        """Inside the block the module is in evaluation mode."""
        module = self._training.module
        before = {part: part.training for part in module.modules()}
        self.hook("model_eval")
        try:
            yield
        finally:
            try:
                if is_overridden(f"on_{self._stage}_model_train", module):
                    self.hook("model_train")
                    before.clear()
            finally:
                for part, training in before.items():
                    part.training = training

    def over(self, loader: Any, part: str, number: tuple[int, ...]) -> int:
        """Go through a loader; its number, where there are several, is part of names, and an argument of steps and hooks.

        Returns:
            batches.
        """
        training, recorder, count = self._training, self.recorder, 0
        recorder.suffix = f"/dataloader_idx_{number[0]}" if number else ""
        begin_epoch(loader, training.trainer.current_epoch)
        limit = training.limit(part)
        most = None if is_whole(limit) else num_batches(loader, limit, f"the {part} part")
        for index, batch in enumerate(limited(loader, most)):
            count += 1
            if index % self._ranks.size != self._ranks.rank:
                continue
            with torch.autocast(training.fabric.device.type, enabled=False):
                batch = training.transfer(batch, *number)
            recorder.batch, recorder.index = batch, index
            self.hook("batch_start", batch, index, *number)
            output = call_step(training.trainer, f"{self._stage}_step", batch, index, *number)
            self.hook("batch_end", output, batch, index, *number)
            if isinstance(output, dict) and "correct" in output:
                self.correct[index] = output["correct"]
        recorder.end_loader()
        recorder.batch, recorder.suffix = None, ""
        return count


@dataclass(frozen=True)
class Evaluator:
    """Evaluates a module, as it stands, on the parts of the data.

    Args:
        training: the module, its device and precision, the seed of the run, the data.
        part: the part that rounds are evaluated on, "validation" or "test".
        evaluation: "pooled" (metrics over all examples), or "clients" (means over clients of means over batches).
        ranks: do it together.
        remote: the clients, where they have the data and not this process.
    """

    training: Training
    part: str
    evaluation: str = "pooled"
    reserved: frozenset[str] = frozenset()
    stages: Stages = field(default_factory=Stages)
    ranks: Ranks = ALONE
    remote: Remote | None = None

    @property
    def data(self) -> Any:
        """The data module."""
        return self.training.data

    def loader(self, part: str) -> Any:
        """The batches of a part, or None where the data have no such part."""
        name = "test_dataloader" if part == "test" else "val_dataloader"
        if not hasattr(self.data, name) or (
            isinstance(self.data, pl.LightningDataModule) and not is_overridden(name, self.data)
        ):
            return None
        if part == "test":
            self.stages.begin("test")
        found = getattr(self.data, name)()
        if isinstance(found, Iterator) and any(found is one for one in self.stages.used):
            raise RunError(
                f"{name} returned the same {type(found).__name__} again, which has one pass; allowed: a loader with many"
            )
        self.stages.used.append(found if isinstance(found, Iterator) else None)
        return found

    def loaders(self) -> dict[str, Any]:
        """Part -> its batches: the part that rounds are evaluated on, and the test part where there is one."""
        found = {part: self.loader(part) for part in dict.fromkeys((self.part, "test"))}
        return {part: batches for part, batches in found.items() if batches is not None}

    def evaluate(self, part: str) -> Evaluation:
        """The metrics on a part; none where the data have no such part, or the module no step for it."""
        if self.remote is not None:
            return Evaluation(pooled(self.remote.evaluate(part)))
        loader = self.loader(part) if step_of(self.training.module, part) else None
        if loader is None:
            return Evaluation({})
        # a loader draws a seed, even when nothing is random
        with seeded(self.training.seed, "evaluate"), self._named(part), self.ranks.watched():
            found = evaluate(self.training, loader, part, self.reserved, self.ranks)
        if part == self.part:
            self.training.trainer.callback_metrics = {name: torch.tensor(value) for name, value in found.metrics.items()}
        return found

    def metrics(self, part: str) -> dict[str, float]:
        """The metrics on a part by the run's one definition, `evaluation`, so that a summary's are those of the last round."""
        if self.evaluation == "clients" and part == self.part and self.remote is None:
            return _mean(self.evaluate_clients(range(self.data.num_clients)))
        return self.evaluate(part).metrics

    @contextlib.contextmanager
    def _named(self, part: str) -> Iterator[None]:
        """Inside the block an error says where it was."""
        try:
            yield
        except RunError:
            raise
        except Exception as error:
            raise RunError(f"evaluation on the {part} part: {type(error).__name__}: {error}") from error

    def measure(self) -> tuple[dict[str, float], list[float | None]]:
        """The metrics of a round, and the accuracy for each client where it is known."""
        if self.remote is not None:
            shares = self.remote.evaluate(self.part)
            metrics = pooled(shares)
            self.training.trainer.callback_metrics = {name: torch.tensor(value) for name, value in metrics.items()}
            return metrics, [None if one is None else one.metrics.get("accuracy") for one in shares]
        self.training.trainer.call("on_validation_model_zero_grad")
        if self.evaluation == "pooled":
            metrics, correct_N = self.evaluate(self.part)
            of_client = getattr(self.data, "client_accuracy", None)
            if of_client is None or correct_N is None or not is_whole(self.training.limit(self.part)):
                return metrics, []
            return metrics, of_client(self.part, correct_N)
        of_clients = self.evaluate_clients(range(self.data.num_clients))  # each by one rank
        return _mean(of_clients), [one.get("accuracy") for one in of_clients]

    def evaluate_clients(self, clients: Sequence[int]) -> list[dict[str, float]]:
        """For each client the mean of batches, on its share of the test part."""
        found: dict[int, dict[str, float]] = {}
        limit = self.training.limit(self.part)
        with seeded(self.training.seed, "evaluate"), self._named(self.part), self.ranks.watched():
            for client in self.ranks.mine(clients):
                loader = self.data.client_test_dataloader(client)
                batches = limited(loader, None if is_whole(limit) else num_batches(loader, limit, f"client {client}"))
                found[client] = _mean([evaluate(self.training, [batch], self.part, self.reserved).metrics for batch in batches])
        known = dict(pair for pair in self.ranks.gather(list(found.items())))
        return [known[client] for client in clients]


def _mean(metrics: list[dict[str, float]]) -> dict[str, float]:
    """The mean of those that there are: a client may have no text of a part."""
    known = [one for one in metrics if one]
    return {name: sum(one[name] for one in known) / len(known) for name in known[0]} if known else {}
