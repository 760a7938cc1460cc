"""Batches on their way from a loader to a module, as a `Trainer` hands them over."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from lightning_fabric.utilities.data import _set_sampler_epoch
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from pytorch_lightning.utilities.data import extract_batch_size
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from fedtune.errors import RunError
from fedtune.federated.trainer import ModuleTrainer

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class Transfer:
    """Brings batches to the device, by the hooks of the data module where it overrides them, else by the module's."""

    def __init__(self, fabric: Fabric, module: pl.LightningModule, data: Any) -> None:
        self._fabric = fabric
        self._before, self._move, self._after = (self._hook(name, module, data) for name in _HOOKS)
        self.on_batch: Callable[[], None] | None = None  # called with each

    @staticmethod
    def _hook(name: str, module: pl.LightningModule, data: Any) -> Callable[..., Any] | None:
        parts = [data, module] if isinstance(data, pl.LightningDataModule) else [module]
        return next((getattr(part, name) for part in parts if is_overridden(name, part)), None)

    def __call__(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """The batch on the device."""
        if self.on_batch is not None:
            self.on_batch()
        if self._before is not None:
            batch = self._before(batch, dataloader_idx)
        device = self._fabric.device
        batch = self._fabric.to_device(batch) if self._move is None else self._move(batch, device, dataloader_idx)
        return batch if self._after is None else self._after(batch, dataloader_idx)


def call_step(trainer: ModuleTrainer, name: str, batch: Any, index: int, *dataloader_idx: int) -> Any:
    """Call a step of a module as a `Trainer` does: with the number of the batch where the step asks for it."""
    return trainer.call(name, batch, *((index, *dataloader_idx) if trainer.takes_index(name) else ()))


def loss_of(output: Any) -> Tensor | None:
    """The loss that a training step returned; None where it skips the batch."""
    if output is None or isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        return cast(Tensor, output["loss"])
    came = f"a dictionary with {', '.join(map(str, output))}" if isinstance(output, Mapping) else type(output).__name__
    raise RunError(f"training_step returned {came}; allowed: a tensor, a dictionary with a tensor 'loss', or None")


def examples_in(batch: Any) -> int:
    """Examples of a batch: the first dimension of its first tensor, as Lightning has it, else the length of the first list or
    array in it.

    Raises:
        RunError: there is none.
    """
    try:
        return int(extract_batch_size(batch))
    except MisconfigurationException:
        pass
    waiting = [batch]
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, (list, tuple)):
            inner = [part for part in one if isinstance(part, (list, tuple, Mapping)) or hasattr(part, "shape")]
            if not inner:
                return len(one)
            waiting += inner
        elif len(getattr(one, "shape", "")):
            return int(one.shape[0])
    raise RunError(
        f"a batch is a {type(batch).__name__} in which no example can be counted; allowed: one with a tensor, array or list"
    )


def begin_epoch(loader: Any, epoch: int) -> None:
    """Tell samplers the epoch, and let a loader's own generators begin where torch's is, whatever was drawn before."""
    for one in loader.loaders if isinstance(loader, _Batches) else [loader]:
        _set_sampler_epoch(one, epoch)
        samplers = getattr(one, "sampler", None), getattr(getattr(one, "batch_sampler", None), "sampler", None)
        for part in (one, *samplers):
            generator = getattr(part, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(int(torch.randint(2**62, (1,))))


def one_loader(loader: Any, where: str) -> Any:
    """The loader of a client, as it is.

    Raises:
        RunError: there is none, or it is a collection of loaders.
    """
    if isinstance(loader, CombinedLoader):
        return _Batches(loader)
    several = loaders_of(loader)
    if loader is None or len(several) != 1 or several[0] is not loader or not isinstance(loader, Iterable):
        came = f"{len(several)} loaders" if len(several) != 1 else type(loader).__name__
        raise RunError(
            f"{where}: client_dataloader returned {came}; allowed: one loader, or Lightning's CombinedLoader of several"
        )
    return loader


def loaders_of(loader: Any) -> list[Any]:
    """The loaders that are evaluated one after the other: those of a list, of a dictionary or of a sequential `CombinedLoader`,
    or the one.

    A list of tensors, tuples or dictionaries is a loader itself, its elements are batches.
    """
    if isinstance(loader, CombinedLoader):
        return list(loader.flattened) if loader._mode == "sequential" else [_Batches(loader)]
    values = list(loader.values()) if isinstance(loader, Mapping) else loader
    if isinstance(values, (list, tuple)) and values and all(map(_is_loader, values)):
        return [one for value in values for one in loaders_of(value)]
    return [loader]


def _is_loader(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_loader, value))
    return (
        isinstance(value, Iterable)
        and not isinstance(value, (Tensor, Mapping, tuple, str, bytes))
        and not hasattr(value, "shape")
    )


