"""Cells that are proposed from what earlier ones reached, and runs that are stopped since others are better."""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import fedtune
from fedtune.errors import RunError, UsageError
from fedtune.files import append_line, read_lines
from fedtune.runs.callbacks import Run
from fedtune.storage.locks import locked
from fedtune.sweeps import grid, parameters, runner, worker
from fedtune.sweeps.bayes import Search, axis
from fedtune.sweeps.board import Board
from fedtune.sweeps.cell import Cell
from fedtune.sweeps.hyperband import Hyperband, Stopping, rule_of

RATE = {"distribution": "log_uniform_values", "min": 1e-5, "max": 1.0}
BEST = {"name": "loss_nats", "goal": "minimize"}
Objective = Callable[[Cell], float | None]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(values: dict[str, Any], **content: Any) -> str:
        file = tmp_path / "sweep.yaml"
        given = {"method": "bayes", "run_cap": 6, "metric": BEST, "parameters": values} | content
        file.write_text(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))
        return str(file)

    return write


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Objective], None]:
    """Runs that end when the runner looks, with a value of their objective; None is a failure."""

    def fake(objective: Objective) -> None:
        def start(cell: Cell, board: Board, logger: str) -> runner.Running:
            ours, theirs = multiprocessing.Pipe()
            theirs.close()
            value = objective(cell)
            ended = {"state": "failed", "error": "it had to be"}
            if value is not None:
                ended = {"state": "finished", "seconds": 1.0, "metrics": {"loss_nats": value}}

            def end() -> None:
                (board.folder / cell.name).mkdir(exist_ok=True)
                (board.folder / cell.name / "status.json").write_text(json.dumps(ended))

            process: Any = SimpleNamespace(join=end, terminate=lambda: None, exitcode=0)
            return runner.Running(cell, process, ours, 0)

        monkeypatch.setattr(runner, "_start", start)
        monkeypatch.setattr(runner, "_start_server", lambda: None)

    return fake


def rate(cell: Cell) -> float:
    return float(cell.varied["model.learning_rate"])


def bowl(cell: Cell) -> float:
    """Orders of magnitude from the best rate, 3e-3, squared."""
    return (math.log10(rate(cell)) - math.log10(3e-3)) ** 2


def proposed(file: str, folder: Path) -> list[str]:
    found = grid.read(file).search
    return [] if found is None else [cell.name for cell in found.proposed(folder)]


def searched(folder: Path, seed: int, runs: int, objective: Objective) -> list[Cell]:
    """The cells of a search whose runs end at once."""
    search = Search(
        {"model.learning_rate": axis("model.learning_rate", RATE)},
        lambda values: Cell({"model": values}, values),
        runs,
        ("loss_nats", False),
        seed,
        "0",
    )
    cells: list[Cell] = []
    while more := search.grow(folder, cells):
        cells += more
        (folder / more[0].name).mkdir()
        ended = {"state": "finished", "seconds": 1.0, "metrics": {"loss_nats": objective(more[0])}}
        (folder / more[0].name / "status.json").write_text(json.dumps(ended))
    return cells


