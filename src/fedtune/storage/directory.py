"""A run directory: the configuration it belongs to, its records, its checkpoints, its summary. Or nothing at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedtune.errors import RunError, UsageError
from fedtune.federated.agreement import ServerState
from fedtune.runs.callbacks import FederatedCallback
from fedtune.runs.figures import plot_curves
from fedtune.storage import checkpoint, records
from fedtune.storage.records import RoundRecord

# what may differ between the start of a run and its continuation: no number of a finished round depends on it
_FREE = {"run_dir", "logger"}
_FREE |= {f"loop.{name}" for name in ("max_rounds", "keep", "progress", "baselines", "baseline_dir")}


class RunDirectory:
    """Where one run is kept; with `path` None everything stays in memory.

    Args:
        path: the directory; made when it does not exist.
        config: the resolved configuration, nested dictionaries of plain values.
        keep: checkpoints that stay.

    Raises:
        UsageError: the directory cannot be written, or belongs to a run of another configuration.
    """

    def __init__(self, path: Path | None, config: Mapping[str, Any], keep: int) -> None:
        self.path, self.keep = path, keep
        self._start: list[ServerState] = []
        if path is None:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._claim(path / "config.yaml", config)
        except OSError as error:
            raise UsageError("run_dir", str(path), f"a directory that can be written ({error.strerror})") from error

    def begin(self, state: ServerState, again: bool) -> None:
        """Keep the state that the run begins with, on the disk where there is a directory, unless an earlier start did so.

        Args:
            again: whether `start` will be asked more than once. In memory this costs a copy of the weights.
        """
        if self.path is None:
            self._start = [state] * (1 + again)
        elif checkpoint.latest(self.path / "start") is None:
            checkpoint.save(self.path / "start", state, keep=1)

    def start(self) -> ServerState:
        """The state that the run began with."""
        found = self._start.pop() if self.path is None else checkpoint.latest(self.path / "start")
        if found is None:
            raise RunError(f"{self.path} lost the weights it began with (start/)")
        return found

    def draw(self, curves: Mapping[str, Sequence[RoundRecord]], levels: Mapping[str, float], part: str) -> None:
        """Draw curves.png."""
        if self.path is not None:
            with _disk(self.path / "curves.png"):
                plot_curves(curves, self.path / "curves.png", levels, title=f"{self.path.name}: {part} part")

    def resume(self) -> tuple[ServerState | None, list[RoundRecord]]:
        """The state after the last complete round and the records up to it; a later, unfinished round is dropped."""
        if self.path is None:
            return None, []
        state = checkpoint.latest(self.path / "checkpoints")
        done = [record for record in records.read_rounds(self.path / "rounds.jsonl") if state and record.round <= state.round]
        if state and len(done) < state.round:
            raise RunError(f"{self.path / 'rounds.jsonl'} lacks rounds up to {state.round}; it has {len(done)}")
        if (self.path / "rounds.jsonl").exists():
            with _disk(self.path / "rounds.jsonl"):
                records.rewrite(self.path / "rounds.jsonl", [record.to_dict() for record in done])
        return state, done

    def complete(self, record: RoundRecord, state: ServerState) -> None:
        """Keep a finished round: first its record, then its checkpoint, which is what makes it count."""
        self.append("rounds.jsonl", record.to_dict())
        if self.path is not None:
            checkpoint.save(self.path / "checkpoints", state, self.keep)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file of the run, at once."""
        if self.path is not None:
            with _disk(self.path / name):
                checkpoint.write_text(self.path / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def read(self, name: str) -> list[dict[str, Any]]:
        """The records of a JSON-lines file of the run; a line that a crash left unfinished is removed from it."""
        if self.path is None or not (self.path / name).exists():
            return []
        found = records.read(self.path / name)
        with _disk(self.path / name):
            records.rewrite(self.path / name, found)
        return found

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a record to a JSON-lines file of the run."""
        if self.path is not None:
            with _disk(self.path / name):
                records.append(self.path / name, record)

    def _claim(self, file: Path, config: Mapping[str, Any]) -> None:
        if file.exists():
            before = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            different = differences(before, config)
            if different:
                allowed = f"a new directory, or the configuration of the run in it, which differs in {'; '.join(different)}"
                raise UsageError("run_dir", str(self.path), allowed)
        text = yaml.safe_dump({**config, "versions": versions()}, sort_keys=False, allow_unicode=True)
        checkpoint.write_text(file, text)


@dataclass
class Course:
    """A sequence of rounds: where it is kept, how long it is, its records so far, and who is told."""

    run: RunDirectory
    rounds: int
    history: list[RoundRecord]
    hooks: Sequence[FederatedCallback] = ()


@contextlib.contextmanager
def _disk(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{file} could not be written ({error}); every complete round is kept") from error


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

    import fedtune

    return {
        "fedtune": fedtune.__version__,
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
