"""A pretrained network from the files of a model: what is read is checked, and the head is fresh unless it is kept."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import PretrainedConfig, PreTrainedModel

from fedtune.errors import RunError, UsageError, shown, warn
from fedtune.files import content, present, regular
from fedtune.models.pretrained import cause, converted_weights, load_config, locate
from fedtune.models.sizes import check_room
from fedtune.tensors import Tensors

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}  # names of old files -> those of today
_COUNTED = ("position_ids", "token_type_ids")  # constants that old files hold, too


def read(
    kind: type[PreTrainedModel], name: str, config: PretrainedConfig, attention: str, head: Sequence[str], keep_head: bool
) -> tuple[PreTrainedModel, set[str]]:
    """The network of a model with its pretrained weights in fp32, and the names of the tensors that are fresh.

    Args:
        config: as the network shall be.
        attention: Transformers' name of how attention is computed.
        head: the parts of the network that make up its head.
        keep_head: take the head from the files, too.

    Raises:
        UsageError: weights that cannot be read, that are not finite, or do not fit the configuration; no head that fits, where
            it is to be kept.
    """
    weights = converted_weights(name)
    if weights is not None:
        _check_finite(name, weights)
        network = kind._from_config(config, attn_implementation=attention)
        fresh, unknown = network.load_state_dict(weights, strict=False)
        if unknown or {one.split(".")[0] for one in fresh} & {one.split(".")[0] for one in weights}:
            raise RunError(f"the weights of {name} do not fit: {[*unknown, *fresh][:3]}")
        if keep_head:
            raise _no_head(f"{name} has none")
        return network, set(fresh)
    weights = _tensors_of(name)
    _check_finite(name, weights)
    _check_names(name, weights, kind.base_model_prefix)
    heads = tuple(f"{part}." for part in head)
    if not keep_head:
        weights = {key: tensor for key, tensor in weights.items() if not key.startswith(heads)}
    options = {"config": config, "attn_implementation": attention, "dtype": torch.float32, "trust_remote_code": False}
    try:
        check_room(name, kind, config, sum(tensor.numel() for tensor in weights.values()))
        with quiet():
            network, found = kind.from_pretrained(
                None, state_dict=weights, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except UsageError:
        raise
    except Exception as error:  # what Transformers raises for a configuration that does not work is of any type
        _check_plain(name, weights)
        raise UsageError("name", name, f"weights that fit the configuration ({cause(error)})") from error
    _check_plain(name, {key: tensor for key, tensor in weights.items() if key not in found["unexpected_keys"]})
    _check_pooler(name, network, found, weights)
    return network, _check_fit(name, network, found, heads, keep_head)


def check_kept_head(name: str, num_labels: int, label_names: Sequence[str] | None) -> None:
    """A head can be kept where its classes are those of the task, in the same order.

    Raises:
        UsageError: it is for another number of classes, or for classes of other names.
    """
    config = load_config(name)
    if config.num_labels != num_labels:
        raise _no_head(f"that of {name} has {config.num_labels}", num_labels)
    theirs = [str(config.id2label.get(number, "")) for number in range(num_labels)]
    unnamed = all(label == f"LABEL_{number}" for number, label in enumerate(theirs))
    if label_names is not None and not unnamed and [one.lower() for one in theirs] != [one.lower() for one in label_names]:
        raise _no_head(f"those of {name} are {shown(theirs)}, those of the task {shown(list(label_names))}", num_labels)


def _no_head(why: str, classes: int | str = "these") -> UsageError:
    return UsageError("keep_head", True, f"False, or a model with a head for {classes} classes ({why})")


def _tensors_of(name: str) -> Tensors:
    """All tensors in the files of a model, by their names there."""
    from safetensors.torch import load_file

    found: Tensors = {}
    file = Path(name)
    try:
        for file in _files_of(name):
            regular(file)
            tensors = load_file(file)
            if found.keys() & tensors.keys():
                raise ValueError(f"{min(found.keys() & tensors.keys())} is in another file, too")
            found |= tensors
    except Exception as error:  # of safetensors, of the hub, of the disk
        raise _unreadable(name, file, error) from error
    return found


def _files_of(name: str) -> list[Path]:
    """The safetensors files of a model: one, or those that an index lists."""
    place = locate(name)
    if Path(place).is_dir():
        whole, index = Path(place) / _WHOLE, Path(place) / _INDEX
        if present(whole):
            return [whole]
        if not present(index):
            pickled = next(iter(sorted(Path(place).glob("pytorch_model*.bin"))), None)
            if pickled is not None:
                hint = "save it once as safetensors: AutoModel.from_pretrained(...).save_pretrained(...)"
                raise FileNotFoundError(f"there is only {pickled.name}; {hint}")
            raise FileNotFoundError(f"there is no {_WHOLE} in {place}")
        return [Path(place) / part for part in _parts(index)]
    from transformers.utils import cached_file

    for here in (True, False):  # first what is on this machine: without a network each question takes long
        for file in (_WHOLE, _INDEX):
            try:
                found = Path(str(cached_file(place, file, local_files_only=here)))
            except OSError as error:
                if not here and (file == _INDEX or isinstance(error.__cause__, LocalEntryNotFoundError)):
                    raise
                continue
            return [found] if file == _WHOLE else [Path(str(cached_file(place, part))) for part in _parts(found)]
    raise FileNotFoundError(f"there is no {_WHOLE} in {place}")


def check_files(name: str) -> None:
    """Check that the files of a model's weights are there and whole, without reading them.

    Raises:
        UsageError: they are not.
    """
    from safetensors import safe_open

    file = Path(name)
    try:
        for file in _files_of(name):
            regular(file)
            with safe_open(file, framework="pt"):
                pass
    except Exception as error:  # of safetensors, of the hub, of the disk
        raise _unreadable(name, file, error) from error


def _unreadable(name: str, file: Path, error: Exception) -> UsageError:
    where = "" if file == Path(name) else f"{file.name}: "
    return UsageError("name", name, f"a model with weights in safetensors that can be read ({where}{cause(error)})")


def _parts(index: Path) -> list[str]:
    """The files that an index lists, which lie beside it.

    Raises:
        ValueError: it lists something else.
    """
    found = json.loads(content(index))
    parts = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f"{index.name} has no weight_map, which names the files")
    for part in parts.values():
        if not isinstance(part, str) or not part.endswith(".safetensors") or part != Path(part).name:
            raise ValueError(f"{index.name} names {shown(part)}, which is no safetensors file beside it")
    return sorted(set(parts.values()))


def _check_plain(name: str, weights: Tensors) -> None:
    """Refuse weights that are whole numbers, as of a quantised model; what is no part of the network may be what it likes."""
    for key, tensor in weights.items():
        if not tensor.is_floating_point() and not key.endswith(_COUNTED):
            raise UsageError("name", name, f"a model whose weights are plain numbers ({key} is {tensor.dtype})")


def _check_finite(name: str, weights: Tensors) -> None:
    for key, tensor in weights.items():
        if not tensor.is_floating_point():
            continue
        if tensor.numel() and not all(
            bool(end.isfinite()) for end in torch.aminmax(tensor.float())
        ):  # isfinite takes 30 times as long
            raise UsageError("name", name, f"a model whose weights are finite numbers ({key} has NaN or infinite ones)")


def _check_names(name: str, weights: Tensors, prefix: str) -> None:
    """Refuse files that have a tensor of a network twice: with and without its family's prefix, by its old and new name."""
    known: dict[str, str] = {}
    for key, tensor in weights.items():
        short = re.sub(rf"^({prefix}\.)+", "", key)
        for old, new in _OLD.items():
            short = short.replace(old, new)
        other = known.setdefault(short, key)
        if other != key and not (tensor.shape == weights[other].shape and torch.equal(tensor, weights[other])):
            raise UsageError("name", name, f"a model that has each of its tensors once (these are {other} and {key})")


