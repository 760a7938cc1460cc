"""Whether a module and data belong together: token ids mean the same to both, and classes are as many.

Legend: T tokens in all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fedtune.errors import UsageError, shown
from fedtune.models.pretrained import load_config, load_tokenizer, max_tokens
from fedtune.models.weights import check_kept_head

_UNUSED = re.compile(r"[\[<]?(unused|extra_id_|madeupword|reserved|special_token)", re.IGNORECASE)  # may be given a meaning


_KINDS = {"texts": "a task of texts and labels", "instructions": "a task of instructions and answers"}


def tokenizer_for(model: str, other: str | None, max_length: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or the other one that is asked for, where the model takes sequences of this length.

    Raises:
        UsageError: it does not, a tokenizer cannot be read, or the model's own does not belong to it.
    """
    config = load_config(model)
    longest = max_tokens(config)
    if longest is not None and max_length > longest:
        raise UsageError("max_length", max_length, f"at most {longest}, the maximum of {model}")
    if other is not None:
        try:
            return load_tokenizer(other)
        except UsageError as error:
            raise UsageError("tokenizer", error.came, error.allowed) from error
    tokenizer = load_tokenizer(model)
    check_size(tokenizer, config, model)
    return tokenizer


def check_size(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, model: str) -> None:
    """A model's own tokenizer has an embedding for each of its tokens, and tokens for most of its embeddings.

    Raises:
        UsageError: ids beyond the embeddings, or less than half as many tokens as there are embeddings.
    """
    rows, vocabulary = getattr(config, "vocab_size", None), tokenizer.get_vocab()
    if rows is None:
        return
    largest = max(vocabulary.values(), default=-1)
    if largest >= rows:
        allowed = f"a model with an embedding for every token (its tokenizer has ids up to {largest}, it has {rows} embeddings)"
        raise UsageError("model", model, allowed)
    if len(vocabulary) < rows / 2:
        allowed = (
            f"a model with its own tokenizer (this has {len(vocabulary)} tokens for {rows} embeddings; are files missing?)"
        )
        raise UsageError("model", model, allowed)


def check_data(module: Any, data: Any) -> None:
    """Data and a module of ours are for the same tokens, lengths and classes. Data of another kind are not looked at.

    Args:
        data: a `FederatedDataModule`.

    Raises:
        UsageError: texts to be classified for a causal model, or conversations for a classifier; more classes than the module
            has, or others; ids beyond its embeddings; another vocabulary than that of its pretrained weights; longer sequences
            than it has positions.
    """
    options = dict(getattr(data, "hparams", {}))
    if not {"model", "tokenizer", "max_length"} <= options.keys() or not hasattr(type(data), "tokens"):
        return
    kind = getattr(data, "kind", "texts") if hasattr(type(data), "kind") else "texts"
    if kind != module.kind:
        raise UsageError(
            "task", options.get("task"), f"{_KINDS[module.kind]} (this one has {kind}), for {type(module).__name__}"
        )
    if kind == "texts" and hasattr(type(data), "label_names"):
        _check_classes(module, data)
    longest = max_tokens(module.network.config)
    if longest is not None and options["max_length"] > longest:
        raise UsageError("max_length", options["max_length"], f"at most {longest}, the maximum of {module.hparams['name']}")
    _check_tokens(module, data, options)


def _check_classes(module: Any, data: Any) -> None:
    classes, names = module.hparams["num_labels"], list(data.label_names)
    if len(names) > classes:
        raise UsageError("num_labels", classes, f"{len(names)}, the classes of the data")
    if module.hparams["keep_head"]:
        check_kept_head(module.hparams["name"], len(names), names)
    known = module.hparams["label_names"]
    if known is not None and list(known) != names:
        raise UsageError("label_names", list(known), f"the names of the classes of the data in their order, {shown(names)}")
    if known is None and len(names) == classes:
        module.name_labels(names)


def _check_tokens(module: Any, data: Any, options: Mapping[str, Any]) -> None:
    name, given = module.hparams["name"], options["tokenizer"] or options["model"]
    rows = module.network.get_input_embeddings().num_embeddings
    largest = max(int(data.tokens.ids_T.max()), data.tokens.pad_id)
    if largest >= rows:
        raise UsageError(
            "tokenizer", given, f"one of at most {rows} tokens, which {name} knows (the data have the id {largest})"
        )
    if given == name or module.hparams["init"] != "pretrained":
        return
    try:
        theirs = {number: token for token, number in load_tokenizer(name).get_vocab().items()}
    except UsageError:  # a model without a tokenizer of its own: another must be given
        return
    for number in torch.unique(data.tokens.ids_T).tolist():
        ours, meant = data.tokenizer.convert_ids_to_tokens(number), theirs.get(number)
        if ours != meant and not (meant is not None and _UNUSED.match(meant)):
            allowed = (
                f"the tokens that {name} was pretrained with (the id {number} is {ours!r} in the data, {meant!r} in the model)"
            )
            raise UsageError("tokenizer", given, allowed)
