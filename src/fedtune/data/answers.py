"""Conversations as tokens, by the model's own chat template, and which of the tokens are answers.

Legend: N conversations, T tokens in all, S tokens of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedtune.data import token_cache
from fedtune.data.conversations import Conversation
from fedtune.data.tokens import TokenStore, check_known, encode_plain, vocabulary_size
from fedtune.errors import UsageError, shown, warn
from fedtune.files import printable
from fedtune.tensors import Tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # of an answer in a text: characters, or tokens; the second is the first behind it
Render = Callable[[Conversation, bool], str]
_PIECE = 2000  # conversations that are tokenised together
_DAY = "26 Jul 2024"  # for templates that write the date, which must not depend on the day of a run
_SAME_DAY = f"{{% macro strftime_now(form) %}}{_DAY}{{% endmacro %}}{{{{ '' }}}}"  # in front of a template that asks for it
_MARK = "7b1f0c5a9e"  # stands for an answer where a template is asked what it writes around one


def instruction_tokens(task: Callable[[], Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenStore:
    """The conversations of an `InstructionTask` as tokens, answers marked; from the cache where they are there.

    A conversation is what the tokenizer's chat template writes of it (without a template: system and prompts, each with a line
    feed behind it, and answers with the token for the end of text), up to its last answer. One of more than `max_length` tokens
    loses the first of those before its first answer, though not so many that less than half of `max_length` is left for them,
    and then the last of its tokens. How many that are is a warning.

    Raises:
        UsageError: the template refuses a conversation, or an answer is not found in what it writes; an answer has no
            token; the tokenizer knows next to nothing of the texts.
    """
    found = task()
    messages: Sequence[Conversation] = found.conversations
    facts = [f"instructions 1 {template_of(tokenizer)}", json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)]
    texts = [json.dumps(one) for one in messages]
    path = token_cache.entry_of([*facts, *texts], None, tokenizer, max_length)
    kept = None if path is None else token_cache.read(path, len(messages), False, vocabulary_size(tokenizer), answers=True)
    if kept is None:
        kept = _tokenise(found.name, messages, tokenizer, max_length)
        if path is not None:
            token_cache.write(path, kept)
    _say_what_is_cut(kept["cuts"].tolist(), len(messages), max_length)
    store = TokenStore(kept["ids"], kept["offsets"], int(tokenizer.pad_token_id or 0), answers_T=kept["answers"])
    check_known(store, tokenizer)
    return store


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template of a tokenizer, None where it has none. Of several it is the one named "default".

    Raises:
        UsageError: it has several, none of them the default.
    """
    if not tokenizer.chat_template:
        return None
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise UsageError("tokenizer", tokenizer.name_or_path, f"one with a default chat template ({error})") from error


def rendered(tokenizer: PreTrainedTokenizerBase, turns: Conversation, ask: bool = False) -> str:
    """What a conversation is as a text; with `ask`, up to where the next answer begins."""
    template = template_of(tokenizer)
    if template is not None:
        template = _SAME_DAY + template if "strftime_now" in template else template
        found = tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=ask, date_string=_DAY
        )
        return str(found)
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    end = {"assistant": tokenizer.eos_token or "\n"}
    return (tokenizer.bos_token if begins else "") + "".join(turn["content"] + end.get(turn["role"], "\n") for turn in turns)


def spans_of(turns: Conversation, render: Render, specials: Sequence[str]) -> tuple[str, list[Span]]:
    """The text of a conversation up to its last answer, and the characters of its answers, each with the token that ends it.

    An answer is what a template writes more, once the assistant has said it, than when the assistant was asked. Some templates
    write earlier answers in another way (without what the assistant thought); of these it is the content, and what stands
    behind the content of a last answer, too.

    Raises:
        ValueError: an answer is not there, or not once.
    """
    last = max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    turns = turns[: last + 1]
    text, spans = render(turns, False), []
    for place, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, after = render(turns[:place], True), text if place == last else render(turns[: place + 1], False)
        if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
            before, after = _around(turns, place, render, text)
        if turn["content"].strip()[-2:] not in text[len(before) : len(after)]:
            raise ValueError(f"the answer {shown(turn['content'])} is not found in what it writes")
        end = len(after)
        shorter = after.rstrip()
        if shorter.endswith(tuple(specials)) and len(shorter) > len(before):
            end = len(shorter)  # a line feed behind the end of a turn is never generated
        spans.append((len(before), end))
    return text, spans


