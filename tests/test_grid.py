from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedtune
from fedtune.errors import UsageError
from fedtune.runs.flags import resolve
from fedtune.sweeps import grid

EXPERIMENTS = Path(fedtune.__file__).parent / "experiments"
Write = Callable[..., str]


@functools.cache
def shipped(file: Path) -> grid.Sweep:
    """A sweep file of the package, read once: that of the paper has 432 cells."""
    return grid.read(file)


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
    def arguments(**parameters: Any) -> Any:
        return (
            grid.read(write({key.replace("__", "."): {"value": value} for key, value in parameters.items()})).cells[0].arguments
        )

    def name(**parameters: Any) -> str:
        return grid.read(write({key.replace("__", "."): {"value": value} for key, value in parameters.items()})).cells[0].name

    assert name(seed=3) == name(data__seed=3, model__seed=3, loop__seed=3) != name(seed=4)
    assert name(loop__options__progress=False, loop__options__keep=1) == name()
    assert name(data__num_clients=1, data__split="by_author") == name(data__num_clients=1, data__split="iid", data__skew=0.5)
    assert name(data__num_clients=2, data__split="by_author") != name(data__num_clients=2, data__split="iid")
    shards = {"data__num_clients": 2, "data__split": "shards"}
    assert name(**shards) == name(**shards, data__shards_per_client=None) != name(**shards, data__shards_per_client=3)
    assert name(data__num_clients=1, data__split="shards", data__shards_per_client=3) == name(data__num_clients=1)
    assert name(data__num_clients=1, data__split="natural") != name(data__num_clients=1)  # it may leave texts out
    assert not {"shards_per_client", "exponent", "min_size", "small_authors"} & set(arguments()["data"])


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
    some = grid.read(file, ["num_clients=1", "num_clients=4", "seed=1"]).cells  # several values of a key
    assert [(cell.varied["data.num_clients"], cell.varied["seed"]) for cell in some] == [(1, 1), (4, 1)]
    rates = write({"model.learning_rate": {"values": [0.001, 2.0e-5]}, "model.freeze_embeddings": {"values": [True, False]}})
    assert len(grid.read(rates, ["learning_rate=1e-3", "freeze_embeddings=true"]).cells) == 1


def test_every_condition_of_only_is_one_of_some_cell(write: Write) -> None:
    file = write(
        {"data.num_clients": {"values": [1, 2, 4]}, "seed": {"values": [0, 1]}, "model.freeze_embeddings": {"value": True}}
    )
    for only, missed in (
        (["num_clients=2", "num_clients=3"], "num_clients=3"),
        (["num_clients=8", "seed=0", "num_clients=3"], "num_clients=8 num_clients=3"),
        (["seed=0", "seed=true"], "seed=true"),
        (["seed=1", "freeze_embeddings=1"], "freeze_embeddings=1"),
    ):
        with pytest.raises(UsageError, match=rf"--only: got '{missed}'; allowed: \w"):
            grid.read(file, only)
    assert {cell.varied["seed"] for cell in grid.read(file, ["seed=1"]).cells} == {1}


def test_only_takes_the_number_that_is_written_so(write: Write) -> None:
    file = write({"loop.limit_train_batches": {"values": [1, 1.0]}})
    for text in ("1", "1.0"):
        (cell,) = grid.read(file, [f"limit_train_batches={text}"]).cells
        assert str(cell.varied["loop.limit_train_batches"]) == text


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
        (
            {"seed": {"value": 1}},
            {"method": "bayesian"},
            [],
            r"method: got 'bayesian'; allowed: bayes \(nearest\), grid, random",
        ),
        ({"seed": {"value": 1}}, {"early_terminate": {}}, [], "metric: got None; allowed: name and goal, for early_terminate"),
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


def test_runs_that_differ_in_their_seed_alone_have_the_arguments_of_each(write: Write) -> None:
    cells = grid.read(write({"seed": {"values": [0, 7]}, "loop.local_epochs": {"values": [1, 2]}})).cells
    for cell in cells:
        assert cell.arguments == resolve(
            {"seed": cell.varied["seed"], "loop": {"local_epochs": cell.varied["loop.local_epochs"]}}
        )
    assert len(cells) == 4


def test_a_seed_that_no_run_takes_is_refused_also_after_one_that_each_takes(write: Write) -> None:
    for seed in (True, "x", 1.5):
        with pytest.raises(UsageError, match=r"--seed: got "):
            grid.read(write({"seed": {"values": [0, seed]}}))


