from __future__ import annotations

import http.server
import json
import os
import re
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
from decoders import make_chats, save_decoder
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from test_lightning import Net, Three, module_with

import fedtune
from fedtune.errors import UsageError
from fedtune.runs.figures import plot_curves, plot_split
from fedtune.runs.loggers import mirror_of
from fedtune.runs.wandb import WandbMirror
from fedtune.runs.wandb_start import sync_command
from fedtune.storage.summary import rounds_to

Make = Callable[..., Any]
ACCURACY, LOSS = "validation/accuracy", "validation/loss_nats"
SECTIONS = ("validation", "train", "time", "traffic", "clients")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.filterwarnings("ignore")  # wandb's own
@pytest.mark.usefixtures("offline")
def test_wandb_changes_no_number_and_holds_every_round_in_sections(
    make_data: Make, make_module: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_RUN_GROUP", "a-sweep")
    with_it, without = make_module(), make_module()
    mirrored = make_loop(run_dir=str(tmp_path / "a"), logger="wandb", progress=True)
    mirrored.fit(with_it, make_data())
    plain = make_loop(run_dir=str(tmp_path / "b"))
    plain.fit(without, make_data())
    assert_equal(weights_of(with_it), weights_of(without))
    assert without_times(mirrored.history) == without_times(plain.history)
    assert capsys.readouterr().out.count("wandb sync") == 1
    rows = offline_rows(tmp_path / "a", rounds=2)
    rounds = {row["round"]: row for row in rows if ACCURACY in row}
    assert sorted(rounds) == [1, 2]
    for record in mirrored.history:
        row, known = rounds[record.round], [value for value in record.client_accuracy if value is not None]
        expected = {f"validation/{name}": value for name, value in record.metrics.items()}
        expected |= {"train/loss_nats": record.train_loss_nats, "train/steps": record.num_steps}
        expected |= {"time/round_seconds": record.seconds, "time/evaluate_seconds": record.seconds_evaluate}
        expected |= {"traffic/bytes_up": record.bytes_up, "traffic/bytes_down": record.bytes_down}
        expected |= {"clients/trained": record.num_clients, "clients/accuracy_min": min(known)}
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert {name.split("/")[0] for name in row if not name.startswith("_")} == {*SECTIONS, "round", "drift"}
    assert rounds[2]["traffic/bytes_total"] == sum(one.bytes_up + one.bytes_down for one in mirrored.history)
    assert sum(key.startswith("clients/split") for row in rows for key in row) > 0


@pytest.mark.filterwarnings("ignore")  # wandb's own
@pytest.mark.usefixtures("offline")
def test_a_run_has_a_name_a_job_type_and_in_its_summary_the_best_round(
    make_data: Make, make_module: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop(max_rounds=3, run_dir=str(tmp_path / "first"), logger="wandb")
    loop.fit(make_module(), make_data())
    offline_rows(tmp_path / "first", rounds=3)
    run, summary = about_offline(tmp_path / "first")
    best = loop.history[loop.summary["best_round"] - 1]
    assert (run.display_name, run.job_type, run.project) == ("first", "federated", "fedtune")
    assert summary["best/round"] == best.round
    assert summary["best/loss_nats"] == pytest.approx(best.loss_nats)
    assert summary["final/accuracy"] == pytest.approx(loop.summary["accuracy"])
    named = {"WANDB_NAME": "mine", "WANDB_JOB_TYPE": "ablation", "WANDB_PROJECT": "p", "WANDB_TAGS": "a,b"}
    for name, value in {**named, "WANDB_DIR": str(tmp_path / "elsewhere")}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "elsewhere").mkdir()
    make_loop(run_dir=str(tmp_path / "second"), logger="wandb").fit(make_module(), make_data())
    assert not (tmp_path / "second" / "wandb").exists()
    offline_rows(tmp_path / "elsewhere", rounds=2)
    run, _ = about_offline(tmp_path / "elsewhere")
    assert (run.display_name, run.job_type, run.project, list(run.tags)) == ("mine", "ablation", "p", ["a", "b"])


@pytest.mark.filterwarnings("ignore")  # wandb's own
@pytest.mark.usefixtures("offline")
def test_the_centralised_curve_is_in_one_chart_with_the_federated_one(
    make_data: Make, make_module: Make, tmp_path: Path
) -> None:
    loop = make_loop(run_dir=str(tmp_path), logger="wandb", baselines=("centralised", "local"))
    loop.fit(make_module(), make_data())
    rows = offline_rows(tmp_path, rounds=2)
    pooled = {row["round"]: row["centralised/accuracy"] for row in rows if "centralised/accuracy" in row}
    assert pooled == {record.round: pytest.approx(record.accuracy) for record in loop.baseline_runs["centralised"]}
    (chart,) = tmp_path.glob("wandb/offline-run-*/files/media/table/**/accuracy_and_baselines*.json")
    table = json.loads(chart.read_text())["data"]
    lines = {name: [value for _, key, value in table if key == name] for name in dict.fromkeys(key for _, key, _ in table)}
    assert lines["federated"] == pytest.approx([record.accuracy for record in loop.history])
    assert lines["centralised"] == pytest.approx([record.accuracy for record in loop.baseline_runs["centralised"]])
    assert lines["majority class"] == pytest.approx([loop.summary["majority_accuracy"]] * 2)
    assert lines["each client alone, mean"] == pytest.approx([loop.summary["local_accuracy"]] * 2)


@pytest.mark.filterwarnings("ignore")  # wandb's own
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("wanted", "rounds"), [(None, []), ("true", [2]), ("all", [1, 2, 2])])
def test_checkpoints_are_artifacts_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str | None, rounds: list[int]
) -> None:
    monkeypatch.setenv("WANDB_LOG_MODEL", wanted or "")
    make_loop(run_dir=str(tmp_path), logger="wandb").fit(Net(), Three())
    offline_rows(tmp_path, rounds=2)
    found = [record.artifact for record in offline_records(tmp_path) if record.WhichOneof("record_type") == "artifact"]
    models = [one for one in found if one.type == "model"]
    assert [json.loads(one.metadata)["round"] for one in models] == rounds
    for one, number in zip(models, rounds, strict=True):
        names = {entry.path for entry in one.manifest.contents}
        assert {"config.yaml", "rounds.jsonl", f"checkpoints/round-{number:04d}/weights.safetensors"} <= names
        assert {"latest", f"round-{number}"} <= set(one.aliases)


