"""Whatever a sweep file, a configuration or a flag says: exit code 0, or exit code 2 and one line."""

from __future__ import annotations

import importlib.util
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cases import assert_good, outcome, share, tried
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fedtune

EXPERIMENTS = Path(fedtune.__file__).parent / "experiments"
SHIPPED = sorted(EXPERIMENTS.rglob("*.yaml"))
SWEEPS = [file for file in SHIPPED if "parameters" in yaml.safe_load(file.read_text()) and file.stem != "paper"]
RANDOM = """
name: drawn
method: random
run_cap: 4
metric: {name: accuracy, goal: maximize, target: 0.9}
parameters:
  model.learning_rate: {distribution: log_uniform_values, min: 1e-5, max: 1e-2}
  model.dropout: {distribution: q_uniform, min: 0, max: 0.5, q: 0.1}
  data.batch_size: {min: 8, max: 64}
  data.alpha: {distribution: log_normal, mu: 0, sigma: 1}
  loop.algorithm: {values: [fedavg, {name: fedavgm, beta: 0.5}], probabilities: [0.5, 0.5]}
  data.split: {value: dirichlet}
"""
BAYES = """
method: bayes
run_cap: 5
metric: {name: loss_nats, goal: minimize}
early_terminate: {type: hyperband, min_iter: 1, eta: 2, strict: true}
parameters:
  model.learning_rate: {distribution: log_uniform_values, min: 1e-5, max: 1e-2}
  model.dropout: {distribution: q_uniform, min: 0, max: 0.5, q: 0.1}
  data.batch_size: {min: 8, max: 64}
  loop.algorithm: {values: [fedavg, {name: fedavgm, beta: 0.5}]}
"""
COMMAND = """
method: grid
command: ['${env}', fedtune, run, --config, '${args_json_file}', --loop.max_rounds, 2]
parameters:
  data: {parameters: {num_clients: {distribution: int_uniform, min: 1, max: 3}, limit: {value: 100}}}
  seed: {values: [0, 1]}
"""
ODD: list[str] = [
    *(
        "",
        "null",
        "~",
        "true",
        "no",
        "[]",
        "{}",
        "[[]]",
        "''",
        "0",
        "-1",
        "1e-5",
        "1e400",
        ".nan",
        ".inf",
        "-.inf",
        "0x10",
        "1:30",
    ),
    *("9" * 30, "9" * 6000, "-" + "9" * 400, "1." + "0" * 5000, "2020-01-01", "!!python/object/apply:os.getcwd []", "!!str x"),
    *("&a [*a]", "*nobody", "{class_path: os.getcwd}", "os.getcwd", "{name: {name: name}}", "[1, 2, 3]", "{a: 1, a: 2}"),
    *(
        '"\\0"',
        '"\\ud800"',
        '"\\U0001F642"',
        "\u202e",
        "x" * 5000,
        "[" * 200,
        "{a: " * 60 + "1" + "}" * 60,
        "- 1",
        "%",
        "|",
        ">",
    ),
    *("{values: [1]}", "{value: 1, values: [2]}", "{min: 1, max: 2}", "{distribution: q_beta}", "99999999999", "0.1", "1_000"),
    *("sgd", "grid", "bayes", "hyperband", "accuracy", "../../etc/passwd", "/dev/zero", "~", "$HOME", "[red]", "<script>"),
]
NAMES = ["class_path", "init_args", "probabilites", "q", "value", "values", "min", "parameters", "early_terminate", "run_cap"]
NAMES += ["name", "seed", "data", "data.seed", "target", "command", "method", "<<", "? [1]", "1", "null", "é", "a b", "", "."]


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 10**9, 10**18, 10**30, -(10**400), 1e-5, 0.5, 1e300, float("nan"), float("inf")),
    *(
        "",
        "1e-5",
        "no",
        "null",
        "x" * 5000,
        "[red]",
        "a\u2028b",
        "\x85",
        "🙂",
        "/dev/zero",
        "os.getcwd",
        "../..",
        "0x10",
        "1:30",
    ),
    *([], {}, [[]], [None], [1, "a"], {"": 1}, {"name": None}, {"name": {}}, {"class_path": "os.getcwd"}, {"a.b": {"a": 1}}),
    *({"value": 1}, {"values": [1, 1]}, {"values": []}, {"min": 0, "max": 10**8}, {"parameters": {}}, {"min": 2, "max": 1}),
    *({"distribution": "q_beta", "q": 0}, {"distribution": "log_uniform", "min": -1, "max": 9999}, {"distribution": "normal"}),
    *({"distribution": "log_normal", "sigma": 1e300}, {"distribution": "q_uniform", "min": 0, "max": 1, "q": 1e-12}),
]


