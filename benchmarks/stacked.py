"""Question: is it faster to train several clients as one stacked model (`torch.func`) than one after the other?

Each of K clients has weights of its own, stacked along a first dimension; `vmap` over `functional_call` gives all their
gradients at once, and a plain SGD step follows. The attention mask is 4-D, as Transformers' models cannot make it under
`vmap`. Against it: the same steps one client after the other, as the network is (there is no padding here). Dropout is off in
both. On a GPU there is a third way, the loop compiled with `mode="reduce-overhead"` (CUDA graphs).
Run it from the project's folder: .venv/bin/python benchmarks/stacked.py
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import about, write
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

import fedtune

BATCH, LENGTH, RATE, REPEATS = 32, 40, 1e-3, 5
Stacked = dict[str, Tensor]
Autocast = Callable[[], torch.autocast]  # entered anew for each forward pass: it keeps casts of the weights until it is left


def mask_4d(mask_BL: Tensor) -> Tensor:
    """An additive (B, 1, L, L) mask: 0 where there is text, very low where there is padding."""
    length = mask_BL.shape[-1]
    allowed = mask_BL[:, None, None, :].expand(-1, 1, length, -1)
    return torch.where(allowed.bool(), 0.0, torch.finfo(torch.float32).min)


def gradients(network: nn.Module, weights: Stacked, data: tuple[Tensor, ...], autocast: Autocast) -> Stacked:
    """The gradients of K clients at once: for each parameter (K, ...); `data` as `batches` makes them."""
    ids_KBL, mask_KBL, labels_KB = data

    def loss(of_one: Stacked, ids_BL: Tensor, mask_B1LL: Tensor, labels_B: Tensor) -> Tensor:
        with autocast():
            logits = functional_call(network, of_one, (), {"input_ids": ids_BL, "attention_mask": mask_B1LL}).logits
        return F.cross_entropy(logits.float(), labels_B)

    masks = torch.stack([mask_4d(mask_BL) for mask_BL in mask_KBL])
    result: Stacked = vmap(grad(loss), randomness="different")(weights, ids_KBL, masks, labels_KB)
    return result


def batches(clients: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random batches of K clients, a fifth of the tokens padding in half of the texts."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (clients, BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, ::2, LENGTH * 4 // 5 :] = 0
    return ids.to(device), mask.to(device), torch.randint(3, (clients, BATCH), generator=generator).to(device)


def one_after_the_other(network: nn.Module, data: tuple[Tensor, ...], autocast: Autocast) -> None:
    """A step of each client in one resident network."""
    parameters = list(network.parameters())
    for ids, mask, labels in zip(*data, strict=True):
        with autocast():
            logits = network(input_ids=ids, attention_mask=mask).logits
        F.cross_entropy(logits.float(), labels).backward()
        with torch.no_grad():
            torch._foreach_add_(
                parameters, [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters], alpha=-RATE
            )
        network.zero_grad()


def stacked(network: nn.Module, weights: Stacked, data: tuple[Tensor, ...], autocast: Autocast) -> None:
    """The same steps at once."""
    found = gradients(network, weights, data, autocast)
    torch._foreach_add_(list(weights.values()), [found[name] for name in weights], alpha=-RATE)


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    raw: dict[str, Any] = {}
    print(f"{'clients':>8} {'precision':>9} {'loop, tokens/s':>15}  times as fast")
    for precision in ("fp32", "bf16"):
        autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")
        for clients in (2, 4, 8):
            network = fedtune.BertClassifier("minilm", 3, dropout=0.0).network.to(device)
            network.set_attn_implementation("eager")
            weights = {name: tensor.detach().clone() for name, tensor in stack_module_state([network] * clients)[0].items()}
            data = batches(clients, network.config.vocab_size, device)
            ways = {
                "loop": functools.partial(one_after_the_other, network, data, autocast),
                "stacked": functools.partial(stacked, network, weights, data, autocast),
            }
            if device.type == "cuda":
                graphed = torch.compile(network, mode="reduce-overhead", dynamic=False)
                ways["graphs"] = functools.partial(one_after_the_other, graphed, data, autocast)
            for way in ways.values():
                way()
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(REPEATS):
                for name, way in ways.items():
                    times[name].append(seconds(way, device))
            raw[f"{clients} clients, {precision}"] = times
            middle = {name: statistics.median(values) for name, values in times.items()}
            others = ", ".join(f"{name} {middle['loop'] / middle[name]:.2f}" for name in ways if name != "loop")
            print(f"{clients:8} {precision:>9} {clients * BATCH * LENGTH / middle['loop']:15.0f}  {others}", flush=True)
    write("stacked", about() | {"unit": "seconds of one step of every client", "raw": raw})


if __name__ == "__main__":
    main()