def test_bayes_gets_closer_than_random_with_as_many_runs(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    found, drawn = [], []
    for seed in range(16):
        cells = searched(tmp_path / str(seed), seed, 25, bowl)
        assert len({cell.name for cell in cells}) == 25
        found.append(min(map(bowl, cells)))
        rates = [parameters.draw(f"rate-{seed}", RATE, number) for number in range(25)]
        drawn.append(min((math.log10(one) - math.log10(3e-3)) ** 2 for one in rates))
    assert sum(map(math.sqrt, found)) < 0.6 * sum(map(math.sqrt, drawn))


@pytest.mark.parametrize("number", [math.nan, math.inf, None])
def test_a_run_without_a_finite_result_is_not_the_best_and_stops_no_search(write: Any, tmp_path: Path, number: Any) -> None:
    pytest.importorskip("optuna")
    board = Board(grid.read(write({"model.learning_rate": RATE}, run_cap=3)), tmp_path, 1)
    for value in (number, 0.5, 0.7):
        (cell,) = board.grow()
        (tmp_path / cell.name).mkdir()
        ended = {"state": "finished", "seconds": 1.0, "metrics": {"loss_nats": value}}
        (tmp_path / cell.name / "status.json").write_text(json.dumps(ended))
    assert "3 of 3 done" in board.summary()
    assert "best loss_nats 0.500" in board.summary()


def test_interrupted_it_goes_on_with_the_same_proposals(write: Any, faked: Any, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    file, calm, broken = write({"model.learning_rate": RATE}, run_cap=14), tmp_path / "calm", tmp_path / "broken"
    faked(bowl)
    runner.run(grid.read(file), calm)
    begun: list[str] = []

    def interrupted(cell: Cell) -> float:
        begun.append(cell.name)
        if len(begun) == 12:
            raise KeyboardInterrupt
        return bowl(cell)

    faked(interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run(grid.read(file), broken)
    assert proposed(file, broken) == begun == proposed(file, calm)[:12]
    assert worker.status(broken / begun[-1]) == {}
    runner.run(grid.read(file), broken)
    assert begun == [*proposed(file, calm)[:12], *proposed(file, calm)[11:]]
    assert proposed(file, broken) == proposed(file, calm)


def test_a_proposal_depends_on_the_seed_and_on_what_was_reached(write: Any, faked: Any, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    names = {}
    objectives: dict[str, Objective] = {"bowl": bowl, "again": bowl, "other": lambda cell: -bowl(cell)}
    for name, objective in objectives.items():
        faked(objective)
        file = write({"model.learning_rate": RATE}, run_cap=13)
        runner.run(grid.read(file), tmp_path / name)
        names[name] = proposed(file, tmp_path / name)
    assert names["again"] == names["bowl"]
    assert names["other"][:10] == names["bowl"][:10]  # the model begins after ten
    assert names["other"] != names["bowl"]
    faked(bowl)
    file = write({"model.learning_rate": RATE, "seed": {"value": 1}}, run_cap=1)
    runner.run(grid.read(file), tmp_path / "bowl")  # two sweeps in one folder have a journal each
    assert len(list((tmp_path / "bowl").glob("bayes-*.jsonl"))) == 2
    values = [next(iter(read_lines(path)[0]["at"].values())) for path in (tmp_path / "bowl").glob("bayes-*.jsonl")]
    assert values[0] != values[1]


def test_a_failed_cell_counts_and_stops_no_other(
    write: Any, faked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    file = write({"model.learning_rate": RATE}, run_cap=15)
    faked(lambda cell: bowl(cell) if rate(cell) < 0.01 else None)
    failed = runner.run(grid.read(file), tmp_path / "runs")
    names = proposed(file, tmp_path / "runs")
    states = [worker.status(tmp_path / "runs" / name)["state"] for name in names]
    assert (len(names), failed) == (15, states.count("failed"))
    assert 0 < failed < 8
    assert f"{15 - failed} of 15 done, 0 running, {failed} failed" in capsys.readouterr().out


def test_two_workers_propose_each_cell_once(write: Any, faked: Any, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    begun: list[str] = []
    faked(lambda cell: begun.append(cell.name) or bowl(cell))
    file = write({"model.learning_rate": RATE}, run_cap=12)
    runner.run(grid.read(file), tmp_path / "runs", workers=2)
    assert begun == proposed(file, tmp_path / "runs")
    assert len(set(begun)) == 12
    alone: list[str] = []
    faked(lambda cell: alone.append(cell.name) or bowl(cell))
    runner.run(grid.read(file), tmp_path / "alone")
    assert alone[:10] == begun[:10]
    assert alone != begun  # the one that runs has no value yet
    faked(lambda cell: begun.append(cell.name) or bowl(cell))
    runner.run(grid.read(file), tmp_path / "runs", workers=2)
    assert len(begun) == 12
    runner.run(grid.read(write({"model.learning_rate": RATE}, run_cap=13)), tmp_path / "runs")
    assert len(begun) == 13  # a sweep may be given more runs


def test_what_another_process_proposes_is_taken_up(write: Any, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    sweep = grid.read(write({"model.learning_rate": RATE}))
    ours, theirs = Board(sweep, tmp_path / "runs", 1), Board(sweep, tmp_path / "runs", 1)
    first = ours.grow()
    assert [cell.name for cell in theirs.grow()] == [cell.name for cell in first]
    second = theirs.grow()
    assert second[0].name != first[0].name
    assert [cell.name for cell in ours.grow()] == [cell.name for cell in second]


def test_where_all_cells_are_proposed_the_sweep_ends(
    write: Any, faked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    faked(lambda cell: float(cell.varied["data.num_clients"]))
    values = {"data.num_clients": {"min": 1, "max": 3}, "loop.algorithm": {"values": ["fedavg", {"name": "fedavgm"}]}}
    file = write(values, run_cap=50)
    assert runner.run(grid.read(file), tmp_path / "runs") == 0
    assert "6 of 6 done" in capsys.readouterr().out


def test_it_stops_at_its_target(write: Any, faked: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    faked(bowl)
    file = write({"model.learning_rate": RATE}, run_cap=40, metric=BEST | {"target": 0.5})
    runner.run(grid.read(file), tmp_path / "runs")
    values = [worker.status(tmp_path / "runs" / name)["metrics"]["loss_nats"] for name in proposed(file, tmp_path / "runs")]
    assert [value <= 0.5 for value in values] == [False] * (len(values) - 1) + [True]
    assert "target loss_nats 0.5 reached" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "low", "high", "step"),
    [
        ({"distribution": "uniform", "min": 1, "max": 2}, 1, 2, None),
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25}, 0, 1, 0.25),
        ({"distribution": "log_uniform", "min": -9.0, "max": -1.0}, 0.0001, 0.37, None),
        ({"distribution": "inv_log_uniform", "min": 1.0, "max": 9.0}, 0.0001, 0.37, None),
        ({"distribution": "log_uniform_values", "min": 0.001, "max": 10}, 0.001, 10, None),
        ({"distribution": "inv_log_uniform_values", "min": 0.001, "max": 10}, 0.001, 10, None),
        ({"distribution": "q_log_uniform_values", "min": 1, "max": 100, "q": 5}, 0, 100, 5),
        ({"distribution": "q_log_uniform", "min": 0, "max": 5, "q": 2}, 0, 150, 2),
    ],
)
def test_distributions_keep_their_bounds_and_steps(
    write: Any, faked: Any, tmp_path: Path, spec: Any, low: float, high: float, step: Any
) -> None:
    pytest.importorskip("optuna")
    faked(lambda cell: float(cell.varied["model.weight_decay"]))
    search = grid.read(write({"model.weight_decay": spec}, run_cap=14)).search
    assert search is not None
    runner.run(grid.read(write({"model.weight_decay": spec}, run_cap=14)), tmp_path / "runs")
    values = [cell.varied["model.weight_decay"] for cell in search.proposed(tmp_path / "runs")]
    assert all(low <= value <= high for value in values)
    assert len(set(values)) == len(values) > 3
    if step is not None:
        assert all(value / step == round(value / step) for value in values)


@pytest.mark.parametrize(
    ("values", "content", "said"),
    [
        (
            {"seed": {"value": 1}},
            {"run_cap": None},
            "run_cap: got None; allowed: the number of runs, 1 or more, for the method",
        ),
        ({"seed": {"value": 1}}, {"metric": None}, "metric: got None; allowed: name and goal, for the method bayes"),
        ({"seed": {"value": 1}}, {"metric": {"name": "accuracy"}}, "allowed: name and goal, for the method bayes"),
        (
            {"model.dropout": {"distribution": "normal"}},
            {},
            "model.dropout, distribution: got 'normal'; allowed: for the method",
        ),
        (
            {"model.dropout": {"distribution": "q_beta"}},
            {},
            "got 'q_beta'; allowed: for the method bayes: constant, categorical",
        ),
        ({"seed": {"values": [1, 2], "probabilities": [0.5, 0.5]}}, {}, "got 'categorical_w_probabilities'"),
        ({"seed": {"min": 1, "max": 10**12}}, {}, "bounds within 1e[+]09, for the method bayes"),
        ({"model.weight_decay": {"min": 1.0, "max": 1e300}}, {}, "bounds within 1e[+]100, for the method bayes"),
        ({"loop.algorithm.beta": {"min": 0.1, "max": 0.9}}, {}, "beta"),
    ],
)
def test_what_bayes_cannot_search_is_refused_in_a_line(write: Any, values: Any, content: Any, said: str) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(UsageError, match=said):
        grid.read(write(values, **content))


def test_a_part_of_what_is_searched_is_refused(write: Any) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(UsageError, match="--only: got 'seed=1'; allowed: nothing, for the method bayes"):
        grid.read(write({"seed": {"value": 1}}), ["seed=1"])


def test_without_optuna_one_line_names_the_extra(
    write: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedtune.cli import main

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit):
        main(["sweep", write({"model.learning_rate": RATE}), "--dry-run"])
    said = capsys.readouterr().err
    assert "method: got 'bayes'; allowed: after: pip install 'fedtune[sweep]'" in said
    assert said.count("\n") == 1


def test_a_dry_run_says_what_is_searched_and_checks_ends_and_categories(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    sweep = grid.read(write({"model.learning_rate": RATE, "data.split": {"values": ["iid", "by_author"]}}))
    grid.check_cells(sweep, "sweep.yaml")
    runner.plan(sweep, tmp_path / "runs", 1)
    out = capsys.readouterr().out
    assert "at most 6 runs, proposed one after another" in out
    assert "log_uniform_values, 1e-05 to 1.0" in out
    assert "iid, by_author" in out
    assert "0 of 6 done, 0 running, 0 failed, time left unknown until a run is done" in out
    assert not (tmp_path / "runs").exists()
    for name, spec, said in (
        ("data.batch_size", {"min": 0, "max": 8}, "--data.batch_size: got 0; allowed: 1 or more"),
        ("model.optimizer", {"values": ["adamw", "sgdd"]}, "--model.optimizer: got 'sgdd'"),
        ("model.dropout", {"min": 0.1, "max": 1.5}, "--model.dropout: got 1.5"),
    ):
        with pytest.raises(UsageError, match=f"sweep.yaml: {said}.*1 of 2 ends of ranges and categories could not start"):
            grid.check_cells(grid.read(write({name: spec})), "sweep.yaml")


def test_a_damaged_journal_is_named_with_its_line(write: Any, faked: Any, tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    faked(bowl)
    file, folder = write({"model.learning_rate": RATE}, run_cap=2), tmp_path / "runs"
    runner.run(grid.read(file), folder)
    journal = next(folder.glob("bayes-*.jsonl"))
    good = journal.read_text()
    for odd in (
        {"number": 4, "run": "0" * 8, "at": {}},
        {"number": 3, "run": "../../secret", "at": {}},
        {"number": 3, "run": "0" * 8, "at": {"model.learning_rate": 9.0}},
        {"number": 3, "run": "0" * 8, "at": {"model.learning_rate": True}},
        {"number": 3, "run": "0" * 8, "at": {}},
    ):
        journal.write_text(good)
        append_line(journal, odd)
        with pytest.raises(RunError, match=r"bayes-.*jsonl, line 3: "):
            runner.run(grid.read(file), folder)
    journal.write_text(good + '{"number": 3, "run"')  # a crash: it was never begun
    runner.run(grid.read(write({"model.learning_rate": RATE}, run_cap=3)), folder)
    assert len(read_lines(journal)) == 3


def test_brackets_are_those_of_wandb() -> None:
    metric = ("accuracy", True)
    assert rule_of({"type": "hyperband", "min_iter": 3}, metric).brackets[:4] == (3, 9, 27, 81)
    assert rule_of({"type": "hyperband", "max_iter": 81, "eta": 3, "s": 3}, metric).brackets == (3, 9, 27)
    assert rule_of({"type": "hyperband", "max_iter": 18, "eta": 3, "s": 2}, metric).brackets == (2, 6)
    assert rule_of({"type": "hyperband", "max_iter": 5, "eta": 2, "s": 9}, metric).brackets == (1, 2)


def test_the_best_of_a_bracket_go_on() -> None:
    # eta 2, losses after a bracket 9, 10, 8, 7, 6: W&B's threshold is the value at place int(5 / 2) of 6, 7, 8, 9, 10
    losses = [9.0, 10.0, 8.0, 7.0, 6.0]
    rule = Hyperband((1,), 2.0, False, ("loss_nats", False))

    def stopped(rule: Hyperband, values: list[float]) -> list[float]:
        return [own for place, own in enumerate(values) if rule.is_stopped(own, values[:place] + values[place + 1 :])]

    assert stopped(rule, losses) == [9.0, 10.0]
    assert stopped(Hyperband((1,), 2.0, True, ("loss_nats", False)), losses) == [9.0, 10.0, 8.0]
    assert stopped(Hyperband((1,), 3.0, True, ("accuracy", True)), losses) == [9.0, 8.0, 7.0, 6.0]
    assert stopped(rule, [5.0]) == stopped(rule, [5.0, 5.0, 5.0]) == stopped(rule, [math.nan]) == []
    assert len(stopped(rule, [math.nan, 1.0, 2.0])) == 1


def rounds(folder: Path, name: str, values: list[float | None]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"round": number} | ({} if value is None else {"accuracy": value})) for number, value in enumerate(values)
    ]
    (folder / name / "rounds.jsonl").write_text("".join(f"{line}\n" for line in lines))


def played(folder: Path, values: list[float | None], rule: Hyperband, names: list[str]) -> tuple[int, Stopping]:
    """Play a run's rounds; how many it had."""
    stopping = Stopping(rule, folder, names)
    run = Run({}, None, len(values), str(folder / "own"), print=lambda text: None)
    for number, value in enumerate(values, start=1):
        record: Any = SimpleNamespace(round=number, metrics={} if value is None else {"accuracy": value})
        run.history.append(record)
        stopping.on_round_end(run, None, record)
        if run.should_stop:
            break
    return len(run.history), stopping


def test_a_run_is_compared_at_brackets_with_those_that_got_there(tmp_path: Path) -> None:
    rule = Hyperband((2, 4), 2.0, True, ("accuracy", True))
    rounds(tmp_path, "a", [0.1, 0.5, 0.5, 0.6, 0.9])
    rounds(tmp_path, "b", [0.9, 0.3])
    rounds(tmp_path, "c", [0.9])  # not there yet
    rounds(tmp_path, "stranger", [0.9, 0.9, 0.9, 0.9])  # of another sweep
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "rounds.jsonl").write_text("damaged\ndamaged\n")
    names = ["a", "b", "c", "d", "e", "own"]
    assert played(tmp_path, [0.0, 0.6, 0.0, 0.7, 0.7], rule, names)[0] == 5
    assert played(tmp_path, [0.9, 0.4, 0.9, 0.9, 0.9], rule, names)[0] == 2
    done, stopping = played(tmp_path, [0.0, 0.6, 0.0, 0.5, 0.7], rule, names)
    assert (done, stopping.reason) == (4, "hyperband: accuracy 0.5000 after round 4 is not among the best 1 of 2 runs")
    assert played(tmp_path, [0.4, None, None, 0.9, 0.9], rule, names)[0] == 2  # the value before
    assert played(tmp_path, [None, None], rule, names)[0] == 2
    again = Stopping(rule, tmp_path, names)
    again.load_state_dict(json.loads(json.dumps(stopping.state_dict())))
    assert again.reason == stopping.reason


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "early_terminate: got None; allowed: type hyperband, with min_iter"),
        ({"type": "envelope", "min_iter": 1}, "early_terminate, type: got 'envelope'; allowed: hyperband"),
        ({"type": "hyperband"}, "type hyperband, with min_iter, or with max_iter and s"),
        ({"type": "hyperband", "min_iter": 1, "max_iter": 9, "s": 2}, "with min_iter, or with max_iter and s"),
        ({"type": "hyperband", "max_iter": 9}, "with min_iter, or with max_iter and s"),
        ({"type": "hyperband", "min_iter": 0}, "early_terminate, min_iter: got 0; allowed: a whole number from 1"),
        ({"type": "hyperband", "min_iter": 1.5}, "early_terminate, min_iter: got 1.5"),
        ({"type": "hyperband", "min_iter": 1, "eta": 1}, "early_terminate, eta: got 1; allowed: a number above 1"),
        ({"type": "hyperband", "min_iter": 1, "strict": 1}, "early_terminate, strict: got 1; allowed: true or false"),
        ({"type": "hyperband", "max_iter": 2, "s": 2}, "max_iter of eta or more"),
        ({"type": "hyperband", "min_itr": 1}, r"early_terminate: got 'min_itr'; allowed: min_iter \(nearest\)"),
    ],
)
def test_every_key_of_hyperband_is_applied_or_refused(write: Any, given: Any, said: str) -> None:
    content = {"method": "grid", "parameters": {"seed": {"value": 1}}, "metric": BEST, "early_terminate": given}
    with pytest.raises(UsageError, match=said):
        grid.check(content)
    with pytest.raises(UsageError, match="metric: got None; allowed: name and goal, for early_terminate"):
        grid.check(content | {"metric": None})


def test_a_real_sweep_stops_what_is_behind_and_it_stays_stopped(
    tiny_bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna")
    data = tmp_path / "data.csv"
    rows = (f"{' '.join(f'word{(i * j) % 37}' for j in range(1, 9))} {i},{'abc'[i % 3]}\n" for i in range(120))
    data.write_text("text,label\n" + "".join(rows))
    values = {"data.task": "csv", "data.task_options": {"path": str(data)}, "data.max_length": 16, "data.batch_size": 4}
    values |= {"model.name": tiny_bert, "loop.max_rounds": 3, "loop.precision": "32-true", "loop.baselines": []}
    content: dict[str, Any] = {"method": "bayes", "run_cap": 3, "metric": BEST}
    content |= {"early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 3, "strict": True}}
    content["parameters"] = {key: {"value": value} for key, value in values.items()} | {"model.learning_rate": RATE}
    file, folder = tmp_path / "sweep.yaml", tmp_path / "runs"
    file.write_text(yaml.safe_dump(content))
    assert runner.run(grid.read(file), folder) == 0
    names = proposed(str(file), folder)
    done = {name: len(read_lines(folder / name / "rounds.jsonl")) for name in names}
    states = {name: worker.status(folder / name) for name in names}
    losses = [[one["loss_nats"] for one in read_lines(folder / name / "rounds.jsonl")] for name in names]
    expected = []
    for place, own in enumerate(losses):  # by hand: at rounds 1 and on, the best of those that were there before
        behind = [number for number in (1,) if any(other[number - 1] < own[number - 1] for other in losses[:place])]
        expected.append(behind[0] if behind else 3)
    assert list(done.values()) == expected
    assert 1 in expected[1:]
    assert [("stopped" in states[name]) for name in names] == [rounds < 3 for rounds in expected]
    assert "stopped by hyperband: loss_nats" in capsys.readouterr().out
    assert fedtune.read_runs(folder).complete.all()
    stopped = names[expected.index(1)]
    (folder / stopped / "status.json").unlink()  # a crash before it was written
    assert runner.run(grid.read(file), folder) == 0
    assert len(read_lines(folder / stopped / "rounds.jsonl")) == 1
    assert worker.status(folder / stopped)["stopped"] == states[stopped]["stopped"]
    with locked(folder):  # a sweep leaves no lock behind
        pass
