"""Question: is it faster to train several clients as one stacked model (`torch.func`) than one after the other?

Each of K clients has weights of its own, stacked along a first dimension; `vmap` over `functional_call` gives all their
gradients at once, and a plain SGD step follows. The attention mask is 4-D, as Transformers' models cannot make it under
`vmap`. Against it: the same steps one client after the other, as fedtune does. Dropout is off in both. On a GPU there is a
third way, the loop compiled with `mode="reduce-overhead"` (CUDA graphs).
Run it from the project's folder: .venv/bin/python benchmarks/stacked.py
"""

from __future__ import annotations

import contextlib
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


def mask_4d(mask_BL: Tensor) -> Tensor:
    """An additive (B, 1, L, L) mask: 0 where there is text, very low where there is padding."""
    length = mask_BL.shape[-1]
    allowed = mask_BL[:, None, None, :].expand(-1, 1, length, -1)
    return torch.where(allowed.bool(), 0.0, torch.finfo(torch.float32).min)


def gradients(network: nn.Module, weights: Stacked, ids_KBL: Tensor, mask_KBL: Tensor, labels_KB: Tensor) -> Stacked:
    """The gradients of K clients at once: for each parameter (K, ...)."""

    def loss(of_one: Stacked, ids_BL: Tensor, mask_B1LL: Tensor, labels_B: Tensor) -> Tensor:
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


def one_after_the_other(network: nn.Module, clients: int, data: tuple[Tensor, ...]) -> None:
    """A step of each client in one resident network."""
    parameters = list(network.parameters())
    for client in range(clients):
        ids, mask, labels = (one[client] for one in data)
        F.cross_entropy(network(input_ids=ids, attention_mask=mask).logits.float(), labels).backward()
        with torch.no_grad():
            torch._foreach_add_(
                parameters, [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters], alpha=-RATE
            )
        network.zero_grad()


def stacked(network: nn.Module, weights: Stacked, data: tuple[Tensor, ...]) -> None:
    """The same steps at once."""
    found = gradients(network, weights, *data)
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
    print(f"{'clients':>8} {'precision':>9} {'loop, tokens/s':>15} {'stacked, tokens/s':>18} {'stacked / loop':>15}")
    for precision in ("fp32", "bf16"):
        bf16 = torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        for clients in (2, 4, 8):
            network = fedtune.BertClassifier("minilm", 3, dropout=0.0).network.to(device)
            network.set_attn_implementation("eager")
            weights = {name: tensor.detach().clone() for name, tensor in stack_module_state([network] * clients)[0].items()}
            data = batches(clients, network.config.vocab_size, device)
            ways: dict[str, Callable[[], None]] = {
                "loop": lambda network=network, clients=clients, data=data: one_after_the_other(network, clients, data),
                "stacked": lambda network=network, weights=weights, data=data: stacked(network, weights, data),
            }
            if device.type == "cuda":
                graphed = torch.compile(network, mode="reduce-overhead", dynamic=False)
                ways["graphs"] = lambda graphed=graphed, clients=clients, data=data: one_after_the_other(graphed, clients, data)
            with bf16:
                for way in ways.values():
                    way()
                times = {name: [] for name in ways}
                for _ in range(REPEATS):
                    for name, way in ways.items():
                        times[name].append(seconds(way, device))
            raw[f"{clients} clients, {precision}"] = times
            rate = {name: clients * BATCH * LENGTH / statistics.median(values) for name, values in times.items()}
            ratio = rate["stacked"] / rate["loop"]
            print(f"{clients:8} {precision:>9} {rate['loop']:15.0f} {rate['stacked']:18.0f} {ratio:15.2f}", flush=True)
    write("stacked", about("python benchmarks/stacked.py") | {"unit": "seconds of one step of every client", "raw": raw})


if __name__ == "__main__":
    main()
