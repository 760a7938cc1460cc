"""Which run a run is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_NAMED = ("task", "model", "seed")


class Baselines:
    """What each run is compared with, of those with the same task, model, seed and setting: the run of one client with the same
    split, as in Hilmkil et al. 2021; else of one client; else the centralised baseline. What a centralised baseline does not
    depend on, it does not have, and so does not differ in.

    Runs are looked up by what they have in common: to go through a table of all rounds for each run takes a time that grows
    with the square of their number.

    Args:
        lines: one line a run, with its columns of `read_runs` that are the same in each of its rounds.
        settings: columns in which runs differ beyond task, model and seed.
    """

    def __init__(self, lines: Iterable[Mapping[str, Any]], settings: Sequence[str]) -> None:
        self._settings = settings
        self._single: dict[tuple[Any, ...], dict[Any, str]] = {}  # of one client: what is alike -> split, or None -> run
        self._pooled: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
        for line in lines:
            if line["kind"] == "centralised":
                self._pooled.setdefault(key_of(line, _NAMED), []).append(line)
            elif line["kind"] == "federated" and line["clients"] == 1:
                runs = self._single.setdefault(key_of(line, [*_NAMED, *settings]), {})
                for split in (None, line["split"]):
                    runs.setdefault(split, line["run"])

    def of(self, line: Mapping[str, Any]) -> str | None:
        """The directory of the run that a run is compared with: its own where it has one client; None where there is none."""
        if line["clients"] == 1 and line["kind"] == "federated":
            return str(line["run"])
        runs = self._single.get(key_of(line, [*_NAMED, *self._settings]))
        return self.pooled(line) if runs is None else runs.get(line["split"], runs[None])

    def pooled(self, line: Mapping[str, Any]) -> str | None:
        """The directory of the centralised baseline of a run; None where there is none."""
        wanted = key_of(line, self._settings)
        for one in self._pooled.get(key_of(line, _NAMED), []):
            if all(has in (None, value) for has, value in zip(key_of(one, self._settings), wanted, strict=True)):
                return str(one["run"])
        return None


def key_of(line: Mapping[str, Any], columns: Sequence[str]) -> tuple[Any, ...]:
    """The values in some columns, None where one is missing."""
    return tuple(None if line[name] is None or line[name] != line[name] else line[name] for name in columns)
