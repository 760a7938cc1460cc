"""What clients remember: the newest below a round, whole or not there, flat in RAM."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
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


@pytest.fixture(autouse=True)
def _at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is on the disk when `save` returns, in all tests but those that say that they wait."""
    if "waits" not in request.node.name:
        save = MemoryOnDisk.save
        monkeypatch.setattr(MemoryOnDisk, "save", lambda self, *what: (save(self, *what), self.settle())[0])


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


def one_line(caught: pytest.ExceptionInfo[RunError], *parts: str) -> None:
    said = str(caught.value)
    assert "\n" not in said
    for part in parts:
        assert part in said


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    memory = MemoryOnDisk(tmp_path, 2)
    memory.save(0, 1, groups(1))
    file = tmp_path / "000000" / "0001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:20])
    with pytest.raises(RunError) as caught:
        memory.load(0, 2)
    one_line(caught, f"{file} cannot be read", "put back what the run has written, or start again in a new run directory")
    for place in range(0, 8 * len(whole), 7):  # every byte, each of its bits in turn
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        with pytest.raises(RunError) as caught:
            memory.load(0, 2)
        one_line(caught, f"{file} cannot be read")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(RunError, match=r"0001.safetensors cannot be read: .* a FIFO, where a file belongs"):
        memory.load(0, 2)


def test_a_file_of_another_client_or_round_is_not_taken_for_this_one(tmp_path: Path) -> None:
    memory = MemoryOnDisk(tmp_path, 2)
    for client, round in ((0, 1), (0, 2), (1, 2)):
        memory.save(client, round, groups(round))
    good = (tmp_path / "000000" / "0002.safetensors").read_bytes()
    for place in ("000000/0001.safetensors", "000001/0002.safetensors"):
        (tmp_path / place).write_bytes(good)
        with pytest.raises(RunError, match=f"{place} cannot be read: its content is not what was written"):
            memory.load(int(place[5]), int(place[10]) + 1)


def test_the_same_memory_is_the_same_bytes(tmp_path: Path) -> None:
    for name in map(str, range(8)):
        MemoryOnDisk(tmp_path / name, 2).save(0, 1, groups(1))
    assert len({file.read_bytes() for file in tmp_path.rglob("0001.safetensors")}) == 1


WRONG = {
    "file": lambda path: path.write_text(""),
    "FIFO": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/null"),
    "link to something that is not there": lambda path: path.symlink_to("nowhere"),
    "symbolic links": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["clients", "clients/000000"])
def test_what_is_no_folder_is_named_where_one_belongs(tmp_path: Path, name: str, kind: str) -> None:
    place = tmp_path / name
    place.parent.mkdir(exist_ok=True)
    WRONG[kind](place)
    memory = MemoryOnDisk(tmp_path / "clients", 2)
    for act in (lambda: memory.load(0, 2), lambda: memory.rewind(1), lambda: memory.expect({0: 1})):
        with pytest.raises(RunError) as caught:
            act()
        one_line(caught, f"{place}", "cannot be read: ", kind)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    memory = MemoryOnDisk(tmp_path / "clients", 2)
    memory.save(0, 1, groups(1))
    (tmp_path / "clients").chmod(0)
    os.seteuid(65534)
    try:
        for act in (lambda: memory.load(0, 2), lambda: memory.rewind(1), lambda: memory.expect({0: 1})):
            with pytest.raises(RunError, match=r"clients.* cannot be read: Permission denied"):
                act()
    finally:
        os.seteuid(0)


def test_strange_names_are_no_clients_and_no_rounds(tmp_path: Path) -> None:
    memory = MemoryOnDisk(tmp_path, 2)
    memory.save(0, 1, groups(1))
    content = (tmp_path / "000000" / "0001.safetensors").read_bytes()
    for name in ("0001 (copy).safetensors", "2.safetensors", "00002.safetensors", "٠٠٠٢.safetensors", "0002.safetensors.bak"):
        (tmp_path / "000000" / name).write_bytes(content)
    for name in ("000000 (copy)", "1", "٠٠٠٠٠١", "0000001", "x"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "000001" / "0003.safetensors").mkdir(parents=True)
    assert value_of(memory, 0, 9) == 1
    memory.prune(8, [0])
    memory.rewind(3)
    assert len(list((tmp_path / "000000").iterdir())) == 6
    with pytest.raises(RunError, match=r"0003.safetensors cannot be removed"):
        memory.rewind(2)


