"""Killed with -9 at many moments and started again, a run ends with the bits of one that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def command(run_dir: Path, csv: Path, model: str) -> list[str]:
    flags = {"data.task": "csv", "data.task_options": json.dumps({"path": str(csv)}), "data.max_length": 16}
    flags |= {
        "data.num_clients": 4,
        "data.batch_size": 4,
        "loop.max_rounds": 3,
        "loop.local_epochs": 6,
        "loop.precision": "32-true",
    }
    flags |= {"model.name": model, "run_dir": run_dir}
    return [sys.executable, "-m", "fedtune.cli", "run", *(f"--{name}={value}" for name, value in flags.items())]


def finals(run_dir: Path) -> dict[str, bytes]:
    folder = run_dir / "checkpoints" / "round-0003"
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "data.csv"
    rows = (f"{' '.join(f'word{(i * j) % 37}' for j in range(1, 13))} {i},{'abc'[i % 3]}\n" for i in range(240))
    path.write_text("text,label\n" + "".join(rows))
    return path


def test_stopped_at_six_moments_and_resumed_it_ends_with_the_same_bytes(tmp_path: Path, csv: Path, tiny_bert: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FEDTUNE_CACHE": str(tmp_path / "cache")}
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    subprocess.run(command(tmp_path / "whole", csv, tiny_bert), check=True, **quiet)
    killed, codes = tmp_path / "killed", []
    # moments by what is on the disk: at once, the first record, a checkpoint under way, a later round, the baselines
    moments = {"config.yaml": signal.SIGKILL, "rounds.jsonl": signal.SIGKILL, "checkpoints/.round-0002.*.tmp": signal.SIGKILL}
    moments |= {
        "checkpoints/round-0002": signal.SIGTERM,
        "baselines/*/rounds.jsonl": signal.SIGINT,
        "baselines/*/local.jsonl": signal.SIGKILL,
    }
    for moment, sent in moments.items():
        process = subprocess.Popen(
            command(killed, csv, tiny_bert), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while process.poll() is None and not list(killed.glob(moment)):
            time.sleep(0.0005)
        process.send_signal(sent)  # nothing happens to a process that is through already: a checkpoint takes milliseconds
        error = process.communicate()[1].decode()
        codes.append(process.returncode)
        if sent is signal.SIGINT and process.returncode:
            assert process.returncode == 130
            assert "the same command goes on from the last complete round" in error
            assert "Traceback" not in error
    assert codes.count(0) <= 1
    last = subprocess.run(command(killed, csv, tiny_bert), env=environment, capture_output=True, text=True, check=True)
    assert "were done before" in last.stdout
    assert finals(killed) == finals(tmp_path / "whole")
    assert not list((killed / "checkpoints").glob(".*"))
    assert [json.loads(line)["round"] for line in (killed / "rounds.jsonl").read_text().splitlines()] == [1, 2, 3]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (killed, tmp_path / "whole")]
    for summary in summaries:
        del summary["seconds"], summary["peak_memory_bytes"]
    assert summaries[0] == summaries[1]
