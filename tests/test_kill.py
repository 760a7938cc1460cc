"""Killed with -9 at many moments and started again, a run ends with the bits of one that was left alone."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

# children are forked from a server that has done the imports: real processes that start at once
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["fedtune.cli", "fedtune.runs.loop", "fedtune.data.classification", "fedtune.models", "transformers"]
)


def flags(run_dir: Path, csv: Path, model: str) -> list[str]:
    values = {"data.task": "csv", "data.task_options": json.dumps({"path": str(csv)}), "data.max_length": 16}
    values |= {"data.num_clients": 4, "data.batch_size": 4, "loop.max_rounds": 3, "loop.local_epochs": 2}
    values |= {"loop.precision": "32-true", "model.name": model, "run_dir": run_dir}
    return ["run", *(f"--{name}={value}" for name, value in values.items())]


def command_line(arguments: list[str], log: Path) -> None:
    """What a child process does."""
    import torch

    from fedtune.cli import main

    stream = open(log, "w", buffering=1)  # noqa: SIM115 - it is the child's output to its end
    sys.stdout = sys.stderr = stream
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["FEDTUNE_CACHE"] = str(log.parent / "cache")
    torch.set_num_threads(1)
    main(arguments)


def start(arguments: list[str], log: Path) -> multiprocessing.process.BaseProcess:
    process = PROCESSES.Process(target=command_line, args=(arguments, log))
    process.start()
    return process


def finals(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "checkpoints" / "round-0003"
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "data.csv"
    rows = (f"{' '.join(f'word{(i * j) % 37}' for j in range(1, 13))} {i},{'abc'[i % 3]}\n" for i in range(240))
    path.write_text("text,label\n" + "".join(rows))
    return path


# by what is on the disk: at once, the first record, a checkpoint under way, a later round, each baseline
MOMENTS = {
    "config.yaml": signal.SIGKILL,
    "rounds.jsonl": signal.SIGKILL,
    "checkpoints/.round-0002.*.tmp": signal.SIGKILL,
    "checkpoints/round-0002": signal.SIGTERM,
    "baselines/*/rounds.jsonl": signal.SIGINT,
    "baselines/*/local.jsonl": signal.SIGKILL,
}


def test_stopped_at_six_moments_and_resumed_it_ends_with_the_same_bytes(tmp_path: Path, csv: Path, tiny_bert: str) -> None:
    whole, killed, log, codes = tmp_path / "whole", tmp_path / "killed", tmp_path / "log", []
    undisturbed = start(flags(whole, csv, tiny_bert), log)
    undisturbed.join()
    assert undisturbed.exitcode == 0, log.read_text()
    for moment, sent in MOMENTS.items():
        process = start(flags(killed, csv, tiny_bert), log)
        while process.is_alive() and not list(killed.glob(moment)):
            time.sleep(0.0005)
        if process.is_alive():
            os.kill(process.pid, sent)
        process.join()
        codes.append(process.exitcode)
        if process.exitcode == 130:
            said = log.read_text()
            assert "the same command goes on from the last complete round" in said
            assert "Traceback" not in said
    assert codes.count(0) <= 1, codes  # a checkpoint is under way for milliseconds, and may be missed
    assert 130 in codes
    last = start(flags(killed, csv, tiny_bert), log)
    last.join()
    assert last.exitcode == 0, log.read_text()
    assert "were done before" in log.read_text()
    assert finals(killed) == finals(whole)
    assert not list((killed / "checkpoints").glob(".*"))
    assert [json.loads(line)["round"] for line in (killed / "rounds.jsonl").read_text().splitlines()] == [1, 2, 3]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (killed, whole)]
    for summary in summaries:
        del summary["seconds"], summary["peak_memory_bytes"]
    assert summaries[0] == summaries[1]
