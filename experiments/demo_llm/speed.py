"""Seconds a training step of the demo's decoder, against a loop as it is written first, in one run: the ways take turns.

Processor seconds of one thread, so that other work on the machine counts little; the median of --repeats steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from demo import DATA, MODEL
from torch import nn

import fedtune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = fedtune.FederatedDataModule(**DATA, model=given.model)
    batch = next(iter(data.client_dataloader(0)))
    steps = ways(given.model, batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(given.repeats + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            if repeat:  # the first one makes what the others use again
                seconds[name].append(time.process_time() - start)
    tokens = int(batch["attention_mask"].sum())
    print(
        f"a batch of {len(batch['labels'])} conversations, {tokens} tokens and {batch['input_ids'].numel() - tokens} of padding"
    )
    for name, found in seconds.items():
        print(f"{statistics.median(found):6.2f} s  {name}")


def ways(model: str, batch: dict[str, torch.Tensor]) -> dict[str, Callable[[], None]]:
    """How a step may be done: name -> a step of it."""
    full, half = {**MODEL, "half_base": False}, {**MODEL, "half_base": True}
    lora = fedtune.CausalLM(model, **full)
    halved, eager, packed = (fedtune.CausalLM(model, **{**half, **more}) for more in ({}, {}, {"packing": 64}))
    eager.network.set_attn_implementation("eager")
    whole = fedtune.CausalLM(model)
    fill, missing = {"labels": -100}, 128 - batch["labels"].shape[1]
    padded = {name: nn.functional.pad(one, (0, missing), value=fill.get(name, 0)) for name, one in batch.items()}
    return {
        "everything trained, padded to 128 tokens, all logits, fp32": naive(whole, padded, False),
        "LoRA, padded to 128 tokens, all logits, fp32": naive(lora, padded, False),
        "LoRA, padded to 128 tokens, all logits, bf16 mixed": naive(lora, padded, True),
        "CausalLM, bf16 mixed": step_of(lora, batch),
        "CausalLM, half_base": step_of(halved, batch),
        "CausalLM, half_base, packing": step_of(packed, batch),
        "CausalLM, half_base, eager attention (the demo)": step_of(eager, batch),
    }


def naive(module: fedtune.CausalLM, batch: dict[str, torch.Tensor], mixed: bool) -> Callable[[], None]:
    """The network's own loss, which computes the logits of all tokens."""
    optimizer = torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], lr=0.0)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            loss = module.network(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_of(module: fedtune.CausalLM, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """The module's own step, as the loop does it."""
    optimizer = torch.optim.AdamW([one for one in module.parameters() if one.requires_grad], lr=0.0)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits_AV, target_A, _ = module.answer_logits(batch)
            loss = nn.functional.cross_entropy(logits_AV.float(), target_A)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
