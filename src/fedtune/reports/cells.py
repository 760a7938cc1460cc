"""One row for each cell of a grid of runs: what a paper's table says of runs that differ in their seed alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedtune.reports.baselines import Baselines
from fedtune.reports.best import BEST, alike, best_of_rates, marked
from fedtune.reports.repeats import each_once
from fedtune.reports.results import TEST, column_of
from fedtune.reports.settings import CELL, order, rates, settings, shown_setting
from fedtune.storage.summary import SHARES

if TYPE_CHECKING:
    from pandas import DataFrame

METRICS = ("accuracy", "macro_f1", "loss_nats", "perplexity", "exact_match", "token_accuracy")  # with columns of their own
PROPORTIONS = ("accuracy", "exact_match")  # of examples, so that their number tells the standard error
REACHED = [f"rounds_to_{share}pct" for share in SHARES]
_TESTED = ["majority", "local", "centralised"]
_TUNED = {"baseline": ["baseline"], "centralised": ["centralised", "test.centralised"]}  # what goes by a rate of its own
_RATES = [f"{baseline}_rate" for baseline in _TUNED]
_MEANS = ["baseline", "centralised", "chance", "client_min", "client_mean", "client_max"]
_MEANS += ["bytes_up", "bytes_down", "megabytes", "seconds"]


def compare(rounds: DataFrame) -> DataFrame:
    """What a paper's table says: one row for each task, model, split, number of clients and other setting.

    Runs that do not have all their rounds yet are left out. A seed counts once: of runs with the same settings and the same
    seeds, as copies of a directory are, the first counts, and a warning names the others.

    The baseline of a run is the run with one client and the same seed, as in Hilmkil et al. 2021, or where there is none the
    centralised baseline. Metrics are those of the last evaluated round, on the `part` that the rounds were evaluated on; those
    of the test part are in columns that begin with "test.". A share of the baseline is only looked for where the baseline is
    better than chance, by two standard errors where the number of examples is known.

    Args:
        rounds: as from `read_runs`.

    Returns:
        columns `task`, `model`, `split`, `clients`, other settings, `monitor`, `mode`, `part`; `seeds` (how many), `rounds`;
        `best_rate` (1 for the learning rate that `tuned` chooses, 0 for others, missing where nothing is chosen);
        `score` with `_min` and `_max` (mean and range over seeds of the metric that is monitored); `accuracy`, `loss_nats` and
        what else of `METRICS` is known, each with its range; the scores of the `baseline` and of the `centralised` one;
        `chance`; `rounds_to_90pct` and so on (mean over seeds; missing unless all seeds get there); `client_min`, `client_max`
        (least and greatest accuracy for a client), `bytes_up` and `bytes_down` (sent by a client in a round, and to it),
        `megabytes` (both ways, of the whole run) and `seconds`, each a mean over seeds; of the test part `test.examples`,
        `test.score` and the metrics, each with its range, `test.standard_error` (of the score, where that is a share of the
        examples), `test.majority`, `test.local` and `test.centralised` (scores of the baselines).
    """
    other = settings(rounds)
    return _cells(marked(_runs(each_once(rounds)), other), other)


def tuned(rounds: DataFrame) -> DataFrame:
    """As `compare`, but of runs that differ in learning rates alone those with the best one, as Reddi et al. 2021 compare.

    The rate of a cell is the one whose mean score is best on the validation part: of the rates with the most seeds, over the
    seeds that these have in common. Its
    baselines (with one client, centralised) are tuned alike: each has the rate that is best by its own score on the
    validation part. Clients alone are evaluated on the test part only; theirs is the cell's rate.

    Returns:
        columns as of `compare`, and `baseline_rate` and `centralised_rate` (learning rates as text); no row where no
        learning rate differs, or where the rounds were evaluated on the test part, on which nothing may be chosen.
    """
    from pandas import DataFrame, concat

    other = settings(rounds)
    chosen, runs = rates(other), marked(_runs(each_once(rounds)), other)
    picked = []
    for group in alike(runs, other):
        best = group[group[BEST] == 1]
        if len(best):
            for baseline, columns in _TUNED.items():
                best = _beside(best, best_of_rates(group, chosen, baseline), chosen, f"{baseline}_rate", columns)
            picked.append(best)
    if not picked:
        return DataFrame(columns=[*_cells(runs, other).columns, *_RATES])
    found = concat(picked, ignore_index=True)
    targets = [reached(run, run["baseline"]) for run in found.to_dict("records")]
    return _cells(found.assign(**DataFrame(targets)), other, *_RATES)


def _beside(best: DataFrame, others: DataFrame | None, chosen: Sequence[str], rate: str, columns: Sequence[str]) -> DataFrame:
    """The chosen runs of a cell, with what others, of another learning rate, say of their baseline: for each seed the same."""
    if others is None:
        return best.assign(**{rate: "–"})
    of_seed = others.drop_duplicates("seed").set_index("seed")
    known = {name: best.seed.map(of_seed[name]) for name in columns}
    return best.assign(**known, **{rate: ", ".join(map(shown_setting, others[list(chosen)].iloc[0]))})


@dataclass(frozen=True, eq=False)
class Curve:
    """The score of a run over its rounds: those that were evaluated."""

    rounds: Any
    scores: Any


def _runs(rounds: DataFrame) -> DataFrame:
    """A row for each federated run that has all its rounds."""
    from pandas import DataFrame

    rounds = rounds[rounds.complete]
    lines = {line["run"]: line for line in rounds.drop_duplicates("run").to_dict("records")}
    found, baselines = dict(iter(rounds.groupby("run", sort=False))), Baselines(lines.values(), settings(rounds))
    federated = [line for line in lines.values() if line["kind"] == "federated"]
    shown = [*CELL, *settings(rounds), "seed", "other_seeds", "monitor", "mode", "part", "examples", "chance"]
    rows = []
    for line in federated:
        base, pooled = (found.get(name) for name in (baselines.of(line), baselines.pooled(line)))
        rows.append(_run(line, shown, found[line["run"]], base, pooled))
    return DataFrame(rows)


def _run(
    line: Mapping[str, Any], shown: Sequence[str], run: DataFrame, base: DataFrame | None, pooled: DataFrame | None
) -> dict[str, Any]:
    """What is known of one run: what it is, and what its rounds and those of its baselines say."""
    column = column_of(line["monitor"])
    row = {name: line[name] for name in shown} | {"rounds": int(run["round"].iloc[-1])}
    row |= {name: _last(run, name) for name in ("score", *METRICS, "client_min", "client_mean", "client_max") if name in run}
    row |= dict(_tested(line))
    for name, one in (("baseline", base), ("centralised", pooled)):
        row[name] = _last(one, column) if one is not None and column in one else math.nan
    row["curve"] = Curve(run["round"].to_numpy(), run.score.to_numpy())
    row |= reached(row, row["baseline"])
    answers = run.num_clients.sum() or math.nan
    row |= {"bytes_up": run.bytes_up.sum() / answers, "bytes_down": run.bytes_down.sum() / answers}
    return row | {"megabytes": (run.bytes_up + run.bytes_down).sum() / 1e6, "seconds": run.seconds.sum()}


def _tested(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What is known of a run on the test part."""
    monitor = line["monitor"]
    yield f"{TEST}score", line.get(TEST + monitor, math.nan)
    for name in (*METRICS, "examples", "majority"):
        yield TEST + name, line.get(TEST + name, math.nan)
    for baseline in ("local", "centralised"):
        yield TEST + baseline, line.get(f"{TEST}{baseline}.{monitor}", math.nan)