def test_a_parameter_that_no_run_has_is_named(write: Write) -> None:
    with pytest.raises(UsageError, match=r"sweep\.yaml: --data\.num_client: no such flag; nearest: --data\.num_clients"):
        grid.read(write({"data.num_client": {"value": 1}}))


@pytest.mark.parametrize("file", sorted(EXPERIMENTS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_shipped_sweeps_are_complete(file: Path) -> None:
    if "parameters" not in yaml.safe_load(file.read_text()):
        pytest.skip("a configuration, not a sweep: test_hilmkil has it")
    assert shipped(file).cells


def test_the_papers_grid_has_every_cell_and_its_protocol() -> None:
    cells = shipped(EXPERIMENTS / "paper.yaml").cells
    assert {cell.arguments["data"]["num_clients"] for cell in cells} == {1, 2, 4, 8, 16, 32}
    assert {cell.arguments["model"]["name"] for cell in cells} == {"bert", "albert", "distilbert"}
    assert len(cells) == 3 * 4 * 6 * 2 * 3
    given = yaml.safe_load((EXPERIMENTS / "hilmkil2021" / "iid.yaml").read_text())
    protocol = resolve(given)
    varied = {"name", "task", "num_clients", "split"}
    for part, values in given.items():
        for name in set(values) - varied:
            assert all(cell.arguments[part][name] == protocol[part][name] for cell in cells), (part, name)


def drawn(write: Write, spec: dict[str, Any], runs: int = 30) -> list[Any]:
    file = write({"model.weight_decay": spec, "seed": {"value": 0}}, method="random", run_cap=runs)
    return [cell.varied["model.weight_decay"] for cell in grid.read(file).cells]


@pytest.mark.parametrize(
    ("spec", "low", "high", "step"),
    [
        ({"distribution": "uniform", "min": 1, "max": 2}, 1, 2, None),
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25}, 0, 1, 0.25),
        ({"distribution": "q_uniform", "min": 0, "max": 9}, 0, 9, 1),
        ({"distribution": "log_uniform", "min": -9.0, "max": -1.0}, 0.0001, 0.37, None),
        ({"distribution": "inv_log_uniform", "min": 1.0, "max": 9.0}, 0.0001, 0.37, None),
        ({"distribution": "log_uniform_values", "min": 0.001, "max": 10}, 0.001, 10, None),
        ({"distribution": "inv_log_uniform_values", "min": 0.001, "max": 10}, 0.001, 10, None),
        ({"distribution": "q_log_uniform_values", "min": 1, "max": 100, "q": 5}, 0, 100, 5),
        ({"distribution": "q_log_uniform", "min": 0, "max": 5, "q": 2}, 0, 150, 2),
        ({"distribution": "log_normal"}, 0.01, 50, None),
        ({"distribution": "q_log_normal", "sigma": 0.5}, 0, 10, 1),
        ({"distribution": "beta", "a": 2, "b": 2}, 0, 1, None),
        ({"distribution": "q_beta", "q": 0.5}, 0, 1, 0.5),
        ({"distribution": "normal", "mu": 9}, 4, 14, None),
        ({"distribution": "q_normal", "mu": 9}, 4, 14, 1),
    ],
)
def test_every_distribution_of_wandb_is_drawn_from(write: Write, spec: Any, low: float, high: float, step: Any) -> None:
    values = drawn(write, spec)
    assert all(low <= value <= high for value in values)
    assert len(set(values)) > 1
    if step is not None:
        assert all(value / step == round(value / step) for value in values)
        assert all(isinstance(value, type(step)) for value in values)


def test_probabilities_are_those_of_the_values(write: Write) -> None:
    file = write({"seed": {"values": [0, 1], "probabilities": [0.0, 1]}, "data.seed": {"value": 0}}, method="random", run_cap=5)
    with pytest.raises(UsageError, match=r"data.seed: got .*; allowed: nothing beside seed"):
        grid.read(file)
    file = write({"seed": {"values": [0, 1], "probabilities": [0.0, 1]}}, method="random", run_cap=5)
    assert [cell.varied["seed"] for cell in grid.read(file).cells] == [1]


