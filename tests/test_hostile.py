"""Somebody else's folder: planted links, FIFOs, names that are code; and helpers that fail beside a run."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import make_loop, without_times
from pytorch_lightning.loggers import Logger
from test_damaged import Noted, fit, one_line
from test_lightning import Data, Net, Three
from test_report import with_metric, write_run

import fedtune
from fedtune.data import token_cache
from fedtune.errors import RunError, UsageError
from fedtune.files import append_line, content, printable, read_lines, write_text
from fedtune.models.cache import cache_folder
from fedtune.reports.folders import failures
from fedtune.reports.report import FILES, report, spreadsheet
from fedtune.runs import figures
from fedtune.runs.wandb import WandbMirror
from fedtune.runs.wandb_start import run_id
from fedtune.storage import checkpoint
from fedtune.storage.locks import Busy, locked
from fedtune.sweeps.board import Board
from fedtune.sweeps.grid import Cell, Sweep
from fedtune.sweeps.worker import recorded, status

pytestmark = pytest.mark.usefixtures("pictures")
SAID = "echo mine\n"
WRITTEN = (
    "config.yaml",
    "rounds.jsonl",
    "callbacks.jsonl",
    "summary.json",
    "curves.png",
    "status.json",
    ".lock.owner",
    ".lock",
)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "profile"
    file.write_text(SAID)
    return file


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """Two runs of four."""
    for name in ("a", "b", "c", "d"):
        write_run(tmp_path / "runs" / name, [0.5, 0.6], seed=ord(name))
    return tmp_path / "runs"


@pytest.mark.filterwarnings("ignore:.*it is made anew:UserWarning")
@pytest.mark.parametrize("name", WRITTEN)
def test_no_run_writes_through_a_link(tmp_path: Path, victim: Path, name: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(victim)
    with contextlib.suppress(UsageError, RunError):
        fit(tmp_path / "run", callbacks=[Noted()])
    assert victim.read_text() == SAID


def test_no_line_is_added_through_a_link(tmp_path: Path, victim: Path) -> None:
    for target in (victim, tmp_path / "new"):
        link = tmp_path / f"{target.name}.jsonl"
        link.symlink_to(target)
        with pytest.raises(OSError, match="it is a symbolic link, where a file belongs"):
            append_line(link, {"round": 1})
    assert victim.read_text() == SAID
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", FILES)
def test_no_report_writes_through_a_link(good: Path, tmp_path: Path, victim: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(victim)
    report(good, tmp_path / "out")
    assert victim.read_text() == SAID
    assert not (tmp_path / "out" / name).is_symlink()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)


def test_the_log_of_a_cell_is_no_link(tmp_path: Path, victim: Path) -> None:
    from fedtune.sweeps.worker import opened

    (tmp_path / "log.txt").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"), opened(tmp_path / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT):
        pass


@pytest.mark.filterwarnings("ignore:.*it is made anew:UserWarning")
@pytest.mark.parametrize("name", ["config.yaml", "rounds.jsonl", "callbacks.jsonl", "summary.json", ".lock", ".lock.owner"])
def test_a_fifo_is_refused_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises((UsageError, RunError)) as caught:
        fit(tmp_path, callbacks=[Noted()])
    one_line(caught, name, "it is a FIFO, where a file belongs")


@pytest.mark.parametrize("name", ["state.json", "weights.safetensors"])
def test_a_checkpoint_with_a_fifo_is_a_damaged_one(tmp_path: Path, name: str) -> None:
    fit(tmp_path)
    file = tmp_path / "checkpoints" / "round-0003" / name
    file.unlink()
    os.mkfifo(file)
    with pytest.warns(UserWarning, match="DAMAGED CHECKPOINT.*it is a FIFO"):
        state = checkpoint.latest(tmp_path / "checkpoints")
    assert state is not None
    assert state.round == 2


def test_devices_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").symlink_to("/dev/zero")
    with pytest.raises(RunError, match="it is a device"):
        read_lines(tmp_path / "rounds.jsonl")
    with pytest.raises(OSError, match="it is a directory, where a file belongs"):
        content(tmp_path)
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="it is a directory"):
        write_text(tmp_path / "x", "")


def test_what_a_lock_says_of_its_owner_is_cut_and_follows_no_link(tmp_path: Path, victim: Path) -> None:
    import fcntl

    with open(tmp_path / ".lock", "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        (tmp_path / ".lock.owner").write_text("\x1b[31m" + "x" * 5000)
        with pytest.raises(Busy) as caught, locked(tmp_path):
            pass
        assert "\x1b" not in str(caught.value)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["rounds.jsonl", "config.yaml", "status.json"])
@pytest.mark.parametrize("way", ["fifo", "garbage", "link", "deep"])
def test_a_report_leaves_out_what_is_damaged_and_names_it(
    good: Path, capsys: pytest.CaptureFixture[str], name: str, way: str
) -> None:
    file = good / "b" / name
    file.unlink(missing_ok=True)
    if way == "fifo":
        os.mkfifo(file)
    elif way == "link":
        file.symlink_to("nowhere")
    else:
        file.write_text("[" * 50_000 + "\n" if way == "deep" else "\x00{\n")
    report(good, good)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert "3 runs, 1 damaged and left out (b: " in out
    assert name in out
    assert name in (good / "tables.md").read_text()
    assert f"<b>b</b>: damaged and left out: {file}" in (good / "report.html").read_text()
    assert set(fedtune.read_runs(good, {}).run) >= {"a", "c", "d"}


def test_a_setting_of_another_type_is_named(good: Path) -> None:
    for name, old, new in (
        ("a", "max_rounds: 2", "max_rounds: two"),
        ("b", "seed: 98", "seed: [1]"),
        ("c", "loop:\n", "loop:\n  mode: 3\n"),
    ):
        file = good / name / "config.yaml"
        file.write_text(file.read_text().replace(old, new))
    damaged: dict[str, str] = {}
    assert set(fedtune.read_runs(good, damaged).run) == {"b", "d"}
    assert "loop.max_rounds is 'two', which no run has" in damaged["a"]
    assert "loop.mode is 3" in damaged["c"]


def test_where_all_runs_are_damaged_one_line_says_so(good: Path) -> None:
    for name in "abcd":
        (good / name / "rounds.jsonl").write_text("x\n")
    with pytest.raises(UsageError) as caught:
        report(good, good)
    one_line(caught, "not all failed or damaged (a: ", "rounds.jsonl, line 1")


def test_links_to_runs_are_followed_once_and_circles_end(good: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "elsewhere" / "far", [0.1])
    write_run(tmp_path / "many" / "one", [0.1])
    (good / "far").symlink_to(tmp_path / "elsewhere" / "far")
    (good / "more").symlink_to(tmp_path / "many")
    (good / "up").symlink_to(good)
    (good / "again").symlink_to(good / "a")
    (good / "root").symlink_to("/usr")
    assert set(fedtune.read_runs(good).run) == {"a", "b", "c", "d", "far", "more/one"}
    (good / "gone").symlink_to(tmp_path / "unmounted")
    damaged: dict[str, str] = {}
    assert failures(good, damaged) == {}
    assert damaged == {"gone": f"{good / 'gone'} cannot be read: it is a link to something that is not there"}


NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> `x` [y](z) \x1b[31m%{x}"


def test_no_name_is_code_in_the_report(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(good / "odd", [0.5, 0.6], clients=3, task=NASTY, model="=cmd|' /C calc'!A0", split="@x")
    with_metric(good / "odd", NASTY, [0.1, 0.2])
    bad = good / "<b>[red]\x1b]0;x\x07"
    bad.mkdir()
    (bad / "status.json").write_text(json.dumps({"state": "failed", "error": NASTY}))
    (good / "worse\x1b").mkdir()
    (good / "worse\x1b" / "status.json").write_text("\x1b[31m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report(good, tmp_path / "out")
    page, text = ((tmp_path / "out" / name).read_text() for name in ("report.html", "tables.md"))
    for said in (page, text, capsys.readouterr().out):
        assert "\x1b" not in said.replace("\\x1b", "")
    assert "<script>alert" not in page
    assert "<img src" not in page
    assert "<" not in text.replace("\\<", "")
    assert "\\`x\\` \\[y\\](z)" in text
    with open(tmp_path / "out" / "tables.csv", newline="") as file:
        rows = list(csv.reader(file))
    odd = next(row for row in rows if NASTY.split()[0] in row[0])
    assert odd[1:3] == ["'=cmd|' /C calc'!A0", "'@x"]


def test_numbers_are_numbers_in_a_spreadsheet() -> None:
    from pandas import DataFrame

    table = DataFrame({"-x": ["-1", "+2.5", "\t=1", "a=1"], "n": [-1.0, 2.0, 3.0, 4.0]})
    assert spreadsheet(table).splitlines() == ["'-x,n", "-1,-1.0", "+2.5,2.0", "'\t=1,3.0", "a=1,4.0"]


def test_a_text_is_printable() -> None:
    assert printable("a\n\tb \x9b\u202e\udcff" + "x" * 300, 10) == "a b " + "\ufffd" * 3 + "xxx…"


def test_thousands_of_runs_are_one_picture_and_one_page(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.reports import curves, page

    monkeypatch.setattr(curves, "_PANELS", 2)
    monkeypatch.setattr(page, "_MOST", 3)
    for number in range(5):
        write_run(good / f"t{number}", [0.5], split=f"split {number}")
    report(good, tmp_path / "out")
    assert "2 of 6 panels; the tables have all" in (tmp_path / "out" / "curves.svg").read_text()
    assert "Curves of the first 1 only." in (tmp_path / "out" / "report.html").read_text()


def test_five_thousand_authors_are_a_picture(tmp_path: Path) -> None:
    table = [{"labels": {"a": 3}, "authors": {f"author {number}": 2 for number in range(first, 5000, 3)}} for first in range(3)]
    figures.plot_split(table, tmp_path / "x.png", "$ 漢字")
    counts = figures._held([row["authors"] for row in table])[0]
    assert len({name for one in counts for name in one}) <= 20
    assert [sum(one.values()) for one in counts] == [sum(row["authors"].values()) for row in table]
    figures.plot_split([{"labels": {"a": 1}}] * 3000, tmp_path / "y.png")


def test_a_picture_that_fails_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "save", lambda *_, **__: 1 / 0)
    with pytest.warns(UserWarning, match=r"curves\.png could not be drawn: ZeroDivisionError"):
        assert fit(tmp_path).summary["rounds"] == 3


class Failing(Logger):
    """A logger of Lightning that fails from a call on."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._fails, self.calls = name, list[str]()

    name, version = "failing", 1  # type: ignore[assignment]

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self._fails:
            raise ConnectionError("no route\nto host")

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        self._call("log_hyperparams")

    def log_metrics(self, *_: Any, **__: Any) -> None:
        self._call("log_metrics")

    def finalize(self, status: str) -> None:
        self._call("finalize")


