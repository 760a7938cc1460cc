"""Cells and tables of a report, from made-up runs: test part, chance, learning rates, and back from a spreadsheet."""

from __future__ import annotations

import csv
import json
import math
import runpy
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from made_runs import TESTED, Made, grid, write_all, write_made
from matplotlib.figure import Figure

import fedtune
from fedtune.errors import FedtuneWarning, UsageError
from fedtune.reports import curves
from fedtune.reports.cells import standard_error, tuned
from fedtune.reports.report import report
from fedtune.reports.settings import settings
from fedtune.reports.spreadsheet import read_cells, spreadsheet
from fedtune.reports.tables import markdown, tables_of
from fedtune.runs.figures import _held

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
RATES = (3e-4, 1e-3, 3e-3)


def summary_with(run: Path, **values: float | None) -> None:
    """Change what a summary says."""
    file = run / "summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def text_of(folder: Path) -> str:
    rounds = fedtune.read_runs(folder)
    return markdown(list(tables_of(fedtune.compare(rounds), tuned(rounds))), {})


def test_the_test_part_stands_beside_the_part_of_the_rounds(tmp_path: Path) -> None:
    write_all(tmp_path, grid(seed=(0, 1, 2), baselines=(True,)))
    for number, accuracy in enumerate((0.5, 0.6, 0.7)):
        told = {"test_accuracy": accuracy, "test_macro_f1": 0.4, "majority_accuracy": 0.2, "local_accuracy": 0.3}
        summary_with(tmp_path / f"000{number}", **told, centralised_accuracy=0.8)
    (cell,) = fedtune.compare(fedtune.read_runs(tmp_path)).to_dict("records")
    assert [cell[f"test.{name}"] for name in ("score", "accuracy_min", "accuracy_max")] == pytest.approx([0.6, 0.5, 0.7])
    assert [cell[f"test.{name}"] for name in ("majority", "local", "centralised")] == pytest.approx([0.2, 0.3, 0.8])
    assert (cell["test.examples"], cell["test.standard_error"]) == (TESTED, pytest.approx((0.6 * 0.4 / TESTED) ** 0.5))
    assert cell["accuracy"] != pytest.approx(0.6)
    text = text_of(tmp_path)
    for said in ("### Test part", "n = 2,000 examples", "The majority class has an accuracy of 0.200", "### Validation part"):
        assert said in text
    head = "| accuracy | standard error | macro-F1 | loss, nats | each client alone: accuracy | centralised: accuracy |"
    assert head in text
    assert "| 0.600 (0.500 to 0.700) | 0.011 | 0.400 (0.400 to 0.400) |" in text


def test_a_run_that_went_on_has_no_test_part_of_fewer_rounds(tmp_path: Path) -> None:
    write_made(tmp_path / "a", Made(rounds=3))
    summary_with(tmp_path / "a", rounds=2)
    assert fedtune.compare(fedtune.read_runs(tmp_path))["test.score"].isna().all()


def test_a_decoder_is_told_by_its_loss_the_less_the_better(tmp_path: Path) -> None:
    write_all(tmp_path, grid(task=("chats",), model=("smollm2",), rate=RATES, seed=(0,), causal=(True,), baselines=(True,)))
    rounds = fedtune.read_runs(tmp_path)
    cells, (best,) = fedtune.compare(rounds), tuned(rounds).to_dict("records")
    assert set(cells.monitor) == {"loss_nats"}
    assert best["score"] == cells.score.min()
    text = text_of(tmp_path)
    assert "| loss, nats | perplexity | token accuracy |" in text
    assert "| accuracy" not in text
    reached = cells.set_index("model.learning_rate").loc[1e-3]
    last = rounds[(rounds.kind == "federated") & (rounds["model.learning_rate"] == 1e-3)]
    there = last[last.score <= reached.baseline / 0.9].groupby("run")["round"].first().mean()
    assert reached.rounds_to_90pct == pytest.approx(there, nan_ok=True)


