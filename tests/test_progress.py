"""What is said of a run while it goes on, and how tasks, records, histories and splits show themselves."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from conftest import make_loop, make_task
from decoders import make_chats
from nbclient import NotebookClient
from rich.console import Console
from rich.table import Table
from test_lightning import Net, Three

from fedtune.federated.messages import ClientReport
from fedtune.runs.displays import Terminal, new_console
from fedtune.runs.forecast import Forecast, Plan
from fedtune.runs.progress import Progress
from fedtune.storage.history import History
from fedtune.storage.records import RoundRecord

Make = Callable[..., Any]
LEFT = re.compile(r"  (\d+) s left in all$")


def test_progress_says_where_the_run_stands(make_data: Make, make_module: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make_loop(progress=True).fit(make_module(), make_data())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["federated round 1/2", "federated round 2/2"]
    assert all("accuracy 0." in line and "train_loss_nats" in line for line in lines)
    make_loop(progress=False).fit(make_module(), make_data())
    assert capsys.readouterr().out == ""


def test_in_a_pipe_baselines_are_announced_and_every_line_has_the_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = make_loop(max_rounds=3, progress=True, baselines=("centralised", "local"), run_dir=str(tmp_path))
    loop.fit(Net(), Three())
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("federated: 3 rounds of 3 clients; then the baselines: centralised (3 rounds ")
    assert first.endswith("local (3 clients, each alone)")
    assert len(lines) == 9
    assert all(LEFT.search(line) for line in lines[:-1])
    assert not LEFT.search(lines[-1])
    loop.fit(Net(), Three())
    assert [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        "federated: 3 of 3 rounds were done before",
        "centralised: 3 of 3 rounds were done before",
        "local: 3 of 3 clients were done before",
    ]


def record(number: int, seconds: float, evaluate: float = 2.0, clients: int = 4) -> RoundRecord:
    """A round of clients that take so many seconds each."""
    reports = [ClientReport(client, 10, 5, 100, 1.0, seconds) for client in range(clients)]
    times = {"seconds": clients * seconds + evaluate, "seconds_train": clients * seconds, "seconds_evaluate": evaluate}
    counts = {"num_clients": clients, "num_examples": 40, "num_steps": 20, "num_tokens": 400, "bytes_up": 1, "bytes_down": 1}
    rest: dict[str, Any] = {"seconds_aggregate": 0.0, "mean_update_norm": 1.0, "update_cosine": None, "drift": {}}
    return RoundRecord(number, {"accuracy": 0.5}, 1.0, **counts, **times, **rest, clients=reports)


def test_the_time_left_is_that_of_rounds_and_baselines() -> None:
    now = [0.0]
    forecast = Forecast(Plan(5, 4, 8, ("centralised", "local"), alone=6), clock=lambda: now[0])
    forecast.begin("federated", 20)
    assert forecast.left() is None
    for client in (1, 2, 3, 4):
        now[0] = 3.0 * client
        forecast.reached(client)
    now[0] = 14.0
    forecast.learn([record(1, 3.0)])
    forecast.reached(4)
    rounds, pooled, alone = 4 * 14.0, 5 * 14.0, 6 * (2.5 * 3.0 + 2.0)  # a client is in 2.5 of 5 rounds
    assert forecast.left() == pytest.approx(rounds + pooled + alone)
    now[0] = 16.0
    assert forecast.left() == pytest.approx(rounds + pooled + alone - 2.0)
    now[0] = 70.0
    forecast.reached(20)
    forecast.end()
    assert forecast.left() == pytest.approx(pooled + alone)
    forecast.begin("centralised", 5)
    now[0] = 71.0
    assert forecast.left() == pytest.approx(pooled + alone - 1.0)
    now[0] = 80.0
    forecast.reached(1)
    assert forecast.left() == pytest.approx(4 * 10.0 + alone)  # it is faster than it was thought
    forecast.end()
    forecast.begin("local", 6)
    forecast.resumed(6)
    assert forecast.left() == 0.0


def test_clients_that_several_processes_share_are_alone_at_the_same_time() -> None:
    one, two = (Forecast(Plan(5, 4, 4, ("local",), alone=4, processes=count)) for count in (1, 2))
    for forecast in (one, two):
        forecast.learn([record(1, 3.0)])
    assert one.left() == 2 * (two.left() or 0.0) > 0.0


def test_a_long_round_is_not_silent_where_there_is_no_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(True)
    progress.plan(Plan(2, 4, 4))
    monkeypatch.setattr(progress._forecast, "clock", lambda: now[0])
    report = ClientReport(0, 10, 5, 100, 1.0, 40.0)
    with progress.phase("federated", 2, 4):
        for _ in range(3):
            now[0] += 40.0
            progress.client(report)
    assert capsys.readouterr().out == "federated: round 1/2, client 0, 10 steps  4 min 0 s left in all\n"


def test_a_bar_on_a_terminal_has_the_time_left_of_the_whole_run() -> None:
    out = io.StringIO()
    terminal = Terminal(Console(file=out, force_terminal=True, width=120))
    terminal.show("federated [1]", 1, 4, 75.0)
    terminal.line("a round [x]")
    terminal.show("federated [1]", 2, 4, 75.0)
    terminal.clear()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "federated [1]" in text
    assert "2/4" in text
    assert re.search(r"1 min 1[45] s left in all", text)
    assert "a round [x]" in text


NOTEBOOK = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {tests!r})
from conftest import make_loop
from test_lightning import Net, Three
loop = make_loop(max_rounds=30, progress=True, baselines=("local",))
history = loop.fit(Net(), Three())
"""


