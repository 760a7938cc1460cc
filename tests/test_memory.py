"""What clients remember: the newest below a round, whole or not there, flat in RAM."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedtune.errors import RunError
from fedtune.federated.memory import ClientMemory, MemoryInRam, MemoryOnDisk


@pytest.fixture(params=["disk", "ram"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> ClientMemory:
    return MemoryOnDisk(tmp_path / "clients", 5) if request.param == "disk" else MemoryInRam()


def groups(value: float) -> dict[str, Any]:
    return {"control": {"a/b.weight": torch.full((2, 3), value), "n": torch.tensor(value)}, "other": {"n": torch.tensor(1)}}


def value_of(memory: ClientMemory, client: int, round: int) -> float | None:
    found = memory.load(client, round)
    return found["control"]["n"].item() if found else None


def test_a_client_reads_the_newest_below_the_round(memory: ClientMemory) -> None:
    assert memory.load(3, 1) == {}
    for round in (1, 4, 7):
        memory.save(3, round, groups(round))
    assert [value_of(memory, 3, round) for round in (1, 2, 4, 5, 7, 8, 99)] == [None, 1, 1, 4, 4, 7, 7]
    assert value_of(memory, 2, 99) is None
    found = memory.load(3, 5)
    assert found.keys() == {"control", "other"}
    assert torch.equal(found["control"]["a/b.weight"], torch.full((2, 3), 4.0))


def test_a_round_that_is_done_again_reads_what_it_read_the_first_time(memory: ClientMemory) -> None:
    memory.save(0, 1, groups(1))
    memory.save(0, 2, groups(2))
    assert value_of(memory, 0, 2) == 1
    memory.save(0, 2, groups(5))
    assert (value_of(memory, 0, 2), value_of(memory, 0, 3)) == (1, 5)


def test_what_is_saved_is_a_copy_and_nothing_leaves_nothing(memory: ClientMemory) -> None:
    kept = groups(1)
    memory.save(0, 1, kept)
    kept["control"]["n"].zero_()
    memory.save(0, 2, {})
    assert value_of(memory, 0, 9) == 1


def test_a_discarded_round_is_forgotten(memory: ClientMemory) -> None:
    for round in (1, 2):
        memory.save(0, round, groups(round))
    memory.discard(2, [0, 4])
    assert value_of(memory, 0, 9) == 1


def test_pruning_leaves_what_any_later_round_can_read(memory: ClientMemory) -> None:
    for round in (1, 3, 5, 6):
        memory.save(0, round, groups(round))
    memory.prune(5, [0, 1])  # the oldest checkpoint is that of round 5
    assert [value_of(memory, 0, round) for round in (6, 7)] == [5, 6]
    assert value_of(memory, 0, 5) is None
    memory.prune(4, [0])
    assert value_of(memory, 0, 6) == 5


def test_a_run_that_goes_on_from_a_round_forgets_what_came_after_it(memory: ClientMemory) -> None:
    for client in (0, 3):
        for round in (1, 2, 3):
            memory.save(client, round, groups(round))
    memory.rewind(2)
    assert [value_of(memory, client, 9) for client in (0, 3)] == [2, 2]


def test_files_are_named_by_client_and_round_and_nothing_else_is_left(tmp_path: Path) -> None:
    memory = MemoryOnDisk(tmp_path / "clients", 20)
    memory.save(12, 7, groups(1))
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()] == [
        "clients/000012/0007.safetensors"
    ]


def test_a_disk_without_room_for_all_clients_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 4 * 10_000
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=size * 1000))
    MemoryOnDisk(tmp_path / "a", 999).save(0, 1, {"control": {"w": torch.zeros(10_000)}})
    with pytest.raises(RunError, match=r"what 1,000 clients remember takes 0.0 GB \(0.040 MB each\); .* has 0.0 GB left"):
        MemoryOnDisk(tmp_path / "b", 1000).save(0, 1, {"control": {"w": torch.zeros(10_000)}})


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    memory = MemoryOnDisk(tmp_path, 2)
    memory.save(0, 1, groups(1))
    file = tmp_path / "000000" / "0001.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(RunError, match=r"0001.safetensors cannot be read"):
        memory.load(0, 2)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(RunError, match=r"0001.safetensors cannot be read"):
        memory.load(0, 2)


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from fedtune.federated.memory import MemoryOnDisk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
memory = MemoryOnDisk(Path(sys.argv[1]), 1)
memory.save(0, 1, {"control": {"w": torch.ones(10)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    memory.save(0, 1, {"control": {"w": torch.zeros(100_000)}})
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("RunError round 1, client 0: its memory could not be written to")
    assert [entry.name for entry in (tmp_path / "000000").iterdir()] == ["0001.safetensors"]
    assert MemoryOnDisk(tmp_path, 1).load(0, 2)["control"]["w"].sum() == 10
