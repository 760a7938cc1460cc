"""The settings in which runs differ, and how they and other values are shown to a reader."""

from __future__ import annotations

import json
import numbers
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedtune.storage.config import KEPT, fingerprint

if TYPE_CHECKING:
    from pandas import DataFrame

CELL = ["task", "model", "split", "clients"]  # what a run is called by, but for its seed
SECTIONS = ("model.", "data.", "loop.", "content.")  # of a configuration; with them begins the column of a setting
CONTENT = "content.version"  # a column where contents differ
NAMED = {"data.task", "model.name", "data.split", "data.skew", "data.alpha", "data.num_clients"}
NAMED |= {"data.seed", "model.seed", "loop.seed"}
_CONTENT_BY = ["data.task", "data.task_options", "data.folder", "data.tokenizer", "data.max_length", "model.name", "model.init"]
_CONTENT_BY += ["model.lora.adapter"]
_NO_CONTENT = ("content.label_names", "content.privacy")  # what is said there of a run, beside what it is made of
_WHERE = ("data.task", "model.name")
_ASIDE = ("versions.", "content.", "baseline.", "loop.baselines", *sorted(KEPT))
_PLAIN = (str, int, float, bool, type(None))
_RATES = ("learning_rate", "lr")  # with these ends the name of a learning rate, of clients or of the server
_LABELS = {"macro_f1": "macro-F1", "loss_nats": "loss, nats", "train_loss_nats": "training loss, nats"}
_WORDS = ("accuracy", "exact_match", "token_accuracy", "perplexity", "update_cosine", "mean_update_norm")


def settings(rounds: DataFrame) -> list[str]:
    """The columns of `read_runs`, or of `compare`, in which runs differ beyond task, model, split, clients and seed."""
    return [column for column in rounds.columns if column.startswith(SECTIONS)]


