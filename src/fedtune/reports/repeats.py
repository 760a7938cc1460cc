"""Runs that are there more than once, as copies of a directory are: each seed counts once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune.errors import warn
from fedtune.files import printable
from fedtune.reports.baselines import key_of
from fedtune.reports.settings import CELL, settings

if TYPE_CHECKING:
    from pandas import DataFrame

_FIRST = 5  # runs that a line names


def repeats(rounds: DataFrame) -> dict[str, str]:
    """The runs that count for nothing, as another one has the same settings and the same seeds.

    Args:
        rounds: as from `read_runs`.

    Returns:
        directory -> the run that counts, which is the first of those that are alike; of federated runs with all their rounds.
    """
    runs = rounds[(rounds.kind == "federated") & rounds.complete].drop_duplicates("run")
    columns = [*CELL, *settings(rounds), "monitor", "mode", "part", "seed", "other_seeds"]
    first: dict[object, str] = {}
    found = {}
    for line in runs[["run", *columns]].to_dict("records"):
        counted = first.setdefault(key_of(line, columns), line["run"])
        if counted != line["run"]:
            found[line["run"]] = counted
    return found


def each_once(rounds: DataFrame) -> DataFrame:
    """The rounds without those of runs that are there already; a warning names these runs."""
    found = repeats(rounds)
    if found:
        some = ", ".join(f"{printable(run)} (as {printable(counted)})" for run, counted in list(found.items())[:_FIRST])
        more = f" and {len(found) - _FIRST} more" * (len(found) > _FIRST)
        warn(f"left out, as they have the settings and the seed of another run, and a seed counts once: {some}{more}")
    return without(rounds, found)


def without(rounds: DataFrame, runs: dict[str, str]) -> DataFrame:
    """The rounds of all other runs."""
    return rounds[~rounds.run.isin(runs)]
