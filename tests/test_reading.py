"""Reading of texts: every row as it stands in the file, or one line that says where the file is not what it should be."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import fedtune
from fedtune.data.registry import load_task

ROWS = [(f"row number {i}", "pos" if i % 2 else "neg") for i in range(40)]
BODY = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)
TEXTS, LABELS = [list(column) for column in zip(*ROWS, strict=True)]
KINDS = ("csv", "jsonl", "parquet", "hub")


@pytest.fixture(autouse=True)
def _own_cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def read(content: str | bytes, name: str = "data.csv", **options: Any) -> fedtune.TextTask:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return fedtune.TextTask.from_csv(name, **options)


def refused(make: Callable[..., Any], *values: Any, **options: Any) -> str:
    """The line with which something is refused."""
    with pytest.raises(fedtune.UsageError) as caught:
        make(*values, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def arrow(**columns: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def make(kind: str, columns: dict[str, list[Any]], **options: Any) -> fedtune.TextTask:
    """A task of columns that were written in one of the formats; a missing value is an empty field of a CSV file."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if kind == "csv":
        fields = [["" if value is None else str(value) for value in row.values()] for row in rows]
        return read("\n".join(map(",".join, [list(columns), *fields])), "data.csv", **options)
    if kind == "jsonl":
        return read("\n".join(map(json.dumps, rows)), "data.jsonl", **options)
    if kind == "parquet":
        return read(arrow(**columns), "data.parquet", **options)
    Path("folder").mkdir(exist_ok=True)
    (Path("folder") / "train.parquet").write_bytes(arrow(**columns))
    return fedtune.TextTask.from_hub("folder", **options)


# ---------------------------------------------------------------- CSV files


@given(
    rows=st.lists(
        st.tuples(st.text("ab,\"\n\r'; é", min_size=1), st.sampled_from("xyz")), min_size=8, max_size=20, unique=True
    ),
    delimiter=st.sampled_from(",;\t|"),
)
@settings(deadline=None, max_examples=60)
def test_what_a_csv_writer_wrote_is_read_as_it_was(
    rows: list[tuple[str, str]], delimiter: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import csv

    rows = [(f"w {text}", label) for text, label in rows] + [(f"{i}", "xyz"[i % 3]) for i in range(60)]
    path = tmp_path_factory.mktemp("written") / "data.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([("text", "label"), *rows])
    task = fedtune.TextTask.from_csv(path, delimiter=delimiter)
    assert list(task.texts) == [text for text, _ in rows]
    assert [task.label_names[label] for label in task.labels] == [label for _, label in rows]


@pytest.mark.parametrize(
    ("content", "options"),
    [
        (b"\xef\xbb\xbf" + BODY.encode(), {}),
        (BODY.replace("\n", "\r\n"), {}),
        (BODY.replace("\n", "\r"), {}),
        (BODY.replace("row number 7", "\n\nrow number 7") + "\n\n", {}),
        (BODY.replace("text,label", " text , label"), {}),
        (BODY.replace(",", ";"), {"delimiter": ";"}),
        (BODY.replace(",", "\t"), {"delimiter": "\\t"}),
        (BODY.encode("utf-16"), {"encoding": "utf-16"}),
        (BODY.replace("row", "'row").replace(",neg", "',neg").replace(",pos", "',pos"), {"quote": "'"}),
        (BODY.partition("\n")[2], {"header": False, "text": 0, "label": 1}),
        (BODY, {"text": 0, "label": "label"}),
        (BODY.replace(",pos", ", pos").replace(",neg", ", neg"), {}),
    ],
)
def test_forms_of_one_table_are_one_task(content: str | bytes, options: dict[str, Any]) -> None:
    task = read(content, **options)
    assert list(task.texts) == TEXTS
    assert [task.label_names[label] for label in task.labels] == LABELS


def test_a_field_keeps_its_lines_and_a_later_fault_its_line_in_the_file() -> None:
    body = BODY.replace("row number 3,", '"row\r\nnumber, or ""three""\n",')
    assert read(body).texts[3] == 'row\r\nnumber, or "three"\n'
    assert "row 31 of data.csv, line 34, is empty" in refused(read, body.replace("row number 30", " "))


def test_quotes_are_letters_where_there_is_no_quote() -> None:
    task = read(BODY.replace("row number 3,", '"row number 3,').replace("row number 5,", 'a 5" disk,'), quote=None)
    assert (task.texts[3], task.texts[5], len(task.texts)) == ('"row number 3', 'a 5" disk', 40)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (BODY.replace("row number 5,", "row, number 5,"), "rows of 2 fields like the first (line 7 has 3)"),
        (BODY.replace("row number 38,neg", "row number 38"), "rows of 2 fields like the first (line 40 has 1)"),
        (BODY.replace("row number 5,pos", "  "), "line 7 has 1"),
        (BODY.replace("row number 3,", '"row number 3,'), "begins in line 5 breaks in line 41: unexpected end"),
        (
            BODY.replace("row number 3,", '"row number 3,').replace("row number 9,", '"row number 9,'),
            "in line 5 breaks in line 11",
        ),
        (BODY.replace("row number 3,", '"row number 3,').replace("row number 9,", 'row number 9",'), "line 5 swallows 6 lines"),
        (BODY.replace("row number 5,", 'a 5" disk,'), "line 7 has another one); or quote: null"),
        (BODY.replace("row number 5,", '"row" number 5,'), "begins in line 7"),
        (BODY.replace("row number 5,", "row\0number 5,"), "line 7 holds a NUL byte"),
        (BODY.replace("row number 5,", "r\u00f6w,").encode("latin-1"), "a file in UTF-8, or with its encoding named (line 7"),
        (BODY + BODY, "a file with one header (line 42 repeats it)"),
        ("", "a file that is not empty"),
        ("\r\n\n", "a file that is not empty"),
        (BODY.replace("text,", "label,"), "text: got 'text'"),
        (BODY.replace("text,label", "text,text"), "text: got 'text'; allowed: a column whose name is there once"),
        (BODY.replace(",", ";"), "only one column: is the delimiter right?"),
        (BODY.replace("text,label", "tekst,label"), "a column of data.csv: tekst (nearest), label"),
        (BODY.replace("number 9,pos", "number 9,nan"), "row 10 of data.csv, line 11, holds 'nan'"),
        (BODY.replace("number 9,pos", "number 9,"), "row 10 of data.csv, line 11, is empty"),
        (BODY.replace("number 9,pos", "number 9,pos "), "label: got 'pos and pos '; allowed: one spelling"),
        (BODY.replace(",pos", ",caf\u00e9").replace("9,caf\u00e9", "9,cafe\u0301"), "allowed: one spelling for each value"),
        (BODY.replace("9,pos", "9,\u200bpos"), "allowed: one spelling for each value"),
    ],
)
def test_no_row_is_lost_or_guessed(body: str | bytes, said: str) -> None:
    line = refused(read, body)
    assert said in line
    assert "data.csv" in line or line.startswith("label:")


