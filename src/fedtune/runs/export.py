"""A run's model as a Transformers folder: configuration, tokenizer, weights, and a short card with the run's numbers."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedtune.errors import RunError, UsageError, one_of, shown
from fedtune.files import content, present, regular, said, settled, synchronise, write_text
from fedtune.models import build_classifier
from fedtune.models.pretrained import content_of, load_tokenizer
from fedtune.models.weights import quiet
from fedtune.storage import checkpoint, start
from fedtune.storage.config import read_config
from fedtune.storage.records import RoundRecord, read_rounds
from fedtune.storage.summary import MODES
from fedtune.tensors import Tensors, assign_, digest, misfit, resting, travelling

WHICH = ("last", "best")
_BEST = "best.safetensors"  # what the callback `BestWeights` keeps


def export(run: str | Path, folder: str | Path, which: str = "last", label_names: Sequence[str] | None = None) -> Path:
    """Write the model of a run as a folder that Transformers opens, with the same logits as the run's module.

    The folder is whole or not there. Attention is computed as in the run on a CPU ("eager", in config.json); another way, which
    differs by rounding, is an argument of `from_pretrained`: attn_implementation="sdpa".

    Args:
        run: directory of a run of a `TextClassifier`.
        folder: where the model goes: absent or empty.
        which: the weights of the "last" round, which the test metrics are of, or those of the "best" round by the run's
            monitor, where they are still there: in a checkpoint, or kept by the callback `BestWeights`.
        label_names: names of the classes, where the run does not know them.

    Returns:
        the folder.

    Raises:
        UsageError: no directory of such a run, weights that are no longer there, a folder that is not empty or cannot be
            written, a model whose files have changed since.
        RunError: the run's files are damaged.
    """
    run, folder = (Path(os.path.expanduser(one)) for one in (run, folder))
    if which not in WHICH:
        raise one_of("which", which, WHICH)
    _check_target(folder)
    config = _config_of(run)
    names = _names_of(config, run, label_names)
    number, weights = _weights_of(run, config, which)
    network = _module_of(run, config, names, weights).network
    tokenizer = _tokenizer_of(config, network)
    card = _card(run, config, names, number, which)
    try:
        _write(folder.resolve(), network, tokenizer, card)
    except (OSError, SafetensorError) as error:
        raise UsageError("folder", str(folder), f"a directory that can be written ({error})") from error
    return folder


def _write(folder: Path, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
    """Write the files under another name, and rename the whole."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        with quiet():
            network.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _complete_config(temporary / "config.json")
        write_text(temporary / "README.md", card)
        settled(temporary)
        os.replace(temporary, folder)
        synchronise(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
        ended = _summary_of(run).get("rounds")
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
    before = (config.get("content") or {}).get("model") or {}
    now = content_of(name) if before else {}
    for file in ("config.json", "tokenizer_config.json"):
        if before.get(file) != now.get(file):
            raise UsageError("run", str(run), f"a run whose model, {name}, has the {file} that it had then")
    digests, kept = start.read(run / "start")
    if digests.keys() <= kept.keys():  # nothing is needed of the weights in the model's files
        options |= {"init": "random", "keep_head": False}
    module = build_classifier(name, len(names), label_names=list(names), **options)
    wrong = misfit(weights, travelling(module))
    if wrong:
        raise UsageError("run", str(run), f"a run whose weights fit {name} with {len(names)} classes ({wrong})")
    still = resting(module)
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
    assign_(travelling(module), weights)
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


def _card(run: Path, config: Mapping[str, Any], names: Sequence[str], number: int, which: str) -> str:
    """What the model is, and the run's numbers."""
    data, loop, versions = (config.get(part) or {} for part in ("data", "loop", "versions"))
    lines = [
        f"Trained by fedtune {versions.get('fedtune')} from `{config['model']['name']}` on the task `{data.get('task')}`, "
        f"divided among {data.get('num_clients')} clients (split `{data.get('split')}`). "
        f"The weights are those after round {number}, the {which} one.",
        f"Classes: {', '.join(names)}. Texts were cut at {data.get('max_length')} tokens.",
    ]
    if data.get("mask") is False:
        lines.append("It was trained without an attention mask: in the run's own evaluation padding was attended to.")
    record, summary = read_rounds(run / "rounds.jsonl", number)[-1], _summary_of(run)
    final = summary if summary.get("rounds") == number else {}  # its test metrics are of the last round
    rows = [("metric", f"{loop.get('evaluate_on')} part", "test part"), ("---", "---", "---")]
    rows += [(name, _shown(value), _shown(final.get(name))) for name, value in record.metrics.items()]
    lines.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    head = "---\nlibrary_name: transformers\npipeline_tag: text-classification\n---\n"
    return head + f"\n# {data.get('task')}: a run of fedtune\n\n" + "\n\n".join(lines) + "\n"


def _summary_of(run: Path) -> dict[str, Any]:
    try:
        found = json.loads(content(run / "summary.json"))
    except (OSError, ValueError, RecursionError):  # a run that goes on
        return {}
    return found if isinstance(found, dict) else {}


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else ""
