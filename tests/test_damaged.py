"""Files of a run that someone has edited, or lost in part: one line says what is wrong, and nothing is dropped in silence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Noted, make_loop, without_times
from test_lightning import Net, Three

import fedtune
from fedtune.files import append_line, read_lines
from fedtune.storage.records import RoundRecord

Edit = Callable[[dict[str, Any]], Any]


def fit(folder: Path, rounds: int = 3, **options: Any) -> Any:
    loop = make_loop(max_rounds=rounds, run_dir=str(folder), **options)
    loop.fit(Net(), Three())
    return loop


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(folder, callbacks=[Noted()])
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A run of three rounds."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def one_line(caught: pytest.ExceptionInfo[Exception], *parts: str) -> None:
    said = str(caught.value)
    assert "\n" not in said
    for part in parts:
        assert part in said


def in_client(**change: Any) -> Edit:
    return lambda line: line["clients"][0].update(change)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda line: line.update(accuracy="high"), "accuracy is 'high', where a finite number belongs"),
        (lambda line: line.update(accuracy="0.5"), "accuracy is '0.5'"),
        (lambda line: line.update(accuracy=True), "accuracy is True"),
        (lambda line: line.update(accuracy=[1]), "accuracy is [1]"),
        (lambda line: line.update(strange={"a": {"b": 1}}), "strange is {'a': {'b': 1}}"),
        (lambda line: line.update(accuracy=10**400), "accuracy is 1000"),
        (lambda line: line.update(round=True), "round is True, where a whole number"),
        (lambda line: line.update(round=2.0), "round is 2.0, where a whole number"),
        (lambda line: line.update(bytes_up=-5), "bytes_up is -5, where a whole number, 0 or more, belongs"),
        (lambda line: line.update(num_examples="36"), "num_examples is '36'"),
        (lambda line: line.update(num_examples=0), "num_examples is 0, where its clients have 36"),
        (lambda line: line.update(num_clients=2), "num_clients is 2, where its clients have 3"),
        (lambda line: line.update(clients=[]), "num_clients is 3, where its clients have 0"),
        (lambda line: line.update(clients=line["clients"] * 2), "where each belongs once"),
        (lambda line: line.update(clients=[5]), "clients have 5, where an object belongs"),
        (lambda line: line.update(clients=[{"client": 0}]), "num_examples, num_steps, num_tokens"),
        (lambda line: line.update(clients=5), "clients is 5, where a list belongs"),
        (in_client(client="0"), "client is '0'"),
        (in_client(train_loss_nats=None), "train_loss_nats is None"),
        (in_client(update_norm=-1), "update_norm is -1, where a number, 0 or more, belongs"),
        (in_client(more=1), "clients have ['more'], which no record has"),
        (in_client(metrics=[1]), "metrics is [1], where an object belongs"),
        (lambda line: line.update(failures=[5]), "failures have 5"),
        (lambda line: line.update(failures=[{"client": 7, "reason": 3}]), "reason is 3, where text belongs"),
        (lambda line: line.update(drift=[1]), "drift is [1], where an object belongs"),
        (lambda line: line.update(drift={"net": "x"}), "drift.net is 'x'"),
        (lambda line: line.update(train_loss_nats=None), "train_loss_nats is None, where a finite number belongs"),
        (lambda line: line.update(seconds=None), "seconds is None"),
        (lambda line: line.update(seconds="1"), "seconds is '1'"),
        (lambda line: line.update(seconds_train=-1.0), "seconds_train is -1.0, where a number, 0 or more, belongs"),
        (lambda line: line.update(client_accuracy=3), "client_accuracy is 3, where a list belongs"),
        (lambda line: line.update(client_accuracy=[0.5, "x"]), "client_accuracy[1] is 'x'"),
        (lambda line: line.update(update_cosine="x"), "update_cosine is 'x'"),
        (lambda line: line.pop("bytes_down"), "bytes_down missing"),
    ],
)
def test_every_value_of_a_record_is_checked(run: Path, edit: Edit, said: str) -> None:
    file = run / "rounds.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    edit(lines[1])
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = file.read_bytes()
    with pytest.raises(fedtune.RunError) as caught:
        fit(run)
    one_line(caught, f"{file}, line 2: no record of a round", said)
    assert file.read_bytes() == before
    with pytest.raises(fedtune.RunError) as caught:  # a report reads the same file
        fedtune.read_runs(run.parent)
    one_line(caught, f"{file}, line 2: ", said)


def test_a_metric_may_be_missing_or_null(run: Path) -> None:
    file = run / "rounds.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0].pop("accuracy")
    lines[1]["accuracy"] = None
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = fit(run).history
    assert ["accuracy" in record.metrics for record in history] == [False, True, True]
    assert json.loads(file.read_text().splitlines()[1])["accuracy"] is None


def test_a_record_is_read_as_it_was_written(run: Path) -> None:
    for line in (run / "rounds.jsonl").read_text().splitlines():
        assert RoundRecord.from_dict(json.loads(line)).to_dict() == json.loads(line)


@pytest.mark.parametrize("content", [b"[]\n", b"x\n", b"\xff\xfe\n", b"[" * 10**5 + b"\n", b"null\n"])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"round": 1}\n' + content + b'{"round": 3}\n')
    with pytest.raises(fedtune.RunError) as caught:
        read_lines(file)
    one_line(caught, f"{file}, line 2: no record, which is a JSON object")
    file.write_bytes(b'{"round": 1}\n' + content)
    with pytest.raises(fedtune.RunError, match="line 2"):
        read_lines(file)


def test_a_new_line_takes_the_place_of_an_unfinished_one(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    for unfinished in ('{"round": 1}\n{"rou', '{"round": 1}\n'):
        file.write_text(unfinished)
        append_line(file, {"round": 2})
        assert read_lines(file) == [{"round": 1}, {"round": 2}]
    file.write_text('{"rou')
    append_line(file, {"round": 1})
    assert read_lines(file) == [{"round": 1}]


@pytest.mark.parametrize(
    "line",
    [
        {"round": 1},
        {"round": 1, "stopped_at": None, "states": "x"},
        {"round": 1, "stopped_at": None, "states": "[]"},
        {"round": 1, "stopped_at": None, "states": '{"a": 1}'},
        {"round": 1, "stopped_at": "2", "states": "{}"},
        {"round": "1", "stopped_at": None, "states": "{}"},
        {"round": True, "stopped_at": None, "states": "{}"},
        [],
    ],
)
def test_what_callbacks_knew_is_not_forgotten_in_silence(run: Path, line: Any) -> None:
    file = run / "callbacks.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps(line), *lines[1:]]) + "\n")
    with pytest.raises(fedtune.RunError) as caught:
        fit(run, 4, callbacks=[Noted()])
    one_line(caught, f"{file}, line 1 is damaged", "remove the file")
    file.write_text("\n".join([*lines, '{"rou']))  # a crash
    noted = Noted()
    fit(run, 4, callbacks=[noted])
    assert noted.count == 4


@pytest.mark.parametrize("content", [b"a: [1", b"- 1\n", b"\x00\xff\x80", b"", b"5\n", b"a: 1\n b: 2\n"])
def test_a_damaged_configuration_is_named(run: Path, content: bytes) -> None:
    (run / "config.yaml").write_bytes(content)
    for use in (lambda: fit(run), lambda: fedtune.read_runs(run.parent)):
        with pytest.raises(fedtune.RunError) as caught:
            use()
        one_line(caught, str(run / "config.yaml"))
    assert (run / "config.yaml").read_bytes() == content


@pytest.mark.parametrize("content", ["[]", "5", "{", ""])
def test_what_does_not_travel_is_named_where_it_is_damaged(run: Path, content: str) -> None:
    (run / "start" / "resting.json").write_text(content)
    with pytest.raises(fedtune.RunError) as caught:
        fit(run)
    one_line(caught, str(run / "start"), "start again in a new run directory")


@pytest.mark.parametrize("lost", ["start", "start/round-0000"])
def test_a_run_does_not_go_on_without_what_it_began_with(run: Path, lost: str) -> None:
    shutil.rmtree(run / lost)
    with pytest.raises(fedtune.RunError) as caught:
        fit(run, 4)
    one_line(caught, f"{run / 'start'} is missing", "put it back, or start again in a new run directory")


@pytest.mark.parametrize("rounds", [3, 1])
def test_records_without_checkpoints_are_not_dropped(tmp_path: Path, rounds: int) -> None:
    fit(tmp_path, rounds)
    before = (tmp_path / "rounds.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(fedtune.RunError) as caught:
        fit(tmp_path, rounds)
    one_line(caught, f"{tmp_path / 'checkpoints'} has no checkpoint")
    assert (tmp_path / "rounds.jsonl").read_bytes() == before


@pytest.mark.parametrize("unmounted", [True, False])
def test_one_record_without_a_checkpoint_is_dropped_only_where_a_crash_explains_it(tmp_path: Path, unmounted: bool) -> None:
    expected, run = fit(tmp_path / "whole", 2).history, tmp_path / "run"
    fit(run, 1)
    for name in ("summary.json", "callbacks.jsonl"):  # a kill right after the first checkpoint
        (run / name).unlink()
    folder, before = run / "checkpoints", (run / "rounds.jsonl").read_bytes()
    shutil.rmtree(folder)
    if unmounted:
        folder.mkdir()
    with pytest.raises(fedtune.RunError) as caught:
        fit(run, 2)
    one_line(caught, f"{folder} has no checkpoint", "is its disk mounted?")
    assert (run / "rounds.jsonl").read_bytes() == before
    (folder / ".round-0001.4711.tmp").mkdir(parents=True)  # a kill between the record and the name of the checkpoint
    assert without_times(fit(run, 2).history) == without_times(expected)
    assert sorted(path.name for path in folder.iterdir()) == ["round-0001", "round-0002"]
    assert not list(run.glob("rounds.jsonl.*"))


def test_a_round_is_recorded_while_its_checkpoint_waits_for_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noting(file: Path, record: dict[str, Any]) -> None:
        if file.name == "rounds.jsonl":
            seen.append([path.name.rpartition(".")[2] for path in (tmp_path / "checkpoints").iterdir()])
        append_line(file, record)

    monkeypatch.setattr("fedtune.storage.directory.append_line", noting)
    fit(tmp_path, 2)
    assert [sorted(names) for names in seen] == [["tmp"], ["round-0001", "tmp"]]


def test_rounds_that_are_done_again_are_kept_where_a_crash_does_not_explain_them(run: Path) -> None:
    expected, file = fit(run, 6).history, run / "rounds.jsonl"
    for number in (5, 6):
        shutil.rmtree(run / "checkpoints" / f"round-{number:04d}")
    shutil.copytree(run / "start" / "round-0000", run / "checkpoints" / "round-0000")
    before, said = (
        file.read_bytes(),
        r"rounds 1 to 6 have no checkpoint and are done again; .* is kept in rounds\.jsonl\.before-1",
    )
    with pytest.warns(UserWarning, match=said):
        again = fit(run, 6).history
    assert without_times(again) == without_times(expected)
    assert (run / "rounds.jsonl.before-1").read_bytes() == before
    fit(run, 6)
    assert not (run / "rounds.jsonl.before-2").exists()


@pytest.mark.parametrize("folder", ["", "start"])
def test_what_a_kill_has_left_half_written_is_removed_at_the_next_start(run: Path, folder: str) -> None:
    for name in (".config.yaml.4711.tmp", ".4711.tmp", ".tmpicf2eI"):
        (run / folder / name).write_text("half")
    (run / folder / ".mine.tmp").write_text("whole")
    fit(run)
    assert [path.name for path in (run / folder).glob(".*tmp*")] == [".mine.tmp"]


def test_the_end_of_a_round_that_a_kill_has_cut_short_is_made_up_for(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "round-0002", run / "checkpoints" / "round-0001")
    fit(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["round-0002", "round-0003"]


def test_other_folders_among_the_checkpoints_are_left_alone(run: Path) -> None:
    for name in ("round-0003.copy", "round-0003 (2)", "round-x"):
        shutil.copytree(run / "checkpoints" / "round-0003", run / "checkpoints" / name)
    assert len(fit(run, 4).history) == 4
    assert (run / "checkpoints" / "round-0003.copy").exists()


def test_a_damaged_summary_is_made_anew_and_named(run: Path) -> None:
    (run / "summary.json").write_text("{")
    with pytest.warns(UserWarning, match=r"summary\.json cannot be read: .*; it is made anew"):
        assert fit(run).summary["rounds"] == 3
    assert json.loads((run / "summary.json").read_text())["rounds"] == 3