def test_a_label_first_does_not_make_lines_of_a_text_suspicious() -> None:
    body = "label,text\n" + "".join(f'{i % 2},"{i} of them,\nand more"\n' for i in range(30))
    assert len(read(body).texts) == 30
    quoted = "id,label,text\n" + "".join(f'"{i}","{i % 2}","{i} of them\nand more"\n' for i in range(30))
    assert len(read(quoted).texts) == 30
    lines = ["label,text", *(f"{i % 2},{i} of them" for i in range(30))]
    lines[6], lines[8] = '1,"5 of them', '1,7 of them"'
    assert "a quote that opens in line 7 swallows 2 lines that are rows themselves, with the label '0'" in refused(
        read, "\n".join(lines)
    )


LOG = '"Tea,pos\ncoffee,neg\nboth,pos",neg\n'


@pytest.mark.parametrize(
    "body",
    [
        BODY + '"Well,pos\nbye",neg\n"a text, with a comma",pos\n',
        BODY + LOG.replace("both", '""both""'),
        BODY + '"Well,pos\nbye,neg\nreally,pos","neg"\n',
        BODY + LOG + '"a text, with a comma",pos\n',
        '"text","label"\n' + "".join(f'"Well,{label}\nbye,{label}\n{text}","{label}"\n' for text, label in ROWS),
        "text,label\n" + "".join(f'"{text}",{label}\n' for text, label in ROWS) + LOG,
        "text,label\n" + "".join(LOG.replace("both", text).replace("neg\n", f"{label}\n") for text, label in ROWS),
    ],
)
def test_texts_whose_lines_look_like_rows_are_read_where_fields_are_quoted_by_rule(body: str) -> None:
    import csv

    texts = [text for text, _ in csv.reader(io.StringIO(body))][1:]
    assert list(read(body).texts) == texts
    assert any("\n" in text for text in texts)


def test_stray_quotes_are_found_where_no_field_needs_them() -> None:
    one = BODY.replace("row number 3,", '"row number 3,').replace("row number 4,", 'row number 4",')
    assert "line 5 swallows 1 lines" in refused(read, one)
    body = BODY.replace("row number 7,", '"row number 7,').replace("row number 20,", '"row number 20",')
    assert "in line 9 breaks in line 22" in refused(read, body)
    for row in (3, 10):
        body = body.replace(f"row number {row},", f'"row number {row},')
        body = body.replace(f"row number {row + 1},", f'row number {row + 1}",')
    body = body.replace('"row number 7,', "row number 7,").replace('"row number 20",', '"row number 20",')
    assert "line 5 swallows 1 lines" in refused(read, body)


