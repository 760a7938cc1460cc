"""A run that is opened again: its module with the weights of a round, tokenizer, data and records."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from fedtune.data.classification import FederatedDataModule
from fedtune.errors import RunError, UsageError, one_of, shown
from fedtune.files import present, regular, said
from fedtune.models import FAMILIES, build_causal_lm, build_classifier
from fedtune.models.module import PretrainedModule
from fedtune.models.pretrained import content_of, load_config, load_tokenizer
from fedtune.runs import building
from fedtune.runs.card import summary_of
from fedtune.runs.client_models import own_weights
from fedtune.runs.own import import_modules
from fedtune.storage import checkpoint, start
from fedtune.storage.config import read_config
from fedtune.storage.records import RoundRecord, read_rounds
from fedtune.storage.summary import MODES
from fedtune.tensors import Tensors, assign_, carried, digest, misfit, resting, travelling, without

WHICH = ("last", "best")
_BEST = "best.safetensors"  # what the callback `BestWeights` keeps


@dataclass(frozen=True)
class LoadedRun:
    """A run that was opened again.

    Args:
        module: with the weights of a round, in evaluation mode, on the CPU.
        tokenizer: of the texts; None where the data are of a class of one's own.
        data: a `FederatedDataModule` as the run had it. Nothing of it is read before it is used: only then it says what is not
            there any more. None where the data are of a class of one's own.
        history: the records of all rounds.
        round: the round of the weights.
        config: as config.yaml has it.
    """

    module: Any
    tokenizer: PreTrainedTokenizerBase | None
    data: FederatedDataModule | None
    history: list[RoundRecord]
    round: int
    config: dict[str, Any]


def load(
    run: str | Path,
    which: str = "last",
    module: pl.LightningModule | None = None,
    label_names: Sequence[str] | None = None,
    client: int | None = None,
) -> LoadedRun:
    """Open a run directory: `fedtune.load("runs/first").module` is what the run has trained.

    Args:
        run: directory of a run of any module.
        which: the weights of the "last" round, or of the "best" one by the run's monitor, where they are still there: in a
            checkpoint, or kept by the callback `BestWeights`.
        module: takes the weights; it must be given where the run was begun in Python with a module of one's own class.
        label_names: names of the classes, where the run does not know them.
        client: whose model is meant, where clients have models of their own; else the server's.

    Raises:
        UsageError: no directory of a run, weights that are no longer there or do not fit, a model whose files have changed; a
            client that has no model of its own, or none chosen where the server has no whole model.
        RunError: the run's files are damaged.
    """
    run = Path(os.path.expanduser(run))
    config = run_config(run)
    number, weights = weights_of(run, config, which)
    weights |= own_weights(run, config, number, which, client)
    model, names = config["model"], names_of(config, run, label_names)
    if module is not None:
        fill(module, run, weights, type(module).__name__)
    elif "class" in model:
        raise UsageError("module", None, f"the module that takes the weights, a {shown(model['class'])}, as the run began with")
    elif "class_path" in model:
        module = building.module_of(model, "", names)
        fill(module, run, weights, model["class_path"])
    else:
        module = module_of(run, config, names, weights)
    data = _data_of(config)
    network = module.network if isinstance(module, PretrainedModule) else None
    tokenizer = None if data is None else tokenizer_of(config, network)
    return LoadedRun(module.eval(), tokenizer, data, read_rounds(run / "rounds.jsonl"), number, config)


def run_config(run: Path) -> dict[str, Any]:
    """The configuration of a run; modules of one's own that it names are imported.

    Raises:
        UsageError: no directory of a run, or a module that cannot be imported.
        RunError: the configuration is damaged.
    """
    if not present(run / "config.yaml"):
        raise UsageError("run", str(run), "a directory of a run, with config.yaml (it has none)")
    config = read_config(run / "config.yaml")
    for part in ("model", "data", "loop"):
        if not isinstance(config.get(part), dict):
            raise UsageError("run", str(run), f"a run of a module (its config.yaml has {shown(config.get(part))} for {part})")
    import_modules((config["loop"].get("options") or {}).get("imports", ()), f"{run / 'config.yaml'}: loop.options.imports")
    return config


def _data_of(config: Mapping[str, Any]) -> FederatedDataModule | None:
    """The data as the run had them; nothing of them is read."""
    if "class" in config["data"]:
        return None
    try:
        return FederatedDataModule(**config["data"], model=_tokens_of(config))
    except TypeError as error:
        raise RunError(f"config.yaml says of the data what a FederatedDataModule does not take: {said(error)}") from error


def _tokens_of(config: Mapping[str, Any]) -> str:
    """The model whose tokens the data are."""
    return str(config["model"].get("name") or config["data"].get("tokenizer"))


def names_of(config: Mapping[str, Any], run: Path, given: Sequence[str] | None) -> list[str]:
    """The names of the classes; none of a causal language model, nor of a module of one's own whose data have none.

    Raises:
        UsageError: names are given where there are none, or other ones; nobody knows them.
    """
    known = (config.get("content") or {}).get("label_names")
    if "class" in config["model"] or "class_path" in config["model"]:
        return [str(name) for name in given or known or ()]
    if load_config(config["model"]["name"]).model_type not in FAMILIES:  # a causal language model
        if given is not None:
            raise UsageError("label_names", list(given), "nothing, as a causal language model has no classes")
        return []
    if known is not None and given is not None and list(given) != list(known):
        raise UsageError("label_names", list(given), f"nothing, as the run knows them: {shown(known)}")
    names = known if known is not None else given
    if names is None:
        raise UsageError("label_names", None, f"the names of the classes in their order, which {run} does not know")
    return [str(name) for name in names]


def weights_of(run: Path, config: Mapping[str, Any], which: str) -> tuple[int, Tensors]:
    """The weights of the last or the best round, and their round.

    Raises:
        UsageError: there are none, or they are no longer there.
        RunError: they are damaged.
    """
    if which not in WHICH:
        raise one_of("which", which, WHICH)
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


def module_of(run: Path, config: Mapping[str, Any], names: Sequence[str], weights: Tensors) -> Any:
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
    fill(module, run, weights, f"{name} with {len(names)} classes" if names else name)
    module.hparams.update({one: config["model"][one] for one in ("init", "keep_head", "lora") if one in config["model"]})
    return module.eval()


def fill(module: pl.LightningModule, run: Path, weights: Tensors, name: str) -> None:
    """Give a module the weights of a round, and what does not travel from the start of the run.

    Args:
        name: what a line calls the model.

    Raises:
        UsageError: they do not fit, or the module is not the one that the run began with.
        RunError: the start is damaged.
    """
    digests, kept = start.read(run / "start")
    for one, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and one not in digests)  # the algorithm may have frozen some
    moved = {one: tensor for one, tensor in weights.items() if of_base(one)}
    wrong = misfit({one: tensor for one, tensor in weights.items() if one not in moved}, travelling(module))
    if wrong:
        raise UsageError("run", str(run), f"a run whose weights fit {name} ({wrong})")
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


def of_base(name: str) -> bool:
    """Whether a weight of a checkpoint is one that an adapter is added to."""
    return name.endswith(".base_layer.weight")


def tokenizer_of(config: Mapping[str, Any], network: Any) -> PreTrainedTokenizerBase:
    """The run's tokenizer, as a pipeline must have it for this network."""
    data = config.get("data") or {}
    tokenizer = load_tokenizer(data.get("tokenizer") or _tokens_of(config))
    if data.get("max_length"):
        tokenizer.model_max_length = data["max_length"]  # with truncation=True texts are cut as in the run
    if network is not None and getattr(network.config, "type_vocab_size", 0) < 2:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return tokenizer
