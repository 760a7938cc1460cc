"""A run's model as a Transformers folder, or its adapters as a folder of peft: weights, tokenizer, a card with its numbers."""

from __future__ import annotations

import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedtune.errors import RunError, UsageError, one_of, shown
from fedtune.files import present, regular, said, settled, synchronise, write_text
from fedtune.models import FAMILIES, adapter_files, build_causal_lm, build_classifier
from fedtune.models.adapters import Lora, merge_
from fedtune.models.pretrained import MODELS, content_of, load_config, load_tokenizer, locate
from fedtune.models.weights import quiet
from fedtune.runs.card import card, summary_of
from fedtune.runs.own_models import own_weights
from fedtune.storage import checkpoint, start
from fedtune.storage.config import read_config
from fedtune.storage.records import RoundRecord, read_rounds
from fedtune.storage.summary import MODES
from fedtune.tensors import Tensors, assign_, carried, digest, misfit, resting, travelling, without

WHICH = ("last", "best")
_BEST = "best.safetensors"  # what the callback `BestWeights` keeps


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
    if which not in WHICH:
        raise one_of("which", which, WHICH)
    _check_target(folder)
    config = _config_of(run)
    if merge and config["model"].get("lora") is None:
        raise UsageError("merge", merge, "False, as the run has no adapters")
    names = _names_of(config, run, label_names)
    number, weights = _weights_of(run, config, which)
    weights |= own_weights(run, config, number, which, client)
    module = _module_of(run, config, names, weights)
    base = None if merge or module.hparams["lora"] is None else _base_of(module, weights)
    tokenizer = _tokenizer_of(config, module.network)
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
    moved = next((one for one in weights if _of_base(one)), None)
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


def _of_base(name: str) -> bool:
    """Whether a weight of a checkpoint is one that an adapter is added to."""
    return name.endswith(".base_layer.weight")


def _check_target(folder: Path) -> None:
    try:
        folder.resolve()
        taken = os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))
    except (OSError, ValueError, RuntimeError) as error:  # links that lead to themselves are of the last kind
        raise UsageError("folder", str(folder), f"a directory that can be written ({said(error)})") from error
    if taken:
        raise UsageError("folder", str(folder), "a directory that is empty, or not there yet")


def _config_of(run: Path) -> dict[str, Any]:
    """The configuration of a run of a `TextClassifier`."""
    if not present(run / "config.yaml"):
        raise UsageError("run", str(run), "a directory of a run, with config.yaml (it has none)")
    config = read_config(run / "config.yaml")
    model = config.get("model")
    if not isinstance(model, dict) or "name" not in model or "class" in model:
        what = shown(model.get("class")) if isinstance(model, dict) else "no module"
        raise UsageError("run", str(run), f"a run of a TextClassifier, as Transformers knows its networks (this is of {what})")
    return config


def _names_of(config: Mapping[str, Any], run: Path, given: Sequence[str] | None) -> list[str]:
    if load_config(config["model"]["name"]).model_type not in FAMILIES:  # a causal language model
        if given is not None:
            raise UsageError("label_names", list(given), "nothing, as a causal language model has no classes")
        return []
    known = (config.get("content") or {}).get("label_names")
    if known is not None and given is not None and list(given) != list(known):
        raise UsageError("label_names", list(given), f"nothing, as the run knows them: {shown(known)}")
    names = known if known is not None else given
    if names is None:
        raise UsageError("label_names", None, f"the names of the classes in their order, which {run} does not know")
    return [str(name) for name in names]