def test_a_header_that_is_none_and_one_that_was_not_expected_are_found() -> None:
    bare = BODY.partition("\n")[2]
    assert "header: got True; allowed: false" in refused(read, bare, text=0, label=1)
    assert "header: got False; allowed: true" in refused(read, BODY, text=0, label=1, header=False)
    numbers = BODY.replace(",pos", ",1").replace(",neg", ",2")
    assert "its first line: 'text', 'label'" in refused(read, numbers, text=0, label=1, header=False)
    assert read(BODY.replace("label", "pos", 1), label="pos").label_names == ("neg", "pos")  # a name is no label
    assert "the label '2'" in refused(read, numbers.partition("\n")[2], text=0, label=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"delimiter": ",,"}, "delimiter: got ',,'; allowed: one character"),
        ({"delimiter": "\n"}, "delimiter"),
        ({"quote": ","}, "quote: got ','; allowed: another character than the delimiter"),
        ({"encoding": "klingon"}, "encoding: got 'klingon'"),
        ({"encoding": "rot13"}, "encoding: got 'rot13'"),
        ({"header": "no"}, "header: got 'no'; allowed: true or false"),
        ({"header": False}, "text: got 'text'; allowed: the number of a column, 0 .. 1"),
        ({"label": 2}, "label: got 2; allowed: a number of a column of data.csv, 0 .. 1"),
        ({"label": -1}, "label: got -1"),
        ({"label": True}, "label: got True; allowed: the name of a column, or its number"),
        ({"text": None}, "text: got None"),
        ({"label": "text"}, "label: got 'text'; allowed: another column than that of text"),
        ({"label": 0}, "label: got 0; allowed: another column than that of text"),
        ({"author": "text"}, "author: got 'text'; allowed: another column"),
        ({"document": "label"}, "document: got 'label'; allowed: another column than that of label"),
        ({"format": "excel"}, "format: got 'excel'; allowed: csv, jsonl, parquet"),
        ({"test_split": "validation"}, "split: got None"),
        ({"test_path": "none.csv"}, "test_path: got 'none.csv'; allowed: a readable CSV file (there is none)"),
        ({"test_path": "data.csv"}, "test_path: got 'data.csv'; allowed: another file than path"),
        ({"split": "label", "test_path": "x.csv"}, "split: got 'label'"),
    ],
)
def test_a_wrong_option_is_refused_before_the_file_is_read(options: dict[str, Any], said: str) -> None:
    assert said in refused(read, BODY + 'a row that is not right, "', **options)


# ---------------------------------------------------------------- other files


