from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

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


def test_options_that_a_task_does_not_know_are_refused() -> None:
    with pytest.raises(fedtune.UsageError, match="the arguments of task 'csv': path, text"):
        load_task("csv", {"file": "x.csv"})


def test_the_table_of_what_was_taken_is_true() -> None:
    table = (Path(__file__).parent.parent / "docs" / "tasks.md").read_text()
    for author, (corpus, _) in AUTHORS.items():
        written, parts = list(documents_of(author)), passages_of(author)
        counts = " | ".join(
            f"{len({p.document for p in parts[part]})} / {len(parts[part])}" for part in ("train", "validation", "test")
        )
        words = sum(len(passage.text.split()) for chosen in parts.values() for passage in chosen)
        assert f"| {author} | `{corpus}` | {len(written)} | {sum(map(len, written)):,} | {counts} | {words:,} |" in table
