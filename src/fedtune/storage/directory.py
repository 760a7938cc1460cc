"""A run directory: the configuration it belongs to, its records, its checkpoints, its summary. Or nothing at all."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from fedtune.errors import RunError, UsageError
from fedtune.federated.memory import ClientMemory, MemoryInRam, MemoryOnDisk
from fedtune.federated.state import ServerState
from fedtune.files import append_line, finite, read_lines, write_lines, write_text
from fedtune.storage import checkpoint, start
from fedtune.storage.config import differences, versions
from fedtune.storage.records import RoundRecord, read_rounds
from fedtune.tensors import Tensors


class RunDirectory:
    """Where one run is kept; with `path` None everything stays in memory.

    Args:
        path: the directory; made when it does not exist.
        config: the resolved configuration, nested dictionaries of plain values.
        keep: checkpoints that stay.
        num_clients: clients that may have something to remember, in `memory`.

    Raises:
        UsageError: the directory cannot be written, or belongs to a run of another configuration.
    """

    def __init__(self, path: Path | None, config: Mapping[str, Any], keep: int, num_clients: int = 0) -> None:
        self.path, self.keep = path, keep
        self.memory: ClientMemory = MemoryInRam() if path is None else MemoryOnDisk(path / "clients", num_clients)
        self._start: list[ServerState] = []
        if path is None:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._claim(path / "config.yaml", config)
        except OSError as error:
            raise UsageError("run_dir", str(path), f"a directory that can be written ({error.strerror})") from error

    def begin(self, state: ServerState, again: bool, resting: Tensors, from_files: Collection[str] = ()) -> None:
        """Keep what the run begins with, on the disk where there is a directory; an earlier start's stays, and is taken up.

        Args:
            again: whether `start` will be asked more than once. In memory this costs a copy of the weights.
            resting, from_files: as in `storage.start`.
        """
        if self.path is None:
            self._start = [state] * (1 + again)
        else:
            start.begin(self.path / "start", state, resting, from_files)

    def start(self) -> ServerState:
        """The state that the run began with."""
        found = self._start.pop() if self.path is None else checkpoint.latest(self.path / "start")
        if found is None:
            raise RunError(f"{self.path} lost the weights it began with (start/)")
        return found

    def resume(self) -> tuple[ServerState | None, list[RoundRecord]]:
        """The state after the last complete round and the records up to it; a later, unfinished round is dropped."""
        if self.path is None:
            return None, []
        state = checkpoint.latest(self.path / "checkpoints")
        self.memory.rewind(state.round if state else 0)
        done = read_rounds(self.path / "rounds.jsonl", state.round if state else 0)
        if (self.path / "rounds.jsonl").exists():
            with writing(self.path / "rounds.jsonl"):
                write_lines(self.path / "rounds.jsonl", [record.to_dict() for record in done])
        return state, done

    def complete(self, record: RoundRecord, state: ServerState) -> None:
        """Keep a finished round: first its record, then its checkpoint, which is what makes it count."""
        self.append("rounds.jsonl", record.to_dict())
        oldest = state.round
        if self.path is not None:
            checkpoint.save(self.path / "checkpoints", state, self.keep)
            oldest = checkpoint.rounds(self.path / "checkpoints")[0]
        self.memory.prune(oldest, record.cohort)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file of the run, at once."""
        if self.path is not None:
            with writing(self.path / name):
                write_text(self.path / name, json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; nothing where it is not there, or damaged, as the run makes it anew."""
        try:
            found = json.loads((self.path / name).read_text(encoding="utf-8")) if self.path is not None else {}
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def read(self, name: str, key: str, wanted: Iterable[int]) -> list[dict[str, Any]]:
        """The records of a JSON-lines file of the run, in which `key` has the wanted numbers, in their order.

        A line that a crash left unfinished, and all from the first on that is no such record, are removed from the file; what
        they said is found again. Where that is more than an unfinished line, a warning says so.
        """
        if self.path is None or not (self.path / name).exists():
            return []
        found = read_lines(self.path / name)
        good = []
        for one, number in zip(found, wanted, strict=False):
            if not isinstance(one, dict) or one.get(key) != number:
                break
            good.append(one)
        if len(good) < len(found):
            warnings.warn(f"{self.path / name}, line {len(good) + 1} is damaged; from there on it is made anew", stacklevel=2)
        self.rewrite(name, good)
        return good

    def rewrite(self, name: str, records: list[dict[str, Any]]) -> None:
        """Replace a JSON-lines file of the run."""
        if self.path is not None and (records or (self.path / name).exists()):
            with writing(self.path / name):
                write_lines(self.path / name, records)

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a record to a JSON-lines file of the run."""
        if self.path is not None:
            with writing(self.path / name):
                append_line(self.path / name, record)

    def _claim(self, file: Path, config: Mapping[str, Any]) -> None:
        if file.exists():
            before = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            different = differences(before, config)
            if different:
                allowed = f"a new directory, or the configuration of the run in it, which differs in {'; '.join(different)}"
                raise UsageError("run_dir", str(self.path), allowed)
        text = yaml.safe_dump({**config, "versions": versions()}, sort_keys=False, allow_unicode=True)
        write_text(file, text)


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Inside the block an error of the disk becomes a `RunError` about the file."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{file} could not be written ({error}); every complete round is kept") from error
