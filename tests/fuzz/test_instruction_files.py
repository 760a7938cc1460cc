"""Files of conversations with odd roles, empty answers, missing columns and wrong types: read whole, or refused in one line."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from cases import FIRST, share

import fedtune
from fedtune.data.registry import load_task

ODD: list[Any] = [
    None,
    "",
    " ",
    0,
    1.5,
    True,
    [],
    {},
    "a",
    "\n",
    "\u200b",
    ["a"],
    {"role": "user"},
    "<|end|>",
    "x" * 2000,
    "\ud800",
]
ROLES: list[Any] = ["user", "assistant", "system", "human", "gpt", "USER ", "tool", "", None, 3, ["user"]]


def message(rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return rng.choice(ODD)
    role = rng.choice(ROLES) if rng.random() < 0.2 else rng.choice(ROLES[:2])
    content = rng.choice(ODD) if rng.random() < 0.2 else rng.choice(["word1", "word2 word3"])
    names = rng.choice(
        [("role", "content"), ("from", "value"), ("role", "value"), ("who", "content")][: 4 if rng.random() < 0.2 else 2]
    )
    return {names[0]: role, names[1]: content} | ({"weight": 1, "tool_calls": rng.choice(ODD)} if rng.random() < 0.1 else {})


def row(rng: random.Random, names: tuple[str, ...]) -> Any:
    if rng.random() < 0.02:
        return rng.choice(ODD)
    if names[0] in ("messages", "conversations"):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        if rng.random() < 0.15:
            turns = rng.choice([[message(rng) for _ in range(rng.randrange(5))], *ODD])
        return {names[0]: turns}
    return {
        name: rng.choice(ODD) if rng.random() < 0.03 else f"{name} {rng.randrange(9)}" for name in names if rng.random() > 0.01
    }


def test_a_file_of_conversations_is_read_whole_or_refused_in_one_line(tmp_path: Path) -> None:
    shapes = [
        ("messages",),
        ("conversations",),
        ("instruction", "input", "output"),
        ("prompt", "completion"),
        ("question", "answer", "system"),
        ("a", "b"),
    ]
    read, lines = 0, []
    for seed in range(FIRST, FIRST + share(0.5)):
        rng = random.Random(seed)
        rows = [
            row(rng, rng.choice(shapes) if rng.random() < 0.05 else shapes[seed % len(shapes)])
            for _ in range(rng.randrange(1, 12))
        ]
        file = tmp_path / f"{seed}.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in rows))
        try:
            task = load_task("instructions", {"path": str(file)})
        except fedtune.UsageError as error:
            lines.append((seed, str(error)))
            continue
        read += 1
        assert len(task) == len(rows), seed
        for conversation in task.messages or ():
            assert {turn["role"] for turn in conversation} <= {"system", "user", "assistant"}, seed
            assert all(turn["content"].strip() for turn in conversation), seed
            assert any(turn["role"] == "assistant" for turn in conversation), seed
    assert read
    assert lines
    assert not [one for one in lines if "\n" in one[1] or "NoneType" in one[1]]
