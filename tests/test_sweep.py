"""A sweep survives failures, kills and company, and repeats nothing."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import fedtune
from fedtune.errors import UsageError
from fedtune.reports import results
from fedtune.storage.locks import is_locked, locked
from fedtune.sweeps import grid, runner, worker
from fedtune.sweeps import wandb_agents as wandb_sweep
from fedtune.sweeps.metric import for_wandb

PROCESSES = multiprocessing.get_context("forkserver")  # as in test_kill.py: real processes that start at once
PROCESSES.set_forkserver_preload(
    ["fedtune.cli", "fedtune.sweeps.runner", "fedtune.data.classification", "transformers.models.bert.modeling_bert"]
)
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, tiny_bert: str) -> Write:
    """Write a sweep of small runs; dotted names change or add parameters."""
    data = tmp_path / "data.csv"
    rows = (f"{' '.join(f'word{(i * j) % 37}' for j in range(1, 9))} {i},{'abc'[i % 3]}\n" for i in range(120))
    data.write_text("text,label\n" + "".join(rows))

    def write(**changes: Any) -> str:
        values = {"data.task": "csv", "data.task_options": {"path": str(data)}, "data.max_length": 16, "data.batch_size": 4}
        values |= {"model.name": tiny_bert, "loop.max_rounds": 2, "loop.precision": "32-true", "loop.baselines": []}
        parameters: dict[str, Any] = {key: {"value": value} for key, value in values.items()}
        parameters["data.num_clients"] = {"values": [1, 2, 3]}
        parameters |= {key.replace("__", "."): spec for key, spec in changes.items()}
        file = tmp_path / f"sweep-{len(list(tmp_path.glob('sweep-*.yaml')))}.yaml"
        file.write_text(yaml.safe_dump({"method": "grid", "parameters": parameters}))
        return str(file)

    return write


def command_line(arguments: list[str], log: Path) -> None:
    """What a child process does."""
    from fedtune.cli import main

    stream = open(log, "w", buffering=1)  # noqa: SIM115 - it is the child's output to its end
    sys.stdout = sys.stderr = stream
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["FEDTUNE_CACHE"] = str(log.parent / "cache")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one thread: the models are too small to share between cores
    main(arguments)


def start(file: str, folder: Path, log: Path, *more: str) -> multiprocessing.process.BaseProcess:
    arguments = ["sweep", file, "--runs_dir", str(folder), *more]
    process = PROCESSES.Process(target=command_line, args=(arguments, log))
    process.start()
    return process


def finals(folder: Path) -> dict[str, bytes]:
    """The last weights of every run."""
    return {file.parts[-4]: file.read_bytes() for file in sorted(folder.glob("*/checkpoints/round-0002/weights.safetensors"))}


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def test_a_failed_run_is_recorded_and_the_others_are_done(write: Write, tmp_path: Path, tiny_bert: str) -> None:
    file = write(model__name={"values": [tiny_bert, "[/no-such-model]"]}, data__num_clients={"values": [2]})
    folder, log = tmp_path / "runs", tmp_path / "log"
    process = start(file, folder, log, "--workers=2")
    process.join()
    assert process.exitcode == 1
    states = {status["state"]: status for status in map(worker.status, sorted(folder.glob("*"))) if status}
    assert set(states) == {"finished", "failed"}
    assert "--model.name: got '[/no-such-model]'; allowed: bert" in states["failed"]["error"]
    assert set(states["finished"]["metrics"]) == {"accuracy", "macro_f1", "loss_nats"}
    out = log.read_text()
    assert "1 of 2 done, 0 running, 1 failed" in out
    assert "failed: --model.name" in out
    assert "Traceback" in next(folder.glob("*/log.txt")).read_text() + "".join(p.read_text() for p in folder.glob("*/log.txt"))


def test_killed_in_the_middle_a_sweep_repeats_nothing_and_ends_alike(write: Write, tmp_path: Path) -> None:
    file, folder, calm = write(), tmp_path / "killed", tmp_path / "calm"
    undisturbed = start(file, calm, tmp_path / "log-calm")  # with as many threads: else the last bits differ
    process = start(file, folder, tmp_path / "log-1")
    wait_until(lambda: len(list(folder.glob("*/status.json"))) == 1 and len(list(folder.glob("*/rounds.jsonl"))) == 2)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    started, ended = ({path.parent.name for path in folder.glob(f"*/{name}")} for name in ("rounds.jsonl", "status.json"))
    wait_until(lambda: not any(is_locked(folder / name) for name in started - ended))  # runs end with their runner
    done = {path: path.stat().st_mtime_ns for path in folder.glob("*/status.json")}
    again = start(file, folder, tmp_path / "log-2")
    again.join()
    undisturbed.join()
    assert (again.exitcode, undisturbed.exitcode) == (0, 0)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(finals(folder)) == 3
    assert finals(folder) == finals(calm)


def test_a_finished_run_whose_texts_changed_is_stale_and_done_again(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = write(data__num_clients={"values": [1, 2]}), tmp_path / "runs"
    start(file, folder, tmp_path / "log-1").join()
    before = finals(folder)
    assert len(before) == 2
    with open(tmp_path / "data.csv", "a") as data:
        data.write("word1 word2 and one more,a\n")
    runner.plan(grid.read(file), folder, 1)
    assert capsys.readouterr().out.count(" stale ") == 2
    again = start(file, folder, tmp_path / "log-2")
    again.join()
    said = (tmp_path / "log-2").read_text()
    assert again.exitcode == 0
    for name in before:
        assert f"stale: {name}: content.task: " in said
        assert f"what it was is kept in {name}.stale-1" in said
        assert (folder / f"{name}.stale-1" / "checkpoints" / "round-0002" / "weights.safetensors").read_bytes() == before[name]
    assert "2 of 2 done, 0 running, 0 failed" in said
    assert all(weights != before[name] for name, weights in finals(folder).items() if name in before)
    runner.plan(grid.read(file), folder, 1)
    assert " stale " not in capsys.readouterr().out
    table = fedtune.compare(fedtune.read_runs(folder))
    assert table["seeds"].tolist() == [1, 1, 1, 1]  # old and new content are rows of their own
    assert table[results.CONTENT].nunique() == 2


def test_two_sweeps_on_one_folder_share_the_work(write: Write, tmp_path: Path) -> None:
    file, folder = write(), tmp_path / "runs"
    both = [start(file, folder, tmp_path / f"log-{number}") for number in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    said = "".join((tmp_path / f"log-{number}").read_text() for number in range(2))
    names = [cell.name for cell in grid.read(file).cells]
    assert sorted(line.split()[0] for line in said.splitlines() if ", accuracy " in line and "finished" in line) == sorted(
        names
    )
    for name in names:
        assert [json.loads(line)["round"] for line in (folder / name / "rounds.jsonl").read_text().splitlines()] == [1, 2]


@pytest.fixture
def cell_of(write: Write) -> Callable[..., dict[str, Any]]:
    """The arguments of a small run."""

    def cell_of(**changes: Any) -> dict[str, Any]:
        values = {"data.num_clients": 2, "loop.options.progress": False} | changes
        return grid.read(write(**{name: {"value": value} for name, value in values.items()})).cells[0].arguments

    return cell_of


def test_a_run_ends_with_the_metrics_of_its_last_evaluated_round(cell_of: Any, tmp_path: Path) -> None:
    loop = worker.recorded(cell_of(**{"loop.max_rounds": 3, "loop.check_val_every_n_rounds": 2}), tmp_path / "run")
    assert [bool(record.metrics) for record in loop.history] == [False, True, False]
    assert worker.status(tmp_path / "run")["metrics"] == loop.history[1].metrics
    assert loop.summary["client_accuracy_mean"] is not None


@pytest.mark.parametrize("number", ["NaN", "Infinity", "null"])
def test_a_metric_that_is_no_finite_number_is_unknown_when_read(tmp_path: Path, number: str) -> None:
    metrics = f'{{"loss_nats": {number}, "accuracy": 0.5}}'
    (tmp_path / "status.json").write_text(f'{{"state": "finished", "seconds": 1.0, "metrics": {metrics}}}')
    assert worker.status(tmp_path)["metrics"] == {"accuracy": 0.5}


def test_a_status_is_json_where_a_metric_is_no_number(cell_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = SimpleNamespace(history=[SimpleNamespace(metrics={"loss_nats": math.nan, "accuracy": 0.5})], callbacks=[])
    monkeypatch.setattr(worker, "fit", lambda *_, **__: loop)
    (tmp_path / "run").mkdir()
    worker.recorded(cell_of(), tmp_path / "run")
    text = (tmp_path / "run" / "status.json").read_text()
    assert json.loads(text, parse_constant=lambda name: name)["metrics"] == {"loss_nats": None, "accuracy": 0.5}


def test_a_finished_run_is_still_finished_after_a_refused_command(cell_of: Any, tmp_path: Path) -> None:
    worker.recorded(cell_of(), tmp_path / "run")
    before = worker.status(tmp_path / "run")
    with pytest.raises(UsageError, match=r"max_rounds: got 1; allowed: 2 or more"):
        worker.recorded(cell_of(**{"loop.max_rounds": 1}), tmp_path / "run")
    assert worker.status(tmp_path / "run") == before
    assert fedtune.read_runs(tmp_path / "run").complete.all()


@pytest.mark.parametrize(("baselines", "said"), [([], "last evaluation"), (["local"], "last evaluation, baselines")])
def test_a_run_says_what_is_left_after_its_rounds(baselines: list[str], said: str, make_data: Any, make_module: Any) -> None:
    from conftest import make_loop

    ours, theirs = multiprocessing.Pipe()
    make_loop(max_rounds=1, baselines=baselines, callbacks=[worker._Reporter(theirs)]).fit(make_module(), make_data())
    assert [ours.recv(), ours.recv()] == ["round 0/1", said]


def test_interrupted_a_sweep_says_how_to_go_on(write: Write, tmp_path: Path) -> None:
    file, folder, log = write(loop__max_rounds={"value": 50}), tmp_path / "runs", tmp_path / "log"
    process = start(file, folder, log)
    wait_until(lambda: len(list(folder.glob("*/rounds.jsonl"))) > 0)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert f"interrupted; the same command goes on from the last complete round in {folder}" in log.read_text()
    assert not any(is_locked(path) for path in folder.glob("*"))


def test_a_plan_tells_what_is_done_and_estimates_the_rest(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = grid.read(write())
    runner.plan(sweep, tmp_path / "runs", 1)
    out = capsys.readouterr().out
    assert "0 of 3 done, 0 running, 0 failed, time left unknown until a run is done" in out
    assert "estimate" not in out  # no column without a value
    first = tmp_path / "runs" / sweep.cells[0].name
    first.mkdir(parents=True)
    (first / "status.json").write_text(json.dumps({"state": "finished", "seconds": 100, "metrics": {"accuracy": 0.5}}))
    runner.plan(sweep, tmp_path / "runs", 2)
    out = capsys.readouterr().out
    assert "1 of 3 done" in out
    assert out.count("1 min 40 s") == 3  # of each run that is to do, and in all, by two workers
    assert "estimate" in out
    assert "time left 1 min 40 s, best accuracy 0.500 (num_clients 1)" in out
    assert not (tmp_path / "runs" / sweep.cells[1].name).exists()


def test_a_sweep_that_has_reached_its_target_starts_no_other_run(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(write())
    content = yaml.safe_load(file.read_text()) | {"metric": {"name": "accuracy", "goal": "maximize", "target": 0.5}}
    file.write_text(yaml.safe_dump(content))
    sweep = grid.read(file)
    first = tmp_path / "runs" / sweep.cells[1].name
    first.mkdir(parents=True)
    (first / "status.json").write_text(json.dumps({"state": "finished", "seconds": 1, "metrics": {"accuracy": 0.5}}))
    monkeypatch.setattr(runner, "_start", lambda *_: pytest.fail("a run was started"))
    assert runner.run(sweep, tmp_path / "runs") == 0
    out = capsys.readouterr().out
    assert "target accuracy 0.5 reached: no other run is started" in out
    assert "1 of 3 done" in out


def test_a_folder_is_for_one_process_and_its_owner_is_named(tmp_path: Path, make_data: Any, make_module: Any) -> None:
    from conftest import make_loop

    script = PROCESSES.Process(target=_hold, args=(str(tmp_path / "run"), str(tmp_path / "ready")))
    script.start()
    wait_until((tmp_path / "ready").exists)
    with pytest.raises(UsageError, match=f"nobody else works in .process {script.pid} on "):
        make_loop(run_dir=str(tmp_path / "run")).fit(make_module(), make_data())
    script.kill()
    script.join()
    make_loop(run_dir=str(tmp_path / "run")).fit(make_module(), make_data())  # a dead owner's lock is no lock


def _hold(folder: str, ready: str) -> None:
    with locked(folder):
        Path(ready).touch()
        time.sleep(60)


def test_a_wandb_sweep_runs_our_command_on_any_machine(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    from fedtune.cli import parser
    from fedtune.runs.flags import name_of, resolved

    file = write()
    content = wandb_sweep.registered(file, "runs/w")
    assert content["parameters"] == yaml.safe_load(Path(file).read_text())["parameters"]
    assert create_sweep_command(content["command"]) == content["command"]
    cell = grid.read(file).cells[0]
    drawn = {key: {"value": spec.get("value", (spec.get("values") or [0])[0])} for key, spec in content["parameters"].items()}
    values = create_sweep_command_args({"args": drawn})["args_json"][0]  # what W&B's agent writes for a cell
    path = Path(file).with_suffix(".json")
    path.write_text(values)
    options = parser("run").parse_args(["--config", str(path), "--logger", "wandb", "--runs_dir", "runs/w"])
    assert name_of(resolved(options)) == cell.name


@pytest.mark.parametrize(
    ("parameters", "name", "at_wandb"),
    [
        ({}, "accuracy", "validation/accuracy"),
        ({}, "validation/loss_nats", "validation/loss_nats"),
        ({"loop.evaluate_on": {"value": "test"}}, "macro_f1", "test/macro_f1"),
        ({"loop": {"parameters": {"evaluate_on": {"values": ["test"]}}}}, "accuracy", "test/accuracy"),
        ({}, "final/test_accuracy", "final/test_accuracy"),
    ],
)
def test_wandb_has_the_metric_of_a_sweep_by_the_name_that_runs_log(
    write: Write, parameters: dict[str, Any], name: str, at_wandb: str
) -> None:
    metric = {"name": name, "goal": "maximize"}
    early = {"early_terminate": {"type": "hyperband", "min_iter": 1}}
    content = yaml.safe_load(Path(write()).read_text())
    content["parameters"] = {one: of for one, of in content["parameters"].items() if one != "loop.evaluate_on"} | parameters
    file = Path(write()).with_name("other.yaml")
    file.write_text(yaml.safe_dump(content | {"metric": metric} | early))
    found = wandb_sweep.registered(str(file), "runs/w")
    assert found["metric"] == metric | {"name": at_wandb}
    assert found["early_terminate"] == early["early_terminate"]
    if not name.startswith("final/"):  # here the same file compares what records have
        assert grid.read(str(file)).metric == (at_wandb.rpartition("/")[2], True)


def test_a_metric_of_two_parts_has_no_name_at_wandb() -> None:
    both = {"loop.evaluate_on": {"values": ["validation", "test"]}}
    with pytest.raises(UsageError, match="metric, name: got 'accuracy'; allowed: final/NAME"):
        for_wandb({"name": "accuracy"}, {}, both)


def test_a_sweep_without_a_network_is_done_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.warns(UserWarning, match=r"W&B cannot be reached \(127.0.0.1: Connection refused\)"):
            assert not wandb_sweep.online()


def test_a_worker_gets_one_of_the_gpus_that_the_sweep_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [runner.gpu(slot, 2) for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert [runner.gpu(slot, 2) for slot in range(3)] == ["2", "3", "2"]


def test_one_client_is_one_run_however_its_split_is_called(write: Write, tmp_path: Path) -> None:
    from fedtune.cli import main

    flags = [
        f"--data.task_options={json.dumps({'path': str(tmp_path / 'data.csv')})}",
        "--data.task=csv",
        "--data.num_clients=1",
    ]
    cell = grid.read(write(), ["num_clients=1"]).cells[0]
    flags += [f"--model.name={cell.arguments['model']['name']}", "--data.max_length=16", "--data.batch_size=4"]
    flags += ["--loop.max_rounds=2", "--loop.precision=32-true", "--loop.baselines=[]", f"--runs_dir={tmp_path / 'runs'}"]
    for split in ("iid", "by_label"):  # as W&B's agents do it, which know nothing of our names
        main(["run", *flags, f"--data.split={split}"])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [cell.name]
    assert worker.status(tmp_path / "runs" / cell.name)["state"] == "finished"


def test_without_a_key_a_wandb_sweep_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not wandb_sweep.online()
    with pytest.raises(UsageError, match="--only"):
        wandb_sweep.run("x.yaml", "runs", 1, ["a=b"])


def test_without_wandb_asking_for_it_names_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="--wandb: got 'wandb'; allowed: after: pip install wandb"):
        wandb_sweep.online()
