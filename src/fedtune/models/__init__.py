"""The model families, and building the right one for a name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fedtune.errors import UsageError
from fedtune.models.adapter_files import opened
from fedtune.models.adapters import lora_of, target_layers
from fedtune.models.albert import AlbertClassifier
from fedtune.models.bert import BertClassifier
from fedtune.models.causal_lm import CausalLM, causal_class, is_causal
from fedtune.models.classifier import TextClassifier
from fedtune.models.distilbert import DistilBertClassifier
from fedtune.models.modernbert import ModernBertClassifier
from fedtune.models.options import check_causal_options, check_options
from fedtune.models.pretrained import load_config
from fedtune.models.roberta import RobertaClassifier
from fedtune.models.sizes import check_config, check_room
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
        hint = "; a causal language model is for a task of instructions" if is_causal(load_config(name)) else ""
        raise UsageError("name", name, f"a model of one of the families {', '.join(FAMILIES)} (this is {family!r}){hint}")
    return FAMILIES[family]


def check_classifier(name: str, options: Mapping[str, Any]) -> None:
    """Check all that can be checked before texts are read: the family, the files of the weights, the options, the adapters.

    Args:
        options: of `TextClassifier`, without the name and what follows from the task.

    Raises:
        UsageError: as `build_classifier`.
    """
    family, config = family_of(name), load_config(name)
    check_config(name, config)
    check_options({"num_labels": 2, **options})
    if options["init"] == "pretrained":
        check_files(name)
    _check_adapters(name, config, family.model_class, options, family.head)


def check_causal_lm(name: str, options: Mapping[str, Any]) -> None:
    """As `check_classifier`, for a `CausalLM` and its options."""
    config = load_config(name)
    kind = causal_class(name, config)
    check_config(name, config)
    check_causal_options(options)
    if options["init"] == "pretrained":
        check_files(name)
    _check_adapters(name, config, kind, options)


def _check_adapters(
    name: str, config: PretrainedConfig, kind: type[PreTrainedModel], options: Mapping[str, Any], head: Sequence[str] = ()
) -> None:
    """Raise `UsageError` where adapters are asked for that a network of a configuration cannot have."""
    lora = opened(lora_of(options.get("lora")), config.model_type)
    if lora is not None:
        check_room(name, kind, config)
        with torch.device("meta"):
            target_layers(kind(config), lora.targets or (), head)
