from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedtune
from fedtune.data.authors import AUTHORS, GAP, Passage, parts_of_author, passages_of
from fedtune.data.authors import documents as documents_of
from fedtune.data.registry import load_task


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wb") as file:
        file.write(text.encode(encoding))
    return path


@pytest.fixture(scope="module")
def authors() -> fedtune.TextTask:
    return load_task("authors")


def test_authors_has_at_least_twelve_and_none_over_three_times_the_median(authors: fedtune.TextTask) -> None:
    assert len(authors.label_names) >= 12
    for part, rows in authors.parts.items():
        counts = np.bincount(authors.labels[rows], minlength=len(authors.label_names))
        assert counts.min() > 0, part
        assert counts.max() <= 3 * np.median(counts)


def test_authors_is_the_same_every_time_and_its_parts_share_no_text(authors: fedtune.TextTask) -> None:
    again = load_task("authors")
    assert again.texts == authors.texts
    texts = [{authors.texts[row] for row in rows} for rows in authors.parts.values()]
    assert sum(map(len, texts)) == len(set().union(*texts))


def test_passages_have_about_fifty_words_and_name_no_typist_or_pseudonym(authors: fedtune.TextTask) -> None:
    lengths = [len(text.split()) for text in authors.texts]
    assert min(lengths) >= 25
    assert max(lengths) == 50
    assert not [text for text in authors.texts if "PUBLIUS" in text or "Gutenberg" in text or "“" in text]


def documents(*sizes: int) -> list[list[Passage]]:
    return [[Passage("A", f"d{d}", i, f"{d} {i}") for i in range(size)] for d, size in enumerate(sizes)]


def test_whole_documents_are_held_out() -> None:
    parts = parts_of_author(documents(40, 40, 40, 40, 40), np.random.default_rng(0))
    held = [{passage.document for passage in chosen} for chosen in parts.values()]
    assert all(held)
    assert sum(map(len, held)) == len(set().union(*held))


def test_a_single_document_gives_blocks_with_a_gap() -> None:
    parts = parts_of_author(documents(400), np.random.default_rng(0))
    spans = {part: (min(p.number for p in chosen), max(p.number for p in chosen)) for part, chosen in parts.items()}
    assert spans["validation"][0] - spans["train"][1] > GAP
    assert spans["test"][0] - spans["validation"][1] > GAP


def test_two_documents_of_one_author_are_refused() -> None:
    with pytest.raises(ValueError, match="one document or at least three"):
        parts_of_author(documents(10, 10), np.random.default_rng(0))


ROWS = "text,label,author\n" + "".join(f"text number {i},{'abc'[i % 3]},w{i % 4}\n" for i in range(60))


@pytest.mark.parametrize("name", ["data.csv", "data.csv.gz"])
def test_csv_plain_or_gzip_gives_texts_labels_and_authors(tmp_path: Path, name: str) -> None:
    task = fedtune.TextTask.from_csv(write(tmp_path / name, ROWS), author="author")
    assert task.label_names == ("a", "b", "c")
    assert task.author_names == ("w0", "w1", "w2", "w3")
    assert task.texts[5] == "text number 5"
    assert task.labels[5] == 2
    assert sorted(np.concatenate(list(task.parts.values())).tolist()) == list(range(60))


def test_numeric_labels_are_ordered_as_numbers(tmp_path: Path) -> None:
    text = "text,stars\n" + "".join(f"t{i},{[10, 2, 1][i % 3]}\n" for i in range(30))
    assert fedtune.TextTask.from_csv(write(tmp_path / "d.csv", text), label="stars").label_names == ("1", "2", "10")