def test_what_a_client_has_lost_is_missed(memory: ClientMemory) -> None:
    memory.expect({})
    for round, clients in enumerate(((0, 1), (0, 2), (1, 2)), start=1):
        for client in clients:
            memory.save(client, round, groups(round))
        memory.discard(round, [2])
        newest = memory.completed(round, clients)
    assert newest == {0: 2, 1: 3}
    assert [value_of(memory, client, 4) for client in (0, 1, 2)] == [2, 3, None]
    memory.expect(newest)
    memory.rewind(2)
    with pytest.raises(RunError) as caught:
        memory.expect(newest)
    one_line(caught, " is missing, what 1 of 2 clients remember is lost", "start again in a new run directory")
    memory.expect(None)  # a checkpoint that says nothing of them
    assert value_of(memory, 1, 4) == 1
    assert memory.completed(4, [0]) is None


def test_a_file_that_is_lost_while_the_run_goes_on_is_missed(tmp_path: Path) -> None:
    memory = MemoryOnDisk(tmp_path, 2)
    memory.expect({})
    memory.save(0, 1, groups(1))
    memory.completed(1, [0])
    (tmp_path / "000000" / "0001.safetensors").unlink()
    with pytest.raises(RunError, match=r"000000/0001.safetensors cannot be read: No such file"):
        memory.load(0, 2)


def test_what_a_kill_has_left_half_written_is_removed_with_the_rewind(tmp_path: Path) -> None:
    memory = MemoryOnDisk(tmp_path, 2)
    memory.save(0, 1, groups(1))
    for name in (".0002.safetensors.4711.tmp", ".tmpicf2eI"):  # ours, and what safetensors writes first
        (tmp_path / "000000" / name).write_bytes(b"half")
    memory.rewind(1)
    assert [file.name for file in (tmp_path / "000000").iterdir()] == ["0001.safetensors"]


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from fedtune.federated.memory import MemoryOnDisk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
memory = MemoryOnDisk(Path(sys.argv[1]), 1)
memory.save(0, 1, {"control": {"w": torch.ones(10)}})
memory.settle()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    memory.save(0, 1, {"control": {"w": torch.zeros(100_000)}})
    memory.settle()
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("RunError round 1, client 0: its memory could not be written to")
    assert [entry.name for entry in (tmp_path / "000000").iterdir()] == ["0001.safetensors"]
    assert MemoryOnDisk(tmp_path, 1).load(0, 2)["control"]["w"].sum() == 10


def test_whatever_looks_at_a_memory_waits_for_what_is_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryOnDisk._store

    def slowly(self: MemoryOnDisk, *what: Any) -> None:
        time.sleep(0.2)
        store(self, *what)

    monkeypatch.setattr(MemoryOnDisk, "_store", slowly)
    memory = MemoryOnDisk(tmp_path, 2)
    looks: list[Any] = [
        lambda number: memory.load(0, number + 1),
        lambda number: memory.after(0, number),
        lambda number: memory.discard(number + 1, [0]),
        lambda number: memory.prune(0, [0]),
        lambda number: memory.rewind(number),
        lambda number: memory.completed(number, [0]),
        lambda number: memory.expect({0: number}),
        lambda number: memory.save(1, number, groups(1.0)),
    ]
    for number, look in enumerate(looks, start=1):
        began = time.perf_counter()
        memory.save(0, number, groups(float(number)))
        assert time.perf_counter() - began < 0.15
        look(number)
        assert (tmp_path / "000000" / f"{number:04d}.safetensors").exists()
    memory.settle()


def test_what_could_not_be_written_is_said_by_whatever_waits_for_it(tmp_path: Path) -> None:
    (tmp_path / "clients").write_text("no folder")
    memory = MemoryOnDisk(tmp_path / "clients", 2)
    memory.save(0, 1, groups(1.0))
    with pytest.raises(RunError, match="round 1, client 0: its memory could not be written"):
        memory.discard(1, [])
    memory.settle()  # it was said once
