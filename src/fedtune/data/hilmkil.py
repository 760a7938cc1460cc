"""The four tasks of Hilmkil et al. 2021, from local files or the hub.

Each builder takes `folder` (default: the sub-folder of `FEDTUNE_DATA` with the task's name, where there is one) and reads
train.csv and test.csv, plain or gzip; without a folder it asks the hub. `validation` is the share of the training texts that
becomes the validation part; the paper has none (0).
"""

from __future__ import annotations

import csv
import gzip
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedtune.data.task import IntArray, TextTask, hold_out
from fedtune.errors import UsageError
from fedtune.randomness import stream

Rows = list[tuple[str, int]]  # text, label
ROWS = {"imdb": (25_000, 25_000), "yelp": (650_000, 50_000), "agnews": (120_000, 7_600), "spooky_author": (14_684, 4_895)}
_SPOOKY = ("EAP", "HPL", "MWS")


def imdb(folder: str | None = None, validation: float = 0.1) -> TextTask:
    """Large Movie Review Dataset v1.0 (Maas et al. 2011): 25,000 reviews to train on and 25,000 to test; neg 0, pos 1.

    Local files have the header `text,label` with `neg` or `negative` and `pos` or `positive`; on the hub it is
    stanfordnlp/imdb.
    """
    names = ("neg", "pos")
    local = _local("imdb", folder)
    if local is None:
        parts = _hub("stanfordnlp/imdb", ("text",), first_label=0)
    else:
        numbers = {"neg": 0, "negative": 0, "pos": 1, "positive": 1}
        parts = [
            [(text, _number(label, numbers, local)) for text, label in _csv(local, part, ("text", "label"))]
            for part in ("train", "test")
        ]
    return _task("imdb", parts, names, validation, local, "cite Maas et al. 2011")


def yelp(folder: str | None = None, validation: float = 0.1) -> TextTask:
    """Yelp review full (Zhang et al. 2015): 650,000 and 50,000 reviews; the label is stars - 1.

    Local files have no header: class 1 to 5, text; the hub's data set is Yelp/yelp_review_full.
    """
    names = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")
    local = _local("yelp", folder)
    if local is None:
        parts = _hub("Yelp/yelp_review_full", ("text",), first_label=0)
    else:
        parts = [[(row[1], _number(row[0], _classes(5), local)) for row in _csv(local, part)] for part in ("train", "test")]
    return _task("yelp", parts, names, validation, local, "Yelp Dataset terms")


def agnews(folder: str | None = None, title: bool = False, allow_partial: bool = False, validation: float = 0.1) -> TextTask:
    """AG News (Zhang et al. 2015): 120,000 and 7,600 news items; the description, with the title before it if asked for.

    Local files have no header: class 1 to 4, title, description; the hub's data set is sh0416/ag_news. With
    `allow_partial` a train_partial.csv serves where there is no train.csv, and the task's name says so.
    """
    names = ("World", "Sports", "Business", "Sci/Tech")
    local = _local("agnews", folder)
    if local is None:
        columns = ("title", "description") if title else ("description",)
        return _task("agnews", _hub("sh0416/ag_news", columns, first_label=1), names, validation, None, "research use")
    partial = not _exists(local, "train") and _exists(local, "train_partial")
    if partial and not allow_partial:
        raise UsageError("allow_partial", False, f"true, to train on the part of AG News in {local}")
    files = ("train_partial" if partial else "train", "test")
    parts = [
        [(f"{row[1]} {row[2]}".strip() if title else row[2], _number(row[0], _classes(4), local)) for row in _csv(local, file)]
        for file in files
    ]
    return _task("agnews", parts, names, validation, local, "research and non-commercial use", partial)


def spooky_author(folder: str | None = None, validation: float = 0.1) -> TextTask:
    """Kaggle's Spooky Author Identification: sentences by Poe (EAP 0), Lovecraft (HPL 1) and Mary Shelley (MWS 2).

    Only Kaggle's train.csv (header `id,text,author`, 19,579 rows) has labels; it is split as scikit-learn's
    `train_test_split(train_size=0.75, shuffle=True, random_state=1)` splits it, in that order. The hub has no copy.
    """
    local = _local("spooky_author", folder)
    if local is None:
        raise UsageError("folder", folder, "a folder with Kaggle's train.csv (kaggle.com/c/spooky-author-identification)")
    numbers = {name: number for number, name in enumerate(_SPOOKY)}
    rows = [(text, _number(author, numbers, local)) for text, author in _csv(local, "train", ("text", "author"))]
    order = np.random.RandomState(1).permutation(len(rows))  # the generator that scikit-learn uses
    train = int(0.75 * len(rows))
    cuts = order[len(rows) - train :], order[: len(rows) - train]
    parts = [[rows[i] for i in cut] for cut in cuts]
    return _task("spooky_author", parts, _SPOOKY, validation, local, "texts in the public domain, Kaggle competition rules")


