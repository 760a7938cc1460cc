"""Whatever stands where data are read: the rows that another reader finds there, or one line; and the tokens that they have."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import os
import random
import re
import shutil
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from cases import FIRST, assert_good, share, tried
from conftest import save_tiny_bert, save_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from test_folders import FOLDERS, NEW, OTHERS, WAYS, bounded, flipped

import fedtune
from fedtune.data.registry import load_task
from fedtune.data.tokens import tokenise
from fedtune.errors import RunError, UsageError
from fedtune.models.pretrained import load_tokenizer
from fedtune.runs import figures

Table = dict[str, list[Any]]
ODD = [
    "",
    " ",
    "a,b",
    'a "b" c',
    '"',
    "a\nb",
    "a\r\nb",
    "a\rb",
    "a;b\tc|d",
    "é",
    "e\u0301",
    "🙂",
    "\u2028x",
    "\x85y",
    "\ufeffz",
    "'",
]
ODD += [
    "nan",
    "None",
    "-1",
    "0",
    "1.0",
    "1e400",
    "9" * 5000,
    "x" * 3000,
    "[1]",
    "[a, b]",
    "[/red]",
    "$x_{$",
    "\x1b[31m",
    "\x1a",
]
PLACES = {"train": "train", "dev": "validation", " TEST": "test", "test": "test"}


def good(rng: random.Random) -> Table:
    """A table of texts that every reader takes: some with quotes, lines, delimiters; perhaps with more columns."""
    count = rng.choice([12, 20, 30])
    words = [one for one in ODD[2:16] if one != "\x85y"] if rng.random() < 0.5 else ["w"]
    labels = rng.choice([["neg", "pos"], [0, 1], ["7", "10"], [True, False], [1.0, 2.0], ["é", "[A] b"]])
    table: Table = {"text": [f"{i} {rng.choice(words)}" for i in range(count)], "label": [labels[i % 2] for i in range(count)]}
    if rng.random() < 0.4:
        table["author"] = [rng.choice(["Ann", "Bo", "Ça", None]) for _ in range(count)]
    if rng.random() < 0.3:
        table["second_text"] = [f"and {rng.choice(words)}" for _ in range(count)]
    if rng.random() < 0.3:
        table["split"] = ["train", "train", "test", "test", "dev", "dev"] * (count // 6)
        table["split"] += ["train"] * (count - len(table["split"]))
    if rng.random() < 0.3:
        table["id"] = list(range(count))
    return table


def in_order(rng: random.Random, table: Table) -> Table:
    return {name: table[name] for name in rng.sample(list(table), len(table))}


def rows_of(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def as_csv(table: Table, delimiter: str = ",", end: str = "\n", all_quoted: bool = False) -> str:
    file = io.StringIO(newline="")
    rule = csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=rule)
    writer.writerows([list(table), *zip(*table.values(), strict=True)])
    return file.getvalue()


def as_jsonl(table: Table, end: str = "\n", ascii_only: bool = True) -> str:
    return "".join(json.dumps(row, ensure_ascii=ascii_only) + end for row in rows_of(table))


def as_parquet(table: Table, **options: Any) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(table), file, **options)
    return file.getvalue()


def zipped(content: bytes, name: str = "inside") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


PACKED: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zip": zipped}


def packed(rng: random.Random, content: bytes, ending: str, accident: bool) -> tuple[bytes, bytes]:
    """Compressed, perhaps in two streams, as parallel compressors write, and perhaps damaged; and what is now compressed."""
    half = rng.randrange(len(content) + 1) if ending != ".zip" and rng.random() < 0.5 else len(content)
    first, second = PACKED[ending](content[:half]), PACKED[ending](content[half:]) if half < len(content) else b""
    if accident and second and rng.random() < 0.5:
        place = rng.randrange(10)
        second = second[:place] + flipped(rng, second[place : place + 1]) + second[place + 1 :]
        return first + second, content
    found = rng.choice(CONTENT)(rng, first + second) if accident else first + second
    return found, content * 2 if found == (first + second) * 2 and ending != ".zip" else content


# ---------------------------------------------------------------- accidents to content


def some_bytes(rng: random.Random, content: bytes) -> bytes:
    place = rng.randrange(len(content) + 1)
    odd = rng.choice([*b'",;\t\n\r\0\x1a\xff\xe9{}[]:', *ODD, *OTHERS[:12]])
    given = bytes([odd]) if isinstance(odd, int) else odd.encode()
    return content[:place] + given + content[place + rng.choice([0, 0, 1]) :]


def a_line(rng: random.Random, content: bytes) -> bytes:
    lines = content.splitlines(keepends=True) or [b""]
    number = rng.randrange(len(lines))
    line = lines[number]
    fewer = line.replace(b",", b"", 1)
    lines[number] = rng.choice([b"", line * 2, fewer, b"x," + line, b'"' + line, line.rstrip() + b'"\n', b" " + line, b"\n"])
    return b"".join(lines)


CONTENT: list[Callable[[random.Random, bytes], bytes]] = [
    lambda rng, content: content[: rng.randrange(len(content) + 1)],
    lambda rng, content: flipped(rng, content),
    lambda rng, content: content + rng.choice([b"\n\n", b"  \n", b"\x1a", b"\0" * 8, b"garbage", content]),
    lambda rng, content: content.replace(b",", rng.choice([b";", b"\t", b" ,", b"|"])),
    lambda rng, content: content.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b"\n \n"])),
    lambda rng, content: rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b" "]) + content,
    lambda rng, content: rng.choice([b"", b"\n", b"\xef\xbb\xbf", b"text,label\n"]),
    some_bytes,
    some_bytes,
    a_line,
    a_line,
]


def another_value(rng: random.Random, table: Table) -> Table:
    """One value, or a whole column, of another type, missing, huge or nested."""
    name = rng.choice(list(table))
    odd = rng.choice(
        [
            *ODD,
            None,
            math.nan,
            math.inf,
            0,
            1.5,
            True,
            10**9,
            2**63,
            10**400,
            [],
            [1],
            {"a": 1},
            "\ud800",
            {"text": "x"},
            [[None]],
        ]
    )
    values = list(table[name])
    values[rng.randrange(len(values))] = odd
    return {**table, name: [odd] * len(values) if rng.random() < 0.1 else values}


def another_column(rng: random.Random, table: Table) -> Table:
    name, new = rng.choice(list(table)), rng.choice([*ODD, "label", "text", "Label", "x" * 300, "text.a"])
    if rng.random() < 0.3:
        return {key: values for key, values in table.items() if key != name}
    return {new if key == name else key: values for key, values in table.items()}


# ---------------------------------------------------------------- a reader for comparison


def plain_rows(content: bytes, kind: str, options: dict[str, Any], tabs: bool) -> list[dict[Any, Any]]:
    """What another reader finds in a file that is not compressed: rows as dictionaries by name, or by number."""
    if kind == "parquet":
        roles = [options.get("text", "text"), options.get("label", "label")]
        roles += [name for role, name in options.items() if role in ("author", "document", "second_text", "split")]
        found = parquet.read_table(io.BytesIO(content), columns=roles, page_checksum_verification=True)
        return found.to_pylist()
    text = content.decode(options.get("encoding", "utf-8")).removeprefix("\ufeff").rstrip("\x1a")
    text = re.sub(r"(?<![^\r\n])[ \x1a\r\n]+\Z", "", text)  # blank lines at the end
    if kind == "jsonl":
        return [json.loads(line) for line in text.replace("\r", "\n").split("\n") if line.strip()]
    quote = options.get("quote", '"') or None
    rows = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=(options.get("delimiter") or ("\t" if tabs else ",")).replace("\\t", "\t"),
        quotechar=quote,
        quoting=csv.QUOTE_MINIMAL if quote else csv.QUOTE_NONE,
    )
    kept = [row for row in rows if row]
    names = [name.strip() for name in kept[0]] if options.get("header", True) else []
    kept = kept[1:] if options.get("header", True) else kept
    return [dict(enumerate(row)) | dict(zip(names, row, strict=True)) for row in kept]


def name_of(value: Any) -> str:
    return value.strip() if isinstance(value, str) else str(int(value) if isinstance(value, float) else value)


def nobody(value: Any) -> bool:
    words = ("", "nan", "NaN", "<NA>", "None", "null", "NULL", "\\N")
    return (
        value is None or (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and value.strip() in words)
    )


def differs(task: fedtune.TextTask, rows: list[dict[Any, Any]], options: dict[str, Any]) -> str | None:
    """What a task has that its rows have not, or the other way round. A column `split` puts the rows in another order."""

    def column(role: str) -> list[Any]:
        name = options.get(role, role)
        return [row.get(name.strip() if isinstance(name, str) and name not in row else name) for row in rows]

    "".join((*task.label_names, *task.author_names)).encode()  # they are printed
    expected: dict[str, list[Any]] = {"text": column("text"), "label": list(map(name_of, column("label")))}
    found: dict[str, list[Any]] = {"text": list(task.texts), "label": [task.label_names[label] for label in task.labels]}
    if "second_text" in options:
        expected["second_text"], found["second_text"] = column("second_text"), list(task.second_texts or ())
    if "author" in options and task.authors is not None:
        expected["author"] = [None if nobody(value) else name_of(value) for value in column("author")]
        own = np.bincount(task.authors) == 1
        names = [None if own[i] and name.startswith("unknown ") else name for i, name in enumerate(task.author_names)]
        found["author"] = [names[author] for author in task.authors]
    owner = {int(row): part for part, rows in task.parts.items() for row in rows}
    if len(owner) != len(task.texts) or sum(map(len, task.parts.values())) != len(owner):
        return "rows in no part or in two"
    had, has = list(zip(*expected.values(), strict=True)), list(zip(*found.values(), strict=True))
    if "split" not in options:
        return None if had == has else f"other rows: {len(has)} of {len(had)}: {str(set(had) ^ set(has))[:300]}"
    if {"train_split", "validation_split", "test_split"} & set(options):
        return None if not Counter(has) - Counter(had) else "rows that are not there"
    said = [PLACES.get(name_of(value)) for value in column("split")]
    for part in ("validation", "test"):
        if part in said and Counter(has[row] for row in task.parts[part]) != Counter(
            row for row, own in zip(had, said, strict=True) if own == part
        ):
            return f"other rows in {part}"
    return None if Counter(had) == Counter(has) else "other rows"


# ---------------------------------------------------------------- 1. files


OPTIONS: dict[str, list[Any]] = {
    "text": ["txt", 0, 1, -1, 99, None, True, "", " text ", "label", ["text"], "x" * 3000, "\ud800", 10**30, 0.5],
    "label": ["lable", 0, 1, "text", "id", False, {}, b"label", "\0"],
    "author": ["label", "text", "nobody", "id", 2, []],
    "document": ["author", "label", "id", "nothing", 1.0],
    "second_text": ["text", "id", "label"],
    "split": ["split", "label", "author", 0],
    "delimiter": [",", ";", "\\t", "\t", "|", " ", "", ",,", '"', "\n", "é", "\udcff", "a", 5, "\x1a"],
    "quote": [None, "", "'", ",", " ", "x", '""', 0],
    "header": [True, False, None, 1, "false"],
    "encoding": [
        "utf-8",
        "UTF8",
        "U8",
        "utf-8-sig",
        "latin-1",
        "cp1252",
        "ascii",
        "utf-16",
        "utf-7",
        "idna",
        "rot13",
        "",
        None,
    ],
    "format": ["csv", "jsonl", "parquet", "json", "", 5],
    "path": [
        "n" * 300,
        "\udcff.csv",
        "\ud800.csv",
        ".",
        "..",
        "/dev/zero",
        "/dev/null",
        "/dev/tty",
        "",
        None,
        5,
        "a.zip",
        "x/y.csv",
    ],
    "test_path": ["SAME", "OTHER", "none.csv", "", "/dev/zero", 5, "\0"],
    "validation_path": ["SAME", "OTHER", "."],
    "train_split": ["train", "dev", "x" * 3000, None],
    "test_split": ["test", "train", "dev", "tset", 0],
    "validation_split": ["dev", "train", ""],
}
OPTIONS["encoding"] += ["punycode", "unicode_escape", "undefined", "base64", "mbcs", "a\0b", "x" * 3000, "utf-32", "cp037"]
NAMES = [("data.csv", "csv"), ("data.tsv", "csv"), ("data.jsonl", "jsonl"), ("data.json", "jsonl"), ("data.parquet", "parquet")]


class File:
    """One file as it was written, after its accidents.

    Args:
        rng: decides all.
        folder: where it is written.
    """

    def __init__(self, rng: random.Random, folder: Path) -> None:
        self.name, self.kind = rng.choice(NAMES)
        table = in_order(rng, good(rng))
        self.options: dict[str, Any] = {role: role for role in table if role in ("author", "second_text", "split")}
        self.done: list[str] = []
        accidents = rng.choices(["value", "column", "content", "packed", "option", "place", "name"], (3, 1, 6, 2, 4, 1, 1), k=3)
        accidents = accidents[: rng.choice([0, 1, 1, 2, 3])]
        for change in (another_value, another_column):
            if change.__name__.removeprefix("another_") in accidents:
                self.done.append(change.__name__)
                table = change(rng, table)
        self.plain = self._written(rng, table)
        for _ in range(accidents.count("content")):
            self.done.append("content")
            self.plain = rng.choice(CONTENT)(rng, self.plain)
        stored = self.plain
        self.ending = rng.choice(list(PACKED)) if rng.random() < 0.35 or "packed" in accidents else ""
        if self.ending:
            stored, self.plain = packed(rng, stored, self.ending, "packed" in accidents)
            self.name += self.ending
            self.done += ["packed"] if "packed" in accidents else []
        self.path = folder / self.name
        if "name" in accidents:
            self.done.append("name")
            self._renamed(rng)
        self.path.write_bytes(stored)
        if "option" in accidents:
            self._optioned(rng, folder)
        if "place" in accidents:
            way = rng.choice([way for way in WAYS if way not in ("truncate", "flip", "replace", "append", "swap")])
            self.done.append(way)
            (folder / "victim").write_text("victim")
            WAYS[way](rng, self.path, folder / "victim")

    def _written(self, rng: random.Random, table: Table) -> bytes:
        if self.kind == "parquet":
            try:
                return as_parquet(
                    table, compression=rng.choice(["none", "snappy", "zstd"]), write_page_checksum=rng.random() < 0.5
                )
            except (pyarrow.ArrowException, OverflowError, UnicodeError):
                return as_parquet(
                    {name: [str(value).encode(errors="replace").decode() for value in values] for name, values in table.items()}
                )
        end = rng.choice(["\n", "\n", "\r\n"])
        if self.kind == "jsonl":
            return as_jsonl(table, end, rng.random() < 0.5).encode("utf-8", "surrogatepass")
        delimiter = "\t" if self.name.endswith(".tsv") else rng.choice(",,,;|")
        if delimiter not in ",\t":
            self.options["delimiter"] = delimiter
        encoding = rng.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252"])
        text = as_csv(table, delimiter, end, rng.random() < 0.3)
        try:
            raw = text.encode(encoding)
        except UnicodeError:
            return text.encode("utf-8", "surrogatepass")
        if encoding not in ("utf-8", "utf-8-sig"):
            self.options["encoding"] = encoding
        return raw

    def _renamed(self, rng: random.Random) -> None:
        other = rng.choice(
            [
                "data",
                "data.txt",
                "data.gz",
                "data.CSV",
                "a[b].csv",
                "$x_{$.csv",
                "x.zip",
                "a\nb.csv",
                self.name + ".gz",
                "n" * 250,
            ]
        )
        self.path = self.path.with_name(other)
        if rng.random() < 0.5:
            self.options["format"] = self.kind

    def _optioned(self, rng: random.Random, folder: Path) -> None:
        option = rng.choice(list(OPTIONS))
        value = rng.choice(OPTIONS[option])
        self.done.append(f"{option}={value!r:.20}")
        if value == "OTHER":
            other = folder / ("other" + "".join(self.path.suffixes))
            other.write_bytes(self.path.read_bytes())
            value = str(other)
        self.options[option] = str(self.path) if value == "SAME" else value

    def rows(self) -> list[dict[Any, Any]]:
        """What another reader finds."""
        name = self.path.name.lower()
        kind = self.options.get("format") or next((kind for end, kind in NAMES if Path(end).suffix in name), self.kind)
        return plain_rows(self.plain, kind, self.options, ".tsv" in name)


def fault_of(act: Callable[[], str | None]) -> tuple[str, str | None]:
    """Do something; whether it was taken, and what is wrong."""
    try:
        with bounded():
            return "taken", act()
    except (UsageError, RunError) as error:
        said = str(error)
        return "refused", None if "\n" not in said and len(
            said
        ) < 1500 and "NoneType" not in said else f"no clear line: {said[:200]!r}"
    except Exception as error:  # whatever it is, it is wrong
        return "broken", f"{type(error).__name__}: {str(error)[:200]}"


def check(many: int, act: Callable[[random.Random], tuple[str, str, str | None]]) -> None:
    """Do many cases; none may be wrong, and some must be taken, others refused."""
    bad, found = {}, Counter[str]()
    for number in range(FIRST, FIRST + many):
        what, how, wrong = act(random.Random(number))
        found[how] += 1
        if wrong:
            bad[f"{number}: {what}"] = wrong
            print(f"BAD {number}: {what}: {wrong}")
    print(found)
    assert not bad
    assert found["taken"]


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache of datasets"))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def test_a_damaged_file_is_read_whole_or_refused_in_one_line(tmp_path: Path) -> None:
    def one(rng: random.Random) -> tuple[str, str, str | None]:
        file = File(rng, fresh(tmp_path / "case"))

        def act() -> str | None:
            task = load_task("csv", {"path": str(file.path), **file.options})
            if "test_path" in file.options or "validation_path" in file.options:
                return None
            return differs(task, file.rows(), file.options)

        return (f"{file.path.name[:40]} {file.done} {file.options!r:.200}", *fault_of(act))

    check(share(0.13), one)


FOLDER = [
    "train.csv",
    "test.csv",
    "dev.csv",
    "train.jsonl",
    "test.jsonl",
    "train.parquet",
    "test.parquet",
    "other.csv",
    "data.csv.gz",
]
FOLDER += ["train.tsv", "notes.txt", "README.md", "dataset_infos.json", ".hidden.csv", "train-0.csv", "sub/train.csv"]
README = "---\nconfigs:\n- config_name: default\n  data_files: train.csv\n---\n"


def written(rng: random.Random, folder: Path, name: str) -> list[str]:
    """Write a file of a folder; the texts that are in it."""
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    table = {role: values for role, values in good(rng).items() if role in ("text", "label")}
    table = {"text": [f"{name} {text}" for text in table["text"]], "label": [str(label) for label in table["label"]]}
    table["label"] = [str(i % 2) for i in range(len(table["text"]))]
    content = as_parquet(table) if "parquet" in name else as_jsonl(table).encode() if "json" in name else as_csv(table).encode()
    if file.suffix in (".md", ".txt"):
        file.write_text(rng.choice([README, "hello", "---\nconfigs: [\n---\n", "---\ndataset_info: 5\n---\n"]))
        return []
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return table["text"]


def a_folder(rng: random.Random, folder: Path) -> tuple[str, list[str]]:
    names = (
        rng.sample(FOLDER, rng.choice([1, 1, 2, 3]))
        if rng.random() < 0.6
        else ["train.csv", "test.csv", *rng.sample(FOLDER, 1)]
    )
    texts = [text for name in dict.fromkeys(names) for text in written(rng, folder, name)]
    if rng.random() < 0.5:
        return f"{names}", texts
    file, way = folder / rng.choice(names), rng.choice([way for way in WAYS if way != "append"])
    if way in ("truncate", "flip") and rng.random() < 0.5:
        file.write_bytes(rng.choice(CONTENT)(rng, file.read_bytes()))
    else:
        WAYS[way](rng, file, folder.with_name("victim"))
    return f"{names}, {way} {file.name}", []


def test_a_folder_of_files_is_read_whole_or_refused_in_one_line(tmp_path: Path) -> None:
    def one(rng: random.Random) -> tuple[str, str, str | None]:
        folder = fresh(tmp_path / "folder")
        what, texts = a_folder(rng, folder)

        def act() -> str | None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                task = load_task("hub", {"path": str(folder)})
            said = " ".join(str(one.message) for one in caught)
            lost = sorted({text.split()[0] for text in set(texts) - set(task.texts)})
            left = [name for name in lost if name not in said and name[0] != "." and not (folder / "README.md").exists()]
            return f"left out in silence: {left}" if left else None

        return (what, *fault_of(act))

    (tmp_path / "victim").write_text("a link leads here")
    check(share(0.01), one)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\x1a"), min_size=1, max_size=12)


@settings(max_examples=share(0.02), deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(texts=st.lists(TEXT, min_size=8, max_size=12, unique=True), seed=st.integers(0, 10**6))
def test_one_table_is_one_task_in_every_format_and_order_of_columns(
    texts: list[str], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng, folder = random.Random(seed), tmp_path_factory.getbasetemp()
    table: Table = {"text": [f"{i} {text}" for i, text in enumerate(texts)]}
    table["label"] = [str(i % 2) for i in range(len(texts))]
    table["author"] = [rng.choice(["A", "B", None]) for _ in texts]
    found = []
    for name, write in (("a.csv", lambda table: as_csv(table, end="\r\n")), ("a.jsonl", as_jsonl), ("a.parquet", as_parquet)):
        content = write(in_order(rng, table))
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        task = fedtune.TextTask.from_csv(folder / name, author="author")
        parts = {part: rows.tolist() for part, rows in task.parts.items()}
        authors = [] if task.authors is None else task.authors.tolist()
        found.append((list(task.texts), task.labels.tolist(), task.label_names, authors, task.author_names, parts))
    assert found[0][0] == table["text"]
    assert found[0] == found[1] == found[2]


# ---------------------------------------------------------------- 2. the cache of tokens


CACHED = [("word1 word2", "word3", "word4 nothing"), ("word5", "word6 word7", "word8 " * 30), ("word9", "word9", "word9")]


def tokens(tokenizer: Any, texts: tuple[str, ...], pairs: bool) -> tuple[list[int], list[int], list[int] | None]:
    found = tokenise(texts, tokenizer, 12, texts[::-1] if pairs else None)
    return found.ids_T.tolist(), found.offsets.tolist(), None if found.types_T is None else found.types_T.tolist()


def cache_damage(rng: random.Random, cache: Path) -> str:
    """Damage an entry, the folder, or both; say how."""
    entry = rng.choice(sorted(cache.iterdir()))
    path = rng.choice([entry, entry, entry, cache, entry.with_name("tokens-" + "0" * 32 + ".safetensors")])
    ways = FOLDERS if path == cache else WAYS if path.exists() else NEW
    way = rng.choice(sorted(ways))
    WAYS[way](rng, path, cache.with_name("victim"))
    if rng.random() < 0.2 and cache.is_dir():
        for number in range(5):
            (cache / rng.choice([f"tokens-{number}", f".{entry.name}.{os.getpid()}.tmp", "x"])).write_bytes(rng.randbytes(50))
    if rng.random() < 0.2 and cache.is_dir():
        cache.chmod(0o500)
        way += ", read-only"
    return f"{way} {path.name}"


def test_tokens_are_right_whatever_became_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    given = [(texts, pairs) for texts in CACHED for pairs in (False, True)]
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "good"))
    right = [tokens(tokenizer, *one) for one in given]
    cache, victim = tmp_path / "cache" / "tokens", tmp_path / "cache" / "victim"
    monkeypatch.setenv("FEDTUNE_CACHE", str(cache))

    def one(rng: random.Random) -> tuple[str, str, str | None]:
        fresh(cache.parent)
        shutil.copytree(tmp_path / "good", cache)
        victim.write_text("victim")
        what = cache_damage(rng, cache)
        before = entries(cache)

        def act() -> str | None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = [tokens(tokenizer, *one) for one in given]
            said = " ".join(str(one.message) for one in caught)
            if found != right:
                return "other tokens"
            if victim.read_text() != "victim" or victim.with_name("new").exists():
                return "written through a link"
            changed = [
                name for name in before if before[name] is not None and before[name] != entries(tmp_path / "good").get(name)
            ]
            silent = [name for name in changed if name.endswith(".safetensors") and "0" * 32 not in name and name not in said]
            return f"nothing said of {silent}" if silent else None

        return (what, *fault_of(act))

    check(share(0.06), one)


def entries(cache: Path) -> dict[str, bytes | None]:
    """The entries of a cache, with their content; of a link that leads nowhere, which is no entry, None."""
    if not cache.is_dir():
        return {}
    return {file.name: file.read_bytes() if file.is_file() else b"" if file.exists() else None for file in cache.iterdir()}


# ---------------------------------------------------------------- 3. fedtune describe


FLAGS = {
    "num_clients": ["1", "2", "3", "500", "0", "-1", "1e3", "x", "9" * 40],
    "split": ["iid", "by_label", "by_author", "dirichlet", "quantity", "", "[red]"],
    "alpha": ["0", "1e-300", "1e300", "nan", "inf", "-1", "x"],
    "skew": ["0.5", "1", "2", "nan", "-0.1"],
    "batch_size": ["4", "0", "1e9", "null"],
    "max_length": ["3", "2", "8", "9999999999", "512", "9" * 40],
    "limit": ["1", "5", "0", "1000000", "null", "x"],
    "seed": ["0", "1", "-1", "9" * 40, "null"],
    "padding": ["max_length", "longest", "none"],
    "tokenizer": ["null", "no/such", "[red]", "/dev/zero", "", ".", "a\x1b[31mb"],
    "task": ["csv", "hub", "nobody", "[red]", "{}", "imdb"],
    "folder": [".", "/dev/null", "null", "no such"],
    "task_options": ["{}", "[]", "null", '{"path": "data.csv"}', '{"pth": 1}', '{"path": {"a": 1}}', "5", "x"],
    "task_options.text": ["txt", "0", "[red]", "null"],
    "drop_last": ["true", "maybe"],
    "group_by_length": ["true"],
    "pad_to_multiple_of": ["8", "0", "99999"],
}
PICTURES = [
    "p.png",
    "p.svg",
    "p.pdf",
    "p.xyz",
    "",
    ".",
    "/dev/full",
    "/dev/null",
    "no/such/p.png",
    "fifo",
    "link",
    "n" * 300 + ".png",
    "\0",
    "dir",
]


def describe_words(rng: random.Random, folder: Path, model: Path) -> list[str]:
    """The words of a command over a file with odd names of labels, and perhaps with accidents."""
    names = [
        "data.jsonl",
        "a[b].jsonl",
        "[red].jsonl",
        "[/].jsonl",
        "$x_{$.jsonl",
        "data\x1b[31m.jsonl",
        "\udcff.jsonl",
        "x" * 200 + ".jsonl",
    ]
    path = folder / rng.choice(names)
    table = good(rng)
    odd = {
        label: rng.choice([*ODD, *ODD, "\ud800", "a", "[bold]", "[/bold]", "_x", "\\[x"])
        for label in set(map(str, table["label"]))
    }
    table["label"] = [odd[str(label)] + str(label) for label in table["label"]]
    writers = [f"{rng.choice(ODD)}{i}" for i in range(3)]
    table |= {
        "author": [rng.choice(writers) for _ in table["label"]],
        "text": [f"word{i} word3" for i in range(len(table["label"]))],
    }
    raw = as_jsonl(table).encode("utf-8", "surrogatepass")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(rng.choice(CONTENT)(rng, raw) if rng.random() < 0.15 else raw)
    flags = {"task": "csv", "task_options.path": path, "num_clients": rng.randint(1, 3), "batch_size": 2, "max_length": 16}
    flags |= {"task_options.author": "author"} if rng.random() < 0.5 else {}
    for flag in rng.sample(list(FLAGS), rng.choice([0, 0, 0, 1, 2])):
        flags[flag] = rng.choice(FLAGS[flag])
    words = [f"--model.name={model}", *(f"--data.{flag}={value}" for flag, value in flags.items())]
    picture = rng.choice(PICTURES)
    if picture == "fifo":
        os.mkfifo(folder / picture)
    elif picture == "link":
        (folder / picture).symlink_to(folder / "victim")
    elif picture == "dir":
        (folder / picture).mkdir()
    return ["describe", *words, f"--picture={folder / picture if picture else picture}"]


def test_whatever_is_described_is_a_table_or_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_bert(tmp_path / "model")
    drawn, draw = [0], figures.plot_split

    def seldom(*values: Any) -> None:  # a picture takes ten times as long as all else
        drawn[0] += 1
        if drawn[0] % 10 == 0:
            draw(*values)

    monkeypatch.setattr(figures, "plot_split", seldom)
    assert_good(tried(share(0.05), lambda rng: describe_words(rng, fresh(tmp_path / "case"), tmp_path / "model"), 4))
