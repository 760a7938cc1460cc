"""What clients remember, damaged between two starts: the right bits, or one line; never a client that begins afresh."""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FIRST, share
from conftest import make_loop, weights_of, without_times
from test_folders import FOLDERS, WAYS, case, damage
from test_lightning import Net, Three

import fedtune
from fedtune.federated.client import Client, ClientUpdate
from fedtune.tensors import Groups

ODD = (
    "000003",
    "000000 (copy)",
    "0",
    "٠٠٠٠٠١",
    "000002.bak",
    "999999999999",
    "-00001",
    "x" * 200,
    "\u202e",
    "0000000",
    ".000001",
)
STRANGE = (
    "0002 (copy).safetensors",
    "2.safetensors",
    "٠٠٠٢.safetensors",
    "0002.safetensors.bak",
    "00002.safetensors",
    "0002",
    "x",
)


@dataclass(frozen=True)
class Remembering(ClientUpdate):
    """Local training, and a step that grows with the rounds that the client remembers, once for each of 64 numbers."""

    def __call__(self, client: Client) -> Groups:
        client.train()
        update = client.update()
        rounds = client.memory.setdefault("rounds", {"done": torch.zeros(64)})["done"]
        for tensor in update.values():
            tensor.add_(0.1 * rounds.mean())
        rounds.add_(1)
        return {"update": update}


def resumed(number: int, folder: Path, rounds: int = 0) -> tuple[Any, ...]:
    """A run whose clients remember goes on: weights and records."""
    module, names = Net(), {"client": {"name": "Remembering"}}
    loop = make_loop(max_rounds=rounds or 5 + number % 2, clients_per_round=2, run_dir=str(folder), algorithm=names, keep=2)
    loop.fit(module, Three())
    return {name: value.tolist() for name, value in weights_of(module).items()}, without_times(loop.history), None


def harm(rng: random.Random, folder: Path, victim: Path) -> str:
    """Damage what clients remember: a file, a client's folder, the folder of all, or a strange name among them."""
    clients = folder / "clients"
    below = sorted(clients.rglob("*"))
    if rng.random() < 0.1:
        place = rng.choice([clients / rng.choice(ODD), rng.choice(below[:1]) / rng.choice(STRANGE)])
        if not place.exists():
            rng.choice([place.mkdir, lambda: place.write_bytes(rng.choice(below[1:2]).read_bytes() or b"")])()
            return f"new {place.relative_to(folder)}"
    if rng.random() < 0.15:
        way = rng.choice((*FOLDERS, "directory", "replace"))
        if way == "replace":
            shutil.rmtree(clients)
        WAYS[way](rng, clients, victim)
        return f"{way} clients"
    if rng.random() < 0.1:
        one, other = rng.sample([path for path in below if path.is_file()], 2)
        one.write_bytes(other.read_bytes())
        return f"{other.relative_to(folder)} in place of {one.relative_to(folder)}"
    return damage(rng, clients, victim)


@pytest.mark.filterwarnings("ignore")
def test_damaged_memory_of_clients_gives_the_right_bits_or_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fedtune.ALGORITHM_PARTS, "Remembering", Remembering)
    good, expected = tmp_path / "good", []
    resumed(0, good, 4)
    for number in range(2):
        shutil.copytree(good, tmp_path / f"good-{number}")
        expected.append(resumed(number, tmp_path / f"good-{number}"))
    bad = {}
    for number in range(FIRST, FIRST + share(0.02)):
        what, wrong = case(number, good, tmp_path / "case", resumed, expected, harm)
        if wrong:
            bad[f"{number}: {what}"] = wrong
    assert not bad, f"{len(bad)} of {share(0.02)}: {bad}"
