"""Whether the numbers of a model's configuration are ones that a network can have, before anything is made of them."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from fedtune.errors import UsageError, shown

_COUNTS = {
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "embedding_size": 2**17,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**12,
    "num_hidden_groups": 1000,
    "inner_group_num": 1000,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**20,
    "type_vocab_size": 2**16,
    "local_attention": 2**20,
}  # the greatest of each: more than any model has, and few enough to be counted
_RANGES = {"layer_norm_eps": 1e3, "norm_eps": 1e3, "initializer_range": 1e3}  # numbers from 0 to this one
_TIMES, _BESIDE = 4, 10**7  # a network may have so many times the numbers of its files, and so many beside them


def check_config(name: str, config: PretrainedConfig) -> None:
    """Check the counts, probabilities and ranges of a configuration of one of our families.

    Raises:
        UsageError: one is of another type, or beyond what a network can have.
    """
    for key, most in _COUNTS.items():
        value = getattr(config, key, 1)
        if type(value) is not int or not 1 <= value <= most:
            raise _strange(name, key, value, f"a whole number from 1 to {most}")
    limits = _RANGES | {key: 1 for key in config.to_dict() if key.endswith(("dropout", "dropout_prob"))}
    for key, limit in limits.items():
        value = getattr(config, key, 0)
        if value is None and key.startswith(("classifier", "seq_classif")):
            continue  # it is that of the hidden states
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= limit:
            raise _strange(name, key, value, f"a number from 0 to {limit:g}")


def _strange(name: str, key: str, value: Any, allowed: str) -> UsageError:
    return UsageError("name", name, f"a configuration that works ({key} is {shown(value)}, which must be {allowed})")


def check_room(name: str, kind: type[PreTrainedModel], config: PretrainedConfig, numbers: int | None = None) -> None:
    """Check how many numbers a network of a configuration has, without making them.

    Args:
        numbers: how many the files of its weights have; None for random weights, which must fit into the machine's memory.

    Raises:
        UsageError: it has far more than its files, or more than fit into memory.
    """
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in kind(config).parameters())
    if numbers is not None and wanted > _TIMES * numbers + _BESIDE:
        allowed = f"weights that fit the configuration (it asks for {wanted:.2g} numbers, the files have {numbers:.2g})"
        raise UsageError("name", name, allowed)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if 4 * wanted > memory:
        raise UsageError(
            "name", name, f"a model that fits into {memory / 2**30:.0f} GiB of memory (it has {wanted:.2g} numbers)"
        )