@pytest.mark.parametrize("name", ["log_hyperparams", "log_metrics", "finalize"])
def test_a_logger_that_fails_is_left_alone(tmp_path: Path, name: str) -> None:
    logger = Failing(name)
    with pytest.warns(UserWarning, match="no longer logged, Failing failed: ConnectionError: no route to host") as caught:
        loop = fit(tmp_path, logger=logger)
    assert len(caught) == 1
    assert loop.summary["rounds"] == 3
    assert logger.calls[-1] == name


class Mirror:
    """A run of W&B that fails from a call on."""

    def __init__(self, name: str) -> None:
        self.fails, self.calls, self.summary, self.dir = name, list[str](), dict[str, Any](), "x"
        self.settings = SimpleNamespace(mode="offline")

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any, **__: Any) -> None:
            self.calls.append(name)
            if name == self.fails:
                raise BrokenPipeError("gone")

        return call


@pytest.mark.parametrize("name", ["define_metric", "log", "finish"])
def test_wandb_that_fails_after_the_start_is_left_alone(
    make_data: Any, make_module: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    mirror = Mirror(name)
    monkeypatch.setattr(WandbMirror, "_opened", lambda self, run: mirror)
    monkeypatch.setattr("fedtune.runs.wandb.WandbLogger", lambda experiment: None)
    loop = make_loop(max_rounds=2, logger="wandb")
    with pytest.warns(UserWarning, match="no longer mirrored, W&B failed: BrokenPipeError: gone") as caught:
        loop.fit(make_module(), make_data())
    assert len([one for one in caught if "mirrored" in str(one.message)]) == 1
    assert len(loop.history) == 2
    assert mirror.calls[-1] == name


def test_the_id_of_a_mirror_is_an_id(tmp_path: Path, victim: Path) -> None:
    known = run_id(str(tmp_path))
    assert run_id(str(tmp_path)) == known
    (tmp_path / "wandb_id").write_text("../../x\n")
    with pytest.warns(UserWarning, match="wandb_id is damaged"):
        assert run_id(str(tmp_path)) != known
    (tmp_path / "wandb_id").unlink()
    (tmp_path / "wandb_id").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        run_id(str(tmp_path))


@pytest.mark.parametrize("text", ["[]", '{"state": "finished"}', '{"state": "finished", "metrics": [1], "seconds": 1}', "\x00"])
def test_a_status_that_no_run_writes_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    assert status(tmp_path) == {}


def test_no_clock_blocks_a_cell(tmp_path: Path) -> None:
    cell = Cell.__new__(Cell)
    object.__setattr__(cell, "name", "cell")
    sweep = Sweep.__new__(Sweep)
    object.__setattr__(sweep, "cells", [cell])
    (tmp_path / "cell").mkdir()
    file = tmp_path / "cell" / "status.json"
    file.write_text(json.dumps({"state": "failed", "error": "full"}))
    os.utime(file, (2**32, 2**32))
    board = Board(sweep, tmp_path, 1)
    assert board.failed_elsewhere(cell) is None  # it was there before
    file.unlink()
    file.write_text(json.dumps({"state": "failed", "error": "again"}))
    os.utime(file, (1, 1))
    assert board.failed_elsewhere(cell) == "again"


def test_a_status_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "status.json").mkdir()
    with pytest.raises(RunError) as caught:
        recorded({}, tmp_path)
    one_line(caught, "status.json could not be written")