def reached(run: Mapping[str, Any], target: float) -> dict[str, float]:
    """The first round with each share of a baseline's score; not known where the baseline is not better than chance.

    A metric that is to be small is to come to the score divided by the share.
    """
    is_max, curve = run["mode"] == "max", run["curve"]
    if not _above_chance(run, target):
        return dict.fromkeys(REACHED, math.nan)
    found = {}
    for share, name in zip(SHARES, REACHED, strict=True):
        wanted = share / 100 * target if is_max else target * 100 / share
        there = curve.rounds[curve.scores >= wanted if is_max else curve.scores <= wanted]
        found[name] = int(there[0]) if len(there) else math.nan
    return found


def _above_chance(run: Mapping[str, Any], target: float) -> bool:
    chance, examples = run["chance"], run["examples"]
    if chance is None or chance != chance:
        return target == target
    if run["mode"] == "min":
        return bool(target < chance)
    margin = 2 * standard_error(chance, examples) if run["monitor"] in PROPORTIONS else 0.0
    return bool(target > chance + (margin if margin == margin else 0.0))


def standard_error(share: float, examples: float) -> float:
    """Of a share of so many examples; not known where their number is not.

    >>> round(standard_error(0.5, 400), 4)
    0.025
    """
    return math.sqrt(share * (1 - share) / examples) if examples and examples > 0 and 0 <= share <= 1 else math.nan


def _last(run: DataFrame, name: str) -> float:
    """A metric after the last evaluated round, as not every round need be evaluated; NaN where it was no finite number."""
    known = run.loc[run.evaluated, name]
    return float(known.iloc[-1]) if len(known) else math.nan


def _cells(runs: DataFrame, other: Sequence[str], *also: str) -> DataFrame:
    """Means and ranges over the seeds of each cell."""
    from pandas import DataFrame

    keys = [*CELL, *other, "monitor", "mode", "part", *also]
    ranged = ["score", *(name for name in METRICS if name in runs or name in ("accuracy", "loss_nats"))]
    columns = [*keys, "seeds", "rounds", BEST, *_with_range(ranged), *_MEANS[:3], *REACHED, *_MEANS[3:]]
    columns += [TEST + "examples", *_with_range([TEST + name for name in ranged]), TEST + "standard_error"]
    columns += [TEST + name for name in _TESTED]
    if not len(runs):
        return DataFrame(columns=columns)
    rows = []
    for key, group in runs.groupby(keys, sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(keys, key, strict=True)) | {"seeds": len(group), "rounds": int(group["rounds"].max())}
        row[BEST] = group[BEST].max()  # the same for all seeds
        for name in (*ranged, *(TEST + one for one in ranged)):
            known, skip = group[name], name.startswith(TEST)  # a seed that diverged is not left out of the mean
            low, high = known.min(skipna=skip), known.max(skipna=skip)
            row |= {name: known.mean(skipna=skip), f"{name}_min": low, f"{name}_max": high}
        row |= {name: group[name].mean() for name in _MEANS}
        row |= {name: group[name].mean(skipna=False) for name in REACHED}
        row |= {TEST + name: group[TEST + name].mean() for name in (*_TESTED, "examples")}
        row[f"{TEST}standard_error"] = _error_of(row)
        rows.append(row)
    return DataFrame(rows, columns=columns).sort_values(keys, ignore_index=True, key=lambda column: column.map(order))


def _error_of(row: Mapping[str, Any]) -> float:
    known = row["monitor"] in PROPORTIONS
    return standard_error(row[f"{TEST}score"], row[f"{TEST}examples"]) if known else math.nan


def _with_range(names: Sequence[str]) -> list[str]:
    return [column for name in names for column in (name, f"{name}_min", f"{name}_max")]
