"""Instruction tasks: what is made of files, the chat template and the answers that are learned, what is cut, splits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import TEMPLATE, make_chats, save_decoder, save_tokenizer

import fedtune
from fedtune.data import answers
from fedtune.data.answers import instruction_tokens, rendered, spans_of
from fedtune.data.registry import load_task

PARTS = {"train": [0, 1], "test": [2]}
# as Qwen3's: of all but the last answer only what comes after the thinking
THINKING = (
    "{% for message in messages %}<|{{ message.role }}|>\n{% if message.role == 'assistant' and not loop.last %}"
    "{{ message.content.split('</think>')[-1] }}{% else %}{{ message.content }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HEADED = "{% for message in messages %}{{ message.role }}: {{ message.content }}</s>\n{% endfor %}"  # it cannot ask


@pytest.fixture
def tiny_llama(tmp_path: Path) -> str:
    return save_decoder(tmp_path / "llama")


def chat(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def of_chats(*chats: Any, **more: Any) -> fedtune.InstructionTask:
    return fedtune.InstructionTask(
        "x", messages=chats, parts={"train": list(range(len(chats) - 1)), "test": [len(chats) - 1]}, **more
    )


def learned(task: fedtune.InstructionTask, tokenizer: Any, length: int = 128) -> list[str]:
    """The answers that a batch has a loss for, decoded."""
    store = instruction_tokens(lambda: task, tokenizer, length)
    labels = store.batch(torch.arange(len(task)))["labels"]
    return [tokenizer.decode(row[row != -100]) for row in labels]


# ---- the mask


def test_what_is_learned_decodes_to_the_answers_and_their_ends(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    several = chat("Who?", "Me.\nAnd you", "Why?", "word1 is why ", system="Be brief.")
    task = of_chats(chat("word1 word2", "word3"), several, chat("a", "é 🙂"))
    assert learned(task, tokenizer) == ["word3<|end|>", "Me.\nAnd you<|end|>word1 is why <|end|>", "é 🙂<|end|>"]


def test_the_tokens_are_those_of_the_template_and_what_follows_the_last_answer_is_left_out(tmp_path: Path) -> None:
    tokenizer, turns = save_tokenizer(tmp_path), chat("Who?", "Me.", "And then?")
    store = instruction_tokens(lambda: of_chats(turns, turns), tokenizer, 128)
    expected = tokenizer.apply_chat_template(turns[:2], tokenize=True, return_dict=False)
    assert store.ids_T[: store.offsets[1]].tolist() == expected[:-1]  # but for the line feed behind the end of the turn


@pytest.mark.parametrize("asked", ["word1 word2", "a", "é\n"])
def test_a_prompt_alone_has_the_tokens_that_stand_before_the_first_label(asked: str, tmp_path: Path) -> None:
    tokenizer, turns = save_tokenizer(tmp_path), chat(asked, "\n word3")
    batch = instruction_tokens(lambda: of_chats(turns, turns), tokenizer, 128).batch(torch.tensor([0]))
    first = int((batch["labels"][0] != -100).nonzero()[0])
    assert batch["input_ids"][0, :first].tolist() == tokenizer.apply_chat_template(
        turns[:1], add_generation_prompt=True, return_dict=False
    )


def test_a_template_that_writes_earlier_answers_in_another_way_is_followed(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, THINKING)
    turns = chat("Who?", "<think>hm</think>Me.", "Why?", "<think>so</think>Because.")
    assert learned(of_chats(turns, turns), tokenizer)[0] == "Me.<|end|><think>so</think>Because.<|end|>"


def test_a_template_without_a_beginning_of_answers_gives_that_to_the_answer(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, HEADED)
    assert learned(of_chats(chat("Who?", "Me."), chat("a", "b")), tokenizer)[0] == "assistant: Me.</s>"


def test_without_a_template_an_answer_follows_a_line_feed_and_ends_the_text(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path, None)
    turns = chat("Who?", "Me.", "Why?", "So.", system="Be brief.")
    assert rendered(tokenizer, turns) == "Be brief.\nWho?\nMe.<|end|>Why?\nSo.<|end|>"
    assert learned(of_chats(turns, turns), tokenizer)[0] == "Me.<|end|>So.<|end|>"


def test_a_template_that_writes_the_date_gives_the_same_tokens_on_every_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    tokenizer = save_tokenizer(tmp_path / "t", "{{ strftime_now('%d %b %Y') }}" + TEMPLATE)
    assert rendered(tokenizer, chat("a", "b")).startswith("26 Jul 2024<s>")


def test_a_template_that_refuses_or_loses_an_answer_is_one_line(tmp_path: Path) -> None:
    refusing = save_tokenizer(tmp_path / "a", "{{ raise_exception('System role not supported') }}")
    with pytest.raises(fedtune.UsageError, match=r"conversation 1: .*System role not supported"):
        learned(of_chats(chat("a", "b"), chat("a", "b")), refusing)
    losing = save_tokenizer(tmp_path / "b", "{% for message in messages %}{{ message.role }}{% endfor %}")
    with pytest.raises(fedtune.UsageError, match=r"conversation 1: the answer 'b' is not found"):
        learned(of_chats(chat("a", "b", "c", "d"), chat("a", "b")), losing)


def test_spans_are_characters_of_the_text() -> None:
    text, spans = spans_of(chat("a", "b"), lambda turns, ask: "".join(t["content"] + "|" for t in turns) + "!" * ask, ["|"])
    assert (text, spans) == ("a|b|", [(2, 4)])  # found by another answer in its place, as the text does not go on from "a|!"


# ---- what is cut


def test_what_is_too_long_loses_the_beginning_first_and_keeps_answers(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    task = of_chats(chat("x" * 100, "yes"), chat("x" * 100, "y" * 100), chat("a", "y" * 100), chat("a", "b"))
    with pytest.warns(
        UserWarning, match="of 4 conversations, 2 lose tokens before the first answer and 2 tokens of answers: max_length is 40"
    ):
        found = learned(task, tokenizer, 40)
    assert found[0] == "yes<|end|>"
    assert found[3] == "b<|end|>"
    assert found[1] == "y" * 20
    assert set(found[2]) == {"y"}
    assert len(found[2]) > 20


@pytest.mark.parametrize("most", range(3, 14))
@pytest.mark.parametrize("first", [1, 4, 9])
@pytest.mark.parametrize("rest", [1, 4, 9])
def test_a_cut_keeps_a_place_before_the_answer_and_tokens_of_it(first: int, rest: int, most: int) -> None:
    marks = np.array([0] * first + [1] * rest + [0] * 3)
    kept, (asked, answered) = answers.cut(marks, most)
    assert len(kept) == min(first + rest, most)
    assert np.array_equal(kept, np.arange(kept[0], kept[0] + len(kept)))
    assert marks[kept][0] == 0
    assert marks[kept].any()
    assert asked == (kept[0] > 0)
    assert answered == (marks[kept].sum() < rest)


def test_the_cut_is_said_again_when_tokens_come_from_the_cache(tmp_path: Path) -> None:
    tokenizer, task = save_tokenizer(tmp_path), of_chats(chat("x" * 100, "yes"), chat("a", "b"))
    for _ in range(2):
        with pytest.warns(UserWarning, match="of 2 conversations, 1 lose tokens before the first answer: max_length is 40"):
            learned(task, tokenizer, 40)


def test_another_template_is_another_entry_and_a_damaged_entry_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTUNE_CACHE", str(tmp_path / "cache"))
    task = of_chats(chat("a", "b"), chat("c", "d"))
    tokenizer = save_tokenizer(tmp_path / "t")
    first = learned(task, tokenizer)
    tokenizer.chat_template = HEADED
    assert learned(task, tokenizer) != first
    assert len(list((tmp_path / "cache").iterdir())) == 2
    tokenizer.chat_template = TEMPLATE
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:-3] + b"xyz")
    with pytest.warns(UserWarning, match="is damaged"):
        assert learned(task, tokenizer) == first


# ---- the task


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"prompts": ["a"]}, "prompts and answers"),
        ({"prompts": ["a", "b", "c"], "answers": ["d"]}, "as many answers as prompts, 3"),
        ({"prompts": ["a", "b", "c"], "answers": ["d", " ", "f"]}, "answers that are not empty"),
        ({"prompts": ["a", "b", "c"], "answers": ["d", "e", "f"], "system": ["g"]}, "one for each of 3"),
        ({"prompts": ["a", "b", "c"], "answers": ["d", "e", "f"], "messages": []}, "or messages"),
        ({"messages": [chat("a", "b"), chat("a"), chat("a", "b")]}, "with an answer"),
        ({"messages": [chat("a", "b"), [{"role": "assistant", "content": "a"}], chat("a", "b")]}, "begun by the user"),
        (
            {"messages": [chat("a", "b"), [{"role": "tool", "content": "a"}], chat("a", "b")]},
            "of the roles system, user, assistant",
        ),
        ({"messages": [chat("a", "b"), chat("a", "b") + chat("c", system="d")[:1], chat("a", "b")]}, "at the beginning only"),
        ({"messages": [chat("a", "b"), chat("a", "\ud800"), chat("a", "b")]}, "half of a UTF-16 pair"),
        ({"messages": [chat("a", "b"), "a", chat("a", "b")]}, "a list of messages"),
        ({"messages": "a"}, "a list of conversations"),
        ({"prompts": ["a", "b", "c"], "answers": ["d", "e", "f"], "author_names": ("x",)}, "author_names only with authors"),
        (
            {"prompts": ["a", "b", "c"], "answers": ["d", "e", "f"], "labels": [0, 1, 2], "label_names": ("x", "y", "z")},
            "occur in the train part",
        ),
    ],
)
def test_a_task_that_cannot_be_is_one_line(fields: dict[str, Any], match: str) -> None:
    with pytest.raises(fedtune.UsageError, match=match) as caught:
        fedtune.InstructionTask("x", parts=PARTS, **fields)
    assert "\n" not in str(caught.value)


def test_prompts_and_messages_are_the_same_task() -> None:
    one = fedtune.InstructionTask("x", ["a", "b", "c"], ["d", "e", "f"], PARTS, system="s")
    other = fedtune.InstructionTask(
        "x", messages=[chat("a", "d", system="s"), chat("b", "e", system="s"), chat("c", "f", system="s")], parts=PARTS
    )
    assert one.messages == other.messages
    assert len(one) == 3


# ---- files


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"instruction": f"i{n}", "input": "" if n % 2 else f"x{n}", "output": f"o{n}", "who": f"w{n % 3}", "topic": "ab"[n % 2]}
    for n in range(12)
]


def shapes(tmp_path: Path) -> dict[str, Path]:
    turns = [("user", "human", f"i{n}\n\nx{n}" if n % 2 == 0 else f"i{n}") for n in range(12)]
    chats = [[(role, name, text), ("assistant", "gpt", f"o{n}")] for n, (role, name, text) in enumerate(turns)]
    return {
        "alpaca": lines(tmp_path / "alpaca.jsonl", *ROWS),
        "dolly": lines(
            tmp_path / "dolly.jsonl",
            *({"instruction": r["instruction"], "context": r["input"], "response": r["output"]} for r in ROWS),
        ),
        "prompts": lines(tmp_path / "prompts.jsonl", *({"prompt": one[0][2], "completion": one[1][2]} for one in chats)),
        "questions": lines(tmp_path / "questions.jsonl", *({"question": one[0][2], "answer": one[1][2]} for one in chats)),
        "messages": lines(
            tmp_path / "messages.jsonl", *({"messages": [{"role": r, "content": t} for r, _, t in one]} for one in chats)
        ),
        "sharegpt": lines(
            tmp_path / "sharegpt.jsonl", *({"conversations": [{"from": f, "value": t} for _, f, t in one]} for one in chats)
        ),
    }


def test_files_of_all_shapes_are_recognised_and_say_the_same(tmp_path: Path) -> None:
    found = {name: load_task("instructions", {"path": str(file)}) for name, file in shapes(tmp_path).items()}
    assert {json.dumps(task.messages) for task in found.values()} == {json.dumps(found["alpaca"].messages)}
    assert found["alpaca"].messages[0] == chat("i0\n\nx0", "o0")
    assert len(found["alpaca"].parts["train"]) == 9


def test_parquet_csv_and_a_folder_of_the_hub_say_the_same(tmp_path: Path) -> None:
    import pandas

    pandas.DataFrame(ROWS).to_parquet(tmp_path / "rows.parquet")
    pandas.DataFrame(ROWS).to_csv(tmp_path / "rows.csv", index=False)
    (tmp_path / "hub").mkdir()
    lines(tmp_path / "hub" / "train.jsonl", *ROWS)
    expected = load_task("instructions", {"path": str(lines(tmp_path / "a.jsonl", *ROWS)), "author": "who", "label": "topic"})
    options = [
        ("instructions", tmp_path / "rows.parquet"),
        ("instructions", tmp_path / "rows.csv"),
        ("instructions_hub", tmp_path / "hub"),
    ]
    for task, path in options:
        found = load_task(task, {"path": str(path), "author": "who", "label": "topic"})
        assert found.messages == expected.messages
        assert found.author_names == ("w0", "w1", "w2")
        assert found.label_names == ("a", "b")
        assert {part: rows.tolist() for part, rows in found.parts.items()} == {
            part: rows.tolist() for part, rows in expected.parts.items()
        }


def test_conversations_in_parquet_and_in_a_folder_of_the_hub(tmp_path: Path) -> None:
    import pandas

    chats = [chat(f"q{n}", f"a{n}", f"r{n}", f"b{n}") for n in range(8)]
    pandas.DataFrame({"messages": chats}).to_parquet(tmp_path / "chats.parquet")
    (tmp_path / "hub").mkdir()
    pandas.DataFrame({"messages": chats}).to_parquet(tmp_path / "hub" / "train.parquet")
    assert load_task("instructions", {"path": str(tmp_path / "chats.parquet")}).messages == chats
    assert load_task("instructions_hub", {"path": str(tmp_path / "hub")}).messages == chats


def test_columns_are_named_and_parts_chosen(tmp_path: Path) -> None:
    rows = [
        {"ask": f"q{n}", "say": f"a{n}", "first": "s" if n % 2 else None, "part": ("train", "dev", "test")[n % 3]}
        for n in range(9)
    ]
    file = lines(tmp_path / "x.jsonl", *rows)
    task = fedtune.InstructionTask.from_file(file, prompt="ask", answer="say", system="first", split="part")
    assert task.messages[:2] == [chat("q0", "a0"), chat("q3", "a3", system="s")]
    assert [len(task.parts[part]) for part in ("train", "validation", "test")] == [3, 3, 3]


def test_conversations_with_one_first_message_stay_together(tmp_path: Path) -> None:
    task = fedtune.InstructionTask.from_file(
        lines(tmp_path / "x.jsonl", *({"prompt": f"q{n // 4}", "answer": f"a{n}"} for n in range(40)))
    )
    asked = {part: {task.messages[row][0]["content"] for row in rows} for part, rows in task.parts.items()}
    assert not asked["train"] & asked["test"]
    assert not asked["train"] & asked["validation"]
    assert len(asked["train"] | asked["test"] | asked["validation"]) == 10


@pytest.mark.parametrize(
    ("rows", "options", "match"),
    [
        ([{"a": "b"}], {}, r"prompt: got None; allowed: columns named by prompt and answer, .*there are \['a'\]"),
        (ROWS, {"prompt": "instruction"}, "answer: got None; allowed: the column that belongs to prompt instruction"),
        (
            ROWS,
            {"prompt": "instruktion", "answer": "output"},
            r"prompt: got 'instruktion'; allowed: a column of .*instruction \(nearest\)",
        ),
        (ROWS, {"messages": "who", "input": "input"}, "nothing beside prompt, answer and input"),
        (ROWS, {"messages": "who"}, "a list of messages"),
        ([*ROWS, {"instruction": "i", "output": " "}], {}, r"answer|output.*not empty \(row 13 of .*, line 13 is empty\)"),
        ([*ROWS, {"instruction": "i", "output": 3}], {}, r"text \(row 13 of .*, line 13 holds 3\)"),
        ([*ROWS, {"instruction": "i"}], {}, r"row 13 of .*, line 13 is empty"),
        (
            [{"messages": chat("a", "b")}, {"messages": [{"role": "tool", "content": "a"}]}],
            {},
            r"of the roles .*row 2 of .*line 2",
        ),
        (
            [{"messages": chat("a", "b")}, {"messages": [{"role": "user"}, {"content": "a"}]}],
            {},
            "messages with role and content",
        ),
        (
            [{"messages": chat("a", "b")}, {"messages": [{"role": "user", "content": ["a"]}]}],
            {},
            "what the user says in message 1",
        ),
        ([{"messages": chat("a", "b")}, {"messages": []}], {}, "with an answer"),
        ([{"messages": chat("a", "b")}, {}], {}, "a list of messages"),
        (
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [1]}]}],
            {},
            "calls of tools",
        ),
    ],
)
def test_a_file_of_which_no_conversations_can_be_made_is_one_line(
    rows: list[Any], options: dict[str, str], match: str, tmp_path: Path
) -> None:
    with pytest.raises(fedtune.UsageError, match=match) as caught:
        load_task("instructions", {"path": str(lines(tmp_path / "x.jsonl", *rows)), **options})
    assert "\n" not in str(caught.value)


# ---- the data module


def data_of(model: str, task: Any, **more: Any) -> fedtune.FederatedDataModule:
    return fedtune.FederatedDataModule(
        **({"task": task, "model": model, "num_clients": 3, "batch_size": 8, "max_length": 64} | more)
    )


def test_batches_have_labels_for_answers_and_nothing_else_is_padded_in(tiny_llama: str) -> None:
    data = data_of(tiny_llama, make_chats())
    batch = next(iter(data.client_dataloader(0)))
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].shape == batch["input_ids"].shape
    marked = batch["labels"] != -100
    assert torch.equal(batch["labels"][marked], batch["input_ids"][marked])
    assert not (marked & (batch["attention_mask"] == 0)).any()
    assert marked.sum(1).min() > 0


@pytest.mark.parametrize("split", ["iid", "quantity", "by_length", "by_author", "natural"])
def test_splits_without_labels_divide_conversations(split: str, tiny_llama: str) -> None:
    data = data_of(tiny_llama, make_chats(), split=split, batch_size=2)
    assert sorted(np.concatenate(data.client_indices)) == sorted(data.task.parts["train"])
    table = data.describe()
    assert "labels" not in table[0]
    assert sum(row["answer_tokens"] for row in table) < sum(row["tokens"] for row in table)
    assert data.client_accuracy("validation", torch.ones(9)) != []
    assert data.majority_accuracy() is None


@pytest.mark.parametrize("split", ["dirichlet", "by_label", "shards", "by_author_and_label", "hilmkil_sorted"])
def test_a_split_by_label_needs_labels(split: str, tiny_llama: str) -> None:
    with pytest.raises(fedtune.UsageError, match=f"split: got '{split}'; allowed: a split that needs no labels"):
        data_of(tiny_llama, make_chats(), split=split).client_indices  # noqa: B018 - reading makes it
    labelled = make_chats(labels=np.arange(60) % 2, label_names=("x", "y"))
    assert len(data_of(tiny_llama, labelled, split=split, batch_size=1).client_indices) == 3


def test_client_accuracy_is_known_by_author_and_else_for_none(tiny_llama: str) -> None:
    right = torch.ones(9)
    assert data_of(tiny_llama, make_chats()).client_accuracy("validation", right) == [None] * 3
    assert data_of(tiny_llama, make_chats(), split="by_author").client_accuracy("validation", right) == [1.0] * 3


def test_the_digest_names_the_answers(tiny_llama: str) -> None:
    one = data_of(tiny_llama, make_chats()).digest
    assert one == data_of(tiny_llama, make_chats()).digest != data_of(tiny_llama, make_chats(seed=1)).digest
    turns = [chat("a", "b", "c", "d")] * 2
    joined = [[*chat("a", "b")[:1], {"role": "user", "content": "b"}, *chat("c", "d")]] * 2
    assert (
        data_of(tiny_llama, of_chats(*turns), num_clients=1, batch_size=1).digest
        != data_of(tiny_llama, of_chats(*joined), num_clients=1, batch_size=1).digest
    )


def test_a_classifier_has_no_use_for_instructions_and_the_other_way_round(
    tiny_llama: str, make_module: Callable[..., Any], make_data: Callable[..., Any]
) -> None:
    data = data_of(tiny_llama, make_chats())
    with pytest.raises(
        fedtune.UsageError, match=r"task: got 'chats'; allowed: a task of texts and labels \(this one has instructions\)"
    ):
        make_module().check_data(data)
    with pytest.raises(fedtune.UsageError, match="allowed: a task of instructions and answers"):
        fedtune.CausalLM(tiny_llama).check_data(make_data())