def _around(turns: Conversation, place: int, render: Render, text: str) -> tuple[str, str]:
    """The text before an answer, and up to its end, found by another answer in its place."""
    marked = [*turns[:place], {"role": "assistant", "content": _MARK}]
    whole, alone = render([*marked, *turns[place + 1 :]], False), render(marked, False)
    before, _, behind = whole.partition(_MARK)
    if whole.count(_MARK) != 1 or alone.count(_MARK) != 1 or not (text.startswith(before) and text.endswith(behind)):
        raise ValueError(f"the answer {shown(turns[place]['content'])} is not found in what it writes")
    ended, closing = alone.partition(_MARK)[2], 0
    while closing < min(len(ended), len(behind)) and ended[closing] == behind[closing]:
        closing += 1
    return before, text[: len(text) - len(behind) + closing]


def _tokenise(name: str, messages: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, most: int) -> Tensors:
    ids: list[list[int]] = []
    marks: list[Any] = []
    cuts = np.zeros(2, dtype=np.int64)
    for number, (tokens, spans) in enumerate(_tokenised(name, messages, tokenizer)):
        answer_S = np.zeros(len(tokens), dtype=np.int8)
        for start, end in spans:
            answer_S[start:end] = 1
        kept, changed = cut(answer_S, most)
        if not answer_S[kept][1:].any():  # nothing stands before the first token to predict it from
            allowed = f"answers with a token for {tokenizer.name_or_path} (that of conversation {number + 1} has none)"
            raise UsageError("task", name, allowed)
        cuts += changed
        ids.append([tokens[place] for place in kept])
        marks.append(answer_S[kept])
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    flat = np.fromiter((token for one in ids for token in one), np.int32, int(lengths.sum()))
    return {
        "ids": torch.from_numpy(flat),
        "offsets": torch.from_numpy(np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])),
        "answers": torch.from_numpy(np.concatenate(marks)),
        "cuts": torch.from_numpy(cuts),
    }


def _tokenised(
    name: str, messages: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[Span]]]:
    """For each conversation its tokens, and which of them are its answers."""
    specials = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]

    def render(turns: Conversation, ask: bool) -> str:
        return rendered(tokenizer, turns, ask)

    for first in range(0, len(messages), _PIECE):
        texts, spans = [], []
        for number, turns in enumerate(messages[first : first + _PIECE], start=first + 1):
            try:
                text, found = spans_of(turns, render, specials)
            except Exception as error:  # what a template raises is of any type
                allowed = f"conversations that the chat template of {tokenizer.name_or_path} takes (conversation {number}: "
                raise UsageError("task", name, f"{allowed}{printable(str(error), 300)})") from error
            texts.append(text)
            spans.append(found)
        edges = [text[:place] for text, found in zip(texts, spans, strict=True) for span in found for place in span]
        whole, parts = encode_plain(texts, tokenizer), iter(encode_plain(edges, tokenizer))
        for tokens, found in zip(whole, spans, strict=True):
            yield tokens, [_tokens_between(tokens, next(parts), next(parts)) for _ in found]


def _tokens_between(tokens: list[int], before: list[int], after: list[int]) -> Span:
    """Which tokens lie between two edges, given the tokens of the text up to each. One that lies across an edge is within."""
    start, end = _shared(tokens, before), _shared(tokens, after)
    return start, end if end == len(after) else end + 1


def _shared(tokens: list[int], others: list[int]) -> int:
    """How many first tokens two lists have in common."""
    for place, (one, other) in enumerate(zip(tokens, others, strict=False)):
        if one != other:
            return place
    return min(len(tokens), len(others))


def cut(answer_S: Any, most: int) -> tuple[Any, tuple[bool, bool]]:
    """Which tokens of a conversation are kept, and whether some before its first answer, and some of its answers, are not.

    >>> cut(np.array([0, 0, 0, 0, 1, 1]), 4)[0].tolist(), cut(np.array([0, 0, 1, 1, 1, 1]), 4)[0].tolist()
    ([2, 3, 4, 5], [0, 1, 2, 3])
    """
    marked = np.flatnonzero(answer_S)
    if not len(marked):
        return marked, (False, False)
    first, end = int(marked[0]), int(marked[-1]) + 1
    rest = end - first
    asked = min(first, max(most - rest, most // 2))
    kept = np.arange(first - asked, min(end, first - asked + most))
    return kept, (asked < first, int(kept[-1]) + 1 < end)


def _say_what_is_cut(cuts: Sequence[int], count: int, most: int) -> None:
    asked, answered = cuts
    if asked or answered:
        said = [f"{asked:,} lose tokens before the first answer"] * bool(asked)
        said += [f"{answered:,} tokens of answers"] * bool(answered)
        warn(f"of {count:,} conversations, {' and '.join(said)}: max_length is {most} tokens")