def another_part(content: Any, rng: random.Random) -> Any:
    """Nested values, one of them another: with a name too many, or of another place, or an odd value."""
    if isinstance(content, dict) and content and rng.random() < 0.85:
        name = rng.choice(list(content))
        if rng.random() < 0.1:
            return {**content, rng.choice(NAMES): rng.choice(VALUES)}
        if rng.random() < 0.1:
            return {key: value for key, value in content.items() if key != name}
        return {**content, name: another_part(content[name], rng)}
    if isinstance(content, list) and content and rng.random() < 0.85:
        place = rng.randrange(len(content))
        return [*content[:place], another_part(content[place], rng), *content[place + 1 :]]
    return rng.choice(VALUES)


def mutated(text: str, rng: random.Random) -> bytes:
    """A text of YAML after one to three accidents, half of the time in its values alone."""
    if rng.random() < 0.5:
        content = yaml.safe_load(text)
        for _ in range(rng.choice([1, 1, 2, 3])):
            content = another_part(content, rng)
        return yaml.safe_dump(content, allow_unicode=True, sort_keys=False).encode()
    for _ in range(rng.randint(1, 3)):
        text = rng.choice(ACCIDENTS)(text, rng)
    raw = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        place = rng.randrange(len(raw) + 1)
        raw = raw[:place] + bytes(rng.choices(range(256), k=rng.choice([1, 1, 1, 8]))) + raw[place:]
    return raw


def _a_line(text: str, rng: random.Random) -> tuple[list[str], int]:
    lines = text.split("\n")
    return lines, rng.randrange(len(lines))


def without_a_line(text: str, rng: random.Random) -> str:
    lines, number = _a_line(text, rng)
    return "\n".join(lines[:number] + lines[number + 1 :])


def a_line_twice(text: str, rng: random.Random) -> str:
    lines, number = _a_line(text, rng)
    return "\n".join(lines[: number + 1] + lines[number:])


def another_indent(text: str, rng: random.Random) -> str:
    lines, number = _a_line(text, rng)
    lines[number] = rng.choice([lines[number].lstrip(), "  " + lines[number], "\t" + lines[number]])
    return "\n".join(lines)


def another_value(text: str, rng: random.Random) -> str:
    found = list(re.finditer(r"(?<=: )[^\s,}\]{\[]+|(?<=: )[\[{][^\]}]*[\]}]", text))
    if not found:
        return text
    place = rng.choice(found)
    return text[: place.start()] + rng.choice(ODD) + text[place.end() :]


def another_name(text: str, rng: random.Random) -> str:
    found = list(re.finditer(r"[\w.]+(?=:)", text))
    if not found:
        return text
    place = rng.choice(found)
    name = place.group()
    other = rng.choice([*NAMES, *(one.group() for one in found), name[:-1], name + "s"])
    return text[: place.start()] + other + text[place.end() :]


def one_more(text: str, rng: random.Random) -> str:
    lines, number = _a_line(text, rng)
    indent = re.match(" *", lines[number])
    lines.insert(number, f"{indent.group() if indent else ''}{rng.choice(NAMES)}: {rng.choice(ODD)}")
    return "\n".join(lines)


def another_character(text: str, rng: random.Random) -> str:
    place = rng.randrange(len(text) + 1)
    return text[:place] + rng.choice("{}[]:,&*!|>'\"%@`#\n\t -?\x00\x7f\ufeff€") + text[place + rng.randint(0, 1) :]


ACCIDENTS: list[Callable[[str, random.Random], str]] = [
    *(without_a_line, a_line_twice, another_indent, another_value, another_value, another_name, another_name, one_more),
    another_character,
]


