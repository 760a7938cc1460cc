"""Which run a run is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

_NAMED = ("task", "model", "seed")


def baselines_among(rounds: DataFrame, split: str) -> DataFrame:
    """What runs of a split are compared with, among rounds of one task, model and setting: those of one client with the same
    split, as in Hilmkil et al. 2021; else of one client; else the centralised baseline."""
    single = rounds[(rounds.kind == "federated") & (rounds.clients == 1)]
    for found in (single[single.split == split], single):
        if len(found):
            return found
    return rounds[rounds.kind == "centralised"]


def alike(rounds: DataFrame, row: Any, columns: list[str]) -> DataFrame:
    """The rounds that are equal to a row in some columns. What a centralised baseline does not depend on, it does not have,
    and so does not differ in."""
    from pandas import isna

    same = rounds["round"].notna()
    for column in columns:
        missing = rounds[column].isna()
        same &= missing if isna(row[column]) else (rounds[column] == row[column]) | (missing & (rounds.kind != "federated"))
    return rounds[same]


class Baselines:
    """What each run is compared with, as `baselines_among` has it, of those with the same seed and setting.

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
                self._pooled.setdefault(_key(line, _NAMED), []).append(line)
            elif line["kind"] == "federated" and line["clients"] == 1:
                runs = self._single.setdefault(_key(line, [*_NAMED, *settings]), {})
                for split in (None, line["split"]):
                    runs.setdefault(split, line["run"])

    def of(self, line: Mapping[str, Any]) -> str | None:
        """The directory of the run that a run is compared with: its own where it has one client; None where there is none."""
        if line["clients"] == 1 and line["kind"] == "federated":
            return str(line["run"])
        runs = self._single.get(_key(line, [*_NAMED, *self._settings]))
        return self.pooled(line) if runs is None else runs.get(line["split"], runs[None])

    def pooled(self, line: Mapping[str, Any]) -> str | None:
        """The directory of the centralised baseline of a run; None where there is none."""
        wanted = _key(line, self._settings)
        for one in self._pooled.get(_key(line, _NAMED), []):
            if all(has in (None, value) for has, value in zip(_key(one, self._settings), wanted, strict=True)):
                return str(one["run"])
        return None


def _key(line: Mapping[str, Any], columns: Sequence[str]) -> tuple[Any, ...]:
    """The values in some columns, None where one is missing."""
    return tuple(None if line[name] is None or line[name] != line[name] else line[name] for name in columns)