class Pooled(Three):
    """Three clients, and all their data."""

    def train_dataloader(self) -> Any:
        return Data().train_dataloader()


@pytest.mark.parametrize("name", ["config.yaml", "rounds.jsonl", "checkpoints"])
def test_a_damaged_baseline_begins_anew_and_is_kept(tmp_path: Path, name: str) -> None:
    def play() -> Any:
        loop = make_loop(max_rounds=2, run_dir=str(tmp_path), baselines=("centralised",))
        loop.fit(Net(), Pooled())
        return loop

    expected = play().baseline_runs["centralised"]
    (folder,) = (tmp_path / "baselines").glob("centralised-*")
    if name == "checkpoints":
        for file in folder.glob("checkpoints/*/state.json"):
            file.write_text("{}")
    else:
        (folder / name).write_text("x: [\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = play().baseline_runs["centralised"]
    assert without_times(again) == without_times(expected)
    assert any(f"{name} is kept as {name}.damaged-1" in str(one.message) for one in caught)


def test_a_start_without_a_complete_round_is_made_anew(tmp_path: Path) -> None:
    fit(tmp_path, 3)
    expected = without_times(fit(tmp_path, 4).history)
    for name in ("checkpoints", "rounds.jsonl", "summary.json", "callbacks.jsonl"):
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "start" / "resting.json").write_text("")
    with pytest.warns(UserWarning, match=r"it is made anew, and start is kept as start\.damaged-1"):
        assert without_times(fit(tmp_path, 4).history) == expected


