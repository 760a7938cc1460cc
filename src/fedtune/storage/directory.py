"""A run directory: the configuration it belongs to, its records, its checkpoints, its summary. Or nothing at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.errors import RunError, UsageError, shown, warn
from fedtune.federated.memory import ClientMemory, MemoryInRam, MemoryOnDisk
from fedtune.federated.ranks import ALONE, Ranks
from fedtune.federated.state import ServerState
from fedtune.files import (
    append_line,
    clear,
    content,
    finite,
    free_name,
    parsed_lines,
    present,
    put_aside,
    read_object,
    replaced,
    said,
    write_lines,
    write_text,
)
from fedtune.storage import checkpoint, start
from fedtune.storage.config import differences, read_config, versions
from fedtune.storage.lines import FORMS
from fedtune.storage.records import RoundRecord, read_rounds
from fedtune.tensors import Tensors
from fedtune.yaml_files import dump

_ONLY_HERE = ("callbacks.jsonl",)  # what its lines say is in no other file


class RunDirectory:
    """Where one run is kept; with `path` None everything stays in memory.

    Args:
        path: the directory; made when it does not exist.
        config: the resolved configuration, nested dictionaries of plain values.
        keep: checkpoints that stay.
        num_clients: clients that may have something to remember, in `memory`.
        ranks: the processes of the run. Rank 0 alone writes; with the others each keeps what its own clients remember.
        memory: what they remember, where it is not kept here.
        most: rounds that the run is to have; None where the directory cannot have more.

    Nothing that is in the directory is rewritten before `take`, so that a command that is refused leaves it as it was.

    Raises:
        UsageError: the directory cannot be written, belongs to a run of another configuration, or has more rounds.
    """

    def __init__(
        self,
        path: Path | None,
        config: Mapping[str, Any],
        keep: int,
        num_clients: int = 0,
        ranks: Ranks = ALONE,
        memory: ClientMemory | None = None,
        most: int | None = None,
    ) -> None:
        self._leads, self.keep, self._config = ranks.leads, keep, config
        here = MemoryInRam(ranks) if path is None else MemoryOnDisk(path / "clients", num_clients, ranks)
        self.memory: ClientMemory = memory or here
        path = self.path = path if ranks.leads else None
        self._start: list[ServerState] = []
        self._again, self._done = "baseline" in config, 0  # whether all can be made anew; complete rounds that were found
        if path is None:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            for folder in (path, path / "start"):
                clear(folder)
            self._check(path / "config.yaml", most)
        except OSError as error:
            raise UsageError("run_dir", str(path), f"a directory that can be written ({error.strerror})") from error

    def take(self, done: Sequence[RoundRecord] = ()) -> None:
        """Make the directory that of a command that nothing refuses any more: its configuration, its number of checkpoints.

        Args:
            done: the rounds that are complete.

        Raises:
            RunError: it cannot be written.
        """
        if self.path is None:
            return
        if done:  # the last round's end, which a kill may have cut short
            self._tidy(self.path / "checkpoints", done[-1].round, done[-1].cohort)
        with writing(self.path / "config.yaml"):
            write_text(self.path / "config.yaml", dump({**self._config, "versions": versions()}))

    def begin(self, state: ServerState, again: int, resting: Tensors, from_files: Collection[str] = ()) -> None:
        """Keep what the run begins with, on the disk where there is a directory; an earlier start's stays, and is taken up.

        Args:
            again: how many times `start` will be asked beside the first. In memory this costs a copy of the weights.
            resting, from_files: as in `storage.start`.
        """
        if self.path is None:
            self._start = [state] * (1 + again) * self._leads
            return
        kept = self.path / "start"
        if not checkpoint.rounds(kept) and (self._leftovers() or checkpoint.rounds(self.path / "checkpoints")):
            raise RunError(
                f"{kept} is missing, with the weights that the run began with, and its frozen ones; put it back, or start "
                "again in a new run directory"
            )
        if not checkpoint.rounds(kept):  # nothing is done here yet; what a run begins with is never without its configuration
            self.take()
        try:
            start.begin(kept, state, resting, from_files)
        except RunError as error:
            if self._leftovers() or checkpoint.rounds(self.path / "checkpoints") or not os.path.lexists(kept):
                raise
            self._put_aside([kept], error)  # no round is complete, so it can be made anew
            start.begin(kept, state, resting, from_files)

    def start(self) -> ServerState:
        """The state that the run began with."""
        found = self._start.pop() if self.path is None else checkpoint.latest(self.path / "start")
        if found is None:
            raise RunError(f"{self.path} lost the weights it began with (start/)")
        return found

    def resume(self) -> tuple[ServerState | None, list[RoundRecord]]:
        """The state after the last complete round and the records up to it; a later, unfinished round is dropped.

        A baseline that is damaged begins anew, and what there was is put aside.

        Raises:
            RunError: a file is damaged, or cannot be seen.
        """
        if self.path is None:
            return None, []
        try:
            return self._resume(self.path)
        except RunError as error:
            if not self._again:
                raise
            names = ("checkpoints", "rounds.jsonl")
            self._put_aside([self.path / name for name in names if os.path.lexists(self.path / name)], error)
            return self._resume(self.path)

    def _resume(self, path: Path) -> tuple[ServerState | None, list[RoundRecord]]:
        folder, file = path / "checkpoints", path / "rounds.jsonl"
        state = checkpoint.latest(folder)
        number = state.round if state else 0
        found = len(parsed_lines(file))
        if state is None and (found > 1 or self._leftovers() or (found and not checkpoint.begun(folder))):
            raise RunError(
                f"{folder} has no checkpoint, but other files of the run have complete rounds; put it back (is its disk "
                "mounted?), or start again in a new run directory"
            )
        done = read_rounds(file, number)
        self._done = number
        self.memory.expect(checkpoint.clients(folder, number) if state else {})
        if found > number + 1:  # a crash leaves one at most
            place = _copied(file)
            said_now = f"{file}: rounds {number + 1} to {found} have no checkpoint and are done again"
            warn(f"{said_now}; what it said of them is kept in {place.name}")
        self.memory.rewind(number)
        self.rewrite(file.name, [record.to_dict() for record in done])
        return state, done

    def _tidy(self, folder: Path, round: int, clients: Iterable[int]) -> None:
        """Drop old checkpoints, and what these clients remember for them alone."""
        checkpoint.drop(folder, round, self.keep)
        self.memory.prune(min(round - self.keep + 1, checkpoint.rounds(folder)[0]), clients)

    def _leftovers(self) -> bool:
        """Whether there is what a run writes only when a round is complete."""
        known = self.path is not None and len(parsed_lines(self.path / "callbacks.jsonl")) > 0
        return known or bool(self.read_json("summary.json").get("rounds"))

    def complete(self, record: RoundRecord, state: ServerState) -> None:
        """Keep a finished round: its record, then the name of its checkpoint, which is what makes it count."""
        newest = self.memory.completed(state.round, record.cohort)
        if not self._leads:
            return
        if self.path is None:
            self.memory.prune(state.round, record.cohort)
            return
        folder = self.path / "checkpoints"
        with checkpoint.saving(folder, state, self.keep, newest):
            self.append("rounds.jsonl", record.to_dict())
        self._tidy(folder, state.round, record.cohort)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file of the run, at once."""
        if self.path is not None:
            with writing(self.path / name):
                write_text(self.path / name, json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; nothing where it is not there, or damaged, as the run makes it anew and says so."""
        try:
            return {} if self.path is None or not present(self.path / name) else read_object(self.path / name)
        except RunError as error:
            warn(f"{error}; it is made anew")
            return {}

    def read(self, name: str, key: str, wanted: Iterable[int]) -> list[dict[str, Any]]:
        """The records of a JSON-lines file of the run, in which `key` has the wanted numbers, in their order.

        A line that a crash left unfinished, and all from the first on that is no such record, are removed from the file; what
        they said is found again. Where that is more than an unfinished line, a warning says so.

        Raises:
            RunError: a line is no such record, and nothing can say again what it said.
        """
        if self.path is None:
            return []
        file, good = self.path / name, []
        if not present(file):
            if name in _ONLY_HERE and self._done > 1 and not self._again:
                warn(f"{file} is missing: callbacks begin after round {self._done} as if they knew nothing")
            return []
        found = parsed_lines(file)
        for one, number in zip(found, wanted, strict=False):
            if not isinstance(one, dict) or isinstance(one.get(key), bool) or one.get(key) != number:
                break
            if name in FORMS and not FORMS[name](one):
                break
            good.append(one)
        if len(good) < len(found):
            damaged = f"{file}, line {len(good) + 1} is damaged"
            if name in _ONLY_HERE:
                raise RunError(
                    f"{damaged}: {shown(found[len(good)])}; remove the file to go on with callbacks that know nothing"
                )
            warn(f"{damaged}; from there on it is made anew")
        if name in _ONLY_HERE and len(good) < self._done - 1:  # a crash loses one at most
            raise RunError(
                f"{file} has {len(good)} of {self._done} rounds; remove the file to go on with callbacks that know nothing"
            )
        self.rewrite(name, good)
        return good

    def rewrite(self, name: str, records: list[dict[str, Any]]) -> None:
        """Replace a JSON-lines file of the run."""
        if self.path is not None and (records or os.path.lexists(self.path / name)):
            with writing(self.path / name):
                write_lines(self.path / name, records)

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a record to a JSON-lines file of the run."""
        if self.path is not None:
            with writing(self.path / name):
                append_line(self.path / name, record)

    def _put_aside(self, paths: Iterable[Path], why: RunError) -> None:
        """Make room for what can be made anew, and say so."""
        for path in paths:
            with writing(path):
                place = put_aside(path, "damaged")
            warn(f"{why}; it is made anew, and {path.name} is kept as {place.name}")

    def _before(self, file: Path) -> dict[str, Any] | None:
        """The configuration of the run that is here, if one is.

        Raises:
            RunError: it is damaged, or missing beside complete rounds. That of a baseline is made anew.
        """
        try:
            if present(file):
                return read_config(file)
        except RunError as error:
            if not self._again:
                raise
            self._put_aside([file], error)
        if not self._again and checkpoint.rounds(file.parent / "checkpoints"):
            raise RunError(
                f"{file} is missing, so nobody knows of what the rounds here are; put it back, or take a new run_dir"
            )
        return None

    def _check(self, file: Path, most: int | None) -> None:
        """Refuse a run of another configuration, or of fewer rounds."""
        before = self._before(file)
        different = [] if before is None else differences(before, self._config)
        if different:
            allowed = f"a new directory, or the configuration of the run in it, which differs in {'; '.join(different)}"
            raise UsageError("run_dir", str(self.path), allowed)
        done = max(checkpoint.rounds(file.parent / "checkpoints"), default=0)
        if most is not None and done > most:
            raise UsageError("max_rounds", most, f"{done} or more, the rounds that {self.path} has")


def _copied(file: Path) -> Path:
    """A copy of a file under a new name beside it."""
    with writing(file):
        place = free_name(file, "before")
        with replaced(place) as temporary:
            temporary.write_bytes(content(file))
    return place


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Inside the block an error of the disk becomes a `RunError` about the file."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{file} could not be written ({said(error)}); every complete round is kept") from error
