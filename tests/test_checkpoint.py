from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_loop

import fedtune
from fedtune.federated.messages import Position
from fedtune.federated.state import ServerState
from fedtune.files import append_line, read_lines
from fedtune.storage import checkpoint
from fedtune.storage.records import read_rounds

Make = Callable[..., Any]


def state(number: int) -> ServerState:
    return ServerState(
        number,
        {"w": torch.full((3,), float(number))},
        Position(steps=number * 2, epochs=number),
        examples=5,
        memory={"Momentum": {"momentum": {"w/with a stroke": torch.ones(())}}},
    )


def test_a_checkpoint_comes_back_as_it_was_and_the_last_stay(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        checkpoint.save(tmp_path, state(number), keep=2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["round-0002", "round-0003"]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.round, found.position, found.examples) == (3, Position(6, 3), 5)
    assert torch.equal(found.weights["w"], torch.full((3,), 3.0))
    assert torch.equal(found.memory["Momentum"]["momentum"]["w/with a stroke"], torch.ones(()))


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = (checkpoint.save(tmp_path / name, state(1), keep=1) for name in "ab")
    assert [f.read_bytes() for f in sorted(one.iterdir())] == [f.read_bytes() for f in sorted(other.iterdir())]


def test_there_is_no_pickle(tmp_path: Path) -> None:
    assert {file.suffix for file in checkpoint.save(tmp_path, state(1), keep=1).iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "notes"])
def test_a_damaged_checkpoint_is_named_loudly_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    for number in (1, 2):
        checkpoint.save(tmp_path, state(number), keep=2)
    file = tmp_path / "round-0002" / ("state.json" if damage == "notes" else "weights.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        content[-1] ^= 1
        file.write_bytes(content[:10] if damage in ("cut", "notes") else content)
    with pytest.warns(UserWarning, match="DAMAGED CHECKPOINT.*round-0002") as caught:
        found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.round == 1
    if damage == "flip":
        assert "has sha256" in str(caught[0].message)


def test_when_all_are_damaged_the_run_does_not_start_over_in_silence(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(1), keep=2)
    (path / "weights.safetensors").unlink()
    with pytest.warns(UserWarning, match="DAMAGED"), pytest.raises(fedtune.RunError, match="every checkpoint of"):
        checkpoint.latest(tmp_path)


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from fedtune.storage import checkpoint
from fedtune.federated.state import ServerState
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
checkpoint.save(folder, ServerState(1, {"w": torch.ones(10)}), keep=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoint.save(folder, ServerState(2, {"w": torch.ones(100_000)}), keep=2)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_half_written(tmp_path: Path) -> None:
    """A limit on the size of files makes the real write fail in the middle, as a full disk does."""
    run = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("RunError round 2: its checkpoint could not be written")
    assert [entry.name for entry in tmp_path.iterdir()] == ["round-0001"]
    assert checkpoint.latest(tmp_path).round == 1


def test_a_half_written_checkpoint_of_a_killed_process_does_not_count_and_is_cleared(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), keep=2)
    (tmp_path / ".round-0002.77.tmp").mkdir()
    assert checkpoint.latest(tmp_path).round == 1
    checkpoint.save(tmp_path, state(2), keep=2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["round-0001", "round-0002"]


def test_a_torn_last_line_does_not_count(tmp_path: Path) -> None:
    file = tmp_path / "rounds.jsonl"
    append_line(file, {"round": 1})
    with open(file, "a") as stream:
        stream.write('{"round": 2, "accu')
    assert read_lines(file) == [{"round": 1}]


def test_a_record_without_its_checkpoint_is_done_again(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    through, cut = make_loop(max_rounds=2, run_dir=str(tmp_path / "a")), {"run_dir": str(tmp_path / "b")}
    through.fit(make_module(), make_data())
    make_loop(max_rounds=2, **cut).fit(make_module(), make_data())
    for file in (tmp_path / "b" / "checkpoints" / "round-0002").iterdir():
        file.unlink()
    (tmp_path / "b" / "checkpoints" / "round-0002").rmdir()
    make_loop(max_rounds=2, **cut).fit(make_module(), make_data())
    rounds = [json.loads(line)["round"] for line in (tmp_path / "b" / "rounds.jsonl").read_text().splitlines()]
    assert rounds == [1, 2]
    weights = [(tmp_path / name / "checkpoints" / "round-0002" / "weights.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_directory_of_another_configuration_is_refused_with_the_keys_named(
    make_data: Make, make_module: Make, tmp_path: Path
) -> None:
    make_loop(max_rounds=1, run_dir=str(tmp_path)).fit(make_module(), make_data())
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(fedtune.UsageError) as caught:
        make_loop(max_rounds=2, seed=3, run_dir=str(tmp_path)).fit(make_module(learning_rate=0.1), make_data(split="by_label"))
    for text in ("loop.seed: 0 -> 3", "model.learning_rate: 0.005 -> 0.1", "data.split: 'iid' -> 'by_label'"):
        assert text in str(caught.value)
    assert "max_rounds" not in str(caught.value)
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_a_run_directory_that_cannot_be_written_is_refused(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(fedtune.UsageError, match=r"run_dir: got .*; allowed: a directory that can be written"):
        make_loop(run_dir=str(tmp_path / "file" / "run")).fit(make_module(), make_data())


@pytest.mark.usefixtures("pictures")
def test_a_run_directory_holds_what_the_design_names(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    loop = make_loop(run_dir=str(tmp_path), baselines=["centralised", "local"])
    loop.fit(make_module(), make_data())
    assert {"config.yaml", "rounds.jsonl", "summary.json", "checkpoints", "curves.png"} <= {p.name for p in tmp_path.iterdir()}
    summary = json.loads((tmp_path / "summary.json").read_text())
    names = {"accuracy", "macro_f1", "loss_nats", "majority_accuracy", "centralised_accuracy", "local_accuracy", "best_round"}
    names |= {"best_validation_accuracy", "rounds_to_90pct", "rounds_to_95pct", "rounds_to_99pct", "seconds"}
    names |= {"bytes_up", "bytes_down", "peak_memory_bytes"}
    assert names <= set(summary)
    assert read_rounds(tmp_path / "rounds.jsonl") == loop.history
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_without_a_run_directory_nothing_is_written(
    make_data: Make, make_module: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_loop(baselines=["centralised", "local"]).fit(make_module(), make_data())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["fifo", "link", "file"])
def test_an_old_checkpoint_that_is_no_folder_is_dropped_at_once(kind: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    old = tmp_path / "checkpoints" / "round-0001"
    old.parent.mkdir()
    {"fifo": os.mkfifo, "link": lambda path: path.symlink_to(elsewhere), "file": Path.touch}[kind](old)
    checkpoint.drop(old.parent, 5, keep=1)
    (old.parent / "round-0002").mkdir()
    checkpoint.drop(old.parent, 5, keep=1)
    assert [path.name for path in old.parent.iterdir()] == ["round-0002"]
    assert (elsewhere / "kept").exists()