def test_texts_of_one_document_stay_in_one_part(tmp_path: Path) -> None:
    text = "text,label,book\n" + "".join(f"t{i},{i % 2},b{i // 10}\n" for i in range(200))
    task = fedtune.TextTask.from_csv(write(tmp_path / "d.csv", text), document="book")
    books = [{row // 10 for row in rows} for rows in task.parts.values()]
    assert sum(map(len, books)) == len(set().union(*books)) == 20


def test_a_test_file_of_its_own_is_the_test_part(tmp_path: Path) -> None:
    train, test = write(tmp_path / "train.csv", ROWS), write(tmp_path / "test.csv", "text,label,author\nnew,a,w0\n")
    task = fedtune.TextTask.from_csv(train, test_path=test)
    assert [task.texts[row] for row in task.parts["test"]] == ["new"]


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (ROWS, {"text": "body"}, "text: got 'body'; allowed: a column of"),
        (ROWS, {"author": "writer"}, "text, label, author"),
        (ROWS.replace("text number 7,", " ,"), {}, "row 8 of"),
        ("text,label\n" + "one,a\ntwo,a\nthree,a\n" * 9, {}, "at least two labels (the only one is ['a'])"),
        ("text,label\n", {}, "a file with at least one row of data"),
    ],
)
def test_a_bad_csv_is_refused_in_one_line(tmp_path: Path, text: str, options: dict, said: str) -> None:
    with pytest.raises(fedtune.UsageError) as caught:
        fedtune.TextTask.from_csv(write(tmp_path / "d.csv", text), **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_only_in_the_test_part_is_named(tmp_path: Path) -> None:
    train, test = write(tmp_path / "train.csv", ROWS), write(tmp_path / "test.csv", "text,label,author\nnew,zebra,w0\n")
    with pytest.raises(fedtune.UsageError, match=r"classes that occur in the train part \(these do not: \['zebra'\]\)"):
        fedtune.TextTask.from_csv(train, test_path=test)


def test_a_file_that_is_not_utf8_or_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fedtune.UsageError, match="a file in UTF-8"):
        fedtune.TextTask.from_csv(write(tmp_path / "d.csv", "text,label\ncafé,a\nthé,b\n", "latin-1"))
    with pytest.raises(fedtune.UsageError, match="a readable CSV file"):
        fedtune.TextTask.from_csv(tmp_path / "absent.csv")
    with pytest.raises(fedtune.UsageError, match="a readable CSV file"):
        fedtune.TextTask.from_csv(write(tmp_path / "d.csv", "text,label\n").rename(tmp_path / "plain.csv.gz"))


def test_a_local_folder_in_hub_format_loads_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.csv", ROWS)
    write(folder / "test.csv", "text,label,author\nnew,b,w1\n")
    task = fedtune.TextTask.from_hub(str(folder), author="author")
    assert [task.texts[row] for row in task.parts["test"]] == ["new"]
    assert task.label_names == ("a", "b", "c")
    assert len(task.parts["train"]) + len(task.parts["validation"]) == 60
    with pytest.raises(fedtune.UsageError, match="label: got 'stars'; allowed: a column of"):
        fedtune.TextTask.from_hub(str(folder), label="stars")


def test_an_absent_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fedtune.UsageError, match="a data set of the hub or a local folder"):
        fedtune.TextTask.from_hub(str(tmp_path / "nowhere"))


TEXTS = [f"text {row}" for row in range(12)]
LABELS = np.arange(12) % 2
PARTS = {"train": np.arange(8), "validation": np.arange(8, 10), "test": np.arange(10, 12)}


def task_with(**changes: Any) -> fedtune.TextTask:
    fields = {"name": "x", "texts": TEXTS, "labels": LABELS, "label_names": ("a", "b"), "parts": PARTS}
    return fedtune.TextTask(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": LABELS.tolist(), "label_names": ["a", "b"]},
        {"labels": LABELS.astype(np.int8)},
        {"labels": LABELS.astype(np.uint64)},
        {"labels": LABELS.astype(object)},
        {"labels": torch.tensor(LABELS)},
        {"texts": np.array(TEXTS)},
        {"parts": {part: rows.tolist() for part, rows in PARTS.items()}},
        {"parts": {part: range(rows[0], rows[-1] + 1) for part, rows in PARTS.items()}},
    ],
)
def test_what_a_task_is_given_is_kept_in_the_types_that_are_promised(changes: dict[str, Any]) -> None:
    task = task_with(**changes)
    assert (task.labels.dtype, task.labels.tolist(), task.label_names) == (np.int64, LABELS.tolist(), ("a", "b"))
    assert {part: rows.tolist() for part, rows in task.parts.items()} == {part: rows.tolist() for part, rows in PARTS.items()}
    assert {rows.dtype for rows in task.parts.values()} == {np.dtype(np.int64)}
    assert list(task.texts) == TEXTS