def _weights_of(run: Path, config: Mapping[str, Any], which: str) -> tuple[int, Tensors]:
    """The travelling weights that are asked for, and their round."""
    if which == "last":
        state = checkpoint.latest(run / "checkpoints")
        if state is None:
            raise UsageError("run", str(run), "a run with a complete round")
        ended = summary_of(run).get("rounds")
        if type(ended) is int and state.round != ended:
            there = f"whose weights are missing or damaged; the last ones are of round {state.round}"
            raise RunError(f"{run} ended with round {ended}, {there}")
        return state.round, state.weights
    loop = config.get("loop") or {}
    monitor = loop.get("monitor", "accuracy")
    known = [one for one in read_rounds(run / "rounds.jsonl") if math.isfinite(one.metrics.get(monitor, math.nan))]
    if not known:
        raise UsageError("which", which, f"last, as no round of the run has {monitor}")
    best: RoundRecord = MODES[loop.get("mode", "max")](known, key=lambda record: record.metrics[monitor])
    kept = checkpoint.rounds(run / "checkpoints")
    if best.round in kept:
        return best.round, checkpoint.load(run / "checkpoints" / f"round-{best.round:04d}").weights
    found = _kept_best(run / _BEST)
    if found is not None and found[0] == best.round:
        return found
    allowed = (
        f"last: the weights of round {best.round}, the best by {monitor}, are not kept (those of rounds "
        f"{', '.join(map(str, kept))} are); loop.options.keep, or the callback BestWeights, keeps them"
    )
    raise UsageError("which", which, allowed)


def _kept_best(file: Path) -> tuple[int, Tensors] | None:
    if not present(file):
        return None
    try:
        regular(file)
        with safe_open(file, framework="pt") as stream:
            number = int((stream.metadata() or {})["round"])
            return number, {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - it is no dictionary
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RunError(f"{file} cannot be read: {type(error).__name__}: {said(error)}") from error


def _module_of(run: Path, config: Mapping[str, Any], names: Sequence[str], weights: Tensors) -> Any:
    """The run's module with these weights; what does not travel is what the run began with."""
    options = dict(config["model"])
    name = options.pop("name")
    if options.get("lora") is not None:
        options["lora"] = {**options["lora"], "adapter": None}  # what it began with is in start/
    before = (config.get("content") or {}).get("model") or {}
    now = content_of(name) if options.get("init", "pretrained") == "pretrained" else {}
    for file in ("config.json", "tokenizer_config.json"):
        if before.get(file) != now.get(file):
            raise UsageError("run", str(run), f"a run whose model, {name}, has the {file} that it had then")
    digests, kept = start.read(run / "start")
    if digests.keys() <= kept.keys():  # nothing is needed of the weights in the model's files
        options |= {"init": "random"} | ({"keep_head": False} if names else {})
    module = build_classifier(name, len(names), label_names=names, **options) if names else build_causal_lm(name, **options)
    for one, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and one not in digests)  # the algorithm may have frozen some
    moved = {one: tensor for one, tensor in weights.items() if _of_base(one)}
    wrong = misfit({one: tensor for one, tensor in weights.items() if one not in moved}, travelling(module))
    if wrong:
        of_classes = f" with {len(names)} classes" if names else ""
        raise UsageError("run", str(run), f"a run whose weights fit {name}{of_classes} ({wrong})")
    still, base = without(resting(module), moved), carried(module, moved)
    for one in sorted(still.keys() ^ digests.keys()):
        raise UsageError("run", str(run), f"a run with the frozen parameters that its configuration says ({one} differs)")
    mine = {one: still[one] for one in kept}
    wrong = misfit(kept, mine)
    if wrong:
        raise UsageError("run", str(run), f"a run whose frozen parameters fit {name} ({wrong})")
    assign_(mine, kept)
    changed = next((one for one, tensor in still.items() if digest({one: tensor}) != digests[one]), None)
    if changed is not None:
        raise UsageError("run", str(run), f"a run whose model, {name}, has the files that it had then; {changed} is another")
    wrong = misfit(moved, {one: base[one] for one in moved if one in base})
    if wrong:
        raise UsageError("run", str(run), f"a run whose weights fit the base of {name} ({wrong})")
    assign_(base, weights)
    return module.eval()


def _tokenizer_of(config: Mapping[str, Any], network: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The run's tokenizer, as a pipeline must have it for this network."""
    data = config.get("data") or {}
    tokenizer = load_tokenizer(data.get("tokenizer") or config["model"]["name"])
    if data.get("max_length"):
        tokenizer.model_max_length = data["max_length"]  # with truncation=True texts are cut as in the run
    if getattr(network.config, "type_vocab_size", 0) < 2:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return tokenizer


def _complete_config(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    write_text(file, json.dumps(content | {"attn_implementation": "eager"}, indent=2, sort_keys=True) + "\n")
