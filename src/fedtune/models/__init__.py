"""The model families, and building the right one for a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.errors import UsageError
from fedtune.models.albert import AlbertClassifier
from fedtune.models.bert import BertClassifier
from fedtune.models.causal_lm import CausalLM, causal_class
from fedtune.models.classifier import TextClassifier
from fedtune.models.distilbert import DistilBertClassifier
from fedtune.models.modernbert import ModernBertClassifier
from fedtune.models.options import check_causal_options, check_options
from fedtune.models.pretrained import load_config
from fedtune.models.roberta import RobertaClassifier
from fedtune.models.sizes import check_config
from fedtune.models.weights import check_files

FAMILIES: dict[str, type[TextClassifier]] = {
    "bert": BertClassifier,
    "distilbert": DistilBertClassifier,
    "albert": AlbertClassifier,
    "roberta": RobertaClassifier,
    "modernbert": ModernBertClassifier,
}


def build_classifier(name: str, num_labels: int, **options: Any) -> TextClassifier:
    """The classifier of the family that the model's configuration names, with `options` as for `TextClassifier`.

    Raises:
        UsageError: the model cannot be found, or its family is not in `FAMILIES`.
    """
    return family_of(name)(name, num_labels, **options)


def build_causal_lm(name: str, **options: Any) -> CausalLM:
    """The causal language model of that name, with `options` as for `CausalLM`.

    Raises:
        UsageError: the model cannot be found, or is none.
    """
    return CausalLM(name, **options)


def family_of(name: str) -> type[TextClassifier]:
    """The class of the family that the model's configuration names. Raises `UsageError` as `build_classifier`."""
    family = load_config(name).model_type
    if family not in FAMILIES:
        allowed = f"a model of one of the families {', '.join(FAMILIES)}, for texts and labels (this is {family!r})"
        raise UsageError("name", name, allowed)
    return FAMILIES[family]


def check_classifier(name: str, options: Mapping[str, Any]) -> None:
    """Check all that can be checked before texts are read: the family, the files of the weights, the options.

    Args:
        options: of `TextClassifier`, without the name and what follows from the task.

    Raises:
        UsageError: as `build_classifier`.
    """
    family_of(name)
    check_config(name, load_config(name))
    check_options({"num_labels": 2, **options})
    if options["init"] == "pretrained":
        check_files(name)


def check_causal_lm(name: str, options: Mapping[str, Any]) -> None:
    """As `check_classifier`, for a `CausalLM` and its options."""
    config = load_config(name)
    causal_class(name, config)
    check_config(name, config)
    check_causal_options(options)
    if options["init"] == "pretrained":
        check_files(name)
