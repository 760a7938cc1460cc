"""How the examples of a client are drawn: Poisson batches of a `DataLoader`'s data set."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import Any, final

from torch.utils.data import DataLoader, IterableDataset

from fedtune.errors import UsageError
from fedtune.federated.batches import num_batches
from fedtune.federated.training import Training


@final
@dataclass(frozen=True)
class Sampling:
    """How the examples of a client are drawn.

    Args:
        examples: n, of the client.
        expected: b, examples of a batch in the mean: the loader's batch size, or all where there are fewer.
        steps: of an epoch, as many as the loader has batches.
    """

    examples: int
    expected: int
    steps: int

    @property
    def rate(self) -> float:
        """q = b / n."""
        return self.expected / self.examples


def sampling_of(loader: Any, training: Training, client: int) -> Sampling:
    """Of a client's loader, in the place of its own batches.

    Raises:
        UsageError: it is no `DataLoader` with a batch size and a data set whose examples can be drawn by number, or has none.
    """
    if (
        not isinstance(loader, DataLoader)
        or loader.batch_size is None
        or not isinstance(loader.dataset, Sized)
        or isinstance(loader.dataset, IterableDataset)
    ):
        sampler = getattr(loader, "batch_sampler", None)
        came = type(loader).__name__ if sampler is None else f"{type(loader).__name__} with {type(sampler).__name__}"
        allowed = (
            "with privacy of examples, a DataLoader with a batch_size and a data set with a length (group_by_length: false)"
        )
        raise UsageError("data", f"client_dataloader({client}), a {came}", allowed)
    examples = len(loader.dataset)
    if not examples:
        raise UsageError("data", f"client {client} without examples", "with privacy of examples, one or more for each client")
    steps = num_batches(loader, training.limit_train_batches) or 1
    return Sampling(examples, min(loader.batch_size, examples), steps)


def fetched(loader: Any, places: list[int]) -> Any:
    """The batch of some examples of a `DataLoader`, as the loader would make it."""
    several = getattr(loader.dataset, "__getitems__", None)
    return loader.collate_fn([loader.dataset[place] for place in places] if several is None else several(places))