def test_a_task_may_have_no_validation_part() -> None:
    assert len(task_with(parts={part: PARTS[part] for part in ("train", "test")}).parts["validation"]) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"labels": LABELS / 2},
            "labels that are whole numbers (there is float64: [0.0, 0.5, 0.0]; regression is not offered)",
        ),
        ({"labels": LABELS.astype(bool)}, "whole numbers (there is bool"),
        ({"labels": [True, *LABELS[1:].tolist()]}, "whole numbers (there is bool"),
        ({"labels": [None, *LABELS[1:].tolist()]}, "whole numbers (there is NoneType"),
        ({"labels": LABELS.astype(str)}, "labels that are whole numbers"),
        ({"labels": np.eye(12, dtype=int)}, "multi-label"),
        ({"labels": [[0], [0, 1]] * 6}, "multi-label"),
        ({"labels": LABELS - 1}, "labels that are whole numbers 0 .. 1, one for each name (of text 1 it is -1)"),
        ({"labels": LABELS + 1}, "(of text 2 it is 2)"),
        ({"labels": [2**70] * 12}, "labels that are whole numbers 0 .. 1"),
        ({"labels": LABELS[:5]}, "as many labels as texts, 12 (these are 5)"),
        ({"texts": TEXTS[:5]}, "as many labels as texts, 5"),
        ({"texts": "twelve texts"}, "texts that are a list of texts (this is a str)"),
        ({"texts": [3, *TEXTS[1:]]}, "texts that are text (text 1 of 12 is 3)"),
        ({"texts": [*TEXTS[:-1], " \n"]}, "texts that are not empty (text 12 of 12 is"),
        ({"texts": ["\udc80", *TEXTS[1:]]}, "whole characters"),
        ({"label_names": ("a", "a")}, "label_names that differ ('a' is there twice)"),
        ({"label_names": ("a",), "labels": LABELS * 0}, "at least two labels (the only one is ['a'])"),
        ({"label_names": ()}, "at least two labels"),
        ({"label_names": (0, 1)}, "label_names that are texts"),
        ({"label_names": "ab"}, "label_names that are a list"),
        ({"parts": PARTS | {"test": PARTS["train"][:2]}}, "parts that share no row (row 0 is in train and test)"),
        ({"parts": PARTS | {"validation": PARTS["test"]}}, "parts that share no row (row 10 is in validation and test)"),
        ({"parts": PARTS | {"train": [0, 1, 1]}}, "parts with no row twice (the train part has 1 twice)"),
        ({"parts": PARTS | {"test": [12]}}, "parts with rows 0 .. 11 (the test part has 12)"),
        ({"parts": PARTS | {"test": [-1]}}, "parts with rows 0 .. 11 (the test part has -1)"),
        ({"parts": PARTS | {"test": [10.0]}}, "rows of the test part that are whole numbers"),
        ({"parts": PARTS | {"test": np.arange(12) > 9}}, "rows of the test part that are whole numbers (there is bool"),
        ({"parts": PARTS | {"test": []}}, "a test part that is not empty"),
        ({"parts": PARTS | {"train": []}}, "a train part that is not empty"),
        ({"parts": PARTS | {"dev": [1]}}, "a dictionary with the parts train, validation, test"),
        ({"parts": {"train": PARTS["train"]}}, "a dictionary with the parts train, validation, test (there is ['train'])"),
        ({"parts": PARTS | {"train": [0, 2, 4]}}, "classes that occur in the train part (these do not: ['b'])"),
        ({"authors": LABELS}, "a name for each number of authors"),
        ({"authors": LABELS, "author_names": ("u",)}, "authors that are whole numbers 0 .. 0"),
        ({"authors": LABELS[:3], "author_names": ("u", "v")}, "as many authors as texts"),
        ({"authors": LABELS / 1, "author_names": ("u", "v")}, "authors that are whole numbers"),
        ({"author_names": ("u",)}, "author_names only with authors"),
        ({"second_texts": TEXTS[:3]}, "as many second_texts as texts, 12 (3 are here)"),
        ({"second_texts": [None] * 12}, "second_texts that are text"),
        ({"second_texts": ["", *TEXTS[1:]]}, "second_texts that are not empty"),
        ({"name": ""}, "a task with a name"),
    ],
)
def test_a_task_holds_its_fields_to_what_they_should_be(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(fedtune.UsageError) as caught:
        task_with(**changes)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_task_that_is_there_takes_no_options() -> None:
    with pytest.raises(fedtune.UsageError, match=r"task_options: got .*folder.*allowed: no options"):
        load_task(task_with(), {"folder": "x"})
    for options in (["path"], {1: 2}):
        with pytest.raises(fedtune.UsageError, match=r"task_options: got .*; allowed: a dictionary"):
            load_task("csv", options)


def test_options_that_a_task_does_not_know_are_refused() -> None:
    with pytest.raises(fedtune.UsageError, match="the arguments of task 'csv': path, text"):
        load_task("csv", {"file": "x.csv"})
    with pytest.raises(fedtune.UsageError, match=r"the arguments of task 'csv': delimiter \(nearest\)"):
        load_task("csv", {"path": "x.csv", "delimeter": ";"})


def test_the_table_of_what_was_taken_is_true() -> None:
    table = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text()
    for author, (corpus, _) in AUTHORS.items():
        written, parts = list(documents_of(author)), passages_of(author)
        counts = " | ".join(
            f"{len({p.document for p in parts[part]})} / {len(parts[part])}" for part in ("train", "validation", "test")
        )
        words = sum(len(passage.text.split()) for chosen in parts.values() for passage in chosen)
        assert f"| {author} | `{corpus}` | {len(written)} | {sum(map(len, written)):,} | {counts} | {words:,} |" in table
