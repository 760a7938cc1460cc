"""What all processes of a run must have alike, before it begins and while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl

from fedtune.errors import RunError, UsageError
from fedtune.federated.ranks import Ranks
from fedtune.storage.config import comparable
from fedtune.tensors import Tensors, assign_, checksum, digest, misfit, resting, travelling


def check_same(config: Mapping[str, Any], ranks: Ranks) -> None:
    """Raise `UsageError` where the ranks have been asked for different runs, or have different data."""
    if ranks.size == 1:
        return
    own = comparable(config)
    first = ranks.from_first(lambda: own)
    for key in {**first, **own}:
        if first.get(key) != own.get(key):
            allowed = f"{first.get(key, 'nothing')}, which rank 0 has: all ranks do one run"
            raise UsageError(f"{key} on rank {ranks.rank}", own.get(key, "nothing"), allowed)


def share(module: pl.LightningModule, ranks: Ranks) -> None:
    """Give the modules of all ranks the tensors of rank 0's, where they differ: a fresh layer is drawn in each process."""
    if ranks.size == 1:
        return
    here = travelling(module) | resting(module)
    own = {name: digest({name: tensor}) for name, tensor in here.items()}
    first = ranks.from_first(lambda: own)
    if own.keys() != first.keys():
        strange = sorted(own.keys() ^ first.keys())[0]
        raise RunError(f"the modules of ranks 0 and {ranks.rank} have other tensors: {strange} is only in one of them")
    names = sorted(set(ranks.gather([name for name in own if own[name] != first[name]])))
    sent: Tensors = ranks.from_first(lambda: {name: here[name] for name in names})
    wrong = misfit(sent, {name: here[name] for name in names})
    if wrong:
        raise RunError(f"the modules of ranks 0 and {ranks.rank} differ: {wrong}")
    if not ranks.leads:
        assign_({name: here[name] for name in names}, sent)


def check_weights(weights: Tensors, round: int, ranks: Ranks) -> None:
    """Raise `RunError` where the ranks come to different weights, as processors of different kinds may."""
    found = ranks.gather([checksum(weights)])
    other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
    if other is not None:
        raise RunError(
            f"round {round}: rank {other} comes to other weights than rank 0; allowed: ranks on processors of one kind, with "
            "the same versions"
        )