def that_differ(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Those settings that are not the same in all rows of a table."""
    return [column for column in columns if len({None if _missing(row[column]) else row[column] for row in rows}) > 1]


def rates(columns: Sequence[str]) -> list[str]:
    """Those settings that are learning rates, of the clients or of the server."""
    return [column for column in columns if column.rpartition(".")[2] in _RATES]


def differing(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The keys, beyond those that name a run, in which runs differ; what a baseline does not have does not count.

    A key that only some runs have is one of them where nothing else tells these runs from the others of their task and model:
    parts of other classes have other keys.
    """
    values: dict[str, set[str]] = {}
    of_runs = [
        {key: written(value) for key, value in config.items() if _counts(key) or key in _WHERE}
        for config in configs.values()
        if "baseline.name" not in config
    ]
    for config in of_runs:
        for key in filter(_counts, config):
            values.setdefault(key, set()).add(config[key])
    several = [key for key, found in values.items() if len(found) > 1]
    alike: dict[tuple[str | None, ...], list[set[str]]] = {}
    for config in of_runs:
        alike.setdefault(tuple(config.get(key) for key in (*_WHERE, *several)), []).append(set(config))
    lacked = {key for same in alike.values() for key in set().union(*same) - same[0].intersection(*same)}
    return [key for key in values if key in several or (key in lacked and _counts(key))]


def _counts(key: str) -> bool:
    return key not in NAMED and key.startswith(SECTIONS) and not key.startswith(_ASIDE)


def changed_contents(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Where runs of the same task and model have different texts, or files of the model, run -> the number of its content
    among those of its task and model, so that no mean mixes them; else nothing."""
    contents: dict[str, dict[str, int]] = {}
    found = {}
    for name, config in configs.items():
        known = contents.setdefault(json.dumps([config.get(key) for key in _CONTENT_BY], default=str), {})
        of_run = {key: value for key, value in config.items() if key.startswith("content.") and key not in _NO_CONTENT}
        found[name] = known.setdefault(fingerprint(of_run), len(known) + 1)
    federated = [name for name, config in configs.items() if "baseline.name" not in config]
    return found if any(found[name] > 1 for name in federated) else {}


def plain(value: Any) -> Any:
    """A value of a configuration as a cell of a table can have it."""
    return value if isinstance(value, _PLAIN) else written(value)


def written(value: Any) -> str:
    """A value with its type, by which settings are told apart: 1, 1.0, true and "1" are four."""
    return json.dumps(value, default=str)


def told_apart(values: Iterable[Any]) -> dict[str, Any]:
    """The values of a setting as cells of a table can have them, by how each is `written`: those that Python, or a reader,
    would take for the same are texts with their types.

    >>> told_apart([1, 1.0, 2])
    {'1': '1', '1.0': '1.0', '2': 2}
    >>> told_apart([True, 1, "1", None])
    {'true': 'true', '1': '1', '"1"': '"1"', 'null': None}
    """
    found = {written(value): plain(value) for value in values}
    for _ in range(2):  # what is now a text may look like another one
        equal, alike = Counter(found.values()), Counter(map(shown_setting, found.values()))
        twice = {text for text, value in found.items() if equal[value] > 1 or alike[shown_setting(value)] > 1}
        found = {text: text if text in twice and value is not None else value for text, value in found.items()}
    return found


def short_names(columns: Sequence[str]) -> dict[str, str]:
    """Setting -> the end of its name, as much of it as no other has.

    >>> short_names(["model.learning_rate", "loop.algorithm.aggregator.name", "data.limit", "model.limit"])
    {'model.learning_rate': 'learning rate', 'loop.algorithm.aggregator.name': 'aggregator', 'data.limit': 'data limit', \
'model.limit': 'model limit'}
    """
    parts = {column: column.removesuffix(".name").split(".") for column in columns}
    found = {}
    for column, words in parts.items():
        for count in range(1, len(words) + 1):
            end = words[-count:]
            if [other[-count:] for other in parts.values()].count(end) == 1 and end not in ([name] for name in (*CELL, "seed")):
                break
        found[column] = " ".join(end).replace("_", " ")
    return found


def shown_setting(value: Any) -> str:
    """A setting as tables and pictures show it. A table has whole numbers as fractions where some run has no value.

    >>> shown_setting(4.0), shown_setting(7e-4), shown_setting(float("nan")), shown_setting("iid")
    ('4', '0.0007', '–', 'iid')
    >>> shown_setting('[{"name": "Drop", "rate": 0.3, "clients": []}]'), shown_setting("[]")
    ('Drop(rate 0.3)', 'none')
    """
    if _missing(value):
        return "–"
    if isinstance(value, str) and value[:1] in "[{" and value:
        return _unpacked(value)
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _missing(value: Any) -> bool:
    return value is None or bool(value != value)


def _unpacked(text: str) -> str:
    """A list, or dictionary, of a configuration in fewer signs; what is none as it is."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(found, list):
        return text
    if all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in found):
        return " + ".join(map(_part, found)) or "none"
    return ", ".join(map(str, found)) if all(isinstance(one, _PLAIN) for one in found) else text


def _part(one: Mapping[str, Any]) -> str:
    """A part of an algorithm, or a fault, without its values that are nothing."""
    values = ", ".join(f"{key} {plain(value)}" for key, value in one.items() if key != "name" and value not in ([], None, 0))
    return f"{one['name']}({values})" if values else str(one["name"])


def label_of(metric: str) -> str:
    """A metric, or a column of it, as tables and pictures name it.

    >>> label_of("loss_nats"), label_of("exact_match"), label_of("metric.seed"), label_of("val_x")
    ('loss, nats', 'exact match', 'seed', 'val_x')
    """
    return _LABELS.get(metric) or (metric.replace("_", " ") if metric in _WORDS else metric.removeprefix("metric."))


def order(value: Any) -> tuple[int, float, str]:
    """A key that sorts numbers as numbers, then splits at random, then other texts.

    >>> sorted(["by_author", 16, "iid", 4, "hilmkil_iid"], key=order)
    [4, 16, 'hilmkil_iid', 'iid', 'by_author']
    """
    if _missing(value):
        return 3, 0.0, ""
    if isinstance(value, numbers.Real):
        return 0, float(value), ""
    return (1 if str(value).endswith("iid") else 2), 0.0, str(value)