def test_whole_numbers_and_steps_make_a_grid_as_in_wandb(write: Write) -> None:
    whole = write(
        {"data.num_clients": {"min": 2, "max": 4}, "model.dropout": {"distribution": "q_uniform", "min": 0, "max": 0.5}}
    )
    assert [cell.varied["data.num_clients"] for cell in grid.read(whole).cells] == [2, 3, 4]
    steps = write({"model.dropout": {"distribution": "q_uniform", "min": 0.0, "max": 0.5, "q": 0.25}})
    assert [cell.varied["model.dropout"] for cell in grid.read(steps).cells] == [0.0, 0.25]  # its end is left out there, too


def test_run_cap_holds_for_a_grid_and_a_target_is_kept(write: Write) -> None:
    values = {"seed": {"values": [0, 1, 2, 3]}, "data.num_clients": {"min": 1, "max": 10**9}}
    metric = {"name": "loss_nats", "goal": "minimize", "target": 0.5}
    sweep = grid.read(write(values, run_cap=2, metric=metric, project="p", entity="e"))
    assert [cell.varied for cell in sweep.cells] == [{"data.num_clients": 1, "seed": number} for number in (0, 1)]
    assert [sweep.is_reached(value) for value in (0.6, 0.5, 0.4, None)] == [False, True, True, False]
    assert sweep.environment == {"WANDB_PROJECT": "p", "WANDB_ENTITY": "e"}
    with pytest.raises(UsageError, match=r"got '4e[+]09 runs'; allowed: at most 10000 runs"):
        grid.read(write(values))


WORDS = ["${env}", "fedtune", "run", "--config", "${args_json_file}"]


def test_flags_in_the_command_hold_for_every_run(write: Write) -> None:
    from fedtune.sweeps import wandb_agents

    seeds = {"seed": {"values": [0, 1]}}
    command = [*WORDS, "--loop.max_rounds", 3, "--loop.algorithm=fedavgm", "--loop.algorithm.beta=0.5"]
    file = write(seeds, command=command, program="fedtune")
    cells = grid.read(file).cells
    assert [cell.arguments["loop"]["max_rounds"] for cell in cells] == [3, 3]
    assert cells[0].arguments["loop"]["algorithm"]["server"][0]["beta"] == 0.5
    assert cells[0].varied == {"seed": 0}
    assert wandb_agents.registered(file, "runs/w")["command"][-3:] == [
        *("--loop.max_rounds=3", "--loop.algorithm=fedavgm", "--loop.algorithm.beta=0.5")
    ]
    assert len(grid.read(write(seeds, command=["python", "-m", "fedtune.cli", "run", "${args}"])).cells) == 2
    for odd, said in (
        (["python", "train.py", "${args}"], "command: got"),
        (["fedtune", "run"], "command: got"),
        ([*WORDS, "${args_no_hyphens}"], "command: got"),
        ([*WORDS, "--seed=3"], "parameter seed: got .* allowed: nothing beside the flag"),
        ([*WORDS, "--runs_dir=x"], "flags of a run but config, run_dir, runs_dir"),
        ([*WORDS, "--loop.max_rounds"], "each with a value"),
        ("fedtune run", "command: got 'fedtune run'"),
    ):
        with pytest.raises(UsageError, match=said):
            grid.read(write(seeds, command=odd))


RANDOM = {"method": "random", "run_cap": 2}


