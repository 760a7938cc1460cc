"""The model families, and building the right one for a name."""

from __future__ import annotations

from typing import Any

from fedtune.errors import UsageError
from fedtune.models.albert import AlbertClassifier
from fedtune.models.bert import BertClassifier
from fedtune.models.classifier import TextClassifier
from fedtune.models.distilbert import DistilBertClassifier
from fedtune.models.pretrained import load_config

FAMILIES: dict[str, type[TextClassifier]] = {
    "bert": BertClassifier,
    "distilbert": DistilBertClassifier,
    "albert": AlbertClassifier,
}


def build_classifier(name: str, num_labels: int, **options: Any) -> TextClassifier:
    """The classifier of the family that the model's configuration names, with `options` as for `TextClassifier`.

    Raises:
        UsageError: the model cannot be found, or its family is not in `FAMILIES`.
    """
    family = load_config(name).model_type
    if family not in FAMILIES:
        raise UsageError("name", name, f"a model of one of the families {', '.join(FAMILIES)} (this is {family!r})")
    return FAMILIES[family](name, num_labels, **options)