def test_no_round_is_looked_for_where_the_baseline_is_no_better_than_chance(tmp_path: Path) -> None:
    write_all(tmp_path, grid(seed=(0,), clients=(1, 4), rounds=(3,)))
    for run in tmp_path.iterdir():  # chance is within two standard errors of what one client reaches
        last = json.loads((tmp_path / "0000" / "rounds.jsonl").read_text().splitlines()[-1])["accuracy"]
        summary_with(run, majority_validation_accuracy=last - 1.9 * standard_error(last, TESTED))
    assert fedtune.compare(fedtune.read_runs(tmp_path)).rounds_to_90pct.isna().all()
    for run in tmp_path.iterdir():
        summary_with(run, majority_validation_accuracy=last - 2.2 * standard_error(last, TESTED))
    one = fedtune.compare(fedtune.read_runs(tmp_path)).query("clients == 1")
    assert one.rounds_to_90pct.notna().all()


def test_the_best_rate_of_a_cell_is_chosen_on_the_validation_part_and_its_baselines_alike(tmp_path: Path) -> None:
    write_all(tmp_path, grid(clients=(4, 16), rate=RATES, seed=(0, 1), rounds=(8,), baselines=(True,)))
    for run in tmp_path.iterdir():  # the test part says the opposite, and is not heard
        summary_with(run, test_accuracy=1 - json.loads((run / "summary.json").read_text())["accuracy"])
    rounds = fedtune.read_runs(tmp_path)
    cells, best = fedtune.compare(rounds), tuned(rounds)
    assert best.clients.tolist() == [4, 16]
    for _, row in best.iterrows():
        of_cell = cells[cells.clients == row.clients]
        chosen = of_cell.loc[of_cell.score.idxmax()]
        assert (row["model.learning_rate"], row.score) == (chosen["model.learning_rate"], chosen.score)
        assert row["test.score"] == chosen["test.score"] < of_cell["test.score"].max()
        pooled = of_cell.loc[of_cell.centralised.idxmax()]
        assert row.centralised_rate == f"{pooled['model.learning_rate']:g}"
        assert row["test.centralised"] == pytest.approx(pooled["test.centralised"])
    assert best["model.learning_rate"].tolist() == [1e-3, 3e-4]  # more clients want a lower one here
    assert set(best.centralised_rate) == {"0.001"}  # and the baseline keeps its own
    text = text_of(tmp_path)
    assert "### Best learning rate per cell, chosen on the validation part" in text
    assert text.index("| 0.0003 |") < text.index("### Best learning rate")  # every rate is in the other tables


def test_a_rate_is_not_the_best_because_it_has_the_easier_seeds(tmp_path: Path) -> None:
    write_all(tmp_path / "few", grid(rate=(3e-4,), seed=(0,)))
    write_all(tmp_path / "all", grid(rate=(1e-3,), seed=(0, 1, 2)))
    rounds = fedtune.read_runs(tmp_path)
    rounds.loc[rounds.seed == 0, "score"] += 0.5
    scores = fedtune.compare(rounds).set_index("model.learning_rate").score
    assert scores[3e-4] > scores[1e-3]
    assert tuned(rounds)["model.learning_rate"].tolist() == [1e-3]


