"""What the options of a classifier may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig

from fedtune.errors import UsageError, at_least, one_of
from fedtune.models.adapters import lora_of

OPTIMIZERS = ("adamw", "sgd")
INITS = ("pretrained", "random")


def check_options(options: Mapping[str, Any]) -> None:
    """Check the options of a classifier by themselves, before any file is read.

    Raises:
        UsageError: a value outside of what is allowed.
    """
    at_least("num_labels", options["num_labels"], 2)
    at_least("freeze_layers", options["freeze_layers"], 0)
    _check_shared(options)
    if options["keep_head"] and options["init"] != "pretrained":
        raise UsageError("keep_head", True, "False, with random weights")


def check_causal_options(options: Mapping[str, Any]) -> None:
    """Check the options of a `CausalLM` by themselves, before any file is read.

    Raises:
        UsageError: a value outside of what is allowed.
    """
    _check_shared(options)
    if options["half_base"] and options["lora"] is None:
        raise UsageError("half_base", True, "False, without lora: nothing is frozen")
    packing = options["packing"]
    if packing is not None and (isinstance(packing, bool) or not isinstance(packing, int) or packing < 1):
        raise UsageError("packing", packing, "a whole number of tokens, 1 or more, or none")


def _check_shared(options: Mapping[str, Any]) -> None:
    at_least("warmup_steps", options["warmup_steps"], 0)
    at_least("seed", options["seed"], 0)
    at_least("weight_decay", options["weight_decay"], 0)
    if not options["learning_rate"] > 0:
        raise UsageError("learning_rate", options["learning_rate"], "a number above 0")
    for name in ("label_smoothing", "dropout"):
        if options.get(name) is not None and not 0 <= options[name] < 1:
            raise UsageError(name, options[name], "at least 0 and below 1")
    if options["optimizer"] not in OPTIMIZERS:
        raise one_of("optimizer", options["optimizer"], OPTIMIZERS)
    if options["init"] not in INITS:
        raise one_of("init", options["init"], INITS)
    if options["vocab_size"] is not None and options["init"] != "random":
        raise UsageError("vocab_size", options["vocab_size"], "nothing, with pretrained weights")
    lora_of(options.get("lora"))


def set_labels(config: PretrainedConfig, names: Sequence[str]) -> None:
    """Name the classes of a configuration.

    Raises:
        UsageError: there are more or fewer classes, or two of one name.
    """
    if len(names) != config.num_labels or len(set(names)) != len(names):
        raise UsageError("label_names", list(names), f"{config.num_labels} different names, one for each class")
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