@pytest.mark.usefixtures("offline")
def test_an_unknown_request_for_artifacts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_LOG_MODEL", "sometimes")
    with pytest.raises(UsageError, match=r"WANDB_LOG_MODEL: got 'sometimes'; allowed: .*true.*all"):
        make_loop(logger="wandb")


@pytest.mark.filterwarnings("ignore")  # wandb's own
@pytest.mark.usefixtures("offline")
def test_arguments_of_lightnings_wandb_logger_are_taken_beside_other_loggers(tmp_path: Path) -> None:
    import wandb

    seen: list[Any] = []
    theirs = WandbLogger(project="p", name="n", group="g", tags=["t"], save_dir=tmp_path, log_model=True)
    csv = CSVLogger(tmp_path / "csv", name="", version="")
    module = module_with(on_train_start=lambda self: seen.append(self.loggers))()
    make_loop(run_dir=str(tmp_path / "run"), logger=[csv, None, theirs, "none"]).fit(module, Three())
    assert (
        theirs.experiment.id == (tmp_path / "run" / "wandb_id").read_text().strip()
    )  # and its run is open, as after a Trainer
    theirs.experiment.log({"mine": 1})
    wandb.finish()
    assert seen[0] == [csv, theirs]
    assert len((tmp_path / "csv" / "metrics.csv").read_text().splitlines()) == 4
    rows = offline_rows(tmp_path, rounds=2)
    assert rows[-1]["mine"] == 1
    run, summary = about_offline(tmp_path)
    assert (run.display_name, run.project, run.run_group, list(run.tags)) == ("n", "p", "g", ["t"])
    assert summary["best/round"] in (1, 2)
    artifacts = [one.artifact for one in offline_records(tmp_path) if one.WhichOneof("record_type") == "artifact"]
    assert "model" in {one.type for one in artifacts}


