from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import assert_equal, make_loop, weights_of, without_times
from test_lightning import Net, Three

from fedtune.runs.figures import plot_curves, plot_split
from fedtune.runs.wandb import WandbMirror
from fedtune.storage.summary import rounds_to

Make = Callable[..., Any]


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_wandb_changes_no_number_and_holds_every_round(
    make_data: Make, make_module: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_RUN_GROUP", "a-sweep")
    with_it, without = make_module(), make_module()
    mirrored = make_loop(run_dir=str(tmp_path / "a"), logger="wandb", progress=True)
    mirrored.fit(with_it, make_data())
    plain = make_loop(run_dir=str(tmp_path / "b"))
    plain.fit(without, make_data())
    assert_equal(weights_of(with_it), weights_of(without))
    assert without_times(mirrored.history) == without_times(plain.history)
    out = capsys.readouterr().out
    assert "wandb sync" in out
    rows = offline_rows(tmp_path / "a", rounds=2)
    rounds = {row["round"]: row for row in rows if "accuracy" in row}
    assert sorted(rounds) == [1, 2]
    for record in mirrored.history:
        assert rounds[record.round]["accuracy"] == pytest.approx(record.accuracy)
        assert rounds[record.round]["loss_nats"] == pytest.approx(record.loss_nats)
    assert any(key.startswith("clients") for row in rows for key in row)
    assert sum("split" in key for row in rows for key in row) > 0
    for record in mirrored.history:
        known = [value for value in record.client_accuracy if value is not None]
        assert rounds[record.round]["client_accuracy/min"] == pytest.approx(min(known))


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_a_resumed_run_mirrors_the_last_round_again_as_the_kill_may_have_come_before_it(
    make_data: Make, make_module: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = str(tmp_path / "a")
    make_loop(max_rounds=2, run_dir=folder).fit(make_module(), make_data())  # a mirror that was killed has logged nothing
    make_loop(max_rounds=3, run_dir=folder, logger="wandb").fit(make_module(), make_data())
    rows = offline_rows(tmp_path / "a", rounds=2)
    assert [row["round"] for row in rows if "accuracy" in row] == [2, 3]


def offline_rows(folder: Path, rounds: int, seconds: float = 30) -> list[dict[str, Any]]:
    """The logged rows of a run's only offline file.

    wandb fills it some time after `finish`, so this waits for so many rounds and the table of clients, which comes last.
    """
    end = time.monotonic() + seconds
    while True:
        rows = read_offline(next(folder.glob("wandb/offline-run-*/*.wandb")))
        whole = sum("accuracy" in row for row in rows) >= rounds and any(key.startswith("clients") for key in rows[-1])
        if whole or time.monotonic() > end:
            return rows
        time.sleep(0.05)


def read_offline(file: Path) -> list[dict[str, Any]]:
    """The logged rows of an offline run. The file is a LevelDB log of protocol buffers: a header of 7 bytes, then blocks
    of 32 KiB with records (checksum 4, length 2, kind 1; whole, or first, middle and last pieces). wandb 0.31 ships no
    reader for Python any more."""
    from wandb.proto import wandb_internal_pb2

    content, place, pieces, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # too little left in the block for a record: it is filled up
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if place + 7 + length > len(content):
            break  # it is being written
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record.FromString(pieces)
            pieces = b""
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                )
    return rows


UNREACHABLE = """
import sys, time
sys.path.insert(0, sys.argv[2])
from conftest import make_loop
from test_lightning import Net, Three
began = time.monotonic()
loop = make_loop(max_rounds=2, run_dir=sys.argv[1], logger="wandb", progress=True)
loop.fit(Net(), Three())
print("rounds", len(loop.history), "seconds", round(time.monotonic() - began))
"""


def unreachable(folder: Path, port: int) -> str:
    """What a run says that is mirrored to a server on this machine."""
    environment = {name: value for name, value in os.environ.items() if "WANDB" not in name}  # an earlier test's service
    environment |= {"WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_SILENT": "true"}
    environment |= {"WANDB_MODE": "online", "WANDB_INIT_TIMEOUT": "3", "WANDB_FINISH_TIMEOUT": "3"}
    command = [sys.executable, "-c", UNREACHABLE, str(folder), str(Path(__file__).parent)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert found.returncode == 0, found.stderr
    seconds = int(found.stdout.split()[-1])
    assert seconds < 60  # it would try for hours
    assert "rounds 2" in found.stdout
    return found.stdout + found.stderr


def test_a_server_that_cannot_be_reached_leaves_offline_files_in_bounded_time(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        said = unreachable(tmp_path, free.getsockname()[1])
    (line,) = [line for line in said.splitlines() if "W&B could not be started" in line]
    folder = Path(line.rpartition("send them with: wandb sync ")[2])
    assert folder.name.startswith("offline-run-")
    assert [row["round"] for row in offline_rows(tmp_path, rounds=2) if "accuracy" in row] == [1, 2]


def test_a_server_that_is_lost_during_the_run_does_not_hold_up_its_end(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Vanishing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said = unreachable(tmp_path, server.server_address[1])
        server.shutdown()
    (line,) = [line for line in said.splitlines() if "the run is no longer mirrored, W&B failed" in line]
    folder = Path(line.rpartition("send what it lacks with: wandb sync ")[2])
    assert list(folder.glob("run-*.wandb"))


def test_an_end_that_takes_too_long_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow() -> None:
        raise TimeoutError("Timed out finishing run.")

    mirror = SimpleNamespace(
        dir="runs/wandb/run-1/files",
        settings=SimpleNamespace(mode="online"),
        summary={},
        finish=slow,
        log=lambda values: None,
        define_metric=lambda *names, **options: None,
    )
    monkeypatch.setattr(WandbMirror, "_opened", lambda self, run: mirror)
    with pytest.warns(UserWarning, match="failed: TimeoutError: .*; send what it lacks with: wandb sync runs/wandb/run-1$"):
        make_loop(run_dir=str(tmp_path), logger="wandb").fit(Net(), Three())


class Vanishing(http.server.BaseHTTPRequestHandler):
    """W&B's server as far as a run is opened; then every connection is closed."""

    opened = False  # of the class, as each connection has an instance

    def do_POST(self) -> None:
        if self.opened:
            self.close_connection = True
            return
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        query, name = body.get("query", ""), body.get("variables", {}).get("name")
        entity = {"id": "e", "name": "me"}
        bucket = {
            "id": "b",
            "name": name,
            "displayName": "b",
            "config": "{}",
            "project": {"id": "p", "name": "p", "entity": entity},
        }
        data = {"upsertBucket": {"bucket": bucket, "inserted": True}} if "UpsertBucket" in query else {}
        content = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        Vanishing.opened |= "UpsertBucket" in query

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def test_progress_says_where_the_run_stands(make_data: Make, make_module: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make_loop(progress=True).fit(make_module(), make_data())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["federated round 1/2", "federated round 2/2"]
    assert all("accuracy 0." in line and "train_loss_nats" in line for line in lines)
    make_loop(progress=False).fit(make_module(), make_data())
    assert capsys.readouterr().out == ""


def test_rounds_to_is_the_first_round_that_reaches_the_target(make_data: Make, make_module: Make) -> None:
    history = make_loop(max_rounds=5).fit(make_module(), make_data())
    best = max(record.accuracy for record in history)
    assert rounds_to(history, best) == next(record.round for record in history if record.accuracy == best)
    assert rounds_to(history, 1.1) is None


def test_pictures_of_any_size_are_drawn(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    history = make_loop(max_rounds=1).fit(make_module(), make_data())
    plot_curves(
        {"federated": history, "centralised": history}, tmp_path / "deep" / "curves.svg", {"majority class": 0.3}, "title"
    )
    assert "majority class (0.30)" in (tmp_path / "deep" / "curves.svg").read_text()
    many = [{"labels": {f"label {i}": 1 + i for i in range(30)}, "authors": {"x": 3}} for _ in range(64)]
    plot_split(many, tmp_path / "split.png", "64 clients")
    assert (tmp_path / "split.png").stat().st_size > 1000
