"""The figures of docs/performance.md are those of the files of results that it names."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "performance.md").read_text()
NOTES = (ROOT / "experiments" / "performance" / "README.md").read_text()


def raw(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["raw"]


def cells(start: str) -> list[str]:
    """What the one row of the page that begins with these cells has after them."""
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in row.removeprefix(f"| {start} |").rstrip("|").split("|")]


def numbers(values: Sequence[str]) -> list[float]:
    return [float(value.replace(",", "").removesuffix(" %")) for value in values]


def middle_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


@pytest.mark.parametrize(
    ("row", "contender"),
    [
        ("fedtune", "fedtune"),
        ("floor: a bare centralised loop, the clients' batches", "floor, the clients' batches"),
        ("floor: the same, batches from all texts", "floor, pooled batches"),
        ("plain loop, bf16 autocast", "plain loop, bf16 autocast"),
        ("plain loop, fp32", "plain loop, fp32"),
        ("the authors' algorithm, 2 processes, fp32, padded to 128", "the authors' algorithm"),
        ("Flower 1.41 simulation, bf16", "Flower simulation, bf16"),
        ("Flower 1.41 simulation, fp32", "Flower simulation, fp32"),
        ("pfl-research 0.6, bf16", "pfl-research, bf16"),
        ("pfl-research 0.6, fp32", "pfl-research, fp32"),
    ],
)
def test_the_table_of_contenders_is_that_of_the_measurement(row: str, contender: str) -> None:
    runs, ours = raw("reference")[contender], raw("reference")["fedtune"]
    train, evaluate = ([run["rounds"][0][key] for run in runs] for key in ("train", "evaluate"))
    our_train, our_evaluate = ([run["rounds"][0][key] for run in ours] for key in ("train", "evaluate"))
    both, our_both = map(
        list, (map(sum, zip(train, evaluate, strict=True)), map(sum, zip(our_train, our_evaluate, strict=True)))
    )
    expected = [statistics.median(train), statistics.median(evaluate), statistics.median(run["peak_memory_mb"] for run in runs)]
    expected += [middle_ratio(train, our_train), middle_ratio(both, our_both)]
    for found, known, digits in zip(numbers(cells(row)), expected, (1, 1, 0, 2, 2), strict=True):
        assert found == pytest.approx(round(known, digits))


@pytest.mark.parametrize(
    ("variant", "shown"),
    [
        ("padded batches", "eager attention | 2.64 | 7.73 |"),
        ("padded batches, sdpa", "with `sdpa` attention | 3.41 | 10.27 |"),
        ("fp32", "`32-true` | 2.28 | 6.87 |"),
        ("torch's dropout", "torch's dropout | 1.13 | 3.39 |"),
        ("batches grouped by length", "`true` | 0.95 | 2.79 |"),
        ("padded batches, grouped by length", "`false` | 1.53, instead of 2.64 | 4.58 |"),
        ("nothing on", "all of these off | | | 7.98 | 23.63 |"),
    ],
)
def test_the_table_of_flags_is_that_of_the_measurement(variant: str, shown: str) -> None:
    epochs = raw("engine")["epoch"]
    ratio = round(middle_ratio(epochs[variant], epochs["everything on"]), 2)
    assert shown in PAGE
    assert ratio == float(re.findall(r"\| (\d\.\d+)", shown)[0])
    assert round(statistics.median(epochs[variant]), 2) == float(re.findall(r"(\d+\.\d+) \|", shown)[-1])


def test_the_sizes_of_evaluation_batches_are_those_of_the_measurement() -> None:
    found = raw("engine")["evaluation"]
    ratios = [f"{middle_ratio(found[size], found['64']):.2f}" for size in ("16", "32", "128", "256")]
    assert f"takes {', '.join(ratios)} times as long" in PAGE


@pytest.mark.parametrize("model", ["bert", "distilbert", "albert", "minilm"])
def test_the_table_of_models_is_that_of_the_measurement(model: str) -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {model} |") and "%" in line]
    found = numbers([cell.strip() for cell in row.strip("|").split("|")][1:])
    for place, length in ((0, 40), (2, 128)):
        measured = raw("throughput")[f"{model}, {length} tokens"]
        assert found[place : place + 2] == [round(measured["tokens_per_s"]), round(100 * measured["share"])]


def test_every_file_of_results_and_every_script_that_is_named_exists() -> None:
    for text in (PAGE, NOTES):
        for name in re.findall(r"`(\w+\.json)`", text):
            assert (ROOT / "benchmarks" / "results" / name).exists(), name
        for name in re.findall(r"benchmarks/(\w+\.py)", text):
            assert (ROOT / "benchmarks" / name).exists(), name


def test_every_flag_that_the_page_names_is_one_of_a_run() -> None:
    from fedtune.cli import parser

    offered = parser("run").format_help()
    for flag in set(re.findall(r"`(--(?:data|loop|model)\.[\w.]+)", PAGE)):
        assert flag in offered or flag == "--model.lora.rank", flag
