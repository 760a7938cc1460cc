"""The records of many runs as one table, and what a paper says of them."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import UsageError
from fedtune.files import present, read_object
from fedtune.reports.baselines import Baselines
from fedtune.reports.folders import check, directories, left_out
from fedtune.storage.config import KEPT, NEUTRAL, dotted, fingerprint, read_config
from fedtune.storage.records import RESERVED, RoundRecord, read_rounds
from fedtune.storage.summary import SHARES, spread

if TYPE_CHECKING:
    from pandas import DataFrame, Series

OTHER = ["monitor", "score", "score_min", "score_max"]  # columns of a table where runs monitor something else than accuracy
CELL = ["task", "model", "split", "clients"]  # what a run is called by, but for its seed
_CLIENTS = ("client_min", "client_mean", "client_max")
_COLUMNS = {"run", "kind", "seed", "complete", "monitor", "mode", "score", *_CLIENTS, *CELL, *RESERVED}
_SECTIONS = ("model.", "data.", "loop.", "content.")  # of a configuration; with them begins the column of a setting
_METRIC = "metric."  # with that begins the column of a metric whose name another column has, or may have
_NAMED = {"data.task", "model.name", "data.split", "data.skew", "data.alpha", "data.num_clients"}
_LEVELS = {"by_author": ["skew"], "by_length": ["skew"], "dirichlet": ["alpha"], "by_author_and_label": ["skew", "alpha"]}
_NAMED |= {"data.seed", "model.seed", "loop.seed"}
CONTENT = "content.digest"  # a column where contents differ
_CONTENT_BY = ["data.task", "data.task_options", "data.folder", "data.tokenizer", "data.max_length", "model.name", "model.init"]
_SUMS = ["accuracy", "accuracy_min", "accuracy_max", "loss_nats", "baseline", *(f"rounds_to_{share}pct" for share in SHARES)]
_SUMS += ["client_min", "client_max", "megabytes", "seconds"]
_PLAIN = (str, int, float, bool, type(None))
_ASIDE = ("versions.", "content.", "baseline.", "loop.baselines", *sorted(KEPT))


def read_runs(folder: str | Path, damaged: dict[str, str] | None = None) -> DataFrame:
    """All round records below a folder, one row a round.

    Args:
        folder: runs in it are found at any depth; a link is followed where it leads to a run, or to a folder of runs.
        damaged: directory -> reason of the runs that cannot be read is added here, and they are left out; so are those that
            are in it already. Without it, one that cannot be read is an error.

    Returns:
        columns `run` (directory), `kind` ("federated", or "centralised" for a baseline), `task`, `model`, `split`, `clients`,
        `seed`, `complete` (whether the run has all its rounds), then the values in which the runs differ otherwise (dotted
        names), then `monitor` and `mode`, the `score` (the metric that is monitored), and what `rounds.jsonl` has: `round`, the
        metrics, `train_loss_nats`, `num_examples`, `seconds` and so on, and of the accuracy for each client the `client_min`,
        `client_mean` and `client_max`. Sorted by run and round. A metric has a column of its name; but one that is named as
        another column is ("seed"), or that begins with "model.", "data.", "loop.", "content." or "metric.", as settings and
        this rule do, has `metric.NAME`.

    Raises:
        UsageError: there is no run below the folder.
        RunError: the files of a run are damaged, where `damaged` is not given.
    """
    from pandas import DataFrame, Series

    found = dict(_runs(Path(folder), damaged))
    if not found:
        raise UsageError("runs_dir", str(folder), "a directory with runs in it (rounds.jsonl and config.yaml)")
    configs = {name: NEUTRAL | config for name, (config, *_) in found.items()}
    other = [*_differing(configs), *_changed_contents(configs)]
    rows = []
    for name, (config, rounds, complete) in found.items():
        of_run = (
            {"clients": rounds[0].num_clients}
            | _named(name, config)
            | {"complete": complete}
            | {"monitor": str(config.get("loop.monitor", "accuracy")), "mode": config.get("loop.mode", "max")}
        )
        of_run |= {key: _plain(_content_of(config) if key == CONTENT else configs[name].get(key)) for key in other}
        rows += [of_run | {"score": one.metrics.get(of_run["monitor"])} | _numbers(one) for one in rounds]
    table = DataFrame(rows).sort_values(["run", "round"], ignore_index=True)
    for name in ("accuracy", "loss_nats", "score"):  # a module of another kind may log neither
        table[name] = table.get(name, Series(dtype=float)).astype(float)
    return table


def metric_names(rounds: DataFrame) -> list[str]:
    """The columns of `read_runs` with what the modules logged: what is monitored first, then accuracy and its like."""
    from pandas.api.types import is_numeric_dtype

    ours = {*_COLUMNS, *settings(rounds)}
    logged = [name for name in rounds.columns if name not in ours and is_numeric_dtype(rounds[name])]
    first = [*map(column_of, rounds.monitor.unique()), "accuracy", "macro_f1", "loss_nats", *sorted(logged), "train_loss_nats"]
    return [name for name in dict.fromkeys(first) if name in rounds and rounds[name].notna().any()] or ["train_loss_nats"]


def column_of(metric: str) -> str:
    """The column of a metric in `read_runs`.

    >>> column_of("val.acc"), column_of("seed")
    ('val.acc', 'metric.seed')
    """
    return _METRIC + metric if metric in _COLUMNS or metric.startswith((*_SECTIONS, _METRIC)) else metric


def settings(rounds: DataFrame) -> list[str]:
    """The columns of `read_runs`, or of `compare`, in which runs differ beyond task, model, split, clients and seed."""
    return [column for column in rounds.columns if column.startswith(_SECTIONS)]


def unfinished(rounds: DataFrame) -> int:
    """The number of runs that do not have all their rounds yet."""
    federated = rounds[rounds.kind == "federated"]
    return int(federated.run.nunique() - federated[federated.complete].run.nunique())


def compare(rounds: DataFrame) -> DataFrame:
    """What a paper's table says: one row for each task, model, split, number of clients and other setting.

    Runs that do not have all their rounds yet are left out.

    The baseline of a run is the run with one client and the same seed, as in Hilmkil et al. 2021, or where there is none the
    centralised baseline. Accuracies are those of the last evaluated round, on the part that the rounds were evaluated on. Where
    a run monitors another metric, its baseline and the rounds to a share of that are about this metric, the score.

    Args:
        rounds: as from `read_runs`.

    Returns:
        columns `task`, `model`, `split`, `clients`, other settings; `monitor`, `score`, `score_min`, `score_max` where that is
        not the accuracy; `seeds` (their number), `rounds`, `accuracy` with `_min` and `_max` (mean and range over seeds),
        `loss_nats`, `baseline` (its score), `rounds_to_90pct` and so on (mean over seeds; missing unless all seeds get there),
        `client_min`, `client_max` (least and greatest accuracy for a client), `megabytes` (sent, both ways) and `seconds`,
        each a mean over seeds.
    """
    from pandas import DataFrame

    other = OTHER if (rounds.monitor != "accuracy").any() else []
    keys = [*CELL, *settings(rounds), *other[:1]]
    rounds, columns = rounds[rounds.complete], [*keys, *other[1:], "seeds", "rounds", *_SUMS]
    federated = rounds[rounds.kind == "federated"]
    if not len(federated):
        return DataFrame(columns=columns)
    lines = {line["run"]: line for line in rounds.drop_duplicates("run").to_dict("records")}
    found, baselines = dict(iter(rounds.groupby("run", sort=False))), Baselines(lines.values(), settings(rounds))
    shown = [*CELL, *settings(rounds), "monitor"]
    runs = DataFrame(
        [_run(lines[name], shown, found[name], found.get(baselines.of(lines[name]))) for name in federated.run.unique()]
    )
    rows = []
    for key, group in runs.groupby(keys, sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(keys, _tuple(key), strict=True)) | {"seeds": len(group)}
        row |= {"rounds": int(group["rounds"].max())}
        for name in ("accuracy", "score"):
            row |= {name: group[name].mean(), f"{name}_min": group[name].min(), f"{name}_max": group[name].max()}
        row |= {name: group[name].mean() for name in ("loss_nats", "baseline")}
        row |= {f"rounds_to_{share}pct": group[f"rounds_to_{share}pct"].mean(skipna=False) for share in SHARES}
        rows.append(row | {name: group[name].mean() for name in ("client_min", "client_max", "megabytes", "seconds")})
    return DataFrame(rows, columns=columns).sort_values(keys, ignore_index=True, key=_sortable)


def _run(line: Mapping[str, Any], shown: list[str], run: DataFrame, base: DataFrame | None) -> dict[str, Any]:
    """What is known of one run: what it is, and what its rounds and those of its baseline say."""
    names = ("accuracy", "score", "loss_nats", "client_min", "client_max")
    column, is_max = column_of(line["monitor"]), line["mode"] == "max"
    target = _last(base[column]) if base is not None and column in base else float("nan")
    row = {name: line[name] for name in shown} | {"rounds": int(run["round"].iloc[-1]), "baseline": target}
    row |= {name: _last(run[name]) for name in names}
    score, rounds = run.score.to_numpy(), run["round"].to_numpy()
    for share in SHARES:
        wanted = share / 100 * target if is_max else target * 100 / share
        there = rounds[score >= wanted if is_max else score <= wanted]
        row[f"rounds_to_{share}pct"] = int(there[0]) if len(there) else float("nan")
    return row | {"megabytes": (run.bytes_up + run.bytes_down).sum() / 1e6, "seconds": run.seconds.sum()}


def _last(values: Series[float]) -> float:
    """The last value that is known: not every round need be evaluated."""
    known = values.dropna()
    return float(known.iloc[-1]) if len(known) else float("nan")


def _runs(folder: Path, damaged: dict[str, str] | None) -> Iterator[tuple[str, tuple[dict[str, Any], list[RoundRecord], bool]]]:
    """Directory -> configuration, rounds, and whether these are all."""
    for name, path in directories(folder, damaged):
        if damaged is not None and name in damaged:
            continue
        with left_out(name, damaged):
            if not present(path / "rounds.jsonl") or not present(path / "config.yaml"):
                continue
            rounds, config = read_rounds(path / "rounds.jsonl"), dotted(read_config(path / "config.yaml"))
            if rounds:
                check(path / "config.yaml", config)
                yield name, (config, rounds, _complete(path, config, rounds))


def _named(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    split, clients = config.get("data.split"), config.get("data.num_clients")
    levels = [str(config.get(f"data.{name}")) for name in _LEVELS.get(str(split), ())]
    pooled = "baseline.name" in config
    return {
        "run": name,
        "kind": str(config["baseline.name"]) if pooled else "federated",
        "task": _shown(config.get("data.task", config.get("data.class"))),
        "model": _shown(config.get("model.name", config.get("model.class"))),
        "split": "pooled" if pooled else " ".join([_shown(split), *levels]),
        "seed": seed if isinstance(seed := config.get("loop.seed"), int) else _shown(seed),
    } | ({"clients": 1} if pooled else {"clients": clients} if isinstance(clients, int) else {})


def _shown(value: Any) -> str:
    """The value of a setting that names a run: another's class may have given it any type."""
    return "–" if value is None else str(_plain(value))


