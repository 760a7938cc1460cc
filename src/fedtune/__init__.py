"""fedtune: federated fine-tuning of language models on text classification.

Everything offered is in `__all__`; it is imported on first use, so that `import fedtune` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fedtune.threads import spin_less_when_busy
from fedtune.version import __version__ as __version__

if TYPE_CHECKING:
    from fedtune.algorithms import ALGORITHM_PARTS, ALGORITHMS
    from fedtune.commands import report, sweep
    from fedtune.data.classification import FederatedDataModule
    from fedtune.data.instructions import InstructionTask
    from fedtune.data.registry import TASKS
    from fedtune.data.splits import SPLITS
    from fedtune.data.task import TextTask
    from fedtune.errors import RunError, UsageError
    from fedtune.federated.parts import Algorithm
    from fedtune.models import FAMILIES, build_classifier
    from fedtune.models.adapters import Lora
    from fedtune.models.albert import AlbertClassifier
    from fedtune.models.bert import BertClassifier
    from fedtune.models.causal_lm import CausalLM
    from fedtune.models.classifier import TextClassifier
    from fedtune.models.distilbert import DistilBertClassifier
    from fedtune.models.modernbert import ModernBertClassifier
    from fedtune.models.pretrained import MODELS
    from fedtune.models.roberta import RobertaClassifier
    from fedtune.privacy.calculator import plan_privacy
    from fedtune.privacy.mechanisms import PRIVACY
    from fedtune.reports.cells import compare
    from fedtune.reports.curves import plot_grid
    from fedtune.reports.results import read_runs
    from fedtune.runs.callbacks import FederatedCallback
    from fedtune.runs.export import export
    from fedtune.runs.figures import plot_curves, plot_split
    from fedtune.runs.loading import LoadedRun, load
    from fedtune.runs.loop import FederatedLoop
    from fedtune.runs.monitors import BestWeights, EarlyStopping, LearningRateMonitor
    from fedtune.runs.options import RunOptions
    from fedtune.runtimes.faults import FAULTS
    from fedtune.secure.parts import SECURE_SUMS
    from fedtune.storage.records import RoundRecord

spin_less_when_busy()  # before torch is imported

_HOME = {
    "ALGORITHMS": "algorithms",
    "ALGORITHM_PARTS": "algorithms",
    "Algorithm": "federated.parts",
    "AlbertClassifier": "models.albert",
    "BertClassifier": "models.bert",
    "CausalLM": "models.causal_lm",
    "DistilBertClassifier": "models.distilbert",
    "ModernBertClassifier": "models.modernbert",
    "RobertaClassifier": "models.roberta",
    "BestWeights": "runs.monitors",
    "EarlyStopping": "runs.monitors",
    "InstructionTask": "data.instructions",
    "LearningRateMonitor": "runs.monitors",
    "FAMILIES": "models",
    "FAULTS": "runtimes.faults",
    "FederatedCallback": "runs.callbacks",
    "FederatedDataModule": "data.classification",
    "FederatedLoop": "runs.loop",
    "LoadedRun": "runs.loading",
    "Lora": "models.adapters",
    "MODELS": "models.pretrained",
    "PRIVACY": "privacy.mechanisms",
    "RoundRecord": "storage.records",
    "RunOptions": "runs.options",
    "RunError": "errors",
    "SECURE_SUMS": "secure.parts",
    "SPLITS": "data.splits",
    "TASKS": "data.registry",
    "TextClassifier": "models.classifier",
    "TextTask": "data.task",
    "UsageError": "errors",
    "build_classifier": "models",
    "compare": "reports.cells",
    "export": "runs.export",
    "load": "runs.loading",
    "plan_privacy": "privacy.calculator",
    "plot_curves": "runs.figures",
    "plot_grid": "reports.curves",
    "plot_split": "runs.figures",
    "read_runs": "reports.results",
    "report": "commands",
    "sweep": "commands",
}

__all__ = [
    "ALGORITHMS",
    "ALGORITHM_PARTS",
    "FAMILIES",
    "FAULTS",
    "MODELS",
    "PRIVACY",
    "SECURE_SUMS",
    "SPLITS",
    "TASKS",
    "AlbertClassifier",
    "Algorithm",
    "BertClassifier",
    "BestWeights",
    "CausalLM",
    "DistilBertClassifier",
    "EarlyStopping",
    "FederatedCallback",
    "FederatedDataModule",
    "FederatedLoop",
    "InstructionTask",
    "LearningRateMonitor",
    "LoadedRun",
    "Lora",
    "ModernBertClassifier",
    "RobertaClassifier",
    "RoundRecord",
    "RunError",
    "RunOptions",
    "TextClassifier",
    "TextTask",
    "UsageError",
    "build_classifier",
    "compare",
    "export",
    "load",
    "plan_privacy",
    "plot_curves",
    "plot_grid",
    "plot_split",
    "read_runs",
    "report",
    "sweep",
]


if not TYPE_CHECKING:  # a type checker that saw it would take any name

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'fedtune' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"fedtune.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
