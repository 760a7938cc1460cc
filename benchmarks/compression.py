"""Questions: how many bytes does a channel make of an update of MiniLM's sizes, what is lost of it, and how long does it take?

The update is made, not trained: in each matrix a part of low rank whose singular values fall as 1 / i, and noise as long as
that; of the embedding only every tenth row, as most words do not occur in a client's texts. The relative error is
|C(v) - v| / |v|, of the first message and of the mean of eight messages of one update, which feedback makes smaller.
Run it from the project's folder: .venv/bin/python benchmarks/compression.py [--part 0.1] [--channels top-k ...]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from machine import about, write

from fedtune.algorithms.compression import QSGD, HalfPrecision, PowerSGD, Quantise, Sign, TopK
from fedtune.federated.feedback import fed_back
from fedtune.federated.messages import Context, Stage, bytes_of, decoded, encoded
from fedtune.tensors import Groups, Tensors, distance, num_bytes

HIDDEN, INNER, WORDS, LAYERS = 384, 1536, 30_522, 6
CHANNELS: dict[str, tuple[Stage, ...]] = {
    "bf16": (HalfPrecision(),),
    "int8": (Quantise(),),
    "int4": (Quantise(4),),
    "int4, fed back": (Quantise(4, feedback=True),),
    "qsgd, 4 bits": (QSGD(4),),
    "qsgd, 2 bits": (QSGD(2),),
    "sign": (Sign(),),
    "top 1 %": (TopK(0.01),),
    "top 1 %, bf16": (TopK(0.01), HalfPrecision()),
    "powersgd, rank 2": (PowerSGD(2),),
    "powersgd, rank 8": (PowerSGD(8),),
}
ROUNDS = 8


def update(part: float) -> Tensors:
    """One of MiniLM's sizes, or with so much of its words and layers."""
    generator, shapes = (
        torch.Generator().manual_seed(0),
        {"embedding": (round(WORDS * part), HIDDEN), "positions": (512, HIDDEN)},
    )
    for layer in range(max(1, round(LAYERS * part))):
        shapes |= {f"{layer}.{name}": (HIDDEN, HIDDEN) for name in ("query", "key", "value", "output")}
        shapes |= {f"{layer}.up": (INNER, HIDDEN), f"{layer}.down": (HIDDEN, INNER), f"{layer}.bias": (INNER + 9 * HIDDEN,)}
    found = {name: 1e-4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for tensor in found.values():
        if tensor.ndim == 2:
            left, right = (torch.randn(size, 16, generator=generator) for size in tensor.shape)
            low = left / torch.arange(1, 17) @ right.T
            tensor += low * (tensor.norm() / low.norm())
    found["embedding"][torch.arange(len(found["embedding"])) % 10 > 0] = 0
    return found


def measure(stages: tuple[Stage, ...], given: Tensors) -> dict[str, Any]:
    """Bytes, seconds to encode and to decode, and relative errors."""
    length, memory, mean = (
        distance(given, {name: torch.zeros_like(tensor) for name, tensor in given.items()}),
        Groups(),
        Tensors(),
    )
    found: dict[str, Any] = {}
    times: dict[str, float] = {}
    for number in range(1, ROUNDS + 1):
        here = Context(0, number, 1, (0,), 1, client=0, weights=given, memory=memory)
        start = time.perf_counter()
        message = (fed_back if any(stage.feedback for stage in stages) else encoded)({"update": given}, stages, here)
        middle = time.perf_counter()
        arrived = decoded(message, stages, here)["update"]
        end = time.perf_counter()
        mean = {name: tensor / ROUNDS + (mean[name] if mean else 0) for name, tensor in arrived.items()}
        if number == 1:
            found = {"bytes": bytes_of(message), "error": distance(arrived, given) / length}
            times = {"seconds to encode, feedback included": middle - start, "seconds to decode": end - middle}
    return found | {"error after 8": distance(mean, given) / length} | times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=float, default=1.0, help="of MiniLM's words and layers")
    parser.add_argument("--channels", nargs="+", default=list(CHANNELS), choices=list(CHANNELS))
    parser.add_argument("--name", default="compression", help="of the file of results; - for none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    given = update(options.part)
    whole, raw = num_bytes(given), {}
    columns = ("bytes", "a value", "error", "after 8", "encode s", "decode s")
    print(f"{whole // 4:,} values".ljust(24) + "".join(f"{column:>12}" for column in columns))
    for name in options.channels:
        raw[name] = one = measure(CHANNELS[name], given)
        values = (4 * one["bytes"] / whole, *(value for key, value in one.items() if key != "bytes"))
        print(f"{name:24}{one['bytes']:12,}" + "".join(f"{value:12.4f}" for value in values), flush=True)
    if options.name != "-":
        unit = "bytes of a message; |C(v) - v| / |v| of the first message, and of the mean of eight; seconds"
        write(options.name, about() | {"values": whole // 4, "unit": unit, "raw": raw})


if __name__ == "__main__":
    main()