@pytest.mark.filterwarnings("ignore")  # jupyter's own
def test_a_notebook_has_one_display_of_a_run_and_tables_of_histories_and_splits(tmp_path: Path) -> None:
    cells = [NOTEBOOK.format(tests=str(Path(__file__).parent)), "history"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown, table = (cell.outputs for cell in notebook.cells)
    (display,) = [one for one in shown if one.output_type != "stream"]
    page = display["data"]["text/html"]
    assert "federated round 30/30" in page
    assert "local client 2" in page
    assert "lines before" in page  # not all of them
    assert "<progress" not in page  # it is over
    assert not any("federated round" in one.get("text", "") for one in shown)
    (found,) = table
    assert found["data"]["text/html"].count("<tr>") == 31


def test_tables_are_as_wide_as_they_are_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", "value")
    table.add_row("x" * 300, "y" * 300)
    new_console().print(table)
    assert "x" * 300 in capsys.readouterr().out


def test_a_task_says_what_it_is_in_a_line() -> None:
    said = repr(make_task())
    assert said == "TextTask('tiny': 144 texts, train 100, validation 22, test 22, 3 labels, 6 authors)"
    assert repr(make_chats()) == "InstructionTask('chats': 60 conversations, train 42, validation 9, test 9, 3 authors)"


def test_records_and_loops_say_what_they_are_in_a_line() -> None:
    loop = make_loop(max_rounds=2, baselines=("centralised",))
    history = loop.fit(Net(), Three())
    assert re.fullmatch(r"RoundRecord\(round=2, accuracy=1, loss_nats=0\.\d+, .*, 3 clients, 36 examples\)", repr(history[-1]))
    assert len(repr(loop)) < 2000
    assert "RoundRecord" not in repr(loop)


def test_a_history_is_a_list_that_shows_itself_as_a_table() -> None:
    history = make_loop(max_rounds=3).fit(Net(), Three())
    assert isinstance(history, History)
    assert history == list(history)
    lines = repr(history).splitlines()
    assert lines[0].split()[:3] == ["round", "accuracy", "loss_nats"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3"]
    assert repr(history[1:]).splitlines() == [lines[0], *lines[2:]]
    assert repr(History()) == "[]"
    many = History(record(number, 1.0) for number in range(1, 101))
    assert [line.split()[0] for line in repr(many).splitlines()[9:13]] == ["9", "10", "…", "91"]
    assert "… 80 more" in repr(many)


def test_a_split_is_a_list_that_shows_itself_as_a_table(make_data: Make) -> None:
    table = make_data().describe()
    assert [line.split()[0] for line in repr(table).splitlines()] == ["client", "0", "1", "2"]
    assert pd.DataFrame(table)["examples"].sum() == 100
    row = {"client": 0, "labels": {"<b>": 2, "a": 1, "c": 3}}
    assert "<td>3: c 3, &lt;b&gt; 2</td>" in type(table)([row])._repr_html_()
