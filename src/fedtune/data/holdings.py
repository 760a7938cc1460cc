"""What each client of a split holds: as a table, as texts held out that are like its own, and what a split leaves out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from fedtune.data.instructions import InstructionTask
from fedtune.data.skews import small_authors_said
from fedtune.data.splits import OF_LABELS, Columns, Split, entropy_bits
from fedtune.data.task import TASK_PARTS, IntArray, TextTask
from fedtune.data.tokens import TokenStore
from fedtune.errors import UsageError
from fedtune.files import printable
from fedtune.tables import Shown

Task = TextTask | InstructionTask
_NAME = 60  # characters of a name in a table
_OF_AUTHORS = ("by_author", "natural", "by_author_and_label")  # splits after which a client is known by its authors


@final
class SplitTable(Shown[dict[str, Any]]):
    """What each client holds, a list of rows; shown without counts of names, but for the most frequent ones."""

    def cells(self, record: dict[str, Any]) -> dict[str, Any]:
        """What is shown of a client."""
        return {name: most_frequent(value) if isinstance(value, Mapping) else value for name, value in record.items()}


def most_frequent(counts: Mapping[str, int]) -> str:
    """How many names there are, and the two most frequent, for a table.

    >>> most_frequent({"a": 1, "b": 3, "c": 2})
    '3: b 3, c 2'
    """
    ranked = sorted(counts, key=lambda name: -counts[name])
    return f"{len(counts)}: " + ", ".join(f"{printable(name, _NAME)} {counts[name]}" for name in ranked[:2])


def digest_of(task: Task, tokens: TokenStore) -> str:
    """Sixteen hexadecimal digits that name tokens, labels, authors, parts, second texts and answers of a task."""
    found = hashlib.sha256()
    arrays = [tokens.ids_T.numpy(), tokens.offsets.numpy(), task.labels, task.authors]
    arrays += [one.numpy() for one in (tokens.types_T, tokens.answers_T) if one is not None]
    for array in [*arrays, *(task.parts[part] for part in TASK_PARTS)]:
        found.update(b"|" if array is None else np.ascontiguousarray(array).tobytes())
    for text in getattr(task, "second_texts", None) or ():
        found.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    return found.hexdigest()[:16]


def labels_of(task: Task) -> Tensor | None:
    """(N,) the labels of whole texts; None of conversations, whose labels are among their tokens."""
    return None if isinstance(task, InstructionTask) else torch.from_numpy(task.labels)


def majority_of(task: Task, parts: Sequence[IntArray], part: str) -> float | None:
    """Accuracy on a part of always answering the most frequent label of the clients; None where no labels are learned."""
    if isinstance(task, InstructionTask):
        return None
    train = np.concatenate([task.labels[rows] for rows in parts])
    return float(np.mean(task.labels[task.parts[part]] == np.bincount(train).argmax()))


def columns_for(task: Task, split: str | Split, rows: IntArray, characters_N: IntArray) -> Columns:
    """What a split may look at of some rows. Without labels all texts are of one class, which a split of yours may see.

    Raises:
        UsageError: a split by label, of a task without labels.
    """
    if task.labels is None and split in OF_LABELS:
        allowed = "a split that needs no labels (this task has none): iid, quantity, by_length, by_author, natural"
        raise UsageError("split", split, allowed)
    labels = np.zeros(len(rows), dtype=np.int64) if task.labels is None else task.labels[rows]
    return Columns(labels, None if task.authors is None else task.authors[rows], characters_N[rows])


def characters_of(task: Task) -> IntArray:
    """(N,) length of each text in characters; of a pair, and of a conversation, all together."""
    if isinstance(task, InstructionTask):
        sizes = (sum(len(turn["content"]) for turn in one) for one in task.conversations)
        return np.fromiter(sizes, dtype=np.int64, count=len(task))
    found = np.fromiter(map(len, task.texts), dtype=np.int64, count=len(task.texts))
    if task.second_texts is not None:
        found += np.fromiter(map(len, task.second_texts), dtype=np.int64, count=len(found))
    return found


def table_of(task: Task, parts: Sequence[IntArray], tokens: TokenStore, characters_N: IntArray) -> SplitTable:
    """A row for each client.

    Args:
        parts: for each client row numbers of the task.
        tokens: of each text of the task.
        characters_N: characters of each text of the task.
    """
    rows, tokens_N, answers_N = SplitTable(), tokens.lengths.numpy(), tokens.answers.numpy()
    for client, chosen in enumerate(parts):
        row: dict[str, Any] = {
            "client": client,
            "examples": len(chosen),
            "tokens": int(tokens_N[chosen].sum()),
            "mean_characters": float(characters_N[chosen].mean()),
        }
        if tokens.answers_T is not None:
            row["answer_tokens"] = int(answers_N[chosen].sum())
        if task.labels is not None:
            labels = task.labels[chosen]
            row |= {"label_entropy_bits": entropy_bits(labels), "labels": _counts(labels, task.label_names)}
        if task.authors is not None:
            row["authors"] = _counts(task.authors[chosen], task.author_names)
        rows.append(row)
    return rows


def left_out_said(task: Task, split: str, rows: IntArray, parts: Sequence[IntArray], options: Mapping[str, Any]) -> str:
    """In a line, what a split left out of some rows, or what `natural` did with authors of few texts; empty if nothing."""
    if split == "natural" and task.authors is not None:
        return small_authors_said(task.authors[rows], **options)
    left = len(rows) - sum(map(len, parts))
    return f"split {split}: {left:,} of {len(rows):,} texts are left out" if left else ""


def shares_of_authors(task: Task, parts: Sequence[IntArray], rows: IntArray) -> list[IntArray]:
    """For each client those of some other rows whose author it has texts of; rows of other authors are left out.

    Raises:
        UsageError: a client whose authors have none of these rows.
    """
    if task.authors is None:
        raise UsageError("split", "natural", "a task that names its authors (this one does not)")
    client_of = np.full(len(task.author_names), -1)
    for client, part in enumerate(parts):
        client_of[task.authors[part]] = client
    owners = client_of[task.authors[rows]]
    found = [rows[owners == client] for client in range(len(parts))]
    without = [client for client, part in enumerate(found) if not len(part)]
    if without:
        allowed = f"another one, or a task that has test texts of every client ({len(without)} of {len(parts)} have none)"
        raise UsageError("split", "natural", allowed)
    return found


def accuracy_of_clients(
    task: Task, split: str, parts: Sequence[IntArray], rows: IntArray, correct_N: IntArray
) -> list[float | None]:
    """For each client the mean, over its texts, of how many held-out texts of the same label (author) were answered rightly.

    Args:
        split: by its name it is known whether clients differ in labels or in authors.
        parts: for each client row numbers of the task.
        rows: row numbers of the held-out texts.
        correct_N: whether each of these was answered rightly.

    Returns:
        a fraction for each client; None where no held-out text has any of its labels (authors), or there are none.
    """
    groups = task.authors if task.authors is not None and split in _OF_AUTHORS else task.labels
    if groups is None:
        return [None] * len(parts)
    right, known = (np.bincount(groups[rows], weight, groups.max() + 1) for weight in (correct_N, None))
    mine = groups[np.concatenate(parts)]
    starts = np.cumsum([0, *map(len, parts[:-1])])
    hits = np.add.reduceat((right / np.maximum(known, 1))[mine], starts)
    counted = np.add.reduceat((known > 0)[mine].astype(np.int64), starts)
    return [float(hit / count) if count else None for hit, count in zip(hits, counted, strict=True)]


def _counts(numbers: IntArray, names: tuple[str, ...]) -> Mapping[str, int]:
    values, counts = np.unique(numbers, return_counts=True)
    return {names[value]: int(count) for value, count in zip(values, counts, strict=True)}