@pytest.mark.filterwarnings("ignore")  # wandb's own
@pytest.mark.usefixtures("offline")
def test_a_causal_model_logs_its_loss_and_perplexity(tmp_path: Path) -> None:
    model = save_decoder(tmp_path / "model")
    data = fedtune.FederatedDataModule(make_chats(), model=model, num_clients=3, batch_size=8, max_length=64)
    loop = make_loop(run_dir=str(tmp_path / "run"), logger="wandb", baselines=("centralised",))
    loop.fit(fedtune.CausalLM(model), data)
    rows = [row for row in offline_rows(tmp_path / "run", rounds=2, metric=LOSS) if LOSS in row]
    assert [row["validation/perplexity"] for row in rows] == pytest.approx([record.perplexity for record in loop.history])
    assert not any("accuracy_min" in name or name == ACCURACY for row in rows for name in row)
    _, summary = about_offline(tmp_path / "run")
    assert summary["best/loss_nats"] == pytest.approx(min(record.loss_nats for record in loop.history))


@pytest.mark.filterwarnings("ignore")  # wandb's own
@pytest.mark.usefixtures("offline")
def test_a_resumed_run_mirrors_the_last_round_again_as_the_kill_may_have_come_before_it(
    make_data: Make, make_module: Make, tmp_path: Path
) -> None:
    folder = str(tmp_path / "a")
    make_loop(max_rounds=2, run_dir=folder).fit(make_module(), make_data())  # a mirror that was killed has logged nothing
    make_loop(max_rounds=3, run_dir=folder, logger="wandb").fit(make_module(), make_data())
    rows = offline_rows(tmp_path / "a", rounds=2)
    assert [row["round"] for row in rows if ACCURACY in row] == [2, 3]


def test_no_logger_is_none_and_false_and_an_empty_list() -> None:
    for logger in (None, False, "none", [], [None, "none"]):
        loop = make_loop(max_rounds=1, logger=logger)
        module = Net()
        loop.fit(module, Three())
        assert mirror_of(logger) == []


def offline_rows(folder: Path, rounds: int, seconds: float = 30, metric: str = "validation/accuracy") -> list[dict[str, Any]]:
    """The logged rows of a run's only offline file.

    wandb fills it some time after `finish`, so this waits for so many rounds and the end.
    """
    end = time.monotonic() + seconds
    while True:
        rows = history_of(offline_records(folder))
        known = {record.WhichOneof("record_type") for record in offline_records(folder)}
        if (sum(metric in row for row in rows) >= rounds and "exit" in known) or time.monotonic() > end:
            return rows
        time.sleep(0.05)


def offline_records(folder: Path) -> list[Any]:
    return read_offline(next(folder.glob("wandb/offline-run-*/*.wandb")))


