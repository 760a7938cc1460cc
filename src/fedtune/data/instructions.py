"""`InstructionTask`: conversations whose answers are learned, in memory, from a file, the hub, or a builder of `TASKS`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedtune.data.contract import IntArray, check_classes, names_of, numbers_of, parts_of, task_said
from fedtune.data.conversations import Conversation, pairs_of, recognised, rows_of, turns_of
from fedtune.data.formats import Format, Table
from fedtune.data.hub import columns_of_hub, read_hub
from fedtune.data.opening import source_of
from fedtune.data.parts import SplitChoice, cut
from fedtune.data.reading import columns_of, read_files
from fedtune.data.values import authors_of, documents_of, ids_of, joined_names, labels_of, numbered
from fedtune.errors import UsageError


@dataclass(frozen=True, repr=False)
class InstructionTask:
    """Conversations of which a causal model learns the answers, divided once and for all into train, validation and test.

    Args:
        name: short name, as in `TASKS`.
        prompts, answers: N texts each; or
        messages: N conversations, each a list of {"role": "system", "user" or "assistant", "content": text}. Afterwards it has
            all of them, also those of prompts and answers. What comes after the last answer of one is left out.
        parts: row numbers of "train", "validation" (may be empty) and "test", disjoint.
        system: with prompts, what the system says first: one text for all, or one for each (None: nothing).
        labels: (N,) class numbers 0 .. C-1, for splits by label alone: nothing is learned of them.
        label_names: C names.
        authors: (N,) author numbers, or None where the source names no authors.
        author_names: A names.
        source: where the conversations come from.
        licence: the terms under which they may be used.

    Raises:
        UsageError: an empty text, a conversation without an answer, another role, an empty part.
    """

    name: str
    prompts: Sequence[str] | None = None
    answers: Sequence[str] | None = None
    parts: Mapping[str, IntArray] = field(default_factory=dict)
    system: str | Sequence[str | None] | None = None
    messages: Sequence[Sequence[Mapping[str, str]]] | None = None
    labels: IntArray | None = None
    label_names: tuple[str, ...] = ()
    authors: IntArray | None = None
    author_names: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""
    kind: ClassVar[str] = "instructions"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UsageError("task", self.name, "a task with a name, a text that is not empty")
        paired = self.prompts is not None and self.answers is not None
        if paired == (self.messages is not None) or (self.messages is not None and self.system is not None):
            raise UsageError("task", self.name, "prompts and answers (with system or without), or messages")
        turns = pairs_of(self.name, self.prompts, self.answers, self.system) if paired else turns_of(self.name, self.messages)
        found: dict[str, Any] = {"messages": turns, "prompts": None, "answers": None, "system": None}
        for numbers, names in (("labels", "label_names"), ("authors", "author_names")):
            known = getattr(self, numbers) is not None
            found[names] = names_of(self.name, names, getattr(self, names)) if known else tuple(getattr(self, names))
            if known:
                found[numbers] = numbers_of(self.name, numbers, getattr(self, numbers), len(turns), len(found[names]))
            elif found[names]:
                raise UsageError("task", self.name, f"{names} only with {numbers}")
        found["parts"] = parts_of(self.name, self.parts, len(turns))
        if self.labels is not None:
            check_classes(self.name, found["labels"], found["label_names"], found["parts"]["train"])
        for name, value in found.items():
            object.__setattr__(self, name, value)  # in the types that are promised

    def __len__(self) -> int:
        return len(self.conversations)

    def __repr__(self) -> str:
        return task_said(self, "conversations")

    @property
    def conversations(self) -> list[Conversation]:
        """N conversations in one spelling, each up to its last answer or beyond."""
        return self.messages  # type: ignore[return-value]  # made so above

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        prompt: str | int | None = None,
        answer: str | int | None = None,
        input: str | int | None = None,
        system: str | int | None = None,
        messages: str | None = None,
        author: str | int | None = None,
        label: str | int | None = None,
        document: str | int | None = None,
        split: str | int | None = None,
        test_path: str | Path | None = None,
        validation_path: str | Path | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
        delimiter: str | None = None,
        quote: str | None = '"',
        header: bool = True,
        encoding: str = "utf-8",
        format: str | None = None,
    ) -> InstructionTask:
        """Read a file: JSON lines, Parquet or CSV, plain or compressed, by its ending (as `TextTask.from_csv`).

        Args:
            path: the file.
            prompt, answer: the columns of a question and its answer.
            input: a column whose text follows the prompt after a blank line, where there is one.
            system: a column of what the system says first.
            messages: instead, the column of whole conversations: lists of {"role", "content"} or {"from", "value"}.
                Without prompt, answer and messages the columns are recognised by their names: messages, conversations;
                instruction, input, output (Alpaca); instruction, context, response; prompt and completion, response or answer;
                question, answer; with them `system`.
            author, label, document, split, test_path, validation_path, train_split, validation_split, test_split, delimiter,
                quote, header, encoding, format: as in `TextTask.from_csv`. Conversations of one first message are one document
                where no other is named.

        Raises:
            UsageError: an option that cannot be; columns that are not known; a row of which no conversation can be made, by its
                line; and what `TextTask.from_csv` and `InstructionTask` refuse.
        """
        named = _given(prompt=prompt, answer=answer, input=input, system=system, messages=messages)
        beside = _given(author=author, label=label, document=document, split=split)
        how = Format(delimiter, quote, header, encoding, format)
        wanted = _complete(named, lambda: columns_of(source_of("path", path, how.kind), how), str(path)) | beside
        files = {"path": path} | _given(validation_path=validation_path, test_path=test_path)
        tables = read_files(files, wanted, how, SplitChoice(train_split, validation_split, test_split))
        return _task_of(Path(path).name, tables, str(path))

    @classmethod
    def from_hub(
        cls,
        path: str,
        *,
        config: str | None = None,
        prompt: str | None = None,
        answer: str | None = None,
        input: str | None = None,
        system: str | None = None,
        messages: str | None = None,
        author: str | None = None,
        label: str | None = None,
        document: str | None = None,
        train_split: str = "train",
        validation_split: str | None = None,
        test_split: str | None = None,
    ) -> InstructionTask:
        """Load a data set of the Hugging Face hub, or a local folder of JSON lines, Parquet or CSV files, with `datasets`.

        Args:
            path, config, train_split, validation_split, test_split: as in `TextTask.from_hub`.
            prompt, answer, input, system, messages, author, label, document: names of columns, as in `from_file`.

        Raises:
            UsageError: as `from_file` and `TextTask.from_hub`.
        """
        named = _given(prompt=prompt, answer=answer, input=input, system=system, messages=messages)
        choice = SplitChoice(train_split, validation_split, test_split)
        if path in (".", "./"):  # a folder without a name, which `datasets` does not take
            path = str(Path(path).resolve())
        wanted = _complete(named, lambda: columns_of_hub(path, config, choice), str(path))
        wanted |= _given(author=author, label=label, document=document)
        return _task_of(Path(str(path)).name, read_hub(path, config, wanted, choice), str(path))


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _complete(named: dict[str, Any], present: Any, source: str) -> dict[str, Any]:
    """The columns of conversations: those that were named, or those that are recognised.

    Raises:
        UsageError: prompt without answer; one of the two beside messages; and as `recognised`.
    """
    if "messages" in named and named.keys() & {"prompt", "answer", "input"}:
        raise UsageError("messages", named["messages"], "nothing beside prompt, answer and input")
    for one, other in (("prompt", "answer"), ("answer", "prompt")):
        if one in named and other not in named:
            raise UsageError(other, None, f"the column that belongs to {one} {named[one]}")
    if named.keys() & {"prompt", "messages"}:
        return named
    found = recognised(present(), source)
    if "input" in named and "prompt" not in found:
        raise UsageError("input", named["input"], "nothing beside messages")
    return found | named


def _task_of(name: str, tables: Mapping[str, Table], source: str) -> InstructionTask:
    """Join the tables of the given parts, number labels and authors, and cut the parts that are missing from train."""
    first = tables["train"]
    turns = [one for table in tables.values() for one in rows_of(table)]
    bounds = np.cumsum([0, *map(len, tables.values())])
    parts = {part: np.arange(bounds[i], bounds[i + 1]) for i, part in enumerate(tables)}
    ids = {
        role: [value for table in tables.values() for value in ids_of(table, role)]
        for role in ("author", "document")
        if role in first.columns
    }
    asked = [next(turn["content"] for turn in one if turn["role"] == "user") for one in turns]
    documents = documents_of(ids["document"]) if "document" in ids else asked
    for role, values in ids.items():
        if None in values:
            source += f" ({values.count(None)} of {len(values)} conversations without {role}: each its own)"
    more: dict[str, Any] = {}
    if "author" in ids:
        more["authors"], more["author_names"] = authors_of(ids["author"], joined_names(tables, "author"))
    if "label" in first.columns:
        labels = [label for table in tables.values() for label in labels_of(table)]
        more["labels"], more["label_names"] = numbered(labels, joined_names(tables, "label"), "label")
    return InstructionTask(name, messages=turns, parts=cut(parts, documents), source=source, **more)