def _task(
    name: str,
    parts: Sequence[Rows],
    names: tuple[str, ...],
    validation: float,
    local: Path | None,
    licence: str,
    partial: bool = False,
) -> TextTask:
    found, expected = tuple(map(len, parts)), ROWS[name]
    if found[1] != expected[1] or (found[0] != expected[0] and not partial):
        raise UsageError("task", name, f"the whole data set, {expected} rows to train and test (here are {found})")
    if not 0 <= validation < 1:
        raise UsageError("validation", validation, "at least 0 and below 1")
    texts = [text for rows in parts for text, _ in rows]
    labels = np.asarray([label for rows in parts for _, label in rows], dtype=np.int64)
    train, test = np.arange(found[0]), np.arange(found[0], sum(found))
    held_out = np.zeros(found[0], dtype=bool)
    if validation:
        held_out = hold_out(texts[: found[0]], validation, stream(0, "parts/validation"))
    divided: dict[str, IntArray] = {"train": train[~held_out], "validation": train[held_out], "test": test}
    return TextTask(
        f"{name} (partial: {found[0]:,} of {expected[0]:,} training rows)" if partial else name,
        texts,
        labels,
        names,
        divided,
        authors=labels if name == "spooky_author" else None,
        author_names=names if name == "spooky_author" else (),
        source=str(local) if local else "Hugging Face hub",
        licence=licence,
    )


def _local(name: str, folder: str | None) -> Path | None:
    """The folder that was named, or the task's own below FEDTUNE_DATA if it is there."""
    if folder is not None:
        if not Path(folder).is_dir():
            raise UsageError("folder", folder, f"a folder with the files of {name}")
        return Path(folder)
    below = Path(os.environ["FEDTUNE_DATA"]) / name if os.environ.get("FEDTUNE_DATA") else None
    return below if below is not None and below.is_dir() else None


def _classes(count: int) -> dict[str, int]:
    """Classes 1 to C as Zhang et al. write them."""
    return {str(number + 1): number for number in range(count)}


def _number(label: str, numbers: dict[str, int], folder: Path) -> int:
    if label not in numbers:
        raise UsageError("folder", str(folder), f"files with the labels {', '.join(numbers)} (there is {label!r})")
    return numbers[label]


def _exists(folder: Path, stem: str) -> bool:
    return any((folder / f"{stem}.csv{suffix}").exists() for suffix in ("", ".gz"))


def _csv(folder: Path, stem: str, columns: tuple[str, ...] = ()) -> list[list[str]]:
    """Rows of a file without header, or the named columns of one with a header."""
    path = folder / f"{stem}.csv"
    opener = open if path.exists() else gzip.open
    path = path if path.exists() else path.with_suffix(".csv.gz")
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UsageError("folder", str(folder), f"a folder with a readable {stem}.csv or {stem}.csv.gz ({error})") from error
    if not columns:
        return rows
    missing = [name for name in columns if name not in rows[0]]
    if missing:
        raise UsageError("folder", str(folder), f"a {path.name} with the columns {', '.join(columns)} (it has {rows[0]})")
    places = [rows[0].index(name) for name in columns]
    return [[row[place] for place in places] for row in rows[1:]]


def _hub(path: str, columns: tuple[str, ...], first_label: int) -> list[Rows]:
    import datasets

    try:
        found = datasets.load_dataset(path)
    except (OSError, ValueError) as error:
        raise UsageError("folder", None, f"a folder with the files, as the hub's {path} cannot be reached") from error
    return [
        [
            (" ".join(values), int(label) - first_label)
            for *values, label in zip(*(found[part][name] for name in columns), found[part]["label"], strict=True)
        ]
        for part in ("train", "test")
    ]
