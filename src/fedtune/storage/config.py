"""What a run is: its configuration in plain values, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
import numbers
import platform
import subprocess
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedtune.errors import RunError, UsageError, shown
from fedtune.files import content, said
from fedtune.storage.plain import Unnamed, class_of, plain
from fedtune.version import __version__

# how and where a run is kept and shown; no number depends on it
KEPT = {"loop.options.keep", "loop.options.progress", "loop.options.baseline_dir", "loop.monitor", "loop.mode", "loop.runtime"}
KEPT |= {"loop.options.imports"}  # what they register is named where it is used
# what may differ between the start of a run and its continuation: no number of a finished round depends on it
_FREE = {"run_dir", "logger", "loop.max_rounds", "loop.baselines", "loop.options.local_clients"} | KEPT
_FREE |= {"content.label_names", "content.privacy"}  # who exports the run has the names, who reads it what may be said of it
# what the processes of one run may have each for itself
_OF_A_PROCESS = KEPT | {"run_dir", "logger", "content.label_names"}
_DEEPEST = 50  # levels of a configuration

# what runs of earlier versions have not written
_LATER = {"model.from", "data.from", "data.num_clients"}
# what runs of earlier versions did not have, and the value at which it does nothing: there it is left out
NEUTRAL: dict[str, Any] = {
    "loop.faults": [],
    "loop.privacy": None,
    "loop.secure_sums": None,
    "loop.options.on_client_error": "stop",
    "model.lora": None,
    "model.gradient_checkpointing": False,
    "model.half_base": False,
    "model.packing": None,
    "model.exact_match": False,
    "model.class_path": None,
    "model.init_args": None,
    "loop.options.imports": [],
}
AS_GIVEN = "_as_the_command_line_has_it"  # an attribute of a module of another's class that a command has built
_NOT_OF_BASELINES = ("loop.algorithm.", "loop.faults", "loop.privacy", "loop.secure_sums", "loop.options.on_client_error")


def describe(module: Any, data: Any, loop: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration of a run, in the words of the command line.

    There the model is named once; so the data's model is only kept, as the tokenizer, where it is another one.
    """
    model, text = config_of(module), config_of(data)
    if "num_clients" not in text and isinstance(getattr(data, "num_clients", None), numbers.Integral):
        text["num_clients"] = int(data.num_clients)
    other = text.pop("model", None) if hasattr(data, "config") else None
    if other is not None and other != model.get("name"):
        text["tokenizer"] = text["tokenizer"] or other
    content = {"task": getattr(data, "digest", None), "model": dict(getattr(module, "content", {}))}
    names = getattr(data, "label_names", None)
    if names:
        content["label_names"] = plain(names)  # for who exports the run
    return settled({"model": model, "data": text, "loop": plain(loop), "content": content})


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what does nothing."""
    values = dotted(config)
    return without(config, {key for key, value in NEUTRAL.items() if key in values and values[key] == value})


def identified(config: Mapping[str, Any]) -> None:
    """Raise `UsageError` when a value has no name by which another start could know it again."""
    for key, value in dotted(config).items():
        for one in _within(value):
            if isinstance(one, Unnamed):
                allowed = "plain values, or a function or class from the top of a module, where there is a run_dir"
                raise UsageError(key, str(one), allowed)


def _within(value: Any) -> Iterator[Any]:
    """A value, or those in lists and dictionaries."""
    if isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _within(one)
    else:
        yield value


def baseline_config(config: Mapping[str, Any], about: Mapping[str, Any], split_matters: bool) -> dict[str, Any]:
    """What the numbers of a baseline depend on: the configuration without the algorithm, how long the run is and where it is
    kept, without the split where texts are pooled, and with what the baseline is `about`."""
    left_out = {key for key in dotted(config) if key in _FREE or key.startswith(_NOT_OF_BASELINES)}
    left_out |= set() if split_matters else {f"data.{name}" for name in ("num_clients", "split", "skew", "alpha")}
    return without(config, left_out) | {"baseline": dict(about)}


def without(config: Mapping[str, Any], keys: Collection[str], prefix: str = "") -> dict[str, Any]:
    """A configuration without some dotted keys.

    >>> without({"data": {"seed": 0, "task": "imdb"}}, {"data.seed"})
    {'data': {'task': 'imdb'}}
    """
    return {
        key: without(value, keys, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in config.items()
        if f"{prefix}{key}" not in keys
    }


def config_of(part: Any) -> dict[str, Any]:
    """The configuration of ours, or of what a command has built, as the command line takes it; of another's class its name,
    where that is "from", and its hyperparameters (none of which can have such a name)."""
    own = getattr(part, AS_GIVEN, getattr(part, "config", None))
    if isinstance(own, Mapping):
        return plain(own)
    return class_of(part) | plain(dict(getattr(part, "hparams", {})))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys in which two configurations differ in a way that changes results, as "key: before -> now".

    >>> differences({"data": {"seed": 0}, "loop": {"max_rounds": 2}}, {"data": {"seed": 1}, "loop": {"max_rounds": 4}})
    ['data.seed: 0 -> 1']
    """
    old, new = dotted(before), dotted(now)
    unknown = {key for key in _LATER if key not in old}
    keys = [key for key in {**old, **new} if key not in _FREE | unknown and not key.startswith("versions")]
    changed = [key for key in keys if _written(old.get(key)) != _written(new.get(key))]
    return [f"{key}: {shown(old.get(key))} -> {shown(new.get(key))}" for key in changed]


