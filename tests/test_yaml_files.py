"""One set of rules for every YAML that is handed in."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedtune import yaml_files
from fedtune.errors import UsageError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
CHAIN = "a0: &a0 [1]\n" + "".join(f"a{number}: &a{number} [*a{number - 1}]\n" for number in range(1, 300))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-2E3", -2000.0),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("12345678901234e5", "12345678901234e5"),  # a hash
        ("2020-01-01", "2020-01-01"),
        ("12:30", "12:30"),
        ("0x10", 16),
        ("'1e-5'", "1e-5"),
        ("null", None),
        ("''", ""),
        ("", None),
        ("{a: &a [1], b: *a}", {"a": [1], "b": [1]}),
        ("{<<: {a: 1, b: 1}, a: 2}", {"a": 2, "b": 1}),
    ],
)
def test_a_value_is_read_as_it_is_meant(text: str, value: Any) -> None:
    assert yaml_files.parse(text) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\na: 2", "the key 'a' is there twice"),
        ("{1: 2, 1.0: 3}", "is there twice"),
        ("b: 1\nmask:", "'mask' has no value, line 2"),
        ("- \n- 1", "an item of a list has no value"),
        ("a: &a [*a]", r"\*a is within what it names"),
        ("a: *b", "undefined alias"),
        (BOMB, "more than 100000 values"),
        (CHAIN, "more than 50 levels"),
        ("[" * 100_000, "more than 50 levels"),
        ("? " * 50_000, "more than 50 levels"),
        ("!!python/object/apply:os.getcwd []", "the tag"),
        ("!!str 5", "the tag"),
        ("9" * 6000, "whole numbers are below"),
        (str(2**63), "whole numbers are below"),
        ("0x" + "f" * 5000, "whole numbers are below"),
        ("a: \x01", "control characters are not allowed"),
        ('a: "\\0"', "a control character"),
        ("? [1]\n: 2", "a name is text"),
        ("--- 1\n--- 2", "another document"),
        ("\ud800", "no text in UTF-8"),
        ("x" * 1_000_001, "longer than"),
    ],
)
def test_what_breaks_a_rule_is_named_in_one_line_and_at_once(text: str, said: str) -> None:
    began = time.monotonic()
    with pytest.raises(yaml_files.YamlError, match=said) as error:
        yaml_files.parse(text)
    assert time.monotonic() - began < 5
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    (tmp_path / "large.yaml").write_bytes(b"#" * 1_000_001)
    os.mkfifo(tmp_path / "fifo.yaml")
    for name, said in (
        ("latin.yaml", "no text in UTF-8"),
        ("large.yaml", "larger than 1 MB"),
        ("fifo.yaml", "no file, but"),
        ("", "no file, but"),
        ("no.yaml", "No such file"),
        ("x" * 5000, "name too long"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(UsageError, match=said):
            yaml_files.read(tmp_path / name, "--config")


def test_json_is_read_by_its_own_rules(tmp_path: Path) -> None:
    file = tmp_path / "args.json"
    file.write_text(json.dumps({"a": "🙂", "b": 1e-05, "c": None, "d": "1e-5"}))  # surrogate pairs, as W&B's agents write them
    assert yaml_files.read(file, "--config") == {"a": "🙂", "b": 1e-05, "c": None, "d": "1e-5"}
    for text, said in (('{"a": 1, "a": 2}', "twice"), ("[" * 100_000, "levels"), ("9" * 6000, "whole numbers")):
        file.write_text(text)
        with pytest.raises(UsageError, match=said):
            yaml_files.read(file, "--config")


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")))
    | st.sampled_from(["1e5", "1.5e5", "no", "null", "2020-01-01", "12:30", "0x1", "~", "1_0", "=", "<<", "-", "1e-5", "07"]),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text("abcdefno15e.", max_size=4), below, max_size=4),
)


@given(PLAIN)
def test_what_is_written_is_read_as_it_was_here_and_elsewhere(value: Any) -> None:
    text = yaml_files.dump(value)
    assert yaml_files.parse(text) == value
    assert yaml.safe_load(text) == value


def test_infinity_is_read_and_left_to_who_takes_the_value() -> None:
    assert yaml_files.parse(".inf") == math.inf


def test_a_value_that_is_there_twice_is_written_twice() -> None:
    shared = [1, 2]
    assert "&" not in yaml_files.dump({"a": shared, "b": shared})
    assert yaml_files.parse(yaml_files.dump({"a": shared, "b": shared})) == {"a": [1, 2], "b": [1, 2]}
