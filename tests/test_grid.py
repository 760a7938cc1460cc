from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.errors import UsageError
from fedtune.runs.flags import resolve
from fedtune.sweeps import grid

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(parameters: dict[str, Any], **content: Any) -> str:
        file = tmp_path / "sweep.yaml"
        file.write_text(yaml.safe_dump({"method": "grid", "parameters": parameters} | content))
        return str(file)

    return write


def test_a_grid_is_the_product_of_its_values_nested_or_dotted(write: Write) -> None:
    one = write(
        {
            "data": {"parameters": {"num_clients": {"values": [2, 4]}, "limit": {"value": 9}}},
            "model.name": {"values": ["a", "b"]},
        }
    )
    cells = grid.read(one).cells
    assert [cell.varied for cell in cells] == [
        {"data.num_clients": clients, "model.name": model} for clients in (2, 4) for model in ("a", "b")
    ]
    assert all(cell.arguments["data"]["limit"] == 9 for cell in cells)
    assert len({cell.name for cell in cells}) == 4


def test_a_cell_is_named_by_what_it_computes(write: Write) -> None:
    def name(**parameters: Any) -> str:
        return grid.read(write({key.replace("__", "."): {"value": value} for key, value in parameters.items()})).cells[0].name

    assert name(seed=3) == name(data__seed=3, model__seed=3, loop__seed=3) != name(seed=4)
    assert name(loop__options__progress=False, loop__options__keep=1) == name()
    assert name(data__num_clients=1, data__split="by_author") == name(data__num_clients=1, data__split="iid", data__skew=0.5)
    assert name(data__num_clients=2, data__split="by_author") != name(data__num_clients=2, data__split="iid")


def test_algorithms_and_their_parameters_are_in_the_cells_and_their_names(write: Write) -> None:
    betas = {"loop.algorithm": {"value": "fedavgm"}, "loop.algorithm.beta": {"values": [0.0, 0.9]}}
    cells = grid.read(write(betas)).cells
    assert [cell.arguments["loop"]["algorithm"]["server"][0]["beta"] for cell in cells] == [0.0, 0.9]
    assert [cell.title for cell in cells] == ["beta 0.0", "beta 0.9"]
    algorithms = grid.read(write({"loop.algorithm": {"values": ["fedavg", "fedavgm", {"name": "fedavgm", "beta": 0.0}]}})).cells
    assert len({cell.name for cell in [*cells, *algorithms]}) == 3  # fedavgm has beta 0.9 by itself
    uniform = grid.read(write({"loop.algorithm.aggregator.weighting": {"values": ["examples", "uniform"]}})).cells
    assert uniform[0].name == algorithms[0].name != uniform[1].name
    with pytest.raises(UsageError, match=r"--loop.algorithm.beta: got 0.9; allowed: weighting"):
        grid.read(write({"loop.algorithm.beta": {"value": 0.9}}))


def test_the_same_cell_twice_is_one(write: Write) -> None:
    cells = grid.read(write({"data.num_clients": {"values": [1, 2]}, "data.split": {"values": ["iid", "by_author"]}})).cells
    assert [(c.varied["data.num_clients"], c.varied["data.split"]) for c in cells] == [(1, "iid"), (2, "iid"), (2, "by_author")]


def test_only_takes_a_part_by_whole_or_shortened_key(write: Write) -> None:
    file = write({"data.num_clients": {"values": [1, 2, 4]}, "seed": {"values": [0, 1]}})
    assert len(grid.read(file, ["num_clients=2"]).cells) == 2
    assert len(grid.read(file, ["data.num_clients=2", "seed=1"]).cells) == 1
    rates = write({"model.learning_rate": {"values": [0.001, 2.0e-5]}, "model.freeze_embeddings": {"values": [True, False]}})
    assert len(grid.read(rates, ["learning_rate=1e-3", "freeze_embeddings=true"]).cells) == 1