@pytest.mark.filterwarnings("ignore")
def test_a_mutated_sweep_file_is_planned_or_refused_in_one_line(tmp_path: Path) -> None:
    texts = [*(file.read_text() for file in SWEEPS), RANDOM, RANDOM, COMMAND]
    texts += [BAYES, BAYES] if importlib.util.find_spec("optuna") else []
    file = tmp_path / "sweep.yaml"
    for text in texts:
        file.write_text(text)
        assert outcome("sweep", str(file), "--dry-run", "--runs_dir", str(tmp_path / "runs")) == "0"

    def words(rng: random.Random) -> list[str]:
        file.write_bytes(mutated(rng.choice(texts), rng))
        return ["sweep", str(file), "--dry-run", "--runs_dir", str(tmp_path / "runs")]

    assert_good(tried(share(0.22), words, 1))


@pytest.mark.filterwarnings("ignore")
def test_a_mutated_configuration_is_printed_or_refused_in_one_line(tmp_path: Path) -> None:
    texts = [file.read_text() for file in SHIPPED if file not in SWEEPS and file.stem != "paper"]
    file = tmp_path / "config.yaml"
    for text in texts:
        file.write_text(text)
        assert outcome("run", f"--config={file}", "--print_config") == "0"

    def words(rng: random.Random) -> list[str]:
        file.write_bytes(mutated(rng.choice(texts), rng))
        return ["run", f"--config={file}", "--print_config"]

    assert_good(tried(share(0.1), words, 2))


FLAGS = ["--data.task", "--data.num_clients", "--data.alpha", "--data.mask", "--data.limit", "--data.task_options", "--data"]
FLAGS += ["--data.task_options.path", "--data.split", "--model.name", "--model.dropout", "--loop.algorithm", "--loop.options"]
FLAGS += ["--loop.algorithm.beta", "--loop.algorithm.up+", "--loop.algorithm.client", "--loop.baselines", "--loop", "--seed"]
FLAGS += [
    "--loop.deterministic",
    "--loop.limit_train_batches",
    "--loop.precision",
    "--config",
    "--logger",
    "--loop.optoins",
    "--",
]
FLAGS += ["--versions", "--run_dir", "--loop.keep", "--model.learning_rate", "--data.seed", "--loop.max_rounds"]


@pytest.mark.filterwarnings("ignore")
def test_odd_flags_are_taken_or_refused_in_one_line() -> None:
    def words(rng: random.Random) -> list[str]:
        found = []
        for _ in range(rng.randint(1, 3)):
            flag, value = rng.choice(FLAGS), rng.choice([*ODD, "\udcff", "a\0b", "minilm", "authors", "3"])
            found += [f"{flag}={value}"] if rng.random() < 0.7 else [flag, value] if rng.random() < 0.9 else [flag]
        return ["run", *(word for word in found if word not in ("-h", "--help")), "--print_config"]

    assert_good(tried(share(0.1), words, 3))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=share(0.05), deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(raw=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))))
def test_any_bytes_are_a_file_that_is_read_or_refused(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "any.yaml").write_bytes(raw)
    for words in (
        ("run", f"--config={folder / 'any.yaml'}", "--print_config"),
        ("sweep", str(folder / "any.yaml"), "--dry-run"),
    ):
        assert outcome(*words) in ("0", "2")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3),
    max_leaves=8,
)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=share(0.05), deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(
    value=PLAIN, name=st.sampled_from(["data.task_options", "loop.algorithm", "loop.options", "data.alpha", "seed", "model"])
)
def test_any_value_is_taken_or_refused(value: Any, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "value.yaml").write_text(yaml.safe_dump({name: value}, allow_unicode=True), encoding="utf-8", errors="replace")
    assert outcome("run", f"--config={folder / 'value.yaml'}", "--print_config") in ("0", "2")
    content = {"method": "grid", "parameters": {name: {"values": [value]}}}
    (folder / "value.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8", errors="replace")
    assert outcome("sweep", str(folder / "value.yaml"), "--dry-run") in ("0", "2")
