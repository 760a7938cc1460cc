"""The report, from records whose numbers are known."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import make_loop

import fedtune
from fedtune.errors import UsageError
from fedtune.federated.messages import ClientReport
from fedtune.reports.curves import plot_grid
from fedtune.reports.folders import failures
from fedtune.reports.report import FILES, report
from fedtune.reports.results import column_of, metric_names
from fedtune.reports.settings import settings
from fedtune.runs.figures import plot_curves, plot_run, plot_split
from fedtune.storage.records import read_rounds


def write_run(folder: Path, accuracies: list[float], **about: Any) -> None:
    """A run directory as `FederatedLoop` leaves it."""
    about = {"task": "spooky", "model": "minilm", "split": "iid", "clients": 1, "seed": 0, "rate": 0.1} | about
    config: dict[str, Any] = {
        "model": {"name": about["model"], "learning_rate": about["rate"], "seed": about["seed"]},
        "data": {"task": about["task"], "num_clients": about["clients"], "split": about["split"], "skew": 0.8, "alpha": 0.5},
        "loop": {"seed": about["seed"], "max_rounds": len(accuracies), "options": {"keep": 2}},
        "versions": {"torch": "2"},
    }
    config["loop"]["max_rounds"] = about.get("asked", len(accuracies))
    if "baseline" in about:
        del config["loop"]["max_rounds"]
        del config["data"]["num_clients"], config["data"]["split"], config["data"]["skew"], config["data"]["alpha"]
        config["baseline"] = {"name": about["baseline"], "examples": [10] * len(accuracies)}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    client = ClientReport(0, 10, 1, 100, 1.0, 0.1)
    times = {"seconds": 2.0, "seconds_train": 1.0, "seconds_aggregate": 0.1, "seconds_evaluate": 0.9}
    counts = {"num_clients": 1, "num_examples": 10, "num_steps": 1, "num_tokens": 100}
    traffic = {
        "bytes_up": 3_000_000,
        "bytes_down": 1_000_000,
        "mean_update_norm": 1.0,
        "update_cosine": None,
        "drift": {"a": 0.1},
    }
    spread = {"clients": [client], "client_accuracy": [0.1, 0.3, None]}
    with open(folder / "rounds.jsonl", "w") as file:
        for number, accuracy in enumerate(accuracies, start=1):
            metrics = {"accuracy": accuracy, "loss_nats": 1 - accuracy}
            record = fedtune.RoundRecord(number, metrics, 0.5, **counts, **times, **traffic, **spread)
            file.write(json.dumps(record.to_dict()) + "\n")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """One client and four clients, two seeds; a run of another task with a centralised baseline; a failed one."""
    folder = tmp_path / "runs"
    write_run(folder / "a0", [0.5, 0.8], seed=0)
    write_run(folder / "a1", [0.6, 0.6], seed=1)
    write_run(folder / "b0", [0.7, 0.76], seed=0, clients=4, split="by_author")
    write_run(folder / "b1", [0.6, 0.5], seed=1, clients=4, split="by_author")
    write_run(folder / "c", [0.1, 0.2], task="authors", clients=2)
    write_run(folder / "baselines" / "centralised-1", [0.3, 0.4], task="authors", baseline="centralised")
    (folder / "d").mkdir()
    (folder / "d" / "status.json").write_text(json.dumps({"state": "failed", "error": "no <model> | of that name"}))
    return folder


def test_mean_range_and_rounds_to_the_baseline_of_the_same_seed(runs: Path) -> None:
    table = fedtune.compare(fedtune.read_runs(runs)).set_index(["task", "clients"])
    four = table.loc[("spooky", 4)]
    assert four["split"] == "by_author 0.8"
    assert (four["seeds"], four["rounds"]) == (2, 2)
    assert [four[name] for name in ("accuracy", "accuracy_min", "accuracy_max")] == pytest.approx([0.63, 0.5, 0.76])
    assert four["baseline"] == pytest.approx(0.7)
    assert four["rounds_to_90pct"] == pytest.approx(1.5)  # 0.72 of 0.8 in round 2, 0.54 of 0.6 in round 1
    assert four["rounds_to_95pct"] == pytest.approx(1.5)
    assert four["rounds_to_99pct"] != four["rounds_to_99pct"]  # seed 0 does not get to 0.792
    assert (four["client_min"], four["client_max"]) == (0.1, 0.3)
    assert (four["megabytes"], four["seconds"]) == (8, 4)


def test_without_a_run_of_one_client_the_centralised_baseline_counts(runs: Path) -> None:
    table = fedtune.compare(fedtune.read_runs(runs)).set_index(["task", "clients"])
    assert table.loc[("authors", 2)]["baseline"] == 0.4
    assert ("authors", 1) not in table.index  # a baseline is no result


def test_values_in_which_runs_differ_are_columns_and_no_means_are_taken_over_them(runs: Path) -> None:
    assert settings(fedtune.read_runs(runs)) == []
    write_run(runs / "e", [0.9, 0.9], clients=4, split="by_author", rate=0.5)
    rounds = fedtune.read_runs(runs)
    assert settings(rounds) == ["model.learning_rate"]
    four = fedtune.compare(rounds).query("task == 'spooky' and clients == 4")
    assert four["model.learning_rate"].tolist() == [0.1, 0.5]
    assert four["seeds"].tolist() == [2, 1]
    assert four["baseline"].isna().tolist() == [False, True]  # a baseline has the same learning rate


def test_the_baseline_has_the_same_split_where_there_is_one(tmp_path: Path) -> None:
    for split, accuracy in (("hilmkil_iid", 0.9), ("hilmkil_sorted", 0.3)):
        write_run(tmp_path / f"1-{split}", [accuracy], split=split)
        write_run(tmp_path / f"4-{split}", [accuracy / 2], split=split, clients=4)
    table = fedtune.compare(fedtune.read_runs(tmp_path)).set_index(["split", "clients"])
    assert table.loc[("hilmkil_iid", 4)]["baseline"] == 0.9
    assert table.loc[("hilmkil_sorted", 4)]["baseline"] == 0.3


def test_a_run_without_all_its_rounds_is_no_result(runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write_run(runs / "b2", [0.1], seed=2, clients=4, split="by_author", asked=3)
    assert fedtune.compare(fedtune.read_runs(runs)).query("task == 'spooky' and clients == 4")["seeds"].sum() == 2
    report(runs, tmp_path / "out")
    assert "6 runs, 1 unfinished and not in the tables, 1 failed" in capsys.readouterr().out
    (runs / "b2" / "summary.json").write_text('{"rounds": 1}')  # a callback stopped it
    assert fedtune.compare(fedtune.read_runs(runs)).query("task == 'spooky' and clients == 4")["seeds"].sum() == 3


def test_a_centralised_baseline_counts_for_runs_of_any_length(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [0.1, 0.2], clients=2)
    write_run(tmp_path / "b", [0.1, 0.2, 0.3], clients=2, seed=1)
    write_run(tmp_path / "c", [0.3, 0.4], baseline="centralised")
    table = fedtune.compare(fedtune.read_runs(tmp_path))
    assert settings(table) == ["loop.max_rounds"]
    assert table["baseline"].tolist()[0] == 0.4


def test_runs_of_other_modules_and_data_are_reported_too(tmp_path: Path, make_module: Any) -> None:
    from conftest import make_loop
    from pytorch_lightning.demos.boring_classes import BoringModel, RandomDataset
    from test_loop import GivenLoaders
    from torch.utils.data import DataLoader

    loader = DataLoader(RandomDataset(32, 8), batch_size=4)
    make_loop(run_dir=str(tmp_path / "runs" / "boring")).fit(BoringModel(), GivenLoaders([loader, loader], loader))
    report(tmp_path / "runs", tmp_path / "out")
    assert "| BoringModel | 2 | 1 | 2 | 2.11 kB |" in (tmp_path / "out" / "tables.md").read_text()


def with_metric(folder: Path, name: str, values: list[float | None], monitored: bool = False) -> None:
    """Give the rounds of a run another metric."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for line, value in zip(lines, values, strict=True):
        line[name] = value
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if monitored:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["loop"] |= {"monitor": name, "mode": "min"}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))