def test_random_draws_within_bounds_and_the_same_each_time(write: Write) -> None:
    drawn = {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2}
    file = write({"model.learning_rate": drawn, "data.batch_size": {"min": 8, "max": 16}}, method="random", run_cap=20)
    rates = [cell.varied["model.learning_rate"] for cell in grid.read(file).cells]
    assert len(set(rates)) == 20
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert sum(rate < 3e-4 for rate in rates) > 5
    assert all(8 <= cell.varied["data.batch_size"] <= 16 for cell in grid.read(file).cells)
    assert [cell.name for cell in grid.read(file).cells] == [cell.name for cell in grid.read(file).cells]


@pytest.mark.parametrize(
    ("parameters", "content", "only", "said"),
    [
        ({"seed": {"value": 1}}, {"method": "bayes"}, [], "method: got 'bayes'; allowed: grid, random; bayes with --wandb"),
        ({"seed": {"value": 1}}, {"early_terminate": {}}, [], "early_terminate with --wandb"),
        ({"seed": {"value": 1}}, {"methid": 1}, [], r"method \(nearest\)"),
        ({"seed": 3}, {}, [], "parameter seed: got 3; allowed: value, values"),
        ({"seed": {"min": 1.0, "max": 2}}, {}, [], "for the method grid"),
        ({"seed": {"min": 1, "max": 2}}, {"method": "random"}, [], "run_cap: got None"),
        ({"seed": {"distribution": "betta"}}, {"method": "random", "run_cap": 1}, [], "distribution: got 'betta'"),
        ({"seed": {"distribution": "uniform"}}, {"method": "random", "run_cap": 1}, [], "allowed: min and max, for uniform"),
        ({"seed": {"value": 1}}, {"metric": "accuracy"}, [], "metric: got 'accuracy'; allowed: name and goal"),
        ({"seed": {"value": 1}}, {"metric": {"name": "accuracy", "goal": "maximise"}}, [], r"maximize \(nearest\)"),
        ({"seed": {"value": 1}}, {"method": "random", "run_cap": "ten"}, [], "run_cap: got 'ten'"),
        ({"seed": {"values": 3}}, {"method": "random", "run_cap": 1}, [], "values: got 3; allowed: a list"),
        ({"model": {"value": 3}, "model.seed": {"value": 1}}, {}, [], "nothing, beside a value for model"),
        ({"model": {"parameters": None}}, {}, [], "parameters of model: got None"),
        ({"run_dir": {"value": "x"}}, {}, [], "any of a run but config, run_dir"),
        ({"seed": {"value": 1}}, {}, ["sead=1"], "--only: got 'sead=1'; allowed: key=value, with a key of the file: seed"),
        ({"seed": {"value": 1}}, {}, ["seed=2"], "--only: got 'seed=2'; allowed: seed 1"),
    ],
)
def test_what_no_sweep_can_be_made_of_is_refused(write: Write, parameters: Any, content: Any, only: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        grid.read(write(parameters, **content), only)


@pytest.mark.parametrize("text", ["- 1", "parameters: [1]", ": :"])
def test_a_file_that_is_no_sweep_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UsageError, match="sweep file"):
        grid.read(tmp_path / "x.yaml")


def test_a_parameter_that_no_run_has_is_named(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        grid.read(write({"data.num_client": {"value": 1}}))
    assert "num_client" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_sweeps_are_complete(file: Path) -> None:
    if "parameters" not in yaml.safe_load(file.read_text()):
        pytest.skip("a configuration, not a sweep: test_hilmkil has it")
    assert grid.read(file).cells


def test_the_papers_grid_has_every_cell_and_its_protocol() -> None:
    cells = grid.read(EXPERIMENTS / "paper.yaml").cells
    assert {cell.arguments["data"]["num_clients"] for cell in cells} == {1, 2, 4, 8, 16, 32}
    assert {cell.arguments["model"]["name"] for cell in cells} == {"bert", "albert", "distilbert"}
    assert len(cells) == 3 * 4 * 6 * 2 * 3
    given = yaml.safe_load((EXPERIMENTS / "hilmkil2021" / "iid.yaml").read_text())
    protocol = resolve(given)
    varied = {"name", "task", "num_clients", "split"}
    for part, values in given.items():
        for name in set(values) - varied:
            assert all(cell.arguments[part][name] == protocol[part][name] for cell in cells), (part, name)
