"""Whether gradients of single examples are what they are called: found out by trying, once a client in each process of a run.

A loss that divides by something of the whole batch, statistics that a batch shares, a layer that opacus reads wrongly, padding
that a network reads as text: with any of these the figures of privacy would not be true, and nothing else would show it. The
last one shows only between examples of different sizes, so the shortest and the longest of a client are among those tried, and
each client has its turn, as its texts may be of other sizes than those of the one before.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedtune.errors import UsageError
from fedtune.federated.batches import call_step, loss_of
from fedtune.federated.logs import TrainingLog, logging_to
from fedtune.federated.trainer import ModuleTrainer
from fedtune.federated.training import Training
from fedtune.privacy.gradients import apart, hooked, take
from fedtune.privacy.sampling import fetched
from fedtune.randomness import seeded
from fedtune.tensors import assign_, counters, restore_counters, snapshot, trainable

_EXAMPLES, _FEW, _LARGE = 4, 2, 2**24  # that are tried, and of a module with more numbers
_LOOKED = 32  # examples that are looked at for their sizes, where the data set does not know them
_MOVED = 0.02  # by which weights are moved for it: where some are 0, as in fresh adapters, so are gradients of others
_EXACT, _ROUGH = 1e-3, 5e-2  # differences of gradients, as shares of the longest; where weights have half precision
# of a run, whose trainer is its own: the clients that were tried, and with which trained parameters
_TRIED: weakref.WeakKeyDictionary[ModuleTrainer, set[tuple[int, frozenset[str]]]] = weakref.WeakKeyDictionary()
Gradients = dict[str, Tensor]  # by name, (B, ...)


def check_apart(training: Training, loader: Any, client: int) -> None:
    """Compare the gradients of some examples of a client in a batch with those of each alone, without dropout, in the weights'
    precision.

    Raises:
        UsageError: they differ, or the module cannot be computed so.
    """
    module, weights = training.module, trainable(training.module)
    tried, now = _TRIED.setdefault(training.trainer, set()), (client, frozenset(weights))
    if now in tried or len(loader.dataset) < 2:
        return
    most = _EXAMPLES if sum(one.numel() for one in weights.values()) < _LARGE else _FEW
    before, counted = snapshot(weights), snapshot(counters(module))
    with seeded(training.seed, "privacy/trial"), _without_dropout(module):
        for tensor in weights.values():
            tensor.add_(torch.randn_like(tensor), alpha=_MOVED)
        try:
            places = _places(loader, most)
            with apart(module):
                alone = [_alone(training, fetched(loader, [place])) for place in places]
            together = _together(training, fetched(loader, places))
        except UsageError:
            raise
        except Exception as error:  # what a module or opacus raises that meets what it does not know is of any type
            raise _refused(module, f"{type(error).__name__} {error}") from error
        finally:
            assign_(weights, before)
            restore_counters(module, counted)
    half = any(one.dtype in (torch.bfloat16, torch.float16) for one in module.parameters())
    wrong = _difference(alone, together, len(places), _ROUGH if half else _EXACT)
    if wrong:
        raise _refused(module, wrong)
    tried.add(now)


def _places(loader: Any, most: int) -> list[int]:
    """The numbers of at most so many examples: the shortest, the longest, and some of the sizes between.

    A data set may have `lengths` (M,), those of all its examples; else some are looked at, as the loader's batches of one.
    """
    total = len(loader.dataset)
    known = getattr(loader.dataset, "lengths", None)
    if isinstance(known, Tensor) and known.shape == (total,):
        looked: Sequence[int] = range(total)
        sizes = known.tolist()
    else:
        looked = _spread(total, _LOOKED)
        sizes = [_size(fetched(loader, [place])) for place in looked]
    by_size = sorted(looked, key=dict(zip(looked, sizes, strict=True)).__getitem__)
    return sorted(by_size[rank] for rank in _spread(len(by_size), most))


def _spread(total: int, most: int) -> list[int]:
    """At most so many of the numbers below a total, evenly spread, the first and the last among them.

    >>> _spread(10, 4), _spread(2, 4)
    ([0, 3, 6, 9], [0, 1])
    """
    return sorted({int(one) for one in np.linspace(0, total - 1, most)})


def _size(batch: Any) -> int:
    """Numbers in the tensors of a batch, of any nesting.

    >>> _size({"input_ids": torch.zeros(1, 5), "more": [torch.zeros(2), "text"]})
    7
    """
    if isinstance(batch, Tensor):
        return batch.numel()
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return sum(map(_size, parts))


def _refused(module: nn.Module, why: str) -> UsageError:
    allowed = "with privacy of examples, one whose training loss is a mean over examples, none of which depends on another"
    return UsageError("module", type(module).__name__, f"{allowed} ({why})")


def _alone(training: Training, batch: Any) -> Gradients:
    """The gradients of an example, by ordinary means."""
    named = {name: one for name, one in training.module.named_parameters() if one.requires_grad}
    found = torch.autograd.grad(_loss(training, batch), list(named.values()), allow_unused=True)
    return {name: one.detach()[None] for name, one in zip(named, found, strict=True) if one is not None}


def _together(training: Training, batch: Any) -> Gradients:
    """The gradients by example of a batch, in an order of the module's own."""
    with apart(training.module), hooked(training.module):
        _loss(training, batch).backward()
        found = {name: take(one) for name, one in training.module.named_parameters() if one.requires_grad}
    return {name: one for name, one in found.items() if one is not None}


def _loss(training: Training, batch: Any) -> Tensor:
    with logging_to(training.trainer, TrainingLog()), torch.enable_grad():
        loss = loss_of(call_step(training.trainer, "training_step", training.transfer(batch), 0))
    if loss is None:
        raise ValueError("training_step returned None")
    return loss


def _difference(alone: list[Gradients], together: Gradients, count: int, share: float) -> str | None:
    """What differs, if anything: each example must be found in the batch, and each of the batch must be one of them."""
    names = list(dict.fromkeys(name for one in [*alone, together] for name in one))
    lacking = [name for name in names if any(name in one for one in alone) and name not in together]
    if lacking:
        return f"{lacking[0]} has no gradient by example"
    if any(len(one) != count for one in together.values()):
        return f"{max(map(len, together.values()))} gradients for {count} examples"
    squares, longest = torch.zeros(count, count, dtype=torch.float64), 0.0
    for name in names:
        for row, one in enumerate(alone):
            mine = one[name][0].float() if name in one else torch.zeros_like(together[name][0])
            longest = max(longest, float(mine.square().sum()))
            squares[row] += (together[name] - mine).flatten(1).square().sum(1).double().cpu()
    worst = float(torch.maximum(squares.amin(0).amax(), squares.amin(1).amax()))
    if worst <= share**2 * longest:
        return None
    return f"in a batch of {count} a gradient differs by {(worst / longest) ** 0.5 if longest else math.inf:.2g} of its length"


@contextlib.contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """Inside the block only those parts that have tensors of their own are in training mode."""
    before = {part: part.training for part in module.modules()}
    for part in before:
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        part.training = bool(own) and before[part]
    try:
        yield
    finally:
        for part, was in before.items():
            part.training = was
