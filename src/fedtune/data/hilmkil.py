"""The four tasks of Hilmkil et al. 2021, from local files or the hub.

Each builder takes `folder` (default: the sub-folder of `FEDTUNE_DATA` with the task's name, where there is one) and reads
train.csv and test.csv, plain or gzip; without a folder it asks the hub. `validation` is the share of the training texts that
becomes the validation part; the paper has none (0).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedtune.data.formats import Columns, Format, Table
from fedtune.data.hub import check_split, load, table_of
from fedtune.data.opening import Source, source_of
from fedtune.data.reading import peek, read
from fedtune.data.task import IntArray, TextTask, hold_out
from fedtune.data.values import check_texts, labels_of, missing
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
    _check(validation=validation)
    local = _local("imdb", folder)
    if local is None:
        parts = _hub("stanfordnlp/imdb", "text", {"0": 0, "1": 1})
    else:
        numbers = {"neg": 0, "negative": 0, "pos": 1, "positive": 1}
        parts = _files(local, ("train", "test"), {"text": "text", "label": "label"}, numbers)
    return _task("imdb", parts, names, validation, local, "cite Maas et al. 2011")


def yelp(folder: str | None = None, validation: float = 0.1) -> TextTask:
    """Yelp review full (Zhang et al. 2015): 650,000 and 50,000 reviews; the label is stars - 1.

    Local files have no header: class 1 to 5, text; the hub's data set is Yelp/yelp_review_full.
    """
    names = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")
    _check(validation=validation)
    local = _local("yelp", folder)
    if local is None:
        parts = _hub("Yelp/yelp_review_full", "text", {str(number): number for number in range(5)})
    else:
        parts = _files(local, ("train", "test"), {"text": 1, "label": 0}, _classes(5), width=2)
    return _task("yelp", parts, names, validation, local, "Yelp Dataset terms")


def agnews(folder: str | None = None, title: bool = False, allow_partial: bool = False, validation: float = 0.1) -> TextTask:
    """AG News (Zhang et al. 2015): 120,000 and 7,600 news items; the description, with the title before it if asked for.

    Local files have no header: class 1 to 4, title, description; the hub's data set is sh0416/ag_news. With
    `allow_partial` a train_partial.csv serves where there is no train.csv, and the task's name says so.
    """
    names = ("World", "Sports", "Business", "Sci/Tech")
    _check(validation=validation, title=title, allow_partial=allow_partial)
    local = _local("agnews", folder)
    if local is None:
        parts = _hub("sh0416/ag_news", "description", _classes(4), "title" if title else None)
        return _task("agnews", parts, names, validation, None, "research use")
    partial = not _exists(local, "train") and _exists(local, "train_partial")
    if partial and not allow_partial:
        raise UsageError("allow_partial", False, f"true, to train on the part of AG News in {local}")
    files = ("train_partial" if partial else "train", "test")
    wanted = {"text": 2, "label": 0} | ({"title": 1} if title else {})
    parts = _files(local, files, wanted, _classes(4), width=3)
    return _task("agnews", parts, names, validation, local, "research and non-commercial use", partial)


def spooky_author(folder: str | None = None, validation: float = 0.1) -> TextTask:
    """Kaggle's Spooky Author Identification: sentences by Poe (EAP 0), Lovecraft (HPL 1) and Mary Shelley (MWS 2).

    Only Kaggle's train.csv (header `id,text,author`, 19,579 rows) has labels; it is split as scikit-learn's
    `train_test_split(train_size=0.75, shuffle=True, random_state=1)` splits it, in that order. The hub has no copy.
    """
    _check(validation=validation)
    local = _local("spooky_author", folder)
    if local is None:
        raise UsageError("folder", folder, "a folder with Kaggle's train.csv (kaggle.com/c/spooky-author-identification)")
    numbers = {name: number for number, name in enumerate(_SPOOKY)}
    (rows,) = _files(local, ("train",), {"text": "text", "label": "author"}, numbers)
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
        if not isinstance(folder, (str, Path)) or not Path(folder).is_dir():
            raise UsageError("folder", folder, f"a folder with the files of {name}")
        return Path(folder)
    below = Path(os.environ["FEDTUNE_DATA"]) / name if os.environ.get("FEDTUNE_DATA") else None
    return below if below is not None and below.is_dir() else None


def _classes(count: int) -> dict[str, int]:
    """Classes 1 to C as Zhang et al. write them."""
    return {str(number + 1): number for number in range(count)}


def _check(validation: float, **switches: bool) -> None:
    """Raise `UsageError` for an option that cannot be, before anything is read."""
    number = isinstance(validation, (int, float)) and not isinstance(validation, bool)
    if not number or not math.isfinite(validation) or not 0 <= validation < 1:
        raise UsageError("validation", validation, "a number that is at least 0 and below 1")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise UsageError(name, value, "true or false")


def _exists(folder: Path, stem: str) -> bool:
    return any((folder / f"{stem}.csv{suffix}").exists() for suffix in ("", ".gz"))


def _source(folder: Path, stem: str) -> Source:
    if not _exists(folder, stem):
        raise UsageError("folder", str(folder), f"a folder with a readable {stem}.csv or {stem}.csv.gz (there is none of them)")
    path = folder / f"{stem}.csv"
    return source_of("folder", path if path.exists() else path.with_suffix(".csv.gz"))


def _files(
    folder: Path, stems: Sequence[str], wanted: Columns, numbers: dict[str, int], width: int | None = None
) -> list[Rows]:
    """Texts and labels of some files.

    Args:
        folder: where they lie.
        stems: their names, without ending.
        wanted: columns with text, label and perhaps title, by name or number.
        numbers: label -> class.
        width: columns of files without a header.

    Raises:
        UsageError: a file is missing or damaged, a row has too many or too few fields, an empty text or another label.
    """
    how = Format(header=width is None, width=width)
    sources = [_source(folder, stem) for stem in stems]
    found = []
    for step in (peek, read):
        for source in sources:
            try:
                table = step(source, wanted, how)
                if table is not None:
                    found.append(_rows(table, numbers))
            except UsageError as error:
                if error.argument == "folder":
                    raise
                said = f"a file with{'' if how.header else 'out'} a header" if error.argument == "header" else error.allowed
                allowed = f"files of the distributor's form; {error.argument}: {said}"
                raise UsageError("folder", str(source.path), allowed) from error
    return found


def _rows(table: Table, numbers: dict[str, int]) -> Rows:
    """Texts, with their titles before them where the table has a column of them, and classes."""
    titles = table.columns.get("title")
    if titles is not None:
        titles = ["" if missing(title) else title for title in titles]
        texts = ["" if missing(text) else text for text in table.columns["text"]]
        table.columns["text"] = [f"{title} {text}".strip() for title, text in zip(titles, texts, strict=True)]
    check_texts(table)
    labels = labels_of(table)
    for row, label in enumerate(labels):
        if str(label) not in numbers:
            raise UsageError("label", label, f"the labels {', '.join(numbers)} ({table.place(row)} has {label!r})")
    return [(text, numbers[str(label)]) for text, label in zip(table.columns["text"], labels, strict=True)]


def _hub(path: str, text: str, numbers: dict[str, int], title: str | None = None) -> list[Rows]:
    wanted = {"text": text, "label": "label"} | ({} if title is None else {"title": title})
    try:
        found = load(path)
    except UsageError as error:
        allowed = f"a folder with the files, as the hub's {path} cannot be reached ({error.allowed})"
        raise UsageError("folder", None, allowed) from error
    rows = []
    for part in ("train", "test"):
        if part not in found:
            raise UsageError(
                "folder", None, f"a folder with the files, as the hub's {path} has no split {part}: {', '.join(found)}"
            )
        check_split(path, part, found[part], wanted)
    for part in ("train", "test"):
        rows.append(_rows(table_of(path, part, found[part], wanted), numbers))
    return rows
