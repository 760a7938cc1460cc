"""Which kind of module a task is for: texts and labels for a classifier, instructions for a causal language model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl

from fedtune.data.registry import TASKS
from fedtune.errors import UsageError
from fedtune.models import CausalLM, TextClassifier, build_causal_lm, build_classifier, check_causal_lm, check_classifier
from fedtune.models.options import check_causal_options, check_options

_OF_TASK = {"num_labels", "label_names"}  # they follow from the task


def _defaults(kind: type[pl.LightningModule]) -> dict[str, Any]:
    parameters = inspect.signature(kind.__init__).parameters.items()
    return {name: one.default for name, one in parameters if name not in ("self", "name", *_OF_TASK)}


def more_options() -> dict[str, inspect.Parameter]:
    """The arguments of a `CausalLM` that a `TextClassifier` does not have."""
    known = inspect.signature(TextClassifier.__init__).parameters
    return {name: one for name, one in inspect.signature(CausalLM.__init__).parameters.items() if name not in known}


def kind_of(task: str) -> str | None:
    """The kind of a registered task by what its builder says that it returns; None where it does not say."""
    builder = TASKS.get(task)
    said = getattr(getattr(builder, "__self__", None), "kind", None)
    returned = getattr(inspect.unwrap(builder), "__annotations__", {}).get("return") if callable(builder) else None
    name = returned if isinstance(returned, str) else getattr(returned, "__name__", "")
    known = {"TextTask": "texts", "InstructionTask": "instructions"}
    return said or known.get(str(name).rpartition(".")[2])


def options_for(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options of both kinds of modules those of one.

    Raises:
        UsageError: an option of the other kind that is not as by default.
    """
    mine, other = (CausalLM, TextClassifier) if kind == "instructions" else (TextClassifier, CausalLM)
    known, strange = _defaults(mine), _defaults(other)
    for name, value in options.items():
        if name not in known and name in strange and value != strange[name]:
            what = "a causal language model" if kind == "instructions" else "a classifier"
            raise UsageError(name, value, f"{strange[name]}, for {what}, which has no such option")
    return {name: value for name, value in options.items() if name in known or name not in strange}


def check_model(kind: str, name: str, options: Mapping[str, Any], files: bool = True) -> None:
    """Check all that can be checked before data are read.

    Args:
        kind: of the task.
        options: of both kinds of modules, without the name.
        files: whether the model's files may be looked at.

    Raises:
        UsageError: as `build_model`.
    """
    chosen, causal = options_for(kind, options), kind == "instructions"
    if not files:
        check_causal_options(chosen) if causal else check_options({"num_labels": 2, **chosen})
    else:
        check_causal_lm(name, chosen) if causal else check_classifier(name, chosen)


def build_model(kind: str, name: str, options: Mapping[str, Any], label_names: Sequence[str] = ()) -> TextClassifier | CausalLM:
    """The module for the data of a task.

    Args:
        kind: of the task.
        options: of both kinds of modules, without the name.
        label_names: of a classifier's classes.

    Raises:
        UsageError: a model of the other kind, and as `build_classifier` and `build_causal_lm`.
    """
    chosen = options_for(kind, options)
    if kind == "instructions":
        return build_causal_lm(name, **chosen)
    return build_classifier(name, len(label_names), label_names=list(label_names), **chosen)
