"""What an `InstructionTask` holds its conversations to, and what columns of a file are made into some.

A conversation is a list of messages, each a dictionary of a role ("system", "user" or "assistant") and a content.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedtune.data.contract import fault_of_text, texts_of
from fedtune.data.formats import Table
from fedtune.data.values import missing
from fedtune.errors import UsageError, one_of, shown

Conversation = list[dict[str, Any]]  # of texts, once they are checked
ROLES = ("system", "user", "assistant")
_SPELT = {
    "human": "user",
    "gpt": "assistant",
    "prompter": "user",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
_ROLE, _CONTENT = ("role", "from"), ("content", "value")  # what messages call the two, in files of chats and of ShareGPT
# columns of files that are recognised, the first that fits: role -> names that it may have
SHAPES: tuple[dict[str, tuple[str, ...]], ...] = (
    {"messages": ("messages", "conversations", "conversation")},
    {"prompt": ("instruction",), "answer": ("output", "response")},
    {"prompt": ("prompt",), "answer": ("completion", "response", "answer")},
    {"prompt": ("question",), "answer": ("answer",)},
)
_BESIDE = {
    "input": ("input", "context"),
    "system": ("system", "system_prompt"),
}  # where they are there; the input of the first only


def recognised(present: Sequence[str], source: object) -> dict[str, str]:
    """Role -> column, for the columns of a file.

    Raises:
        UsageError: they have no shape that is known.

    >>> recognised(["instruction", "input", "output"], "x.jsonl")
    {'prompt': 'instruction', 'answer': 'output', 'input': 'input'}
    """
    for number, shape in enumerate(SHAPES):
        found = {role: next((name for name in names if name in present), None) for role, names in shape.items()}
        if None not in found.values():
            beside = [role for role in _BESIDE if role == "system" or number == 1]
            more = {role: next((name for name in _BESIDE[role] if name in present), None) for role in beside}
            return {role: name for role, name in (found | more).items() if name is not None}
    known = "; ".join(" and ".join("/".join(names) for names in shape.values()) for shape in SHAPES)
    allowed = f"columns named by prompt and answer, or by messages; or a file with {known} (in {source} there are "
    raise UsageError("prompt", None, f"{allowed}{shown(list(present[:20]))})")


def turns_of(task: str, messages: Any) -> list[Conversation]:
    """The conversations of a task, checked, in one spelling.

    Raises:
        UsageError: one that is none, by its number.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not hasattr(messages, "__iter__"):
        raise UsageError("task", task, f"messages that are a list of conversations (this is a {type(messages).__name__})")
    found = []
    for row, one in enumerate(messages):
        turns = plain(one)
        fault = turns if isinstance(turns, str) else fault_of(turns)
        if fault or isinstance(turns, str):
            raise UsageError("task", task, f"messages that are {fault} (conversation {row + 1} is {shown(one)})")
        found.append(turns)
    return found


def plain(messages: Any) -> Conversation | str:
    """A conversation as it is spelt here; what it should be, where it is none.

    Messages are dictionaries of role and content, or from and value; or a dictionary of two lists, as `datasets` has them.
    What else is in a message is left out where it is empty.
    """
    if isinstance(messages, Mapping) and all(isinstance(value, (list, tuple)) for value in messages.values()):
        sizes = {len(value) for value in messages.values()}
        if len(sizes) != 1:
            return "lists of one length each"
        messages = [dict(zip(messages, values, strict=True)) for values in zip(*messages.values(), strict=True)]
    if isinstance(messages, (str, bytes, Mapping)) or not hasattr(messages, "__iter__"):
        return "a list of messages"
    found: Conversation = []
    for message in messages:
        if not isinstance(message, Mapping):
            return "a list of messages, each with role and content"
        pair = [next((message[name] for name in names if name in message), None) for names in (_ROLE, _CONTENT)]
        if any(message.get(name) for name in ("tool_calls", "function_call", "tools")):
            return "without calls of tools, which are not offered"
        if not isinstance(pair[0], str):
            return "messages with role and content (or from and value)"
        role = _SPELT.get(pair[0].strip().lower(), pair[0].strip().lower())
        if role not in ROLES:
            return f"of the roles {one_of('', pair[0], ROLES).allowed}, not {shown(pair[0])}"
        if role == "system" and not found and missing(pair[1]):
            continue  # a chat without one
        found.append({"role": role, "content": pair[1]})
    return found


