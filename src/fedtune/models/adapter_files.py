"""Adapters in peft's format: a directory with adapter_config.json and adapter_model.safetensors.

There a tensor `….query.lora_A.default.weight` of the network is called `base_model.model.….query.lora_A.weight`, and one of the
head, which peft calls "modules to save", `base_model.model.classifier.weight`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from fedtune.errors import RunError, UsageError, shown
from fedtune.files import content, present, read_object, said
from fedtune.models.adapters import ADAPTER, Lora, adapted, add_adapters, completed, lora_of
from fedtune.models.pretrained import content_of
from fedtune.randomness import seeded
from fedtune.tensors import Tensors, assign_, read_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# what a configuration may say without being asked here: of where it is from, and how its adapter began
_BESIDE = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping"),
    *("r", "lora_alpha", "target_modules", "use_rslora", "lora_dropout", "modules_to_save", "fan_in_fan_out"),
    "init_lora_weights",
}
_BEGINNINGS = (True, False, "gaussian", "orthogonal", "eva")  # others, as PiSSA, change the base, too


def opened(lora: Lora | None, model_type: str) -> Lora | None:
    """With all values: rank, alpha, targets and rslora of the adapter that it begins with, the default targets of a family.

    Raises:
        UsageError: there are none; the adapter's configuration cannot be read, says of it what is not W + s B A alone, or other
            values than those that were given.
    """
    if lora is None or lora.adapter is None:
        return lora if lora is None else completed(lora, model_type)
    folder = Path(os.path.expanduser(str(lora.adapter)))
    try:
        said_there = read_object(folder / CONFIG)
    except RunError as error:
        raise _strange(lora.adapter, str(error)) from error
    _check_kind(lora.adapter, said_there)
    try:
        found = Lora(
            said_there.get("r"),  # type: ignore[arg-type]  # what it may be, it checks
            said_there.get("lora_alpha"),  # type: ignore[arg-type]  # as above
            said_there.get("target_modules"),
            said_there.get("use_rslora", False),
        )
    except UsageError as error:
        raise _strange(lora.adapter, f"{CONFIG} says {shown(error.came)} for {error.argument.partition('.')[2]}") from error
    plain = Lora()
    for name in ("rank", "alpha", "targets", "rslora"):
        given, theirs = getattr(lora, name), getattr(found, name)
        same = set(given) == set(theirs) if name == "targets" and given is not None else given == theirs
        if given != getattr(plain, name) and not same:
            raise UsageError(f"lora.{name}", given, f"{shown(theirs)}, as its adapter {lora.adapter} says, or nothing")
    return dataclasses.replace(found, dropout=lora.dropout, adapter=lora.adapter)


def _check_kind(adapter: str, config: dict[str, Any]) -> None:
    """Refuse all that would make another network of it than W + s B A."""
    from peft import LoraConfig

    if config.get("peft_type") != "LORA":
        raise _strange(adapter, f"its peft_type is {shown(config.get('peft_type'))}, which must be 'LORA'")
    if not isinstance(config.get("target_modules"), list):
        raise _strange(adapter, f"its target_modules are {shown(config.get('target_modules'))}, which must be a list of names")
    begun = config.get("init_lora_weights", True)
    if not any(begun is one or begun == one for one in _BEGINNINGS):
        raise _strange(adapter, f"its init_lora_weights is {shown(begun)}, which changes the weights of the base, too")
    plain = LoraConfig().to_dict()
    for name, value in config.items():
        if name not in _BESIDE and value and value != plain.get(name):
            raise _strange(adapter, f"its {name} is {shown(value)}, which is not known here")


def content_of_model(options: Mapping[str, Any]) -> dict[str, str]:
    """What names the content of the files that a module's weights come from: those of its model, and of the adapter that it
    begins with.

    Args:
        options: of the module: "name", "init" and "lora".

    Raises:
        UsageError: they cannot be found.
    """
    found, lora = content_of(options["name"]) if options["init"] == "pretrained" else {}, lora_of(options.get("lora"))
    return found if lora is None or lora.adapter is None else found | _content_of(lora)


def _content_of(lora: Lora) -> dict[str, str]:
    folder = Path(os.path.expanduser(str(lora.adapter)))
    try:
        return {f"adapter/{file}": hashlib.sha256(content(folder / file)).hexdigest()[:16] for file in (CONFIG, WEIGHTS)}
    except OSError as error:
        raise _strange(str(lora.adapter), said(error)) from error


def begin(
    network: nn.Module, lora: Lora, model_type: str, seed: int, trained: Sequence[str] = (), still: Iterable[nn.Module] = ()
) -> None:
    """Give a network adapters, in place, drawn from a seed or begun with those of a directory.

    Args:
        lora: complete, as from `opened`.
        trained, still: as `head` and `still` in `add_adapters`.

    Raises:
        UsageError: as `add_adapters` and `load_`.
    """
    with seeded(seed, "lora"):
        add_adapters(network, lora, model_type, trained, still)
    if lora.adapter is not None:
        load_(network, lora, trained)


def load_(network: nn.Module, lora: Lora, trained: Sequence[str]) -> None:
    """Give the adapters of a network, and its head where the files have one, the weights of the adapter that is begun with.

    Args:
        lora: with an `adapter`.
        trained: parts of the network that are trained whole, its head.

    Raises:
        UsageError: weights that cannot be read, are not finite, or do not fit.
    """
    adapter = str(lora.adapter)
    weights = _tensors_of(adapter)
    live = tensors_of(network, trained)
    heads = {name for name in live if ".lora_" not in name}
    if not heads & weights.keys():  # an adapter without a head: the fresh one stays
        live = {name: tensor for name, tensor in live.items() if name not in heads}
    for name in sorted(weights.keys() ^ live.keys()):
        what = "lacks" if name in live else "has a weight for what is not adapted here,"
        raise _strange(adapter, f"{WEIGHTS} {what} {name}")
    for name, tensor in weights.items():
        if tensor.shape != live[name].shape:
            raise _strange(
                adapter, f"{name} has the shape {tuple(tensor.shape)}, the network asks for {tuple(live[name].shape)}"
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise _strange(adapter, f"{name} has other values than finite numbers")
    assign_(live, weights)


def tensors_of(network: nn.Module, trained: Sequence[str]) -> Tensors:
    """The tensors of the adapters and of the parts that are trained whole, live, by their names in peft's files."""
    found: Tensors = {}
    for name, layer in adapted(network):
        found[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A[ADAPTER].weight.detach()
        found[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B[ADAPTER].weight.detach()
    for part in trained:
        state = network.get_submodule(part).state_dict(prefix=f"{PREFIX}{part}.", keep_vars=True)
        found |= {name: tensor.detach() for name, tensor in state.items()}
    return found


def save(network: nn.Module, folder: Path, lora: Lora, base: str, task_type: str, trained: Sequence[str]) -> None:
    """Write the adapters of a network, and the parts that are trained whole, into a folder, as peft does.

    Args:
        base: what its weights belong to: the folder or hub id of a model.
        task_type: as peft calls it, "SEQ_CLS" or "CAUSAL_LM".

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    from peft import LoraConfig

    names = [name for name, _ in adapted(network)]
    targets = lora.targets or ()
    meant = {name for name, _ in network.named_modules() if any(f".{name}".endswith(f".{one}") for one in targets)}
    config = LoraConfig(
        base_model_name_or_path=base,
        task_type=task_type,
        inference_mode=True,
        r=lora.rank,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=list(targets) if meant == set(names) else names,  # else peft would adapt others, too
        fan_in_fan_out=any(layer.fan_in_fan_out for _, layer in adapted(network)),
        modules_to_save=list(trained) or None,
    )
    config.save_pretrained(folder)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors_of(network, trained).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _tensors_of(adapter: str) -> Tensors:
    folder = Path(os.path.expanduser(adapter))
    if not present(folder / WEIGHTS):
        raise _strange(adapter, f"there is no {WEIGHTS}; save_pretrained of today's peft writes it")
    try:
        return read_file(folder / WEIGHTS)[0]
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise _strange(adapter, f"{WEIGHTS}: {said(error)}") from error


def _strange(adapter: str, why: str) -> UsageError:
    return UsageError("lora.adapter", adapter, f"a directory of a LoRA adapter that fits the model ({why})")