COLUMNS = ["seed", "score", "mode", "task", "model", "monitor", "split", "run", "kind", "complete", "client_min", "seeds"]
COLUMNS += ["rounds", "baseline", "accuracy_max", "megabytes", "loop.seed", "model.learning_rate", "content.digest", "metric.x"]
ORDINARY = ["val.acc", "a.b.c", "val/acc", "x$_{", "_x", "", "漢字", "</script><script>alert(1)</script>", "a|b"]


@pytest.mark.parametrize("name", [*COLUMNS, *ORDINARY])
def test_no_name_of_a_metric_changes_what_else_is_known(runs: Path, tmp_path: Path, name: str) -> None:
    before = fedtune.read_runs(runs)
    table = fedtune.compare(before)
    for run in ("a0", "a1", "b0", "b1", "c", "baselines/centralised-1"):
        with_metric(runs / run, name, [7.0, None])
    rounds = fedtune.read_runs(runs)
    column = column_of(name)
    assert (column == name) == (name in ORDINARY or name in ("seeds", "rounds", "baseline", "accuracy_max", "megabytes"))
    assert rounds[before.columns].equals(before)
    assert settings(rounds) == []
    assert column in metric_names(rounds)
    assert rounds[column].dropna().eq(7).sum() == 6
    assert fedtune.compare(rounds).equals(table)
    report(runs, tmp_path / "out")
    assert "<script>alert(1)" not in (tmp_path / "out" / "report.html").read_text()
    plot_grid(rounds, tmp_path / "x.png", column)