def members(**named: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in named.items():
            archive.writestr(name, text)
    return file.getvalue()


LINES = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS)
COMPRESSED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        *((f"data.csv{ending}", compress(BODY.encode()), {}) for ending, compress in COMPRESSED.items()),
        ("data.zip", members(**{"inside.csv": BODY}), {}),
        ("data.jsonl.zip", members(**{"whatever": LINES}), {}),
        ("data.tsv", BODY.replace(",", "\t"), {}),
        ("DATA.TSV.GZ", gzip.compress(BODY.replace(",", "\t").encode()), {}),
        ("data.jsonl", LINES, {}),
        ("data.json", LINES.replace("\n", "\r\n\r\n"), {}),
        ("data.ndjson.xz", lzma.compress(b"\xef\xbb\xbf" + LINES.encode()), {}),
        ("data.parquet", arrow(text=TEXTS, label=LABELS), {}),
        ("data.parquet.gz", gzip.compress(arrow(text=TEXTS, label=pyarrow.array(LABELS).dictionary_encode())), {}),
        ("data.txt", BODY, {"format": "csv"}),
        ("data.jsonl", LINES.replace("}", ', "score": NaN, "id": ' + "1" * 5000 + "}"), {}),
        ("data.zip", members(**{"data.csv": BODY, "__MACOSX/._data.csv": "x", ".DS_Store": "x", "a/._b": "x"}), {}),
        ("data.zip", members(**{"data.tsv": BODY.replace(",", "\t")}), {}),
        ("data.zip", members(**{"data.tsv": BODY.replace(",", "\t")}), {"format": "csv"}),
        ("data.csv.zip", members(**{"data.tsv": BODY.replace(",", "\t")}), {}),
        ("data.zip", members(**{"data.txt": BODY}), {"format": "csv"}),
        ("data.csv", BODY + "   ", {}),
        ("data.csv", BODY + " \r\n\n  \n", {}),
        ("data.csv", BODY + "\x1a", {}),
        ("data.csv", BODY.rstrip() + "\x1a", {}),
        ("data.jsonl", LINES + "\x1a", {}),
    ],
)
def test_a_file_is_read_by_its_ending(name: str, content: str | bytes, options: dict[str, Any]) -> None:
    task = read(content, name, **options)
    assert (list(task.texts), task.label_names) == (TEXTS, ("neg", "pos"))
    assert [task.label_names[label] for label in task.labels] == LABELS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data.txt", BODY, "a file whose name ends in .csv, .tsv, .jsonl, .ndjson, .json, .parquet"),
        ("data", BODY, "a file whose name ends in"),
        ("data.gz", gzip.compress(BODY.encode()), "a file whose name ends in"),
        *(
            (f"data.csv{ending}", compress(BODY.encode())[:-9], "whole and not damaged")
            for ending, compress in COMPRESSED.items()
        ),
        *((f"data.csv{ending}", BODY, "whole and not damaged") for ending in COMPRESSED),
        ("data.zip", members(**{"a.csv": BODY, "b.csv": BODY}), "a zip archive of one file (in this there are 2)"),
        ("data.csv.zip", BODY, "whole and not damaged"),
        ("data.jsonl", LINES[:-9], "one JSON object in each line (line 40"),
        ("data.json", f"[{LINES}]", "one JSON object in each line (line 1 begins an array; one object a line is wanted)"),
        ("data.json", "[1]", "line 1 begins an array"),
        ("data.json", "1", "line 1 is a int"),
        ("data.jsonl", "[" * 100_000, "one JSON object in each line (line 1"),
        ("data.jsonl", LINES.replace('"neg"', "NaN"), "row 1 of data.jsonl, line 1, is empty"),
        ("data.jsonl", LINES.replace('"neg"', "1" * 5000), "row 1 of data.jsonl, line 1, holds inf"),
        ("data.jsonl", LINES.replace('"row number 6"', "NaN"), "row 7 of data.jsonl, line 7, is empty"),
        ("data.jsonl", LINES.replace('"label"', '"text"'), "line 1: a name is there twice"),
        ("data.jsonl", LINES.replace('"text": "row number 6"', '"txt": ""'), "row 7 of data.jsonl, line 7, is empty"),
        ("data.jsonl", LINES.replace("row number 6", "\\ud83d"), "whole characters"),
        ("data.jsonl", "", "at least one row"),
        ("data.parquet", BODY, "a readable Parquet file"),
        ("data.parquet", arrow(text=TEXTS, label=LABELS)[:-20], "a readable Parquet file"),
        ("data.parquet", arrow(text=[], label=[]), "at least one row"),
    ],
)
def test_a_file_that_cannot_be_read_whole_is_refused(name: str, content: str | bytes, said: str) -> None:
    assert said in refused(read, content, name)


@pytest.mark.parametrize("ending", COMPRESSED)
def test_all_streams_of_a_compressed_file_count_or_it_is_refused(ending: str) -> None:
    compress, name = COMPRESSED[ending], f"data.csv{ending}"
    streams = [compress(BODY[:100].encode()), compress(BODY[100:].encode())]
    assert list(read(b"".join(streams), name).texts) == TEXTS
    assert list(read(b"".join(streams) + bytes(8), name).texts) == TEXTS  # a last block that is filled up
    for damaged in (streams[0] + b"\1" + streams[1][1:], b"".join(streams) + b"more", b"".join(streams)[:-9], b""):
        assert f"got '{name}'" in refused(read, damaged, name)


def test_a_page_of_parquet_that_is_not_what_its_checksum_says_is_refused() -> None:
    file = io.BytesIO()
    table = pyarrow.table({"text": TEXTS, "label": LABELS})
    parquet.write_table(table, file, compression="none", write_page_checksum=True, write_statistics=False, use_dictionary=False)
    whole = file.getvalue()
    assert list(read(whole, "data.parquet").texts) == TEXTS
    assert "a readable Parquet file" in refused(read, whole.replace(b"row number 7", b"row number 8", 1), "data.parquet")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo("fifo.csv")
    Path("link.csv").symlink_to("/dev/zero")
    Path("folder.csv").mkdir()
    kinds = {
        "fifo.csv": "it is a FIFO",
        "link.csv": "it is a device",
        "folder.csv": "it is a directory",
        "none.csv": "there is none",
    }
    for name, said in (*kinds.items(), ("n" * 300 + ".csv", "File name too long"), ("\ud800.csv", "surrogates not allowed")):
        assert said in refused(fedtune.TextTask.from_csv, name)