@pytest.mark.parametrize(
    ("parameters", "content", "said"),
    [
        ({"model.optimizer": {"values": "sgd"}}, {}, "parameter model.optimizer, values: got 'sgd'; allowed: a list"),
        ({"model.optimizer": {"values": []}}, {}, "a list with a value or more"),
        ({"seed": {"value": 1, "values": [1, 2]}}, {}, "parameter seed: got 'values'; allowed: value"),
        (
            {"seed": {"values": [1, 2], "probabilites": [0.5, 0.5]}},
            RANDOM,
            "parameter seed: got 'probabilites'; allowed: values",
        ),
        ({"seed": {"values": [1, 2], "probabilities": [0.5, 0.6]}}, RANDOM, "probabilities: got .* 2 numbers that sum to 1"),
        ({"seed": {"values": [1, 2], "probabilities": [0.5, 0.5]}}, {}, "for the method grid"),
        ({"seed": {"min": 1, "max": 2, "q": 1}}, RANDOM, "parameter seed: got 'q'; allowed: min, max"),
        ({"model.dropout": {"min": "0.1", "max": 0.2}}, RANDOM, "min: got '0.1'; allowed: a number, without quotes"),
        ({"model.dropout": {"min": float("nan"), "max": 0.2}}, RANDOM, "min: got nan; allowed: a number"),
        ({"model.dropout": {"min": 0.2, "max": 0.1}}, RANDOM, "min below max"),
        ({"model.dropout": {"max": 0.1}}, RANDOM, "min and max"),
        (
            {"model.dropout": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}},
            RANDOM,
            "q: got 0; allowed: a number above",
        ),
        ({"model.dropout": {"distribution": "q_uniform", "min": 0, "max": 1, "q": 1e-9}}, {}, "at most 10000 values in a grid"),
        ({"model.dropout": {"distribution": "log_uniform", "min": 0, "max": 1e5}}, RANDOM, "exponents of e"),
        ({"model.dropout": {"distribution": "log_uniform_values", "min": 0, "max": 1}}, RANDOM, "a number above 0"),
        ({"model.dropout": {"distribution": "log_normal", "sigma": 1e300}}, RANDOM, "finite"),
        ({"seed": {"value": 1}}, {"method": "random", "run_cap": 99999999999}, "run_cap: got 99999999999; allowed: at most"),
        ({"seed": {"value": 1}}, {"run_cap": 0}, "run_cap: got 0"),
        ({"seed": {"value": 1}}, {"run_cap": True}, "run_cap: got True"),
        (
            {"seed": {"value": 1}},
            {"metric": {"name": "acuracy"}},
            r"metric, name: got 'acuracy'; allowed: accuracy \(nearest\)",
        ),
        ({"seed": {"value": 1}}, {"metric": {"name": "accuracy", "target": "high"}}, "target: got 'high'; allowed: a number"),
        ({"seed": {"value": 1}}, {"metric": {"name": "accuracy", "impute": "best"}}, "metric: got 'impute'"),
        ({"seed": {"value": 1}}, {"program": "train.py"}, "program: got 'train.py'"),
        ({"seed": {"value": 1}}, {"name": 5}, "name: got 5; allowed: text"),
        ({"seed": {"value": float("inf")}}, {}, "got inf; allowed: a finite number"),
        ({"data": {"value": {"seed": 1}}, "data.seed": {"value": 2}}, {}, "nothing beside data {'seed': 1}"),
        ({"data": {"parameters": {"seed": {"value": 1}}}, "data.seed": {"value": 1}}, {}, "once in a file"),
        ({"data": {"parameters": {"seed": {"value": 1}}, "value": 3}}, {}, "nothing beside parameters"),
        ({"data": {"value": 5}}, {}, "data: got 5; allowed: names and values"),
        ({"loop.options": {"value": 5}}, {}, "loop.options: got 5; allowed: names and values"),
        ({"data": {"value": {"class_path": "os.getcwd"}}}, {}, "data.class_path: no such flag"),
        ({"loop.options": {"value": {"class_path": "os.getcwd"}}}, {}, "loop.options.class_path: no such flag"),
        ({"data.mask": {"value": None}}, {}, "data.mask: got null; allowed: true or false"),
    ],
)
def test_every_key_is_applied_or_refused(write: Write, parameters: Any, content: Any, said: str) -> None:
    file = write(parameters, **content)
    with pytest.raises(UsageError, match=said) as error:
        grid.read(file)
    assert str(error.value).count(file) == 1


def test_a_dry_run_checks_what_a_run_would(write: Write) -> None:
    for name, value, said in (
        ("data.batch_size", 0, "--data.batch_size: got 0; allowed: 1 or more"),
        ("data.task", "authers", r"--data.task: got 'authers'; allowed: authors \(nearest\)"),
        ("data.split", "os.getcwd", "--data.split: got 'os.getcwd'; allowed: "),
        ("data.task_options", {"volumes": 1}, "--data.task_options: got 'volumes'"),
        ("model.optimizer", "sgdd", "--model.optimizer: got 'sgdd'"),
        ("model.name", "/no/such", "--model.name: got '/no/such'"),
        ("loop.options", {"keep": 0}, "--loop.options.keep: got 0"),
        ("loop.clients_per_round", 99, "--loop.clients_per_round: got 99; allowed: at most num_clients, 8"),
    ):
        sweep = grid.read(write({name: {"values": [value]}, "seed": {"values": [0, 1]}}))
        with pytest.raises(UsageError, match=f"sweep.yaml: {said}.*2 of 2 runs could not start"):
            grid.check_cells(sweep, "sweep.yaml")
    grid.check_cells(shipped(EXPERIMENTS / "paper.yaml"), "paper.yaml")
