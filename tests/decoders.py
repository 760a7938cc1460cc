"""Tiny decoders and a tiny tokenizer with a chat template, in hub format, and conversations to train them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from conftest import WORDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import fedtune

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> transformers.PreTrainedTokenizerFast:
    """Bytes are tokens, and so are a few words: every text can be written."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*SPECIAL, *pieces])}
    merges = [("w", "o"), ("wo", "r"), ("wor", "d"), ("Ġ", "word")]
    for one, other in merges:
        vocabulary[one + other] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names: dict[str, Any] = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|end|>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=SPECIAL[3:7], **names)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


SIZE = len(SPECIAL) + 256 + 4


def save_decoder(folder: Path, family: str = "llama", template: str | None = TEMPLATE, **changes: Any) -> str:
    """A folder in hub format: two layers, hidden size 16, at most 128 tokens."""
    ids = {"bos_token_id": 2, "eos_token_id": 7, "pad_token_id": 0, "vocab_size": SIZE}
    if family == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=128, **(ids | changes))
    else:
        kind = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[family]
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 128}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
        heads |= {"head_dim": 8} if family == "qwen3" else {}
        config = kind(**(sizes | heads | ids | changes))
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder, template)
    return str(folder)


def make_chats(count: int = 60, authors: int = 3, seed: int = 0, **more: Any) -> fedtune.InstructionTask:
    """Each author has favourite words; an answer repeats the first word of the prompt."""
    rng = np.random.default_rng(seed)
    numbers = np.arange(count) % authors
    prompts = [" ".join(WORDS[author * 10 + word] for word in rng.integers(10, size=rng.integers(1, 5))) for author in numbers]
    order = rng.permutation(count)
    cuts = [int(count * 0.7), int(count * 0.85)]
    return fedtune.InstructionTask(
        "chats",
        prompts,
        [prompt.split()[0] for prompt in prompts],
        parts=dict(zip(("train", "validation", "test"), np.split(order, cuts), strict=True)),
        authors=numbers,
        author_names=tuple(f"author {number}" for number in range(authors)),
        **more,
    )