@pytest.mark.parametrize("encoding", ["utf-8", "UTF_8", "utf8", "U8", "cp65001"])
def test_a_byte_order_mark_is_dropped_whatever_utf_8_is_called(encoding: str) -> None:
    assert list(read(b"\xef\xbb\xbf" + BODY.encode(), encoding=encoding).texts) == TEXTS


def test_half_a_character_is_no_name_of_a_class_or_an_author() -> None:
    lines = LINES.replace('"pos"', '"\\ud800"')
    assert "whole characters (half of a UTF-16 pair is none) (row 2 of data.jsonl, line 2," in refused(
        read, lines, "data.jsonl"
    )
    lines = LINES.replace("}", ', "author": "\\udfff"}')
    assert "author: got 'author'" in refused(read, lines, "data.jsonl", author="author")
    names = ("a", "\ud800")
    parts = {"train": [0, 1], "test": [2]}
    assert "label_names that are texts and not empty, of whole characters" in refused(
        fedtune.TextTask, "t", ["a", "b", "c"], [0, 1, 0], names, parts
    )


def test_names_in_a_line_are_cut_and_on_one_line() -> None:
    columns = {"text": TEXTS, "a\r\nb": LABELS, "x" * 5000: LABELS} | {f"column {i}": LABELS for i in range(30)}
    line = refused(make, "parquet", columns)
    assert "a column of data.parquet: text, a b, " + "x" * 40 + "…, column 0" in line
    assert line.endswith(" and 13 more")
    columns = {"text": TEXTS, "label": LABELS, "part": ["z" * 5000] * 40}
    assert len(refused(make, "csv", columns, split="part")) < 600


@pytest.mark.parametrize("option", [{"delimiter": ";"}, {"quote": None}, {"header": False}])
def test_an_option_that_says_nothing_about_a_file_is_refused(option: dict[str, Any]) -> None:
    (name,) = option
    assert f"{name}: got {option[name]!r}; allowed: no such option for JSON lines" in refused(read, LINES, "x.jsonl", **option)
    assert "no such option for Parquet" in refused(read, arrow(text=TEXTS, label=LABELS), "x.parquet", **option)


# ---------------------------------------------------------------- values, alike in all formats


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_an_author_is_the_only_one_of_its_author(kind: str) -> None:
    authors = [None if i % 4 == 0 else f"w{i % 3}" for i in range(40)]
    task = make(kind, {"text": TEXTS, "label": LABELS, "author": authors}, author="author", document="author")
    assert task.author_names == ("w0", "w1", "w2", *(f"unknown {number}" for number in range(1, 11)))
    assert np.bincount(task.authors).tolist()[3:] == [1] * 10
    assert [task.author_names[author] for author in task.authors if author < 3] == [name for name in authors if name]
    assert "10 of 40 texts without author: each its own" in task.source
    held_out = {task.authors[row] for row in task.parts["test"]}
    assert len(held_out) == round(0.2 * 13)  # documents, of which ten are single texts
    assert not held_out & set(task.authors[task.parts["train"]])


@pytest.mark.parametrize("spelt", [" ", "nan", "None", "<NA>", "\\N"])
def test_words_for_no_author_are_no_author(spelt: str) -> None:
    task = make("csv", {"text": TEXTS, "label": LABELS, "author": ["A", "unknown"] * 15 + [spelt] * 10}, author="author")
    assert task.author_names == ("A", "unknown", *(f"(unknown) {number}" for number in range(1, 11)))


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("label", [[0], [0, 1]] * 20, "multi-label"),
        ("label", [i / 3 for i in range(40)], "regression"),
        ("label", [{"a": 1}] * 40, "words or whole numbers"),
        ("label", [None, 1] * 20, "is empty"),
        ("label", [-1] * 40, "all 40 labels"),
        ("text", list(range(40)), "text"),
        ("text", [["a"]] * 40, "text"),
        ("text", [{"a": "b"}] * 40, "text"),
        ("text", [None, *TEXTS[1:]], "is empty"),
        ("author", [["a"]] * 40, "words or whole numbers"),
        ("author", [0.5] * 40, "words or whole numbers"),
    ],
)
def test_values_of_other_types_are_named(kind: str, column: str, values: list[Any], said: str) -> None:
    columns = {"text": TEXTS, "label": LABELS, "author": LABELS} | {column: values}
    line = refused(make, kind, columns, author="author")
    assert said in line
    assert line.startswith(f"{column}: got '{column}'")
    assert "data." in line or "split train of folder" in line or "folder/train.parquet" in line