class _Batches:
    """A `CombinedLoader` without the numbers that it gives with a batch."""

    def __init__(self, loader: CombinedLoader) -> None:
        self._loader, self.loaders = loader, loader.flattened

    def __len__(self) -> int:
        iter(self._loader)  # its length is known once it was begun
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, _, _ in self._loader)


def num_tokens(batch: Any) -> Tensor:
    """Tokens of a batch, padding left out; 0 where a batch has no token ids."""
    if not isinstance(batch, dict) or "input_ids" not in batch:
        return torch.zeros((), dtype=torch.int64)
    return batch["attention_mask"].sum() if "attention_mask" in batch else torch.tensor(batch["input_ids"].numel())


def is_whole(limit: int | float) -> bool:
    """Whether a limit leaves nothing out: 1.0 is all batches, and 1 is one."""
    return isinstance(limit, float) and limit == 1.0


def num_batches(loader: Any, limit: int | float = 1.0, where: str = "a loader") -> int | None:
    """Batches of a loader within a limit (a number, or a share); None where it has no length and no limit.

    Raises:
        RunError: a share of a loader without a length, or of so few batches that none is left.
    """
    try:
        length = len(loader)
    except (TypeError, NotImplementedError):
        length = None
    if is_whole(limit):
        return length
    if isinstance(limit, float):
        if length is None:
            raise RunError(
                f"{where}: a share of {limit} was chosen, and {type(loader).__name__} has no length; allowed: a number"
            )
        if int(length * limit) == 0 < length:
            raise RunError(
                f"{where}: a share of {limit} of {length} batches is none; allowed: {1 / length:.3g} or more, or a number"
            )
        return int(length * limit)
    return limit if length is None else min(limit, length)


def limited(loader: Any, count: int | None) -> Iterable[Any]:
    """The first batches of a loader."""
    return loader if count is None else itertools.islice(loader, count)


def with_last(batches: Iterable[Any], count: int | None) -> Iterator[tuple[Any, bool]]:
    """Batches, and whether each is the last; where nobody knows how many there are, the next one is fetched to see."""
    if count is not None:
        for number, batch in enumerate(batches, start=1):
            yield batch, number == count
        return
    iterator = iter(batches)
    batch = next(iterator, _END)
    while batch is not _END:
        following = next(iterator, _END)
        yield batch, following is _END
        batch = following


_END = object()


def _first(tensor: Tensor, count: int, size: int) -> Tensor:
    """The first examples of a tensor that has one row for each of `size` examples; another tensor as it is."""
    return tensor[:count] if tensor.ndim and len(tensor) == size else tensor


def exactly(loader: Any, examples: int) -> Iterator[Iterator[Any]]:
    """As many passes over a loader as it takes to see exactly so many examples; the last batch is cut."""
    left = examples

    def one() -> Iterator[Any]:
        nonlocal left
        for batch in loader:
            size = examples_in(batch)
            if size > left:
                batch = apply_to_collection(batch, Tensor, _first, left, size)
            left -= min(size, left)
            yield batch
            if left <= 0:
                return

    while left > 0:
        before = left
        yield one()
        if left == before:
            raise RunError("the pooled training data have no batch")
