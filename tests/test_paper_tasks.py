"""The paper's tasks, on the real files where `FEDTUNE_DATA` names them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import fedtune
from fedtune.data.registry import load_task

real = pytest.mark.skipif(not os.environ.get("FEDTUNE_DATA"), reason="FEDTUNE_DATA names no folder with the real data")


@real
def test_spooky_is_split_exactly_as_scikit_learn_splits_it() -> None:
    model_selection = pytest.importorskip("sklearn.model_selection")
    task = load_task("spooky_author", {"validation": 0.0})
    numbers = np.arange(19_579)
    train, test = model_selection.train_test_split(numbers, train_size=0.75, shuffle=True, random_state=1)
    file = load_rows(Path(os.environ["FEDTUNE_DATA"]) / "spooky_author" / "train.csv.gz")
    assert [task.texts[row] for row in task.parts["train"]] == [file[i]["text"] for i in train]
    assert [task.label_names[task.labels[row]] for row in task.parts["test"]] == [file[i]["author"] for i in test]
    assert task.label_names == task.author_names == ("EAP", "HPL", "MWS")
    assert len(task.parts["validation"]) == 0


def load_rows(path: Path) -> list[dict[str, str]]:
    import csv
    import gzip

    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@real
def test_imdb_has_its_rows_and_label_order() -> None:
    task = load_task("imdb")
    assert {part: len(rows) for part, rows in task.parts.items()}["test"] == 25_000
    assert len(task.parts["train"]) + len(task.parts["validation"]) == 25_000
    assert task.label_names == ("neg", "pos")
    assert np.bincount(task.labels).tolist() == [25_000, 25_000]


@real
def test_a_partial_ag_news_is_refused_or_says_so() -> None:
    with pytest.raises(fedtune.UsageError, match=r"task_options\.allow_partial: got False; allowed: true"):
        load_task("agnews")
    task = load_task("agnews", {"allow_partial": True})
    assert task.name == "agnews (partial: 27,662 of 120,000 training rows)"
    assert np.bincount(task.labels[task.parts["test"]]).tolist() == [1_900] * 4
    data = fedtune.FederatedDataModule(task="agnews", task_options={"allow_partial": True})
    assert data.task.name == task.name


def write(folder: Path, **files: str) -> str:
    for name, text in files.items():
        (folder / f"{name}.csv").write_text(text)
    return str(folder)


def test_formats_are_those_of_the_distributors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.data.hilmkil.ROWS", {"yelp": (4, 1), "agnews": (4, 1), "imdb": (3, 1)})
    stars = write(tmp_path, train='"5","great ""food"""\n"1","bad"\n"3","so so"\n"2","meh"\n', test='"2","hm"\n')
    with pytest.raises(fedtune.UsageError, match=r"train part .*3 stars|these do not"):
        load_task("yelp", {"folder": write(tmp_path, test='"4","hm"\n'), "validation": 0.0})
    write(tmp_path, test='"2","hm"\n')
    task = load_task("yelp", {"folder": stars, "validation": 0.0})
    assert (task.texts[0], task.labels[0]) == ('great "food"', 4)
    news = write(tmp_path, train='"3","T","one"\n"4","","two"\n"1","T","x"\n"2","T","y"\n', test='"1","U","three"\n')
    assert load_task("agnews", {"folder": news, "validation": 0.0}).texts == ["one", "two", "x", "y", "three"]
    assert load_task("agnews", {"folder": news, "validation": 0.0, "title": True}).texts[0] == "T one"
    reviews = write(tmp_path, train="text,label\nA,neg\nB,pos\nC,pos\n", test="text,label\nD,neg\n")
    assert load_task("imdb", {"folder": reviews, "validation": 0.0}).labels.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        ("imdb", {"folder": "/no/such"}, "folder: got '/no/such'; allowed: a folder with the files of imdb"),
        ("spooky_author", {}, "a folder with Kaggle's train.csv"),
        ("yelp", {}, "the hub's Yelp/yelp_review_full cannot be reached"),
        ("imdb", {"folder": "."}, "a folder with a readable train.csv"),
    ],
)
def test_without_the_files_it_is_said_what_is_missing(
    task: str, options: dict, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("FEDTUNE_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fedtune.UsageError) as caught:
        load_task(task, options)
    assert said in str(caught.value)


def test_an_incomplete_data_set_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, train="text,label\nA,neg\nB,pos\n", test="text,label\nC,neg\n")
    with pytest.raises(fedtune.UsageError, match=r"\(25000, 25000\) rows to train and test \(here are \(2, 1\)\)"):
        load_task("imdb", {"folder": folder})


GOOD = {"train": '"3","T","one"\n"4","","two"\n"1","T","x"\n"2","T","y"\n', "test": '"1","U","three"\n'}


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"test": '"1","U"\n'}, {}, "test.csv'; allowed: a file of 3 columns (line 1 has 2)"),
        ({"train": GOOD["train"] + '"1","T"\n'}, {}, "rows of 3 fields like the first (line 5 has 2)"),
        ({"train": GOOD["train"].replace('"two"', '""')}, {}, "row 2 of"),
        ({"train": GOOD["train"].replace('"two"', '"two')}, {}, "begins in line 2 breaks in line 3"),
        ({"train": GOOD["train"].replace('"4"', '"5"')}, {}, "the labels 1, 2, 3, 4"),
        ({"train": "label,title,text\n" + GOOD["train"]}, {}, "a file without a header"),
        ({"train": ""}, {}, "a file that is not empty"),
        ({}, {"validation": "0.1"}, "validation: got '0.1'; allowed: a number"),
        ({}, {"validation": 1}, "validation: got 1; allowed: a number"),
        ({}, {"validation": float("nan")}, "validation: got nan"),
        ({}, {"title": "false"}, "title: got 'false'; allowed: true or false"),
        ({}, {"allow_partial": 1}, "allow_partial: got 1; allowed: true or false"),
    ],
)
def test_a_file_that_is_not_the_distributors_is_named(
    changes: dict, options: dict, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.data.hilmkil.ROWS", {"agnews": (4, 1)})
    folder = write(tmp_path, **(GOOD | changes))
    with pytest.raises(fedtune.UsageError) as caught:
        load_task("agnews", {"folder": folder, "validation": 0.0} | options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(GOOD["train"].encode())[:-9])
    with pytest.raises(fedtune.UsageError, match=r"a folder with a readable test\.csv or test\.csv\.gz"):
        load_task("agnews", {"folder": str(tmp_path)})
    write(tmp_path, test=GOOD["test"])
    with pytest.raises(fedtune.UsageError, match=r"train\.csv\.gz'; allowed: a readable CSV file, whole and not damaged"):
        load_task("agnews", {"folder": str(tmp_path)})


def on_the_hub(monkeypatch: pytest.MonkeyPatch, **columns: list) -> None:
    import datasets

    monkeypatch.delenv("FEDTUNE_DATA", raising=False)
    monkeypatch.setattr("fedtune.data.hilmkil.ROWS", {"imdb": (2, 2), "agnews": (2, 2), "yelp": (2, 2)})
    rows = datasets.Dataset.from_dict(columns)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=rows, test=rows))


