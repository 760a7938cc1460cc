"""Which learning rate of a cell is the best: one rule for tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedtune.reports.settings import CELL, rates

if TYPE_CHECKING:
    from pandas import DataFrame

BEST = "best_rate"  # a column: 1 for the best learning rate of a cell, 0 for others, not known where none is chosen
_SEEDS = ["seed", "other_seeds"]


def marked(runs: DataFrame, other: Sequence[str]) -> DataFrame:
    """The runs with the column `best_rate`.

    Args:
        runs: a row a run: settings, seeds, monitor, mode, part and score.
        other: the settings in which runs differ beyond task, model, split, clients and seed.

    Returns:
        nothing is chosen where no learning rate differs, or on the test part.
    """
    runs = runs.assign(**{BEST: math.nan})
    for group in alike(runs, other):
        best = best_of_rates(group, rates(other), "score")
        if best is not None:
            runs.loc[group.index, BEST] = group.index.isin(best.index).astype(float)
    return runs


def alike(runs: DataFrame, other: Sequence[str]) -> list[DataFrame]:
    """The runs that differ in learning rates and seeds alone, of which one rate may be chosen."""
    chosen = rates(other)
    found = runs[runs.part != "test"] if chosen and len(runs) else runs[:0]
    keys = [*CELL, *(name for name in other if name not in chosen), "monitor", "mode", "part"]
    return [group for _, group in found.groupby(keys, sort=False, dropna=False)] if len(found) else []


def best_of_rates(runs: DataFrame, chosen: Sequence[str], name: str) -> DataFrame | None:
    """Those runs of a cell with the learning rates whose mean over seeds is best; None where nothing is known.

    A rate that failed for some seeds is no better for the seeds that it survived: only the rates with the most seeds are
    compared, on the seeds that they have in common, as one seed may be easier than another; where there are none, on all.
    """
    rate = runs.groupby(list(chosen), sort=False, dropna=False).ngroup()
    seed = runs.groupby(_SEEDS, sort=False, dropna=False).ngroup()
    known = runs[name].notna()
    if not known.any():
        return None
    seeds = seed[known].groupby(rate[known]).nunique()
    most = known & rate.isin(seeds.index[seeds == seeds.max()])
    having = rate[most].groupby(seed[most]).nunique()
    common = most & seed.isin(having.index[having == having.max()]) if having.max() == rate[most].nunique() else most
    means = runs.loc[common, name].groupby(rate[common]).mean()
    return runs[rate == (means.idxmax() if runs["mode"].iloc[0] == "max" else means.idxmin())]