@pytest.mark.parametrize(
    ("labels", "said"),
    [(["0.25", "3"], "regression"), (["[1, 0]", "[0]"], "multi-label"), (["-1", "-1"], "all 40 labels from row 1 of data.csv")],
)
def test_labels_of_csv_files_are_classes(labels: list[str], said: str) -> None:
    body = BODY.replace("neg", f'"{labels[0]}"').replace("pos", f'"{labels[1]}"')
    assert said in refused(read, body)


def test_words_in_square_brackets_are_labels() -> None:
    assert read(BODY.replace(",pos", ",[pos]").replace(",neg", ",[A B]")).label_names == ("[A B]", "[pos]")
    for label in ("[]", "[1]", "[1 0]", "['A']"):
        assert "multi-label" in refused(read, BODY.replace("9,pos", f"9,{label}"))


def test_bytes_and_times_are_named() -> None:
    assert "holds binary" in refused(make, "parquet", {"text": [text.encode() for text in TEXTS], "label": LABELS})
    times = pyarrow.array([0] * 40, pyarrow.timestamp("s"))
    assert "holds timestamp" in refused(make, "hub", {"text": TEXTS, "label": times})


@pytest.mark.parametrize(
    ("values", "names"),
    [([1.0, 0.0], ("0", "1")), ([True, False], ("False", "True")), ([10, 9], ("9", "10")), ([-1, 1], ("-1", "1"))],
)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_numbers_are_class_names_in_their_order(kind: str, values: list[Any], names: tuple[str, ...]) -> None:
    task = make(kind, {"text": TEXTS, "label": values * 20})
    assert task.label_names == names
    assert [task.label_names[label] for label in task.labels[:2]] == [names[sorted(values).index(value)] for value in values]


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_are_read_and_count_in_the_digest(kind: str) -> None:
    columns = {"text": TEXTS, "label": LABELS, "second": [f"answer {i}" for i in range(40)]}
    task = make(kind, columns, second_text="second")
    assert list(task.second_texts or ()) == columns["second"]
    plain, other = make(kind, columns), make(kind, columns | {"second": columns["second"][::-1]}, second_text="second")
    assert plain.second_texts is None
    digests = {fedtune.FederatedDataModule(one, "minilm", max_length=16).digest for one in (task, plain, other)}
    assert len(digests) == 3
    assert "row 7 of" in refused(
        make, kind, columns | {"second": [None if i == 6 else "x" for i in range(40)]}, second_text="second"
    )


# ---------------------------------------------------------------- parts


