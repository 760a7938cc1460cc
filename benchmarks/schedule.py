"""Question: how far from the ideal is a round whose clients are dealt out to many devices?

A simulation, no training: clients take as long as they have texts (sizes by a Pareto law with exponent 1.5, as in data where a
few have much), times the speed of their device in this round (stragglers: some devices take two to four times as long). A round
ends with its last device. Three ways to deal: longest first to the least loaded device (ours), in turn (round robin), and at
random. The ideal is the most that no way can beat: all work over all devices, or the longest client where that is more; with
stragglers, work over the sum of speeds, or the longest client on the fastest device.
Run it from the project's folder: .venv/bin/python benchmarks/schedule.py
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
from machine import about, write

from fedtune.runtimes.dealing import longest_first

Deal = Callable[[np.ndarray, int, np.random.Generator], list[list[int]]]
EXPONENT, LEAST = 1.5, 20.0  # of the Pareto law; texts of the smallest client
STRAGGLERS, SLOWEST = 0.1, (2.0, 4.0)  # share of the devices, and how many times as long they take


def ours(costs: np.ndarray, devices: int, rng: np.random.Generator) -> list[list[int]]:
    return longest_first(costs.tolist(), devices)


def in_turn(costs: np.ndarray, devices: int, rng: np.random.Generator) -> list[list[int]]:
    return [list(range(device, len(costs), devices)) for device in range(devices)]


def at_random(costs: np.ndarray, devices: int, rng: np.random.Generator) -> list[list[int]]:
    where = rng.integers(devices, size=len(costs))
    return [np.flatnonzero(where == device).tolist() for device in range(devices)]


WAYS: dict[str, Deal] = {"longest first": ours, "in turn": in_turn, "at random": at_random}


def speeds(devices: int, stragglers: bool, rng: np.random.Generator) -> np.ndarray:
    """How much work each device does in a second of this round."""
    found = np.ones(devices)
    if stragglers:
        slow = rng.random(devices) < STRAGGLERS
        found[slow] /= rng.uniform(*SLOWEST, size=slow.sum())
    return found


def makespan(dealt: list[list[int]], costs: np.ndarray, speed: np.ndarray) -> float:
    return max(float(costs[places].sum()) / one for places, one in zip(dealt, speed, strict=True))


def ideal(costs: np.ndarray, speed: np.ndarray) -> float:
    return max(float(costs.sum() / speed.sum()), float(costs.max() / speed.max()))


def ratios(devices: int, clients: int, stragglers: bool, rounds: int, seed: int) -> dict[str, list[float]]:
    """Makespan over the ideal, for each way and round; all ways have the same rounds."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(rounds):
        rng = np.random.default_rng([seed, devices, clients, stragglers, number])
        costs, speed = np.round(LEAST * (1 + rng.pareto(EXPONENT, clients))), speeds(devices, stragglers, rng)
        for name, deal in WAYS.items():
            found[name].append(makespan(deal(costs, devices, rng), costs, speed) / ideal(costs, speed))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="schedule", help="of the file of results; - writes none")
    given = parser.parse_args()
    began, raw = time.monotonic(), []
    print(f"{'devices':>8}{'clients':>9} stragglers " + "".join(f"{name + ', median':>23}{'95 %':>7}" for name in WAYS))
    for devices in (4, 16, 64, 256, 1024):
        for each in (4, 16, 64):
            for stragglers in (False, True):
                found = ratios(devices, devices * each, stragglers, given.rounds, given.seed)
                row = {
                    name: {"median": statistics.median(values), "95 %": float(np.quantile(values, 0.95)), "most": max(values)}
                    for name, values in found.items()
                }
                raw.append({"devices": devices, "clients": devices * each, "stragglers": stragglers, "makespan / ideal": row})
                print(
                    f"{devices:8}{devices * each:9} {'yes' if stragglers else 'no':10} "
                    + "".join(f"{one['median']:23.3f}{one['95 %']:7.2f}" for one in row.values()),
                    flush=True,
                )
    if given.name != "-":
        settings = {"rounds": given.rounds, "seed": given.seed, "pareto exponent": EXPONENT, "texts of the smallest": LEAST}
        settings |= {"share of stragglers": STRAGGLERS, "times as long": list(SLOWEST)}
        write(given.name, about() | {"settings": settings, "seconds": time.monotonic() - began, "raw": raw})


if __name__ == "__main__":
    main()