def history_of(records: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def about_offline(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The run as W&B has it, and its summary."""
    records = offline_records(folder)
    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    updates = [item for one in records if one.WhichOneof("record_type") == "summary" for item in one.summary.update]
    return run, {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in updates}


def read_offline(file: Path) -> list[Any]:
    """The records of an offline run. The file is a LevelDB log of protocol buffers: a header of 7 bytes, then blocks
    of 32 KiB with records (checksum 4, length 2, kind 1; whole, or first, middle and last pieces). wandb 0.31 ships no
    reader for Python any more."""
    from wandb.proto import wandb_internal_pb2

    content, place, pieces, records = file.read_bytes(), 7, b"", []
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
            records.append(wandb_internal_pb2.Record.FromString(pieces))
            pieces = b""
    return records


UNREACHABLE = """
import sys, time
sys.path.insert(0, sys.argv[2])
from conftest import make_loop
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from test_lightning import Net, Three, module_with
began = time.monotonic()
loop = make_loop(max_rounds=2, run_dir=sys.argv[1], logger="wandb", progress=True)
loop.fit(Net(), Three())
print("rounds", len(loop.history), "seconds", round(time.monotonic() - began))
"""


def unreachable(folder: Path, port: int) -> str:
    """What a run says that is mirrored to a server on this machine."""
    environment = {name: value for name, value in os.environ.items() if "WANDB" not in name}  # an earlier test's service
    environment |= {"WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{port}"}
    environment |= {"WANDB_MODE": "online", "WANDB_FINISH_TIMEOUT": "3"}
    command = [sys.executable, "-c", UNREACHABLE, str(folder), str(Path(__file__).parent)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert found.returncode == 0, found.stderr
    seconds = int(re.search(r"seconds (\d+)", found.stdout)[1])
    assert seconds < 60  # it would try for hours
    assert "rounds 2" in found.stdout
    said = found.stdout + found.stderr
    assert "deprecated" not in said
    assert said.count("wandb sync") == 1
    return said


def test_a_server_that_cannot_be_reached_leaves_offline_files_in_bounded_time(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        said = unreachable(tmp_path, free.getsockname()[1])
    assert any("W&B could not be started" in line for line in said.splitlines())
    (line,) = [line for line in said.splitlines() if "send them with" in line]
    folder = Path(line.rpartition("send them with: wandb sync ")[2])
    assert folder.name.startswith("offline-run-")
    assert [row["round"] for row in offline_rows(tmp_path, rounds=2) if ACCURACY in row] == [1, 2]


def test_a_server_that_is_lost_during_the_run_does_not_hold_up_its_end(tmp_path: Path) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Vanishing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said = unreachable(tmp_path, server.server_address[1])
        server.shutdown()
    (line,) = [line for line in said.splitlines() if "the run is no longer mirrored, W&B failed" in line]
    folder = Path(line.rpartition("send what it lacks with: wandb sync ")[2])
    assert list(folder.glob("run-*.wandb"))


def test_an_end_that_takes_too_long_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(exit_code: int) -> None:
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


def test_all_starts_of_a_run_are_sent_and_no_other_run(tmp_path: Path) -> None:
    def started(name: str) -> str:
        (tmp_path / "my runs" / "wandb" / name / "files").mkdir(parents=True)
        return str(tmp_path / "my runs" / "wandb" / name / "files")

    first, place = started("offline-run-20261130_103755-a_b-c"), f"wandb sync '{tmp_path}/my runs/wandb'/"
    started("offline-run-20261130_103755-x-a_b-c")
    assert sync_command(first) == f"wandb sync '{Path(first).parent}'"
    assert sync_command(started("run-20261130_110000-a_b-c")) == f"{place}*run-????????_??????-a_b-c"
    found = sorted(path.name for path in (tmp_path / "my runs" / "wandb").glob("*run-????????_??????-a_b-c"))
    assert found == ["offline-run-20261130_103755-a_b-c", "run-20261130_110000-a_b-c"]


@pytest.mark.filterwarnings("ignore")  # wandb's own
@pytest.mark.usefixtures("offline")
def test_the_line_of_a_resumed_run_sends_the_files_of_both_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rounds in (1, 2):
        make_loop(max_rounds=rounds, run_dir=str(tmp_path), logger="wandb", progress=True).fit(Net(), Three())
        if rounds == 1:
            time.sleep(1.1)  # W&B names a folder after the second
    (*_, line) = [line for line in capsys.readouterr().out.splitlines() if "send them with" in line]
    folder, _, pattern = line.rpartition("send them with: wandb sync ")[2].rpartition("/")
    assert len(list(Path(folder).glob(pattern))) == len(list(tmp_path.glob("wandb/offline-run-*"))) == 2


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