@pytest.mark.parametrize("name", ["seed", "mode", "val.acc", "loop.seed", "a$b^$"])
def test_a_metric_of_any_name_is_monitored(runs: Path, tmp_path: Path, name: str) -> None:
    for run, values in (("a0", [0.5, 0.25]), ("a1", [0.5, 0.75]), ("b0", [2.0, 0.125]), ("b1", [None, 0.75])):
        with_metric(runs / run, name, values, monitored=True)
    table = fedtune.compare(fedtune.read_runs(runs)).set_index(["task", "clients"])
    four = table.loc[("spooky", 4)]
    assert [four[one] for one in ("monitor", "score", "score_min", "baseline", "seeds")] == [name, 0.4375, 0.125, 0.5, 2]
    assert four["rounds_to_90pct"] == 2
    report(runs, tmp_path / "out")


def test_rounds_that_are_not_evaluated_are_left_out_of_tables_and_curves(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / "runs" / str(seed), [0.1, 0.5, 0.2], clients=2, seed=seed)
        file = tmp_path / "runs" / str(seed) / "rounds.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in (lines[0], lines[2]):
            del line["accuracy"], line["loss_nats"]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = fedtune.compare(fedtune.read_runs(tmp_path)).to_dict("records")
    assert (row["accuracy"], row["loss_nats"], row["rounds"]) == (0.5, 0.5, 3)
    report(tmp_path / "runs", tmp_path / "out")


def test_settings_of_other_classes_name_runs_whatever_their_type(tmp_path: Path) -> None:
    for number, split in enumerate((0.8, [1, 2], None)):
        write_run(tmp_path / "runs" / str(number), [0.1], clients=2, split=split, task={"a": 1} if number else 3)
    table = fedtune.compare(fedtune.read_runs(tmp_path))
    assert set(table["split"]) == {"0.8", "[1, 2]", "–"}
    report(tmp_path / "runs", tmp_path / "out")


def test_baselines_alone_are_no_report(tmp_path: Path) -> None:
    write_run(tmp_path / "centralised-1", [0.3, 0.4], baseline="centralised")
    with pytest.raises(UsageError, match="a directory with federated runs in it"):
        report(tmp_path, tmp_path / "out")