def _numbers(record: RoundRecord) -> dict[str, Any]:
    known = spread([value for value in record.client_accuracy if value is not None and math.isfinite(value)])
    clients = {f"client_{name}": float("nan") if value is None else value for name, value in known.items()}
    own = {name: value for name in RESERVED if not isinstance(value := getattr(record, name), (list, dict))}
    return own | {column_of(name): value for name, value in record.metrics.items()} | clients


def _differing(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The keys, beyond those that name a run, in which runs differ; what a baseline does not have does not count."""
    values: dict[str, set[str]] = {}
    for config in configs.values():
        for key, value in config.items():
            if key not in _NAMED and key.startswith(_SECTIONS) and not key.startswith(_ASIDE) and "baseline.name" not in config:
                values.setdefault(key, set()).add(json.dumps(value, default=str))
    return [key for key, found in values.items() if len(found) > 1]


def _changed_contents(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A column for the content where runs of the same task and model have different ones, so that no mean mixes them."""
    contents: dict[str, set[str]] = {}
    for config in configs.values():
        if "baseline.name" not in config:
            named = [config.get(key) for key in _CONTENT_BY]
            contents.setdefault(json.dumps(named, default=str), set()).add(_content_of(config))
    return [CONTENT] if any(len(found) > 1 for found in contents.values()) else []


def _content_of(config: Mapping[str, Any]) -> str:
    """Eight digits that name the content of a run's texts and model."""
    return fingerprint(
        {key: value for key, value in config.items() if key.startswith("content.") and key != "content.label_names"}
    )


def _plain(value: Any) -> Any:
    return value if isinstance(value, _PLAIN) else json.dumps(value, default=str)


def _complete(folder: Path, config: Mapping[str, Any], rounds: list[RoundRecord]) -> bool:
    """Whether a run has as many rounds as it was asked for, or stopped by itself and said so in its summary."""
    examples = config.get("baseline.examples")
    asked = config.get("loop.max_rounds") if examples is None else len(examples)
    if asked is None or rounds[-1].round >= asked:
        return True
    summary = folder / "summary.json"
    return present(summary) and bool(read_object(summary).get("rounds") == rounds[-1].round)


def _tuple(key: Hashable) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else (key,)


def shown_setting(value: Any) -> str:
    """A setting as tables and pictures show it. A table has whole numbers as fractions where some run has no value.

    >>> shown_setting(4.0), shown_setting(7e-4), shown_setting(float("nan")), shown_setting("iid")
    ('4', '0.0007', '–', 'iid')
    """
    if value is None or value != value:
        return "–"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _sortable(column: Any) -> Any:
    return column.astype(str) if column.dtype == object else column