def scored(runs: Path, scores: dict[tuple[float, int], float | None]) -> None:
    """Runs by rate and seed, each with a score in all its rounds."""
    for (rate, seed), score in scores.items():
        run = runs / f"{rate}-{seed}"
        write_made(run, Made(rate=rate, seed=seed))
        lines = [json.loads(line) | {"accuracy": score} for line in (run / "rounds.jsonl").read_text().splitlines()]
        (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("diverged", [False, True])
def test_a_rate_that_failed_for_a_seed_is_not_the_best_for_the_seeds_that_it_survived(tmp_path: Path, diverged: bool) -> None:
    scores: dict[tuple[float, int], float | None] = {(1e-3, 0): 0.8, (1e-3, 1): 0.6, (1e-3, 2): 0.7, (3e-3, 0): 0.81}
    scores |= {(3e-3, 1): None, (3e-3, 2): None} if diverged else {}
    scored(tmp_path, scores)
    rounds = fedtune.read_runs(tmp_path)
    (best,) = tuned(rounds).to_dict("records")
    assert (best["model.learning_rate"], best["seeds"], best["score"]) == (1e-3, 3, pytest.approx(0.7))
    assert fedtune.compare(rounds).set_index("model.learning_rate").best_rate.to_dict() == {1e-3: 1.0, 3e-3: 0.0}


def test_rates_with_as_many_seeds_are_compared_on_those_they_have_in_common(tmp_path: Path) -> None:
    scored(tmp_path, {(1e-3, 0): 0.1, (1e-3, 1): 0.6, (3e-3, 1): 0.5, (3e-3, 2): 0.9, (3e-4, 1): 0.9})
    cells = fedtune.compare(fedtune.read_runs(tmp_path))
    assert cells.set_index("model.learning_rate").best_rate.to_dict() == {3e-4: 0.0, 1e-3: 1.0, 3e-3: 0.0}
    (tmp_path / "x.csv").write_text(spreadsheet(cells))
    assert read_cells(tmp_path / "x.csv").best_rate.tolist() == cells.best_rate.tolist()
    (tmp_path / "old.csv").write_text(spreadsheet(cells.drop(columns="best_rate")))  # which says how many seeds, and not which
    assert read_cells(tmp_path / "old.csv").best_rate.tolist() == [0.0, 0.0, 1.0]


def test_a_score_is_that_of_the_last_evaluated_round_also_where_it_is_no_number(tmp_path: Path) -> None:
    write_all(tmp_path, grid(seed=(0, 1, 2), causal=(True,)))
    skipped, diverged, _ = (tmp_path / f"000{number}" / "rounds.jsonl" for number in range(3))
    lines = [json.loads(line) for line in skipped.read_text().splitlines()]
    last = lines[-2]["loss_nats"]
    for name in ("loss_nats", "perplexity", "token_accuracy"):
        del lines[-1][name]  # as check_val_every_n_rounds does
    skipped.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rounds = fedtune.read_runs(tmp_path)
    (cell,) = fedtune.compare(rounds).to_dict("records")
    finals = [last, *rounds[(rounds["round"] == 5) & (rounds.run != "0000")].loss_nats]
    assert (cell["score"], cell["loss_nats_max"]) == (pytest.approx(sum(finals) / 3), max(finals))
    lines = [json.loads(line) for line in diverged.read_text().splitlines()]
    diverged.write_text("".join(json.dumps(line | {"loss_nats": None}) + "\n" for line in lines))
    (cell,) = fedtune.compare(fedtune.read_runs(tmp_path)).to_dict("records")
    assert all(math.isnan(cell[name]) for name in ("score", "loss_nats", "loss_nats_min", "score_max"))
    assert cell["token_accuracy"] > 0


def test_nothing_is_chosen_on_the_test_part(tmp_path: Path) -> None:
    settings_ = ((("loop.evaluate_on", "test"),),)
    write_all(tmp_path, grid(rate=RATES, seed=(0,), settings=settings_))
    assert not len(tuned(fedtune.read_runs(tmp_path)))
    assert "est learning rate" not in text_of(tmp_path)
    assert "### Test part, after the last round" in text_of(tmp_path)


def test_what_only_some_runs_have_is_a_setting_where_nothing_else_tells_them_apart(tmp_path: Path) -> None:
    frozen = (("loop.algorithm.frozen", ["*.lora_A.*"]),)
    write_all(tmp_path / "a", [Made(seed=seed, settings=some) for seed in (0, 1) for some in ((), frozen)])
    rounds = fedtune.read_runs(tmp_path / "a")
    assert settings(rounds) == ["loop.algorithm.frozen"]
    assert fedtune.compare(rounds).seeds.tolist() == [2, 2]
    own = [(("loop.algorithm.aggregator.name", "Mean"),)]
    own += [(("loop.algorithm.aggregator.name", "Krum"), ("loop.algorithm.aggregator.chosen", 2))]
    write_all(tmp_path / "b", [Made(settings=some) for some in own])
    assert settings(fedtune.read_runs(tmp_path / "b")) == ["loop.algorithm.aggregator.name"]  # it tells them apart


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (True, 1), ("1", 1), (True, "True"), (0.1, 0.1 + 1e-12)])
@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_what_differs_in_its_type_alone_is_two_settings(tmp_path: Path, one: object, other: object, seeds: Any) -> None:
    name = "loop.limit_val_batches"
    for value, seed in zip((one, other), seeds, strict=True):
        write_made(tmp_path / repr(value), Made(seed=seed, settings=((name, value),)))
    write_made(tmp_path / "third", Made(seed=1, settings=((name, 7),)))
    cells = fedtune.compare(fedtune.read_runs(tmp_path))
    assert sorted(map(str, cells[name])) == sorted([json.dumps(one), json.dumps(other), "7"])
    assert cells.seeds.tolist() == [1, 1, 1]
    for value in (one, other):
        assert f"| 4 | {json.dumps(value)} |" in text_of(tmp_path)


