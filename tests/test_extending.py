"""The recipes of docs/extending.md, followed."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SPECIAL, WORDS, assert_equal, make_loop, save_tokenizer, weights_of, without_times

import fedtune

Make = Callable[..., Any]
TEXT = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Run the code of a recipe, as a module of its own."""

    def follow(title: str) -> dict[str, Any]:
        section = TEXT[TEXT.index(f"## {title}\n") :]
        (code,) = re.findall(r"```python\n(.*?)```", section[: section.index("\n## ", 5)], flags=re.S)
        module = types.ModuleType("recipe")
        monkeypatch.setitem(sys.modules, "recipe", module)
        exec(compile(code, title, "exec", dont_inherit=True), vars(module))
        return vars(module)

    return follow


@pytest.fixture(autouse=True)
def _registries_as_before() -> Any:
    before = {name: dict(getattr(fedtune, name)) for name in ("TASKS", "SPLITS", "ALGORITHMS", "ALGORITHM_PARTS", "FAMILIES")}
    yield
    for name, entries in before.items():
        registry = getattr(fedtune, name)
        registry.clear()
        registry.update(entries)


def test_every_recipe_has_five_steps() -> None:
    for title in ("A task", "A split", "An algorithm", "A model family"):
        section = TEXT[TEXT.index(f"## {title}\n") :]
        steps = re.findall(r"^(\d)\. ", section[: section.index("\n## ", 5)], flags=re.M)
        assert steps == ["1", "2", "3", "4", "5"], title


def test_a_task_of_ones_own(follow: Any) -> None:
    follow("A task")
    data = fedtune.FederatedDataModule(task="weather", model="minilm", num_clients=2, batch_size=8, max_length=16)
    assert [row["examples"] for row in data.describe()] == [40, 40]
    assert make_loop(max_rounds=1).fit(fedtune.BertClassifier("minilm", 2), data)[-1].accuracy > 0


def test_a_split_of_ones_own(follow: Any, make_data: Make) -> None:
    follow("A split")
    sizes = [len(rows) for rows in make_data(split="halves", num_clients=3).client_indices]
    assert sizes == [50, 25, 25]
    assert len(make_data(split="halves", num_clients=1).client_indices[0]) == 100


def test_an_algorithm_of_ones_own(follow: Any, make_data: Make, make_module: Make, tmp_path: Path) -> None:
    recipe = follow("An algorithm")
    (tmp_path / "check").mkdir()
    recipe["test_careful"](tmp_path / "check")
    whole, stopped, again = make_module(), make_module(), make_module()
    given = {"name": "careful", "mu": 0.1, "rate": 0.5, "half": True}
    records = make_loop(max_rounds=3, algorithm=given).fit(whole, make_data())
    folder = str(tmp_path / "run")
    make_loop(max_rounds=2, algorithm=given, run_dir=folder).fit(stopped, make_data())
    resumed = make_loop(max_rounds=3, algorithm=recipe["careful"](0.1, rate=0.5, half=True), run_dir=folder)
    assert without_times(resumed.fit(again, make_data())) == without_times(records)
    assert_equal(weights_of(whole), weights_of(again))
    assert records[0].bytes_up * 2 == records[0].bytes_down


def test_a_model_family_of_ones_own(follow: Any, task: fedtune.TextTask, tmp_path: Path) -> None:
    follow("A model family")
    config = transformers.ElectraConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        embedding_size=16,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    transformers.ElectraModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    module = fedtune.build_classifier(str(tmp_path), 3, dropout=0.0, freeze_layers=1)
    assert type(module).__name__ == "ElectraClassifier"
    data = fedtune.FederatedDataModule(task=task, model=str(tmp_path), num_clients=2, batch_size=8, max_length=24)
    assert make_loop(max_rounds=1).fit(module, data)[0].loss_nats > 0
