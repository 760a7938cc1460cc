"""Federated algorithms, a file each, that read as their papers do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedtune.algorithms.compression import Quantise
from fedtune.algorithms.fedavg import LocalTraining, Mean, fedavg
from fedtune.algorithms.fedavgm import Momentum, fedavgm
from fedtune.federated.parts import Algorithm

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {"fedavg": fedavg, "fedavgm": fedavgm}
ALGORITHM_PARTS: dict[str, type[Any]] = {part.__name__: part for part in (LocalTraining, Mean, Momentum, Quantise)}