def test_a_copy_of_a_run_is_no_seed_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_all(tmp_path / "runs", grid(seed=(0, 1), rate=RATES))
    alone = fedtune.compare(fedtune.read_runs(tmp_path / "runs"))
    for name in ("0000", "0003"):
        shutil.copytree(tmp_path / "runs" / name, tmp_path / "runs" / f"{name}-copy")
    with pytest.warns(FedtuneWarning, match=r"a seed counts once: 0000-copy \(as 0000\), 0003-copy \(as 0003\)$"):
        cells = fedtune.compare(fedtune.read_runs(tmp_path / "runs"))
    assert cells.equals(alone)
    report(tmp_path / "runs", tmp_path / "out")
    line = capsys.readouterr().out
    assert line.startswith("6 runs, 2 more left out, as a seed counts once (0000-copy: the settings and the seed of 0000;")
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "| 0003-copy | left out: the settings and the seed of 0003 |" in text
    assert text.count("| 2 |") >= 6  # each row is over two seeds
    assert "| 3 |" not in text


def test_curves_and_the_best_rate_are_over_seeds_and_not_over_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[float]] = []
    monkeypatch.setattr(curves, "save", lambda figure, *_, **__: drawn.append(list(figure.axes[0].lines[0].get_ydata())))
    write_all(tmp_path, grid(seed=(0, 1), rate=(1e-3,)) + grid(seed=(0,), rate=(3e-3,)))
    before = fedtune.read_runs(tmp_path)
    fedtune.plot_grid(before, tmp_path / "x.png")
    for number in range(5):
        shutil.copytree(tmp_path / "0000", tmp_path / f"copy-{number}")
    after = fedtune.read_runs(tmp_path)
    with pytest.warns(FedtuneWarning, match="copy-4"):
        fedtune.plot_grid(after, tmp_path / "x.png")
    with pytest.warns(FedtuneWarning, match="copy-4"):
        assert tuned(after).equals(tuned(before))
    assert drawn[0] == drawn[1]


def test_runs_whose_data_or_model_have_seeds_of_their_own_are_no_copies(tmp_path: Path) -> None:
    write_all(tmp_path, [Made(settings=((f"{part}.seed", seed),)) for part in ("data", "model") for seed in (1, 2)])
    rounds = fedtune.read_runs(tmp_path)
    assert fedtune.compare(rounds).seeds.tolist() == [4]
    assert set(rounds.other_seeds) == {"data 1", "data 2", "model 1", "model 2"}


def test_a_table_has_no_column_that_is_the_same_in_all_its_rows(tmp_path: Path) -> None:
    other = (("loop.algorithm.aggregator.weighting", "uniform"),)
    runs = grid(task=("imdb",), clients=(2, 4), rate=(1e-3,)) + grid(task=("yelp",), rate=RATES, settings=(other,))
    write_all(tmp_path, runs)
    imdb, yelp = text_of(tmp_path).split("\n## ")[1:]
    assert "learning rate" not in imdb
    assert "learning rate" in yelp
    assert "weighting" not in imdb + yelp  # it differs between the tasks alone


def test_content_that_changed_is_a_number_and_what_is_said_of_privacy_is_no_content(tmp_path: Path) -> None:
    def of(seed: int, **content: str) -> Made:
        return Made(seed=seed, settings=tuple((f"content.{name}", value) for name, value in content.items()))

    write_all(tmp_path / "a", [of(0, task="abc"), of(1, task="abc", privacy="epsilon 3"), of(2, task="def")])
    rounds = fedtune.read_runs(tmp_path / "a")
    assert settings(rounds) == ["content.version"]
    assert fedtune.compare(rounds)[["content.version", "seeds"]].to_numpy().tolist() == [[1, 2], [2, 1]]
    assert "| model | split | clients | version |" in text_of(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / "0002")
    assert settings(fedtune.read_runs(tmp_path / "a")) == []


