"""Federated algorithms, a file each, that read as their papers do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedtune.algorithms.adaptive import Adagrad, Adam, Yogi, fedadagrad, fedadam, fedyogi
from fedtune.algorithms.compression import QSGD, HalfPrecision, PowerSGD, Quantise, Sign, TopK
from fedtune.algorithms.ditto import Beside, ditto
from fedtune.algorithms.fedavg import LocalTraining, Mean, fedavg
from fedtune.algorithms.fedavgm import Momentum, fedavgm
from fedtune.algorithms.feddyn import Drift, Dynamic, feddyn
from fedtune.algorithms.fedex_lora import Residual, fedex_lora
from fedtune.algorithms.fedit import AdapterTraining, fedit
from fedtune.algorithms.fedkseed import ZerothOrder, fedkseed
from fedtune.algorithms.fednova import Normalised, Rescaled, fednova
from fedtune.algorithms.fedper import InTurn, fedper, fedrep
from fedtune.algorithms.fedprox import Proximal, fedprox
from fedtune.algorithms.fedsa_lora import fedsa_lora
from fedtune.algorithms.ffa_lora import ffa_lora
from fedtune.algorithms.flexlora import Resized, flexlora
from fedtune.algorithms.flora import Stacking, flora
from fedtune.algorithms.hetlora import Padded, hetlora
from fedtune.algorithms.qfedavg import Fair, Scaled, qfedavg
from fedtune.algorithms.robust import (
    CentredClipping,
    ClippedMean,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NearestMean,
    TrimmedMean,
)
from fedtune.algorithms.rolora import Alternating, rolora
from fedtune.algorithms.scaffold import Control, Controlled, scaffold
from fedtune.algorithms.torch_optim import Continued, TorchOptimizer, diloco, fedopt
from fedtune.federated.parts import Algorithm

ALGORITHMS: dict[str, Callable[..., Algorithm]] = {
    make.__name__: make
    for make in (
        *(fedavg, fedavgm, fedadagrad, fedadam, fedyogi, fedopt, diloco),
        *(fedprox, scaffold, fednova, feddyn, qfedavg, ditto, fedper, fedrep, fedkseed),
        *(fedit, ffa_lora, rolora, fedsa_lora, flora, fedex_lora, flexlora, hetlora),
    )
}
_PARTS: tuple[type[Any], ...] = (
    *(LocalTraining, Continued, Proximal, Controlled, Normalised, Dynamic, Fair, Beside, InTurn, ZerothOrder),
    *(Mean, ClippedMean, Median, TrimmedMean, GeometricMedian, Krum, MultiKrum, CentredClipping, NearestMean),
    *(Momentum, Adagrad, Adam, Yogi, TorchOptimizer, Control, Rescaled, Drift, Scaled),
    *(Quantise, QSGD, HalfPrecision, Sign, TopK, PowerSGD),
    *(AdapterTraining, Alternating, Stacking, Residual, Resized, Padded),
)
ALGORITHM_PARTS: dict[str, type[Any]] = {part.__name__: part for part in _PARTS}
