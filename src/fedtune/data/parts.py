"""Which texts are for training, for validation and for test: chosen among a source's splits, or cut from its training texts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedtune.data.contract import TASK_PARTS, IntArray
from fedtune.data.formats import Table
from fedtune.errors import UsageError, one_of, shown
from fedtune.randomness import stream

SYNONYMS = {
    "train": ("train", "training", "tr"),
    "validation": ("validation", "valid", "val", "dev", "development", "eval"),
    "test": ("test", "testing", "heldout", "held_out", "held-out"),
}
_PART = {name: part for part, names in SYNONYMS.items() for name in names}
_HELD_OUT = {"test": 0.2, "validation": 0.1}  # shares of the documents, where the source has no such part


@dataclass(frozen=True)
class SplitChoice:
    """Which split of a source is which part.

    Args:
        train: the split to train on.
        validation: the validation part; by default the split of that name, or of one that means the same. Where there is
            none, or where it is the name of the split to train on, a tenth of the training texts.
        test: the test part, in the same way; a fifth of the training texts.
    """

    train: str = "train"
    validation: str | None = None
    test: str | None = None

    def check(self) -> None:
        """Raise `UsageError` for one split as two parts."""
        for part, name in (("train", self.train), ("validation", self.validation), ("test", self.test)):
            if not isinstance(name, str) and (name is not None or part == "train"):
                raise UsageError(f"{part}_split", name, "the name of a split")
        if self.validation is not None and self.validation == self.test != self.train:
            raise UsageError(
                "validation_split", self.validation, f"another split than test_split, or {self.train}, to cut from it"
            )

    def of(self, present: Sequence[str], source: str) -> dict[str, str]:
        """Part -> split, for the parts that are not cut from the training texts.

        Raises:
            UsageError: no such split; or none that is named like a part, and several that might be it.
        """
        train = self.train if self.train in present else self._own("train", present, set())
        if train is None or (self.train != "train" and self.train not in present):
            raise UsageError("train_split", self.train, f"a split of {source}: {one_of('', self.train, present).allowed}")
        taken = {train} | {name for name in (self.validation, self.test) if name is not None}
        found = {"train": train}
        for part, name in (("validation", self.validation), ("test", self.test)):
            if name is not None and name not in (*present, self.train):
                raise UsageError(f"{part}_split", name, f"a split of {source}: {one_of('', name, present).allowed}")
            chosen = self._own(part, present, taken) if name is None else name
            if chosen is not None and chosen not in (train, self.train):
                found[part] = chosen
        return found

    def _own(self, part: str, present: Sequence[str], taken: set[str]) -> str | None:
        """The split that is named like a part, if there is one."""
        free = [name for name in present if name not in taken]
        own = [name for name in free if name == part] or [name for name in free if canonical(name) == part]
        near = own or [name for name in free if canonical(name.replace("-", "_").split("_")[0]) == part]
        if len(near) > 1 or (near and not own):
            also = "" if part == "train" else f", or {self.train} to cut it from"
            raise UsageError(f"{part}_split", None, f"a choice, as no split is simply named {part}: {', '.join(near)}{also}")
        return own[0] if own else None


def canonical(name: str) -> str | None:
    """The part that a name of a split means, or None.

    >>> canonical("Dev"), canonical(" train "), canonical("fold 1")
    ('validation', 'train', None)
    """
    return _PART.get(name.strip().lower())


def with_hints(tables: Mapping[str, Table], found: Mapping[str, str], present: Sequence[str]) -> dict[str, Table]:
    """The tables of the parts, with what an error says of the choice of a split without labels."""
    hinted = {}
    for part, table in tables.items():
        free = [f"{part}_split={name}" for name in present if name not in (found[part], found["train"])]
        also = [] if part == "train" else [f"{part}_split={found['train']} to cut it from the training texts"]
        others = f"for example {', or '.join(free + also)}" if free + also else ""
        hinted[part] = replace(table, option=(f"{part}_split", found[part]) if others else None, others=others)
    return hinted


def by_column(table: Table, choice: SplitChoice, source: str) -> dict[str, Table]:
    """Divide the rows of a table by its column `split`.

    Raises:
        UsageError: a value that names no part and is not chosen, by its row; several values that mean one part, of which none
            is chosen; no row to train on.
    """
    parts: dict[str, list[int]] = {}
    for row, value in enumerate(table.columns["split"]):
        if not isinstance(value, str):
            raise _no_part(table, row)
        parts.setdefault(_folded(value), []).append(row)
    named = _resolved(choice, list(parts))
    chosen = {named.train, named.validation, named.test}
    for name, rows in parts.items():
        if canonical(name) is None and name not in chosen:
            raise _no_part(table, rows[0])
    present = [name for part in TASK_PARTS for name in parts if canonical(name) == part]
    present += [name for name in parts if name not in present]
    found = named.of(present, source)
    return with_hints({part: _rows(table, parts[name]) for part, name in found.items()}, found, present)


def _folded(name: str) -> str:
    return name.strip().casefold()


def _no_part(table: Table, row: int) -> UsageError:
    allowed = f"a column of the values {', '.join(TASK_PARTS)}, of names that mean the same "
    allowed += f"({', '.join(name for names in SYNONYMS.values() for name in names[1:])}), or of names that an option "
    allowed += f"chooses, for example test_split ({table.place(row)} has {shown(table.columns['split'][row])})"
    return UsageError("split", table.named["split"], allowed)


def _resolved(choice: SplitChoice, present: Sequence[str]) -> SplitChoice:
    """The choice in the names that a column has: each part has one, also where several mean it.

    Raises:
        UsageError: several values that mean a part, of which none is chosen; one value as two parts.
    """
    found = {part: None if name is None else _folded(name) for part, name in vars(choice).items()}
    for part, name in found.items():
        alike = [one for one in present if name is not None and canonical(one) == canonical(name) is not None]
        if name is not None and name not in present and len(alike) > 1:
            raise _choice(part, canonical(name) or part, alike)
        found[part] = alike[0] if name not in present and alike else name
    for part, name in found.items():
        others = {found[other] for other in found if other != part}
        alike = [one for one in present if canonical(one) == part and one not in others]
        if (name is None or (part == "train" and _folded(choice.train) == "train")) and len(alike) > 1:
            raise _choice(part, part, alike)
    named = SplitChoice(found["train"] or "", found["validation"], found["test"])
    named.check()
    return named


def _choice(part: str, meant: str, alike: Sequence[str]) -> UsageError:
    return UsageError(f"{part}_split", None, f"a choice, as several are named like {meant}: {', '.join(alike)}")


def _rows(table: Table, rows: list[int]) -> Table:
    columns = {role: [values[row] for row in rows] for role, values in table.columns.items()}
    return replace(table, columns=columns, place=lambda row: table.place(rows[row]))


def cut(parts: dict[str, IntArray], documents: Sequence[Hashable]) -> dict[str, IntArray]:
    """All three parts: those that are missing are cut from the training texts, by whole documents.

    Args:
        parts: row numbers of the parts that there are.
        documents: (N,) the document of each text.
    """
    found = dict(parts)
    for part in ("test", "validation"):
        if part not in found:
            train = found["train"]
            held_out = hold_out([documents[row] for row in train], _HELD_OUT[part], stream(0, f"parts/{part}"))
            found[part], found["train"] = train[held_out], train[~held_out]
    return found


def hold_out(documents: Sequence[Hashable], share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Mark the texts of about `share` of the documents, at least one document; no document is cut through.

    Args:
        documents: (N,) the document that each text belongs to.
    """
    names = list(dict.fromkeys(documents))
    count = min(max(1, round(share * len(names))), len(names) - 1)
    chosen = {names[i] for i in rng.permutation(len(names))[:count]}
    return np.asarray([document in chosen for document in documents], dtype=bool)