def test_names_are_drawn_as_they_are(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run_$x_$ {^ 漢字"
    shutil.copytree(runs / "a0", folder)
    with_metric(folder, "$_{^", [0.5, 0.5])
    history = read_rounds(folder / "rounds.jsonl")
    plot_run(folder, history, {"centralised": history}, "validation", "$_{^")
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    many = {f"_{number}$": history for number in range(10)}
    with pytest.MonkeyPatch.context() as patch:
        drawn: list[Any] = []
        patch.setattr("fedtune.runs.figures.save", lambda figure, path, dpi=0: drawn.append(figure))
        plot_curves(many, "x.png", {"$a_": 0.1, "_b": 0.2, "c": 0.3})
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == [*many, "$a_ (0.10)", "_b (0.20)", "c (0.30)"]  # nothing is left out
    plot_curves(many, tmp_path / "x.svg", {"$a_": 0.1}, "$\\frac{", "accuracy")
    plot_curves({}, tmp_path / "none.png", title="\udcff")
    plot_split([{"labels": {"$a_{": 3, "_b": 1, "漢字": 2}}], tmp_path / "split.png", "$^{")
    write_run(runs / "odd", [0.5], task="$_{", model="漢$", clients=3, split="$^")
    for suffix in ("png", "svg"):
        plot_grid(fedtune.read_runs(runs), tmp_path / f"grid.{suffix}")


def test_the_report_holds_every_run_and_every_failure(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(runs, tmp_path / "out")
    written = [f"curves-{task}.{suffix}" for task in ("spooky", "authors") for suffix in ("png", "svg")]
    written += [name for name in FILES if not name.startswith("curves")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(written)
    text = (tmp_path / "out" / "tables.md").read_text()
    row = "| minilm | by_author 0.8 | 4 | 2 | 2 | 0.630 (0.500 to 0.760) | 0.370 (0.240 to 0.500) | 0.700 | 1.5 | 1.5 | – |"
    assert f"{row} 0.100 to 0.300 | 8.00 MB | 4 |" in text
    assert "| d | no \\<model\\> \\| of that name |" in text
    assert len((tmp_path / "out" / "tables.csv").read_text().splitlines()) == 4
    assert "5 runs, 1 failed" in capsys.readouterr().out
    assert failures(runs) == {"d": "no <model> | of that name"}


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a directory with runs in it"):
        report(tmp_path, tmp_path)


def test_a_picture_for_every_task_and_a_panel_for_every_model_and_split(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("fedtune.reports.curves.save", lambda figure, path, dpi: drawn.append(figure))
    write_run(runs / "f", [0.3, 0.4], clients=4)
    paths = plot_grid(fedtune.read_runs(runs), tmp_path / "x.png")
    assert [path.name for path in paths] == ["x-spooky.png", "x-authors.png"]
    assert [axes.get_title() for axes in drawn[0].axes] == ["iid", "by_author 0.8"]
    assert drawn[0].get_suptitle() == "spooky, minilm, 4 clients: validation part"
    lines = {line.get_label(): line for line in drawn[0].axes[1].get_lines()}
    assert lines["federated"].get_ydata().tolist() == pytest.approx([0.65, 0.63])
    assert lines["one client"].get_ydata().tolist() == pytest.approx([0.55, 0.7])
    assert drawn[0].axes[0].get_ylim() == drawn[0].axes[1].get_ylim()
    (pooled,) = [line for line in drawn[1].axes[0].get_lines() if line.get_label() == "centralised"]
    assert pooled.get_ydata().tolist() == pytest.approx([0.3, 0.4])
    assert (pooled.get_color(), pooled.is_dashed()) != (lines["one client"].get_color(), lines["one client"].is_dashed())
    write_run(runs / "e", [0.9, 0.9], clients=4, split="by_author", rate=0.5)
    plot_grid(fedtune.read_runs(runs), tmp_path / "x.png")
    names = [line.get_label() for line in drawn[2].axes[1].get_lines()]
    assert names == ["learning rate 0.1", "learning rate 0.5", "one client, learning rate 0.1"]  # never a mean over settings


def test_one_round_has_one_tick_and_settings_are_shown_as_they_were_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("fedtune.reports.curves.save", lambda figure, path, dpi=0: drawn.append(figure))
    write_run(tmp_path / "a", [0.5], clients=4, rate=0.1)
    write_run(tmp_path / "b", [0.6], clients=4, rate=None)
    rounds = fedtune.read_runs(tmp_path)
    plot_grid(rounds, "x.png")
    for axes in drawn[0].axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]
    assert [line.get_label() for line in drawn[0].axes[0].get_lines()] == ["learning rate 0.1", "federated"]
    report(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "| minilm | iid | 4 | 0.1 | 1 |" in text
    assert "| minilm | iid | 4 | – | 1 |" in text


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "~nobody-has-this", "none"])
def test_a_folder_that_is_not_there_is_named_in_one_line(runs: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="a directory with"):
        report(Path(name), tmp_path)
    if name not in ("none", "~nobody-has-this"):
        with pytest.raises(UsageError, match="--out: got"):
            report(runs, tmp_path / name)


def test_runs_with_and_without_faults_are_not_averaged(make_data: Any, make_module: Any, tmp_path: Path) -> None:
    for seed in (0, 1):
        for name, faults in (("honest", []), ("lying", [{"name": "SignFlip", "clients": [0]}])):
            folder = str(tmp_path / f"{name}-{seed}")
            make_loop(seed=seed, faults=faults, run_dir=folder).fit(make_module(), make_data())
    table = fedtune.compare(fedtune.read_runs(tmp_path))
    assert list(table.seeds) == [2, 2]
    assert sorted(table["loop.faults"]) == ["[]", '[{"name": "SignFlip", "rate": 0.0, "clients": [0]}]']