def fault_of(turns: Conversation) -> str:
    """What a conversation should be and is not; empty where it is right.

    >>> fault_of([{"role": "user", "content": "Who?"}])
    'with an answer: a message of the role assistant'
    """
    for number, turn in enumerate(turns):
        fault = fault_of_text(turn["content"])
        if fault:
            return f"{fault} (what the {turn['role']} says in message {number + 1} is {shown(turn['content'])})"
        if turn["role"] == "system" and number:
            return "with a system message at the beginning only"
    roles = [turn["role"] for turn in turns if turn["role"] != "system"]
    if roles[:1] == ["assistant"]:
        return "begun by the user"
    return "" if "assistant" in roles else "with an answer: a message of the role assistant"


def pairs_of(task: str, prompts: Any, answers: Any, system: Any) -> list[Conversation]:
    """Conversations of one prompt and one answer each, with what the system says before, to all or to each.

    Raises:
        UsageError: one is no text, or empty; they differ in number.
    """
    columns = {"prompts": texts_of(task, "prompts", prompts), "answers": texts_of(task, "answers", answers)}
    count = len(columns["prompts"])
    if len(columns["answers"]) != count:
        raise UsageError("task", task, f"as many answers as prompts, {count} ({len(columns['answers'])} are here)")
    before = [system] * count if system is None or isinstance(system, str) else list(system)
    if len(before) != count:
        raise UsageError("task", task, f"one system text, or one for each of {count} prompts ({len(before)} are here)")
    found = []
    for row, (said, prompt, answer) in enumerate(zip(before, columns["prompts"], columns["answers"], strict=True)):
        fault = "" if missing(said) else fault_of_text(said)
        if fault:
            raise UsageError("task", task, f"system texts that are {fault} (text {row + 1} of {count} is {shown(said)})")
        first: Conversation = [] if missing(said) else [{"role": "system", "content": said}]
        found.append([*first, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}])
    return found


def rows_of(table: Table) -> Iterator[Conversation]:
    """The conversations of a file, row by row.

    Raises:
        UsageError: a row of which none can be made, by its place.
    """
    columns = table.columns
    for row in range(len(table)):
        said = columns["system"][row] if "system" in columns else None
        if "messages" in columns:
            turns = plain(columns["messages"][row])
            if not isinstance(turns, str) and not missing(said) and not (turns and turns[0]["role"] == "system"):
                turns = [{"role": "system", "content": said}, *turns]
        else:
            prompt = _joined(columns["prompt"][row], columns["input"][row] if "input" in columns else None)
            turns = [] if missing(said) else [{"role": "system", "content": said}]
            turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": columns["answer"][row]}]
        fault = turns if isinstance(turns, str) else fault_of(turns)
        if fault or isinstance(turns, str):
            raise _wrong(table, row, fault)
        yield turns


def _joined(prompt: Any, more: Any) -> Any:
    """An instruction, and after a blank line what it is about, where there is something."""
    if missing(more):
        return prompt
    return (
        f"{prompt}\n\n{more}"
        if isinstance(prompt, str) and isinstance(more, str)
        else prompt
        if isinstance(more, str)
        else more
    )


def _wrong(table: Table, row: int, fault: str) -> UsageError:
    role = "messages" if "messages" in table.columns else "answer"
    for name in ("prompt", "answer"):
        if name in table.columns and fault_of_text(table.columns[name][row]):
            role = name
            fault = fault_of_text(table.columns[name][row])
    value = table.columns[role][row]
    has = "is empty" if missing(value) else f"holds {shown(value)}"
    kind = "conversations" if role == "messages" else "texts"
    return UsageError(role, table.named[role], f"a column of {kind} that are {fault} ({table.place(row).rstrip(',')} {has})")
