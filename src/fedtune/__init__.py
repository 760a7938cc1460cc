"""fedtune: federated fine-tuning of language models on text classification.

Everything offered is in `__all__`; it is imported on first use, so that `import fedtune` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.aggregation import ALGORITHMS
    from fedtune.callbacks import FederatedCallback
    from fedtune.curves import plot_grid
    from fedtune.datamodule import FederatedDataModule
    from fedtune.errors import RunError, UsageError
    from fedtune.figures import plot_curves, plot_split
    from fedtune.loop import FederatedLoop
    from fedtune.models import FAMILIES, build_classifier
    from fedtune.models.albert import AlbertClassifier
    from fedtune.models.bert import BertClassifier
    from fedtune.models.distilbert import DistilBertClassifier
    from fedtune.models.text_classifier import TextClassifier
    from fedtune.pretrained import MODELS
    from fedtune.records import RoundRecord
    from fedtune.results import compare, read_runs
    from fedtune.splits import SPLITS
    from fedtune.tasks import TASKS
    from fedtune.texttask import TextTask

__version__ = "0.1.0"

_HOME = {
    "ALGORITHMS": "aggregation",
    "AlbertClassifier": "models.albert",
    "BertClassifier": "models.bert",
    "DistilBertClassifier": "models.distilbert",
    "FAMILIES": "models",
    "FederatedCallback": "callbacks",
    "FederatedDataModule": "datamodule",
    "FederatedLoop": "loop",
    "MODELS": "pretrained",
    "RoundRecord": "records",
    "RunError": "errors",
    "SPLITS": "splits",
    "TASKS": "tasks",
    "TextClassifier": "models.text_classifier",
    "TextTask": "texttask",
    "UsageError": "errors",
    "build_classifier": "models",
    "compare": "results",
    "plot_curves": "figures",
    "plot_grid": "curves",
    "plot_split": "figures",
    "read_runs": "results",
}

__all__ = [
    "ALGORITHMS",
    "FAMILIES",
    "MODELS",
    "SPLITS",
    "TASKS",
    "AlbertClassifier",
    "BertClassifier",
    "DistilBertClassifier",
    "FederatedCallback",
    "FederatedDataModule",
    "FederatedLoop",
    "RoundRecord",
    "RunError",
    "TextClassifier",
    "TextTask",
    "UsageError",
    "build_classifier",
    "compare",
    "plot_curves",
    "plot_grid",
    "plot_split",
    "read_runs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fedtune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fedtune.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
