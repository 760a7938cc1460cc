"""What a run is: its configuration in plain values, and how two of them differ."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.version import __version__

# what may differ between the start of a run and its continuation: no number of a finished round depends on it
_FREE = {"run_dir", "logger"}
_FREE |= {f"loop.{name}" for name in ("max_rounds", "keep", "progress", "baselines", "baseline_dir")}


def describe(module: Any, data: Any, loop: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration of a run, in the words of the command line.

    There the model is named once; so the data's model is only kept, as the tokenizer, where it is another one.
    """
    model, text = config_of(module), config_of(data)
    other = text.pop("model", None)
    if other is not None and other != model.get("name"):
        text["tokenizer"] = text["tokenizer"] or other
    return {"model": model, "data": text, "loop": plain(loop), "content": {"task": getattr(data, "digest", None)}}


def baseline_config(config: Mapping[str, Any], about: Mapping[str, Any], split_matters: bool) -> dict[str, Any]:
    """What the numbers of a baseline depend on: the configuration without how long the run is and where it is kept, without
    the split where texts are pooled, and with what the baseline is `about`."""
    found = {part: dict(options) for part, options in config.items()}
    for key in ("max_rounds", "keep", "progress", "baselines", "baseline_dir"):
        del found["loop"][key]
    for key in () if split_matters else ("num_clients", "split", "skew", "alpha"):
        found["data"].pop(key, None)
    return found | {"baseline": dict(about)}


def config_of(part: Any) -> dict[str, Any]:
    """The configuration of ours as the command line takes it; of another's class its name and hyperparameters."""
    if hasattr(part, "config"):
        return plain(part.config)
    return {"class": type(part).__name__} | plain(dict(getattr(part, "hparams", {})))


def plain(values: Any) -> Any:
    """Values as YAML keeps them: numbers, text, lists and dictionaries; anything else by its name."""
    if isinstance(values, Mapping):
        return {str(key): plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    if isinstance(values, np.generic):
        return values.item()
    return values if isinstance(values, (int, float, str, bool, type(None))) else getattr(values, "__name__", repr(values))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys in which two configurations differ in a way that changes results, as "key: before -> now".

    >>> differences({"data": {"seed": 0}, "loop": {"max_rounds": 2}}, {"data": {"seed": 1}, "loop": {"max_rounds": 4}})
    ['data.seed: 0 -> 1']
    """
    old, new = flat(before), flat(now)
    keys = [key for key in {**old, **new} if key not in _FREE and not key.startswith("versions")]
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]


def fingerprint(config: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that name a configuration."""
    return hashlib.sha256(json.dumps(flat(config), sort_keys=True, default=str).encode()).hexdigest()[:8]


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names.

    >>> flat({"data": {"seed": 0}, "run_dir": None})
    {'data.seed': 0, 'run_dir': None}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
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
