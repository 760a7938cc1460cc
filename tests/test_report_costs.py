"""What a score costs in bytes: columns of cells, and the picture that reports have where cells send differently many."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_runs import Made, write_all
from matplotlib.figure import Figure

import fedtune
from fedtune.reports import costs
from fedtune.reports.cells import compare, tuned
from fedtune.reports.report import report
from fedtune.reports.results import read_runs

UP = "loop.algorithm.up"
CHANNELS = {45_000_000: [], 1_400_000: [{"name": "Sign", "feedback": True}], 900_000: [{"name": "TopK", "share": 0.01}]}
RATES = (3e-4, 1e-3, 3e-3)  # the middle one is the best


def runs(task: str = "imdb", rates: tuple[float, ...] = RATES, models: tuple[str, ...] = ("bert",)) -> list[Made]:
    """A sweep over channels, rates and seeds."""
    return [
        Made(task=task, model=model, seed=seed, rate=rate, settings=((UP, stages),), bytes_up=size)
        for model in models
        for size, stages in CHANNELS.items()
        for rate in rates
        for seed in range(3)
    ]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are made."""
    found: list[Figure] = []

    def kept(*values: Any, usual: Any = costs.new_figure, **more: Any) -> Any:
        figure, axes = usual(*values, **more)
        found.append(figure)
        return figure, axes

    monkeypatch.setattr(costs, "new_figure", kept)
    return found


def test_cells_have_the_bytes_of_a_client_and_round_in_each_direction(tmp_path: Path) -> None:
    write_all(tmp_path, runs(rates=(1e-3,)))
    cells = compare(read_runs(tmp_path))
    assert sorted(cells.bytes_up) == sorted(CHANNELS)
    assert set(cells.bytes_down) == {45_000_000}
    megabytes = cells.rounds * cells.clients * (cells.bytes_up + cells.bytes_down) / 1e6
    assert list(cells.megabytes) == pytest.approx(list(megabytes))


def test_a_point_is_the_best_rate_of_a_channel_with_the_range_over_seeds(tmp_path: Path, drawn: list[Figure]) -> None:
    write_all(tmp_path, runs())
    report(tmp_path, tmp_path / "out")
    cells = compare(read_runs(tmp_path))
    best = cells.loc[cells.groupby(UP).score.idxmax()]
    assert len(best) == len(CHANNELS) < len(cells)
    (panel,) = drawn[0].axes
    points = list(panel.get_lines())
    found = {float(line.get_xdata()[0]): float(line.get_ydata()[0]) for line in points}  # type: ignore[index, arg-type]
    assert found == dict(zip(best.bytes_up, best["test.score"], strict=True))
    bars = {tuple(map(tuple, bar.get_segments()[0])) for bar in panel.collections}  # type: ignore[attr-defined]
    ranges = zip(best.bytes_up, best["test.score_min"], best["test.score_max"], strict=True)
    assert bars == {((x, low), (x, high)) for x, low, high in ranges}
    assert panel.get_xscale() == "log"
    names = {line.get_label() for line in points}
    assert names == {"up none", "up Sign(feedback True)", "up TopK(share 0.01)"}
    for suffix in (".png", ".svg"):
        assert (tmp_path / "out" / f"bytes{suffix}").stat().st_size > 1000


def test_a_point_is_that_of_the_table_of_best_rates(tmp_path: Path, drawn: list[Figure]) -> None:
    few = [one for one in runs() if one.rate != 1e-3 or one.seed == 2]  # the best rate has one seed left
    write_all(tmp_path, few)
    rounds = read_runs(tmp_path)
    costs.plot_costs(compare(rounds), tmp_path / "bytes.png")
    best = tuned(rounds)
    assert set(best.seeds) == {3}
    found = {tuple(line.get_xydata()[0]) for line in drawn[0].axes[0].get_lines()}  # type: ignore[index]
    assert found == set(zip(best.bytes_up, best["test.score"], strict=True))


def test_a_spreadsheet_is_drawn_as_the_runs_are(tmp_path: Path, drawn: list[Figure]) -> None:
    write_all(tmp_path / "runs", runs())
    report(tmp_path / "runs", tmp_path / "out")
    report(tmp_path / "out" / "tables.csv", tmp_path / "again")
    first, second = ([(line.get_label(), *line.get_xydata()[0]) for line in one.axes[0].get_lines()] for one in drawn)  # type: ignore[misc]
    assert [one[0] for one in first] == [one[0] for one in second]
    assert [value for one in first for value in one[1:]] == pytest.approx([value for one in second for value in one[1:]])
    assert (tmp_path / "again" / "bytes.png").exists()


def test_there_is_no_picture_where_clients_of_a_panel_send_equally_much(tmp_path: Path, drawn: list[Figure]) -> None:
    same = [Made(task="imdb", model="bert", rate=rate, bytes_up=8_000) for rate in RATES]
    other = [Made(task="imdb", model="albert", rate=rate, bytes_up=1_000) for rate in RATES]  # another model, another panel
    write_all(tmp_path, same + other)
    report(tmp_path, tmp_path / "out")
    assert not drawn
    assert not list((tmp_path / "out").glob("bytes*"))


def test_each_task_has_its_picture_and_each_model_its_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    alone = [Made(task="agnews", rate=rate) for rate in RATES]
    write_all(tmp_path, runs(models=("bert", "albert")) + runs("yelp", rates=(1e-3,)) + alone)
    cells = fedtune.compare(fedtune.read_runs(tmp_path))
    assert [path.name for path in costs.plot_costs(cells, tmp_path / "bytes.png")] == ["bytes-imdb.png", "bytes-yelp.png"]
    titles = [[axes.get_title() for axes in figure.axes if axes.get_visible()] for figure in drawn]
    assert titles == [["albert, iid, 4 clients", "bert, iid, 4 clients"], ["bert, iid, 4 clients"]]
    colours = [{line.get_label(): line.get_color() for line in axes.get_lines()} for axes in drawn[0].axes]
    assert len(colours[0]) == len(CHANNELS)
    assert colours[0] == colours[1]  # a channel has one in all panels


def test_nothing_is_chosen_on_the_test_part(tmp_path: Path, drawn: list[Figure]) -> None:
    given = [replace(one, settings=(*one.settings, ("loop.evaluate_on", "test"))) for one in runs()]
    write_all(tmp_path, given)
    costs.plot_costs(compare(read_runs(tmp_path)), tmp_path / "bytes.png")
    points = list(drawn[0].axes[0].get_lines())
    assert len(points) == len(CHANNELS) * len(RATES)
    assert all("learning rate" in str(line.get_label()) for line in points)
