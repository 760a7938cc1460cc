"""Question: what do secure sums cost a client and the server, in seconds and bytes, and how does that grow with the clients?

One process plays all clients and the server, one thread; seconds of a client are means over all. Vectors are made, not trained:
300,000 numbers, as a head and LoRA adapters have, and MiniLM's 22.7 million. "Dropped": an eighth of the clients share secrets
and send nothing, so the server makes their pairwise masks with every survivor. t is 0.67 of the clients, rounded up.
Run it from the project's folder: .venv/bin/python benchmarks/secure_sums.py [--numbers 300000] [--clients 4 8]
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from machine import about, write

from fedtune.federated.pieces import Pieces
from fedtune.federated.sums import ExactSum
from fedtune.randomness import stream
from fedtune.secure.client import Client, Secrets
from fedtune.secure.parts import PairwiseMasks
from fedtune.secure.round import NUMBER
from fedtune.secure.server import Server

STAGES = ("keys", "shares", "receive", "mask", "reveal")


class Watch:
    """Seconds of a stage, summed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def __call__(self, stage: str, do: Any, *given: Any) -> Any:
        start = time.perf_counter()
        found = do(*given)
        self.seconds[stage] += time.perf_counter() - start
        return found


def measure(count: int, size: int, dropped: int) -> dict[str, Any]:
    """One round of the protocol; the sum is compared with the plain one."""
    threshold, watch = PairwiseMasks().least(count), Watch()
    server = Server(threshold, "benchmark")
    clients: list[Client] = []
    for number in range(count):
        secrets = Secrets.drawn(stream(0, "benchmark", 1, number))
        clients.append(watch("keys", Client, number, secrets, threshold))
        server.take_keys(number, watch("keys", clients[number].advertise))
    keys = server.all_keys()
    for number, client in enumerate(clients):
        server.take_shares(number, watch("shares", client.share, keys))
    for number, client in enumerate(clients):
        watch("receive", client.receive, server.shares_for(number))
    plain, sealed = np.zeros(size, np.int64), server.sealed[0][1]
    for number, client in enumerate(clients[dropped:], start=dropped):
        numbers = np.random.default_rng(number).integers(-(2**50), 2**50, size)
        plain += numbers
        watch("mask", client.mask, numbers)
        watch("take", server.take_masked, number, numbers)
    asked = server.ask()
    answers = {number: watch("reveal", clients[number].reveal, asked.survivors, asked.dropped) for number in asked.survivors}
    found = watch("unmask", server.unmasked, answers)
    assert np.array_equal(found, plain)
    seconds, sending = watch.seconds, count - dropped
    of_client = {stage: seconds[stage] / (count if stage in STAGES[:3] else sending) for stage in STAGES}
    shares = (count - 1) * (len(sealed) + NUMBER)
    return {
        **{"clients": count, "numbers": size, "dropped": dropped, "threshold": threshold},
        "seconds_client": of_client | {"all": sum(of_client.values())},
        "seconds_server": {"add": seconds["take"], "unmask": seconds["unmask"]},
        "bytes_up": {"keys": len(keys[0]), "shares": shares, "masked": 8 * size, "unmasking": count * (NUMBER + 16)},
        "bytes_down": {"keys": count * (NUMBER + len(keys[0])), "shares": shares, "unmasking": NUMBER * count},
        "bytes_up_plain": 4 * size,
    }


def plain_seconds(size: int) -> float:
    """What a client's fp32 update costs a plain sum, mean of eight."""
    sums, values = ExactSum(lambda _: 8.0, 1_000), torch.randn(size).clamp(-8, 8)
    start = time.perf_counter()
    for _ in range(8):
        sums.add({"update": Pieces({"w": values})}, 100)
    return (time.perf_counter() - start) / 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", nargs="+", type=int, default=[300_000, 22_700_000])
    parser.add_argument("--clients", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--name", default="secure_sums", help="of the file of results; - for none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    raw: list[dict[str, Any]] = []
    columns = ("dropped", "t", *(f"{stage} ms" for stage in STAGES), "client s", "server s", "up kB", "but y kB", "down kB")
    print(f"{'numbers':>9} {'clients':>7}" + "".join(f"{column:>11}" for column in columns))
    for size in options.numbers:
        for count in options.clients:
            for dropped in (0, max(1, count // 8)):
                raw.append(one := measure(count, size, dropped))
                mine, theirs, up = one["seconds_client"], sum(one["seconds_server"].values()), sum(one["bytes_up"].values())
                others = (up - one["bytes_up"]["masked"]) / 1000, sum(one["bytes_down"].values()) / 1000
                values = [*(1000 * mine[stage] for stage in STAGES), mine["all"], theirs, up / 1000, *others]
                head = f"{size:9,} {count:7}{dropped:11}{one['threshold']:11}"
                print(head + "".join(f"{value:11.3f}" for value in values), flush=True)
    plain = {size: plain_seconds(size) for size in options.numbers}
    print("plain sum, s a client: " + ", ".join(f"{size:,}: {value:.4f}" for size, value in plain.items()))
    if options.name != "-":
        unit = "seconds and bytes of one client in one round, means over its clients; of the server for all of them together"
        write(options.name, about() | {"unit": unit, "seconds_plain_sum": plain, "raw": raw})


if __name__ == "__main__":
    main()