def test_a_report_of_a_run_writes_over_no_file_of_it(tmp_path: Path) -> None:
    write_made(tmp_path / "a", Made(rounds=2))
    for name in ("curves.png", "tables.md"):
        (tmp_path / "a" / name).write_text("mine")
    report(tmp_path / "a")
    assert {(tmp_path / "a" / name).read_text() for name in ("curves.png", "tables.md")} == {"mine"}
    assert (tmp_path / "a" / "report" / "report.html").exists()
    with pytest.raises(UsageError, match=r"--out: got .*a directory that is no run's own"):
        report(tmp_path, tmp_path / "a")


def test_a_spreadsheet_says_the_tables_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_all(tmp_path / "runs", grid(task=("imdb", "yelp"), clients=(1, 4), seed=(0, 1), rounds=(3,), baselines=(True,)))
    report(tmp_path / "runs", tmp_path / "out")
    capsys.readouterr()
    report(tmp_path / "out" / "tables.csv")
    assert capsys.readouterr().out == (tmp_path / "out" / "tables.md").read_text()
    report(tmp_path / "out" / "tables.csv", tmp_path / "again")
    assert (tmp_path / "again" / "tables.md").read_text() == (tmp_path / "out" / "tables.md").read_text()


@pytest.mark.parametrize("content", [None, "", "a,b\n1,2\n", "task,model,split,clients,accuracy\nx,y,z,1,many\n", "\0"])
def test_what_is_no_spreadsheet_of_a_report_is_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "x.csv").write_text(content)
    with pytest.raises(UsageError, match=r"a tables\.csv that a report wrote") as caught:
        report(tmp_path / "x.csv")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("NA", "null"),
        ("1e5", "007"),
        ("nan", "1.0"),
        ("-x", "=1+1"),
        ("'=x", "''"),
        ("'a", "-5"),
        ("a|b\nc", '"q",x'),
        ("True", ""),
    ],
)
def test_names_come_back_from_a_spreadsheet_as_they_were(tmp_path: Path, task: str, model: str) -> None:
    model = model or "\ttab"
    write_made(tmp_path / "runs" / "a", Made(task=task, model=model, settings=(("loop.x", 1), ("loop.y", "@home"))))
    write_made(tmp_path / "runs" / "b", Made(task=task, model=model, settings=(("loop.x", 1.0), ("loop.y", "+7up"))))
    cells = fedtune.compare(fedtune.read_runs(tmp_path / "runs"))
    (tmp_path / "x.csv").write_bytes(spreadsheet(cells).encode())
    back = read_cells(tmp_path / "x.csv")
    named = ["task", "model", "split", "clients", "loop.x", "loop.y"]
    assert back[named].to_numpy().tolist() == cells[named].to_numpy().tolist()
    assert markdown(list(tables_of(back, back[:0])), {}) == markdown(list(tables_of(cells, cells[:0])), {})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seeds", "x", "its seeds is 'x', where a whole number belongs"),
        ("seeds", "1.5", "its seeds is '1.5', where a whole number belongs"),
        ("seeds", "inf", "its seeds is 'inf', where a whole number belongs"),
        ("seeds", "0", "its seeds is '0', where a whole number belongs"),
        ("rounds", "many", "its rounds is 'many', where a whole number belongs"),
        ("clients", "many", "its clients is 'many', where a whole number belongs"),
        ("clients", "", "its clients is '', where a whole number belongs"),
        ("mode", "maximum", "its mode is 'maximum', where max or min belongs"),
        ("accuracy", "nan", "its accuracy is 'nan', where a number belongs"),
        ("monitor", "7", None),
        ("rounds", "", None),
        ("seeds", "9000000000", None),
        ("part", "3", None),
    ],
)
def test_every_column_of_a_spreadsheet_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, value: str, said: str | None
) -> None:
    write_all(tmp_path / "runs", grid(rate=RATES, seed=(0, 1)))
    rows = list(csv.DictReader(spreadsheet(fedtune.compare(fedtune.read_runs(tmp_path / "runs"))).splitlines()))
    with open(tmp_path / "x.csv", "w", newline="") as file:
        table = csv.DictWriter(file, [column for column in rows[0] if column != "best_rate"], extrasaction="ignore")
        table.writeheader()
        table.writerows(row | {name: value} for row in rows)
    if said is None:
        report(tmp_path / "x.csv")
        assert "### Validation part" in capsys.readouterr().out or name == "part"
        return
    with pytest.raises(UsageError, match=rf"a tables\.csv that a report wrote \({said}\)$"):
        report(tmp_path / "x.csv")