def _check_pooler(name: str, network: PreTrainedModel, found: dict[str, Any], weights: Tensors) -> None:
    """A pooler, or ModernBERT's `head`, is fresh where the files have none; one that does not fit, or in part, is a fault of
    theirs."""
    every = [*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])]
    for prefix, mark in ((f"{network.base_model_prefix}.pooler.", "pooler"), ("head.", ".head.")):
        absent = sorted(key for key in every if key.startswith(prefix))
        theirs = sorted(key for key in weights if mark in f".{key.lower()}")
        if absent and theirs:
            lacking = f"these lack {', '.join(absent[:3])}, but have {', '.join(theirs[:3])}"
            raise UsageError("name", name, f"weights that fit the configuration ({lacking})")


def _check_fit(name: str, network: PreTrainedModel, found: dict[str, Any], heads: tuple[str, ...], keep_head: bool) -> set[str]:
    """The names of the tensors that are fresh: those of the head, and a pooler's that was not pretrained."""
    absent = [*found["missing_keys"], *(key[0] for key in found["mismatched_keys"])]
    prefix = f"{network.base_model_prefix}."
    encoder = [key for key in absent if key.startswith(prefix) and ".pooler." not in key]
    if encoder:
        raise UsageError("name", name, f"weights that fit the configuration (these lack {', '.join(sorted(encoder)[:3])})")
    if keep_head and any(key.startswith(heads) for key in absent):
        raise _no_head(f"{name} lacks {', '.join(sorted(key for key in absent if key.startswith(heads))[:2])}")
    parts = {part for part, _ in network.base_model.named_children()}
    left_out = [key for key in found["unexpected_keys"] if key.removeprefix(prefix).split(".")[0] in parts]
    left_out = [key for key in left_out if not key.endswith(_COUNTED) and ".pooler." not in f".{key}"]
    if left_out:
        warn(
            f"{name} has weights that its configuration does not use: {', '.join(sorted(left_out)[:3])}"
            f"{f' and {len(left_out) - 3} more' if len(left_out) > 3 else ''}"
        )
    return set(absent)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No loading bar, no table of fresh parameters: that the head is fresh is what everyone here expects."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
