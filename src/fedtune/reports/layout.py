"""Which curve goes into which panel, and by what it is known: one arrangement for pictures and page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedtune.reports.best import best_of_rates
from fedtune.reports.settings import order, settings, short_names, shown_setting

if TYPE_CHECKING:
    from pandas import DataFrame

MOST_LINES = 8  # in a panel; more cannot be told apart
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Layout:
    """The arrangement of one task.

    Args:
        columns, rows: names of the columns of `read_runs` whose values choose a panel.
        lines: those whose values tell the curves of a panel apart.
        labels: name -> what a reader is told.
        baseline: whether runs with one client are a baseline, and no curves of their own.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    lines: tuple[str, ...]
    labels: Mapping[str, str]
    baseline: bool

    def curves(self, runs: DataFrame) -> DataFrame:
        """Those rows of a task that are curves, and no baselines."""
        federated = runs[runs.kind == "federated"]
        return federated[federated.clients > 1] if self.baseline else federated

    def name(self, keys: Sequence[str], values: Sequence[Any]) -> str:
        """Some values, each so that it says what it is; not those that are missing.

        >>> Layout((), (), (), {"model.lr": "rate"}, True).name(["clients", "model.lr"], [4, 0.1])
        '4 clients, rate 0.1'
        """
        known = [(key, value) for key, value in zip(keys, values, strict=True) if value is not None and value == value]
        return ", ".join(self._value(key, value) for key, value in known)

    def _value(self, key: str, value: Any) -> str:
        shown = shown_setting(value)
        if key == "clients":
            return "one client" if shown == "1" else f"{shown} clients"
        return shown if key in ("model", "split") else f"{self.labels.get(key, key)} {shown}"


def layout_of(runs: DataFrame) -> Layout:
    """The arrangement of the rounds of one task: a column a model, a row a split and what else would make too many lines."""
    other = settings(runs)
    federated = runs[runs.kind == "federated"]
    baseline = bool((federated.clients > 1).any())
    curves = (federated[federated.clients > 1] if baseline else federated).drop_duplicates("run")
    varying = [key for key in ("clients", *other) if curves[key].nunique(dropna=False) > 1]
    columns = [key for key in ("model",) if curves[key].nunique() > 1]
    rows = [key for key in ("split",) if curves[key].nunique() > 1]
    lines: list[str] = []
    for key in varying:
        if _most_in_a_panel(curves, [*columns, *rows], [*lines, key]) <= MOST_LINES:
            lines.append(key)
        else:
            rows.append(key)
    if not columns:
        columns, rows = rows[:1], rows[1:]
    return Layout(tuple(columns), tuple(rows), tuple(lines), short_names(other), baseline)


def _most_in_a_panel(runs: DataFrame, panel: Sequence[str], lines: Sequence[str]) -> int:
    """The most different lines that a panel would have."""
    one = runs[[*panel, *lines]].drop_duplicates()
    return int(one.groupby(list(panel), dropna=False).size().max()) if panel else len(one)


def values_of(runs: DataFrame, keys: Sequence[str]) -> list[Key]:
    """The different values of some columns, sorted; one empty key where there is no column."""
    if not keys:
        return [()]
    found = runs[list(keys)].drop_duplicates().itertuples(index=False, name=None)
    return sorted(found, key=lambda key: [order(value) for value in key])


def with_values(runs: DataFrame, keys: Sequence[str], values: Sequence[Any]) -> DataFrame:
    """The rows that have some values; of a baseline what it does not depend on does not count."""
    from pandas import isna

    same = runs["round"].notna()
    for key, value in zip(keys, values, strict=True):
        missing = runs[key].isna()
        same &= missing if isna(value) else (runs[key] == value) | (missing & (runs.kind != "federated"))
    return runs[same]


def best_of(runs: DataFrame, keys: Sequence[str], score: str, mode: str) -> tuple[Key, DataFrame]:
    """Of the runs of a baseline those with the values of some columns whose last score is best, by the rule for rates."""
    from pandas import concat

    found = [(key, with_values(runs, keys, key)) for key in values_of(runs, keys)]
    evaluated = [one[one.evaluated] if one.evaluated.any() else one for _, one in found]
    last = concat([one.groupby("run").tail(1).assign(place=place, mode=mode) for place, one in enumerate(evaluated)])
    best = best_of_rates(last.reset_index(drop=True), ["place"], score)
    return found[0 if best is None else int(best["place"].iloc[0])]