SPLIT = ["train", "dev", " Train", " TEST"] * 10


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_column_says_which_part_a_text_is_in(kind: str) -> None:
    columns = {"text": TEXTS, "label": ["a", "b", "b", "a"] * 10, "part": SPLIT}

    def found(**options: str) -> dict[str, set[str]]:
        task = make(kind, columns, split="part", **options)
        return {part: {task.texts[row] for row in rows} for part, rows in task.parts.items()}

    own = {name: {text for text, split in zip(TEXTS, SPLIT, strict=True) if split == name} for name in SPLIT}
    train = own["train"] | own[" Train"]
    assert found() == {"train": train, "validation": own["dev"], "test": own[" TEST"]}
    other = found(test_split="dev")
    assert other["test"] == own["dev"]
    assert other["train"] | other["validation"] == train
    cut = found(test_split="train")
    assert (cut["validation"], cut["train"] | cut["test"]) == (own["dev"], train)
    assert "row 2 of" in refused(make, kind, columns | {"part": ["train", "fold 2"] * 20}, split="part")
    assert "test_split: got 'tset'; allowed: a split of" in refused(make, kind, columns, split="part", test_split="tset")
    assert "validation_split" in refused(make, kind, columns, split="part", test_split="dev", validation_split="dev")


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        (("train", "valid", "eval"), {}, "validation_split: got None; allowed: a choice, as several are named like validation"),
        (("train", "valid", "eval"), {"test_split": "validation"}, "test_split: got None; allowed: a choice"),
        (("train", "training", "test"), {}, "named like train: train, training"),
        (("train", "dev", "val", "test"), {"test_split": "train"}, "named like validation: dev, val"),
        (("train", "test", "heldout"), {}, "named like test: test, heldout"),
        (("train", "dev"), {"validation_split": "dev", "test_split": "val"}, "another split than test_split"),
        (("train", "fold 1", "fold 2"), {"test_split": "fold 1"}, "row 3 of data.csv, line 4, has 'fold 2'"),
    ],
)
def test_several_values_that_mean_one_part_have_to_be_chosen(values: Any, options: dict[str, str], said: str) -> None:
    columns = {"text": TEXTS, "label": [str(i // 5 % 2) for i in range(40)], "part": (list(values) * 40)[:40]}
    assert said in refused(make, "csv", columns, split="part", **options)


@pytest.mark.parametrize(
    ("values", "options", "chosen"),
    [
        (("train", "valid", "eval"), {"validation_split": "valid", "test_split": "eval"}, ("train", "valid", "eval")),
        (("train", "valid", "eval"), {"test_split": "Eval "}, ("train", "valid", "eval")),
        (("train", "training", "test", "dev"), {"train_split": "training"}, ("training", "dev", "test")),
        (("train", "dev", "test", "heldout"), {"test_split": "heldout"}, ("train", "dev", "heldout")),
        (("1", "2", "3"), {"train_split": "1", "validation_split": "3", "test_split": "2"}, ("1", "3", "2")),
    ],
)
def test_parts_of_a_column_are_those_chosen_and_share_no_row(values: Any, options: dict[str, str], chosen: Any) -> None:
    column = (list(values) * 40)[:40]
    columns = {"text": TEXTS, "label": [str(i // 5 % 2) for i in range(40)], "part": column}
    task = make("csv", columns, split="part", **options)
    for part, value in zip(("train", "validation", "test"), chosen, strict=True):
        assert [task.texts[row] for row in task.parts[part]] == [TEXTS[i] for i in range(40) if column[i] == value]
    assert len(set(task.texts)) == len(task.texts)


def test_an_unlabelled_part_is_named_and_another_can_be_taken() -> None:
    labels = ["-1" if split == " TEST" else LABELS[i // 4 % 2] for i, split in enumerate(SPLIT)]
    columns = {"text": TEXTS, "label": labels, "part": SPLIT}
    line = refused(make, "csv", columns, split="part")
    assert line.startswith("test_split: got 'test'; allowed: data with labels (all 10 labels from row 4 of data.csv, line 5,")
    assert "test_split=dev, or test_split=train" in line
    assert len(make("csv", columns, split="part", test_split="validation").parts["test"]) == 10
    Path("test.csv").write_text("text,label\nnew,\nnewer,\n")
    assert "test_path: got 'test.csv'; allowed: data with labels (all 2 labels" in refused(read, BODY, test_path="test.csv")


def hub(name: str = "folder", **splits: dict[str, list[Any]]) -> str:
    import datasets

    kind = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    Path(name).mkdir()
    for split, columns in splits.items():
        (Path(name) / f"{split}.parquet").unlink(missing_ok=True)
        datasets.Dataset.from_dict(columns, features=kind).to_parquet(f"{name}/{split}.parquet")
    return name


def some(label: Callable[[int], int], count: int = 20, word: str = "text") -> dict[str, list[Any]]:
    return {"text": [f"{word} {i}" for i in range(count)], "label": [label(i) for i in range(count)]}


def test_the_unlabelled_test_split_of_a_benchmark_is_named_and_another_can_be_taken() -> None:
    name = hub(train=some(lambda i: i % 2), validation=some(lambda i: i % 2, 8, "v"), test=some(lambda i: -1, 5, "t"))
    line = refused(load_task, "hub", {"path": name})
    assert line.startswith(
        "task_options.test_split: got 'test'; allowed: data with labels (all 5 labels from row 1 of split test of"
    )
    assert "test_split=validation, or test_split=train" in line
    task = load_task("hub", {"path": name, "test_split": "validation"})
    assert {task.texts[row] for row in task.parts["test"]} == {f"v {i}" for i in range(8)}
    assert (len(task.parts["validation"]), task.label_names) == (2, ("no", "yes"))
    cut = load_task("hub", {"path": name, "test_split": "train"})
    assert (len(cut.parts["train"]), len(cut.parts["validation"]), len(cut.parts["test"])) == (16, 8, 4)
    assert "task_options.test_split: got 'tset'; allowed: a split of" in refused(
        load_task, "hub", {"path": name, "test_split": "tset"}
    )


def test_single_labels_that_are_none_are_named_by_row_and_split() -> None:
    name = hub(train=some(lambda i: i % 2), test=some(lambda i: -1 if i == 3 else i % 2, 8))
    assert "(row 4 of split test of folder holds -1)" in refused(fedtune.TextTask.from_hub, name)


def test_splits_of_several_names_are_chosen_and_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    parts = {"train": 20, "validation_matched": 8, "validation_mismatched": 8, "test_matched": 4}
    found = {name: datasets.Dataset.from_dict(some(lambda i: i % 2, count, name)) for name, count in parts.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(found))
    line = refused(load_task, "hub", {"path": "some/mnli"})
    assert "validation_split: got None; allowed: a choice, as no split is simply named validation: validation_matched" in line
    options = {"path": "some/mnli", "validation_split": "validation_matched", "test_split": "validation_mismatched"}
    task = load_task("hub", options)
    assert {task.texts[row].split()[0] for row in task.parts["test"]} == {"validation_mismatched"}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"train.csv": BODY.replace("row number 5,", "row, number 5,")}, "folder/train.csv'; allowed: rows of 2 fields"),
        ({"train.csv": BODY.replace("row number 5,pos", "row number 5")}, "line 7 has 1"),
        ({"train.csv": BODY, "test.csv": BODY.replace("row number 3,", '"row number 3,')}, "folder/test.csv"),
        ({"train.jsonl": LINES[:-9]}, "a data set of the hub or a local folder"),
        ({"train.parquet": BODY}, "a readable Parquet file"),
        ({"notes.bin": ""}, "a data set of the hub or a local folder"),
    ],
)
def test_files_of_a_local_folder_are_read_as_strictly(
    files: dict[str, str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("folder").mkdir()
    for name, text in files.items():
        (Path("folder") / name).write_text(text)
    assert said in refused(fedtune.TextTask.from_hub, "folder")
    assert "Failed" not in capfd.readouterr().err


def test_a_local_csv_folder_with_types_has_its_class_names_and_is_checked_as_strictly() -> None:
    Path("folder").mkdir()
    names = "".join(f"          '{number}': {name}\n" for number, name in enumerate(("bad", "good")))
    label = f"  - name: label\n    dtype:\n      class_label:\n        names:\n{names}"
    kinds = f"  features:\n  - name: text\n    dtype: string\n{label}"
    (Path("folder") / "README.md").write_text(f"---\ndataset_info:\n{kinds}---\n")
    body = BODY.replace(",neg", ",0").replace(",pos", ",1")
    (Path("folder") / "train.csv").write_text(body)
    assert fedtune.TextTask.from_hub("folder").label_names == ("bad", "good")
    (Path("folder") / "train.csv").write_text(body.replace("row number 3,", '"row number 3,').replace("r 9,", 'r 9",'))
    assert "line 5 swallows 6 lines" in refused(fedtune.TextTask.from_hub, "folder")


def test_words_of_a_local_csv_folder_stay_words() -> None:
    Path("folder").mkdir()
    (Path("folder") / "train-0.csv").write_text(BODY.replace("row number 5,", "NA,").replace("row number 6,", "007,"))
    (Path("folder") / "train-1.csv").write_text(BODY.replace("row", "line"))
    task = fedtune.TextTask.from_hub("folder")
    assert (task.texts[5], task.texts[6], len(task.texts)) == ("NA", "007", 80)


def test_files_of_a_folder_that_are_left_out_are_named() -> None:
    Path("folder/sub").mkdir(parents=True)
    for name in ("train.csv", "test.csv"):
        (Path("folder") / name).write_text(BODY.replace("row", name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(fedtune.TextTask.from_hub("folder").texts) == 80
        for name, text in ((".hidden.csv", BODY), ("dataset_infos.json", "{}"), ("notes.txt", BODY)):
            (Path("folder") / name).write_text(text)
        assert len(fedtune.TextTask.from_hub("folder").texts) == 80
    for name in ("other.csv", "sub/data.jsonl.gz"):
        (Path("folder") / name).write_text(BODY)
    with pytest.warns(UserWarning, match=r"not read of folder: other.csv, sub/data.jsonl.gz; other files"):
        assert len(fedtune.TextTask.from_hub("folder").texts) == 80
    (Path("folder") / "README.md").write_text("---\nconfigs: [\n---\n")
    assert "a data set of the hub or a local folder (while parsing" in refused(fedtune.TextTask.from_hub, "folder")


def test_the_folder_that_one_is_in_is_a_task_of_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("folder").mkdir()
    (Path("folder") / "train.csv").write_text(BODY)
    monkeypatch.chdir("folder")
    assert fedtune.TextTask.from_hub(".").name == "folder"


@pytest.mark.parametrize("options", [{"text": "txt"}, {"test_split": "tset"}, {"author": "label", "document": "book"}])
def test_a_wrong_option_is_refused_before_a_data_set_is_loaded(
    options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("it was loaded"))
    name = hub(train=some(lambda i: i % 2), test=some(lambda i: i % 2, 5, "t"))
    assert f"got {list(options.values())[-1]!r}; allowed: a" in refused(fedtune.TextTask.from_hub, name, **options)


def test_without_the_package_datasets_the_pip_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "after: pip install datasets" in refused(fedtune.TextTask.from_hub, "some/set")
