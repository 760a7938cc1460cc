"""A run's model as a Transformers folder, or its adapters as a folder of peft: weights, tokenizer, a card with its numbers."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from fedtune.errors import UsageError, shown
from fedtune.files import said, settled, synchronise, write_text
from fedtune.models import adapter_files
from fedtune.models.adapters import Lora, merge_
from fedtune.models.pretrained import MODELS, locate
from fedtune.models.weights import quiet
from fedtune.runs.card import card
from fedtune.runs.client_models import own_weights
from fedtune.runs.loading import module_of, names_of, of_base, run_config, tokenizer_of, weights_of
from fedtune.tensors import Tensors


def export(
    run: str | Path,
    folder: str | Path,
    which: str = "last",
    label_names: Sequence[str] | None = None,
    merge: bool = False,
    client: int | None = None,
) -> Path:
    """Write the model of a run as a folder that Transformers opens, with the same logits as the run's module; of a run with
    low-rank adapters, these and the head alone, as a folder for peft's `PeftModel.from_pretrained`.

    The folder is whole or not there. Attention is computed as in the run on a CPU ("eager", in config.json); another way, which
    differs by rounding, is an argument of `from_pretrained`: attn_implementation="sdpa".

    Args:
        run: directory of a run of a `TextClassifier` or a `CausalLM`.
        folder: where the model goes: absent or empty.
        which: the weights of the "last" round, which the test metrics are of, or those of the "best" round by the run's
            monitor, where they are still there: in a checkpoint, or kept by the callback `BestWeights`.
        label_names: names of the classes, where the run does not know them.
        merge: add adapters to the weights that they belong to, and write the whole model.
        client: whose model is meant, where clients have models of their own (FedPer, FedRep, Ditto, FedSA-LoRA).

    Returns:
        the folder.

    Raises:
        UsageError: no directory of such a run, weights that are no longer there, a folder that is not empty or cannot be
            written, a model whose files have changed since; a run whose adapters say nothing without its own base, or that has
            none to merge; a client that has no model of its own, or none chosen where the server has no whole model.
        RunError: the run's files are damaged.
    """
    run, folder = (Path(os.path.expanduser(one)) for one in (run, folder))
    _check_target(folder)
    config = _config_of(run)
    if merge and config["model"].get("lora") is None:
        raise UsageError("merge", merge, "False, as the run has no adapters")
    names = names_of(config, run, label_names)
    number, weights = weights_of(run, config, which)
    weights |= own_weights(run, config, number, which, client)
    module = module_of(run, config, names, weights)
    base = None if merge or module.hparams["lora"] is None else _base_of(module, weights)
    tokenizer = tokenizer_of(config, module.network)
    text = card(run, config, names, number, which, base, client)
    try:
        _write(folder.resolve(), functools.partial(_save, module, base), tokenizer, text)
    except (OSError, SafetensorError) as error:
        raise UsageError("folder", str(folder), f"a directory that can be written ({error})") from error
    return folder


def _write(folder: Path, save: Callable[[Path], None], tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Write the files under another name, and rename the whole."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        save(temporary)
        tokenizer.save_pretrained(temporary)
        write_text(temporary / "README.md", text)
        settled(temporary)
        os.replace(temporary, folder)
        synchronise(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _config_of(run: Path) -> dict[str, Any]:
    """The configuration of a run of a `TextClassifier` or a `CausalLM`."""
    config = run_config(run)
    model = config["model"]
    if "name" not in model or "class" in model or "class_path" in model:
        what = shown(model.get("class", model.get("class_path")))
        raise UsageError("run", str(run), f"a run of a TextClassifier or a CausalLM (this is of {what}; fedtune.load opens it)")
    return config


def _save(module: Any, base: str | None, folder: Path) -> None:
    """Write the adapters that belong to a base, or the whole network."""
    if base is not None:
        lora = Lora(**module.hparams["lora"])
        adapter_files.save(module.network, folder, lora, base, module.task_type, module.trained_whole)
        return
    merge_(module.network)
    with quiet():
        module.network.save_pretrained(folder)
    _complete_config(folder / "config.json")


def _base_of(module: Any, weights: Tensors) -> str:
    """The folder or hub id of the model that the adapters of a module belong to.

    Raises:
        UsageError: there is none with the weights that the run has beside them.
    """
    name = module.hparams["name"]
    moved = next((one for one in weights if of_base(one)), None)
    if moved is not None:
        why = f"the run moved weights of its base ({moved})"
    elif module.hparams["init"] != "pretrained":
        why = "the base of the run has random weights"
    elif name in MODELS and MODELS[name].convert is not None:
        why = f"{name} is made of the files of another family"
    else:
        place = locate(name)
        return str(Path(place).resolve()) if Path(place).is_dir() else place
    raise UsageError("merge", False, f"True, for the whole model: {why}, which adapters alone cannot say")


def _check_target(folder: Path) -> None:
    try:
        folder.resolve()
        taken = os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))
    except (OSError, ValueError, RuntimeError) as error:  # links that lead to themselves are of the last kind
        raise UsageError("folder", str(folder), f"a directory that can be written ({said(error)})") from error
    if taken:
        raise UsageError("folder", str(folder), "a directory that is empty, or not there yet")


def _complete_config(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    write_text(file, json.dumps(content | {"attn_implementation": "eager"}, indent=2, sort_keys=True) + "\n")