def test_checkpoints_that_cannot_be_seen_are_not_taken_for_none(tmp_path: Path) -> None:
    fit(tmp_path)
    before = (tmp_path / "rounds.jsonl").read_bytes()
    os.rename(tmp_path / "checkpoints", tmp_path / "disk")
    places = [lambda path: path.symlink_to("unmounted"), Path.mkdir, Path.touch, os.mkfifo, lambda path: path.symlink_to(path)]
    for place in places:
        place(tmp_path / "checkpoints")  # type: ignore[operator]
        with pytest.raises(RunError) as caught:
            fit(tmp_path, 4)
        one_line(caught, f"{tmp_path / 'checkpoints'} ")
        assert (tmp_path / "rounds.jsonl").read_bytes() == before
        path = tmp_path / "checkpoints"
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk")  # a disk with more room
    assert len(fit(tmp_path, 4).history) == 4


def test_no_permission_is_not_taken_for_no_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path)

    real = os.listdir

    def listed(path: Any) -> Any:
        if path != tmp_path / "checkpoints":
            return real(path)
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "listdir", listed)
        with pytest.raises(RunError, match=r"checkpoints cannot be read: .*Permission denied"):
            fit(tmp_path, 4)
    assert len(read_lines(tmp_path / "rounds.jsonl")) == 3


def test_a_run_whose_configuration_is_missing_does_not_go_on(tmp_path: Path) -> None:
    fit(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(RunError) as caught:
        fit(tmp_path, 4)
    one_line(caught, "config.yaml is missing", "put it back")


def test_callbacks_that_lost_what_they_knew_are_named(tmp_path: Path) -> None:
    fit(tmp_path, callbacks=[Noted()])
    file = tmp_path / "callbacks.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    with pytest.raises(RunError, match=r"callbacks\.jsonl has 1 of 3 rounds; remove the file to go on"):
        fit(tmp_path, 4, callbacks=[Noted()])
    file.unlink()
    with pytest.warns(UserWarning, match=r"callbacks\.jsonl is missing"):
        fit(tmp_path, 4, callbacks=[Noted()])


def test_where_tokens_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("FEDTUNE_CACHE", "")
    assert cache_folder() == tmp_path / ".cache" / "fedtune"
    monkeypatch.setenv("FEDTUNE_CACHE", "~/c")
    assert cache_folder() == tmp_path / "c"
    monkeypatch.setenv("FEDTUNE_CACHE", "")

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    with pytest.raises(RunError, match="there is no home directory"):
        cache_folder()


def test_an_entry_of_the_cache_that_is_a_fifo_is_damaged(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.warns(UserWarning, match="is damaged .*it is a FIFO"):
        assert token_cache.read(tmp_path / "x.safetensors", 1, False, 9) is None
