"""Greedy generation: the likeliest token after the other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from fedtune.errors import at_least


def greedy(
    network: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Collection[int],
    pad_id: int,
    batch_size: int = 16,
) -> list[list[int]]:
    """What a causal language model of Transformers writes after prompts, without dropout.

    Args:
        network: the model; its mode is as before afterwards.
        prompts: token ids of each.
        max_new_tokens: tokens that it writes at most.
        stop: ids that end an answer; they are not part of it.
        pad_id: an id for padding, which stands before shorter prompts.
        batch_size: prompts at once.

    Returns:
        the ids of each answer.
    """
    from transformers import GenerationConfig

    at_least("max_new_tokens", max_new_tokens, 1)
    how = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, eos_token_id=list(stop), pad_token_id=pad_id
    )
    found: list[list[int]] = []
    was, kept = network.training, network.generation_config
    network.eval()
    network.generation_config = how  # a folder may ask for sampling
    try:
        for first in range(0, len(prompts), batch_size):
            some = prompts[first : first + batch_size]
            length = max(map(len, some))
            ids = torch.tensor([[pad_id] * (length - len(one)) + list(one) for one in some], device=network.device)
            mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in some], device=network.device)
            with torch.no_grad():
                written = network.generate(input_ids=ids, attention_mask=mask, generation_config=how)
            found += [_until(one, stop) for one in written[:, length:].tolist()]
    finally:
        network.generation_config = kept
        network.train(was)
    return found


def _until(ids: list[int], stop: Collection[int]) -> list[int]:
    end = next((place for place, one in enumerate(ids) if one in stop), len(ids))
    return ids[:end]