SHIPPED = sorted(EXPERIMENTS.glob("*/*.csv"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_the_tables_of_an_experiment_are_those_that_its_command_prints(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(file)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    readme = (file.parent / "README.md").read_text()
    command = f"fedtune report {file.relative_to(EXPERIMENTS.parent)}"
    assert command in readme
    told = [line for line in readme.splitlines() if line.startswith("| ")]
    assert len(printed) > 2
    assert set(printed) <= set(told)


def test_the_pictures_of_the_first_results_show_what_their_spreadsheets_say(monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(EXPERIMENTS / "first_results" / "draw.py"))
    drawn: list[Figure] = []
    monkeypatch.setitem(script["draw"].__globals__, "save", lambda figure, *_, **__: drawn.append(figure))
    for name in ("spooky", "authors"):
        file = EXPERIMENTS / "first_results" / f"{name}.csv"
        script["draw"](file, Path())
        cells, figure = read_cells(file), drawn.pop()
        for panel, split in zip(figure.axes, ("iid", "by_author 1.0"), strict=True):
            for model, line in ((line.get_label(), line) for line in panel.lines[:-1]):
                here = cells[(cells.model == model) & ((cells.split == split) | (cells.clients == 1))].sort_values("clients")
                assert line.get_ydata().tolist() == here["test.accuracy"].tolist()
                assert line.get_xdata() == pytest.approx(here.clients.to_numpy(), rel=0.07)
        assert len(figure.axes[0].lines) == 3


def test_the_picture_of_privacy_shows_what_its_spreadsheet_says(monkeypatch: pytest.MonkeyPatch) -> None:
    script = runpy.run_path(str(EXPERIMENTS / "privacy" / "picture.py"))
    drawn: list[Figure] = []
    monkeypatch.setitem(script["draw"].__globals__, "save", lambda figure, *_, **__: drawn.append(figure))
    file = EXPERIMENTS / "privacy" / "authors.csv"
    script["draw"](file, Path())
    cells, (panel,) = script["tuned"](read_cells(file)), drawn.pop().axes
    assert len(cells) == 2 * (len(script["SETTINGS"]) + 1)  # a rate for each algorithm and setting
    assert [line.get_label() for line in panel.lines[:-1]] == ["FFA-LoRA", "LoRA (FedIT)"]
    for line in panel.lines[:-1]:
        here = cells[cells.algorithm == line.get_label()]
        assert here.place.tolist() == list(range(len(here)))
        assert line.get_ydata().tolist() == here["test.accuracy"].tolist()


def test_made_up_runs_are_read_as_real_ones(tmp_path: Path) -> None:
    write_all(tmp_path, grid(clients=(1, 2), seed=(0, 1)))
    shutil.rmtree(tmp_path / "0000")
    rounds = fedtune.read_runs(tmp_path)
    assert rounds.run.nunique() == 3
    assert rounds.complete.all()


@pytest.mark.parametrize(("clients", "authors"), [(8, 16), (100, 40), (100, 5000)])
def test_no_colour_of_a_split_means_two_things_and_no_text_is_left_out(clients: int, authors: int) -> None:
    held = [Counter(f"author {(client * 7 + text * text) % authors}" for text in range(300)) for client in range(clients)]
    rows, colours, _ = _held(held)
    assert len(set(colours.values())) == len(colours) <= 20
    assert {name for row in rows for name in row} <= set(colours)
    assert [row.total() for row in rows] == [300] * clients
