"""The records and summaries of many runs as one table."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import UsageError
from fedtune.files import present, read_object
from fedtune.reports.folders import check, directories, left_out
from fedtune.reports.settings import CELL, CONTENT, SECTIONS, changed_contents, differing, plain, settings, told_apart, written
from fedtune.storage.config import NEUTRAL, dotted, read_config
from fedtune.storage.records import RESERVED, RoundRecord, read_rounds
from fedtune.storage.summary import spread

if TYPE_CHECKING:
    from pandas import DataFrame

TEST = "test."  # with that begins the column of what is known of the test part, once for a run
_CLIENTS = ("client_min", "client_mean", "client_max")
_OF_RUN = (
    "run",
    "kind",
    "seed",
    "other_seeds",
    "complete",
    "part",
    "examples",
    "chance",
    "monitor",
    "mode",
    "score",
    "evaluated",
)
_COLUMNS = {*_OF_RUN, *_CLIENTS, *CELL, *RESERVED}
_METRIC = "metric."  # with that begins the column of a metric whose name another column has, or may have
_LEVELS = {"by_author": ["skew"], "by_length": ["skew"], "dirichlet": ["alpha"], "by_author_and_label": ["skew", "alpha"]}
_BASELINES = ("local", "centralised")


def read_runs(folder: str | Path, damaged: dict[str, str] | None = None) -> DataFrame:
    """All round records below a folder, one row a round.

    Args:
        folder: runs in it are found at any depth; a link is followed where it leads to a run, or to a folder of runs.
        damaged: directory -> reason of the runs that cannot be read is added here, and they are left out; so are those that
            are in it already. Without it, one that cannot be read is an error.

    Returns:
        columns `run` (directory), `kind` ("federated", or "centralised" for a baseline), `task`, `model`, `split`, `clients`,
        `seed` (of the loop), `other_seeds` (those of data and model, as text, where they are not the loop's), `complete`
        (whether the run has all its rounds), then the values in which the runs differ otherwise (dotted names; 1, 1.0, true
        and "1" of one name are texts, as they are four settings; of
        "content.version" each number stands for other texts, or other files of the model), then the `part` that
        the rounds were evaluated on and its `examples`, `monitor` and `mode`, the `chance` (what the metric that is monitored
        comes to without learning: the most frequent class, a uniform guess), the `score` (that metric; NaN also where it was no
        finite number), whether the round was `evaluated`, and what
        `rounds.jsonl` has: `round`, the metrics, `train_loss_nats`, `num_examples`, `seconds` and so on, and of the accuracy
        for each client the `client_min`, `client_mean` and `client_max`. Sorted by run and round. A metric has a column of its
        name; but one that is named as another column is ("seed"), or that begins with "model.", "data.", "loop.", "content.",
        "test." or "metric.", as settings and this rule do, has `metric.NAME`.

        What a run's summary says of the test part is in each of its rows: `test.NAME` of the metrics after the last round,
        `test.examples`, `test.majority` (accuracy of the most frequent class), and of the baselines `test.centralised.NAME` and
        `test.local.NAME` (each client alone, mean).

    Raises:
        UsageError: there is no run below the folder.
        RunError: the files of a run are damaged, where `damaged` is not given.
    """
    from pandas import DataFrame, Series

    with _uncollected():
        found = dict(_runs(Path(folder), damaged))
    if not found:
        raise UsageError("runs_dir", str(folder), "a directory with runs in it (rounds.jsonl and config.yaml)")
    configs = {name: NEUTRAL | config for name, (config, *_) in found.items()}
    other, contents = differing(configs), changed_contents(configs)
    values = {key: told_apart(config.get(key) for config in configs.values()) for key in other}
    rows = []
    for name, (config, rounds, complete, summary) in found.items():
        of_run = {"clients": rounds[0]["num_clients"]} | _named(name, config) | {"complete": complete}
        of_run |= {key: values[key][written(configs[name].get(key))] for key in other}
        of_run |= {CONTENT: contents[name]} if contents else {}
        of_run |= _measured(config, summary) | _tested(summary)
        rows += [of_run | one for one in rounds]
    table = DataFrame(rows).sort_values(["run", "round"], ignore_index=True)
    for name in ("accuracy", "loss_nats", "score", "examples", "chance"):  # a module of another kind may log neither
        table[name] = table.get(name, Series(dtype=float)).astype(float)
    return table


def metric_names(rounds: DataFrame) -> list[str]:
    """The columns of `read_runs` with what the modules logged: what is monitored first, then accuracy and its like."""
    from pandas.api.types import is_numeric_dtype

    ours = {*_COLUMNS, *settings(rounds)}
    names = [name for name in rounds.columns if name not in ours and not name.startswith(TEST)]
    logged = [name for name in names if is_numeric_dtype(rounds[name])]
    first = [*map(column_of, rounds.monitor.unique()), "accuracy", "macro_f1", "loss_nats", *sorted(logged), "train_loss_nats"]
    return [name for name in dict.fromkeys(first) if name in rounds and rounds[name].notna().any()] or ["train_loss_nats"]


def column_of(metric: str) -> str:
    """The column of a metric in `read_runs`.

    >>> column_of("val.acc"), column_of("seed")
    ('val.acc', 'metric.seed')
    """
    return _METRIC + metric if metric in _COLUMNS or metric.startswith((*SECTIONS, TEST, _METRIC)) else metric


def unfinished(rounds: DataFrame) -> int:
    """The number of runs that do not have all their rounds yet."""
    federated = rounds[rounds.kind == "federated"]
    return int(federated.run.nunique() - federated[federated.complete].run.nunique())


_Found = tuple[dict[str, Any], list[dict[str, Any]], bool, dict[str, Any]]


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Inside the block nothing looks for cycles: what is read has none, and its size would make that a quarter of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _runs(folder: Path, damaged: dict[str, str] | None) -> Iterator[tuple[str, _Found]]:
    """Directory -> configuration, the numbers of each round, whether these are all, and the summary of them."""
    for name, path in directories(folder, damaged):
        if damaged is not None and name in damaged:
            continue
        with left_out(name, damaged):
            if not present(path / "rounds.jsonl") or not present(path / "config.yaml"):
                continue
            rounds, config = read_rounds(path / "rounds.jsonl"), dotted(read_config(path / "config.yaml"))
            if rounds:
                check(path / "config.yaml", config)
                summary = read_object(path / "summary.json") if present(path / "summary.json") else {}
                summary = summary if summary.get("rounds") == rounds[-1].round else {}  # of other rounds it says nothing
                monitor = str(config.get("loop.monitor", "accuracy"))
                numbers = [_scored(one, monitor) | _numbers(one) for one in rounds]
                yield name, (config, numbers, _complete(config, rounds, summary), summary)


def _measured(config: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the rounds were evaluated on, and by what: part, its examples, monitor, mode, chance."""
    part, monitor = str(config.get("loop.evaluate_on", "validation")), str(config.get("loop.monitor", "accuracy"))
    classes = config.get("content.label_names")
    chance = None
    if monitor == "accuracy":
        chance = _number(summary.get("majority_accuracy" if part == "test" else f"majority_{part}_accuracy"))
    elif monitor == "loss_nats" and isinstance(classes, list) and classes:
        chance = math.log(len(classes))
    about = {"part": part, "examples": _number(summary.get(f"examples_{part}")), "chance": chance}
    return about | {"monitor": monitor, "mode": config.get("loop.mode", "max")}


def _tested(summary: Mapping[str, Any]) -> dict[str, float]:
    """What a summary says of the test part."""
    known = {name: value for name, one in summary.items() if (value := _number(one)) is not None}
    found = {TEST + name.removeprefix("test_"): value for name, value in known.items() if name.startswith("test_")}
    for name, other in (("majority_accuracy", "majority"), ("examples_test", "examples")):
        found |= {TEST + other: known[name]} if name in known else {}
    for baseline in _BASELINES:
        begins = f"{baseline}_"
        of_baseline = {name: value for name, value in known.items() if name.startswith(begins) and name != "local_clients"}
        found |= {f"{TEST}{baseline}.{name.removeprefix(begins)}": value for name, value in of_baseline.items()}
    return found


def _number(value: Any) -> float | None:
    """A number of a file, None where there is none."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


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
        "seed": seed if type(seed := config.get("loop.seed")) is int else _shown(seed),
        "other_seeds": _other_seeds(config, seed),
    } | ({"clients": 1} if pooled else {"clients": clients} if type(clients) is int else {})


def _other_seeds(config: Mapping[str, Any], seed: Any) -> str | None:
    """The seeds of data and model where they are others than the loop's; what has none of its own has the loop's."""
    found = {part: config.get(f"{part}.seed", seed) for part in ("data", "model")}
    other = [f"{part} {_shown(own)}" for part, own in found.items() if own != seed]
    return ", ".join(other) or None


def _shown(value: Any) -> str:
    """The value of a setting that names a run: another's class may have given it any type."""
    return "–" if value is None else str(plain(value))


def _scored(record: RoundRecord, monitor: str) -> dict[str, Any]:
    return {"score": record.metrics.get(monitor), "evaluated": bool(record.metrics)}


def _numbers(record: RoundRecord) -> dict[str, Any]:
    known = spread([value for value in record.client_accuracy if value is not None and math.isfinite(value)])
    clients = {f"client_{name}": float("nan") if value is None else value for name, value in known.items()}
    own = {name: value for name in RESERVED if not isinstance(value := getattr(record, name), (list, dict))}
    return own | {column_of(name): value for name, value in record.metrics.items()} | clients


def _complete(config: Mapping[str, Any], rounds: list[RoundRecord], summary: Mapping[str, Any]) -> bool:
    """Whether a run has as many rounds as its configuration says, or stopped by itself and said so in its summary."""
    examples = config.get("baseline.examples")
    planned = config.get("loop.max_rounds") if examples is None else len(examples)
    return planned is None or rounds[-1].round >= planned or bool(summary)