def test_columns_of_the_hub_give_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    on_the_hub(monkeypatch, title=["T", None], description=["one", "two"], label=[4, 1])
    assert list(load_task("agnews", {"validation": 0.0}).texts) == ["one", "two"] * 2
    task = load_task("agnews", {"validation": 0.0, "title": True})
    assert (list(task.texts[:2]), task.labels.tolist()) == (["T one", "two"], [3, 0, 3, 0])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"text": [["a"], ["b"]], "label": [0, 1]},
            "text: got 'text'; allowed: a column of texts (in split train of stanfordnlp/imdb",
        ),
        ({"text": [{"a": 1}, {"a": 2}], "label": [0, 1]}, "holds struct"),
        ({"text": [1, 2], "label": [0, 1]}, "holds int64"),
        ({"text": [b"a", b"b"], "label": [0, 1]}, "holds binary"),
        ({"text": ["a", None], "label": [0, 1]}, "row 2 of split train of stanfordnlp/imdb is empty"),
        ({"text": ["a", "b"], "label": [[0], [1]]}, "multi-label"),
        ({"text": ["a", "b"], "label": [0.5, 1]}, "regression"),
        ({"text": ["a", "b"], "label": [None, 1]}, "label: got 'label'; allowed: a column without empty values"),
        ({"text": ["a", "b"], "label": [1, 2]}, "the labels 0, 1 (row 2 of split train"),
        (
            {"text": ["a", "b"], "stars": [0, 1]},
            "label: got 'label'; allowed: a column of stanfordnlp/imdb, split train: text, stars",
        ),
    ],
)
def test_columns_of_the_hub_that_hold_something_else_are_named(
    columns: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_the_hub(monkeypatch, **columns)
    with pytest.raises(fedtune.UsageError) as caught:
        load_task("imdb")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