def comparable(config: Mapping[str, Any]) -> dict[str, str]:
    """What must be the same in all processes of a run, by name; not what has no name but an address.

    >>> comparable({"run_dir": "here", "loop": {"max_rounds": 2}})
    {'loop.max_rounds': '2'}
    """
    values = {
        key: value for key, value in dotted(config).items() if key not in _OF_A_PROCESS and not key.startswith("versions")
    }
    return {
        key: _written(value) for key, value in values.items() if not any(isinstance(one, Unnamed) for one in _within(value))
    }


def _written(value: Any) -> str:
    """A value with its type: 1, 1.0 and true are three, and no number is itself."""
    return json.dumps(value, sort_keys=True, default=repr)


def read_config(file: Path) -> dict[str, Any]:
    """A configuration that a run has written.

    Raises:
        RunError: the file is damaged.
    """
    try:
        text = content(file).decode("utf-8")
        loader, depth = getattr(yaml, "CSafeLoader", yaml.SafeLoader), 0
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST or isinstance(event, yaml.AliasEvent):
                raise ValueError("it is nested too deeply, or refers to itself, which no run writes")
        found = yaml.load(text, Loader=loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise RunError(f"{file} cannot be read: {said(error)}") from error
    if not isinstance(found, dict) or not found:
        raise RunError(f"{file} has no configuration, but {shown(found)}")
    return found


def fingerprint(config: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that name a configuration."""
    return hashlib.sha256(json.dumps(dotted(config), sort_keys=True, default=str).encode()).hexdigest()[:8]


def dotted(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names.

    >>> dotted({"data": {"seed": 0}, "run_dir": None})
    {'data.seed': 0, 'run_dir': None}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as dictionaries in dictionaries; a text with names below it is the "name" among them.

    Raises:
        UsageError: a value that has names below it.

    >>> nested({"data.task": "imdb", "data.seed": 1, "seed": 2})
    {'data': {'task': 'imdb', 'seed': 1}, 'seed': 2}
    >>> nested({"loop.algorithm.beta": 0.5, "loop.algorithm": "fedavgm"})
    {'loop': {'algorithm': {'name': 'fedavgm', 'beta': 0.5}}}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        place = found
        for part in path:
            below = place.setdefault(part, {})
            if isinstance(below, str):  # a name, and what belongs to it
                below = place[part] = {"name": below}
            if not isinstance(below, dict):
                raise UsageError(f"parameter {name}", value, f"nothing, beside a value for {part}")
            place = below
        if isinstance(place.get(last), dict) and isinstance(value, str):
            value = {"name": value} | place[last]
        place[last] = value
    return found


def versions() -> dict[str, Any]:
    """What the numbers of a run may depend on beside its configuration."""
    import pytorch_lightning
    import torch
    import transformers

    return {
        "fedtune": __version__,
        "torch": str(torch.__version__),  # it is a subclass of str that YAML does not know
        "lightning": pytorch_lightning.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit of the fedtune that runs, where it runs from a checkout."""
    folder = Path(__file__).parent
    try:
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
        tracked = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found if tracked.returncode == 0 else None
