"""Commands from Python, one's own code on the command line, and runs that are opened again."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import assert_equal, data_maker, make_loop, make_task, weights_of
from decoders import make_chats, save_decoder

import fedtune
from fedtune.experiments import shipped
from fedtune.storage.config import read_config

Make = Callable[..., Any]
Run = Callable[..., tuple[int, str, str]]
OWN = '''
import numpy as np
import pytorch_lightning as pl
import torch

import fedtune
from fedtune.algorithms import fedavgm


def weather() -> fedtune.TextTask:
    words = [f"word{number % 3} word{number % 7}" for number in range(90)]
    parts = {"train": np.arange(60), "validation": np.arange(60, 75), "test": np.arange(75, 90)}
    return fedtune.TextTask("weather", words, np.arange(90) % 3 % 2, ("dry", "wet"), parts)


def halves(columns, num_clients, seed):
    return np.array_split(np.arange(len(columns.labels)), num_clients)


def gentle(push: float = 0.5) -> fedtune.Algorithm:
    return fedavgm(beta=push)


fedtune.TASKS["weather"] = weather
fedtune.SPLITS["in_order"] = halves
fedtune.ALGORITHMS["gentle"] = gentle


class Bag(pl.LightningModule):
    """The mean of word vectors, and a linear layer; the first half of the vectors is frozen."""

    def __init__(self, num_labels: int, width: int = 4, rate: float = 0.5) -> None:
        super().__init__()
        if width < 1:
            raise ValueError("a width below 1")
        self.rate = rate
        self.still = torch.nn.EmbeddingBag(64, width).requires_grad_(False)
        self.words, self.head = torch.nn.EmbeddingBag(64, width), torch.nn.Linear(width, num_labels)

    def loss(self, batch):
        mean = self.words(batch["input_ids"]) + self.still(batch["input_ids"])
        return torch.nn.functional.cross_entropy(self.head(mean), batch["labels"])

    def training_step(self, batch, number):
        return self.loss(batch)

    def validation_step(self, batch, number):
        self.log("loss_nats", self.loss(batch), batch_size=len(batch["labels"]))

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)


class Fixed:
    pass
'''
REGISTRIES = ("TASKS", "SPLITS", "ALGORITHMS", "ALGORITHM_PARTS", "FAMILIES")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A working directory with my_module.py; what is called forgets it, as a new process would."""
    (tmp_path / "my_module.py").write_text(OWN)
    (tmp_path / "broken_module.py").write_text("import fedtune\n\nfedtune.TASKS['half'] = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {name: dict(getattr(fedtune, name)) for name in REGISTRIES}

    def forget() -> None:
        for name in ("my_module", "broken_module"):
            sys.modules.pop(name, None)
        for name, entries in before.items():
            getattr(fedtune, name).clear()
            getattr(fedtune, name).update(entries)

    yield forget
    forget()


@pytest.fixture
def flags(tiny_bert: str) -> list[str]:
    values = {"data.task": "weather", "data.split": "in_order", "data.num_clients": "2", "data.batch_size": "8"}
    values |= {"data.max_length": "8", "model.name": tiny_bert, "loop.max_rounds": "2", "loop.algorithm": "gentle"}
    return ["--import=my_module", *(f"--{name}={value}" for name, value in values.items())]


BAG = ["--model.class_path=my_module.Bag", "--model.init_args.width", "3"]
FAST = ["--loop.baselines=[]", "--loop.precision=32-true"]


def test_what_a_module_registers_is_there_in_every_command_on_its_run(
    command: Run, own: Callable[[], None], flags: list[str], tmp_path: Path
) -> None:
    code, _, err = command("run", *flags, *FAST, "--run_dir=r")
    assert code == 0, err
    assert read_config(tmp_path / "r" / "config.yaml")["loop"]["options"]["imports"] == ["my_module"]
    expected = weights_of(fedtune.load("r").module)
    own()
    code, out, err = command("run", "--config=r/config.yaml", "--run_dir=r", "--loop.max_rounds=3")  # goes on
    assert (code, "2 of 3 rounds were done before" in out) == (0, True), err
    own()
    code, out, err = command("describe", "--config=r/config.yaml")
    assert (code, "weather, split in_order, 2 clients" in out) == (0, True), err
    own()
    assert command("export", "r", "model")[0] == 0
    own()
    assert command("report", "r")[0] == 0
    own()
    loaded = fedtune.load("r")
    assert [len(rows) for rows in loaded.data.client_indices] == [30, 30]
    assert len(loaded.history) == loaded.round == 3
    assert expected.keys() == weights_of(loaded.module).keys()
    own()
    code, _, err = command("run", "--config=r/config.yaml", *FAST, "--loop.options.imports=[]")
    assert (code, "--data.task: got 'weather'" in err) == (2, True), err  # nobody knows it


def test_a_run_has_one_name_with_and_without_what_it_imports(own: Callable[[], None], flags: list[str]) -> None:
    from fedtune.cli import parser
    from fedtune.runs.flags import name_of, resolved

    names = {name_of(resolved(parser("run").parse_args([*flags, *more]))) for more in ([], ["--import", "json"])}
    assert len(names) == 1


def test_a_class_of_ones_own_is_run_continued_and_loaded(
    command: Run, own: Callable[[], None], flags: list[str], tmp_path: Path
) -> None:
    code, out, err = command("run", *flags, *BAG, "--run_dir=r", "--loop.precision=32-true")
    assert code == 0, err
    assert "test part: loss_nats" in out
    assert "local client 1" in out
    config = read_config(tmp_path / "r" / "config.yaml")
    assert set(config["model"]) == {"class_path", "init_args", "name", "seed"}
    assert config["model"]["init_args"] == {"width": 3}
    own()
    code, _, err = command("run", "--config=r/config.yaml", "--run_dir=r", "--loop.max_rounds=3", "--loop.baselines=[]")
    assert code == 0, err
    three = ["--loop.max_rounds=3" if flag.startswith("--loop.max_rounds") else flag for flag in flags]
    assert command("run", *three, *BAG, *FAST, "--run_dir=whole")[0] == 0
    own()
    loaded, whole = fedtune.load("r"), fedtune.load("whole")
    assert type(loaded.module).__name__ == "Bag"
    assert_equal(dict(loaded.module.state_dict()), dict(whole.module.state_dict()))
    assert loaded.tokenizer("word1")["input_ids"][1:-1] == loaded.tokenizer.convert_tokens_to_ids(["word1"])
    found = make_loop().validate(loaded.module, loaded.data)[0]["loss_nats"]
    assert found == pytest.approx(loaded.history[-1].loss_nats, abs=1e-6)
    code, _, err = command("export", "r", "model")
    assert (code, "this is of 'my_module.Bag'" in err) == (2, True)
    assert command("run", *flags, *BAG[:1], *FAST, "--run_dir=plain")[0] == 0  # built with its defaults
    own()
    assert fedtune.load("plain").module.rate == 0.5
    code, _, err = command("run", *three, *BAG[:1], "--model.init_args.width=4", *FAST, "--run_dir=r")
    assert (code, "model.init_args.width: 3 -> 4" in err) == (2, True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--import=no_such_module"], "--import: got 'no_such_module'; allowed: a module in /"),
        (["--import=my_module.py"], "--import: got 'my_module.py'; allowed: a name as in Python's import"),
        (["--import=broken_module"], "ZeroDivisionError: division by zero, broken_module.py, line 3"),
        (["--import"], "--import"),
        (["--model.class_path=Bag"], "--model.class_path: got 'Bag'; allowed: module and class, like my_module.MyModule"),
        (["--model.class_path=my_module.Bog"], "--model.class_path: got 'my_module.Bog'; allowed: my_module.Bag (nearest)"),
        (["--model.class_path=my_module.Fixed"], "allowed: a class of a LightningModule"),
        (["--model.class_path=os.system"], "--model.class_path: got 'os.system'; allowed: a class of a LightningModule"),
        ([*BAG[:1], "--model.init_args.depth=2"], "--model.init_args.depth: got 2; allowed: num_labels"),
        (
            [*BAG[:1], "--model.init_args.width=0"],
            "values by which my_module.Bag can be built (ValueError: a width below 1, my_mod",
        ),
        ([*BAG[:1], "--model.learning_rate=1"], "--model.learning_rate: got 1.0; allowed: 0.0001, beside class_path"),
        (["--model.init_args.width=4"], "--model.init_args: got {'width': 4}; allowed: nothing without class_path"),
    ],
    ids=range(12),
)
def test_own_code_that_cannot_be_used_is_one_line(
    command: Run, own: Callable[[], None], flags: list[str], given: list[str], said: str
) -> None:
    code, _, err = command("run", *flags, *given)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_a_configuration_of_a_module_that_python_has_built_is_described_and_loaded_into_one(
    command: Run, own: Callable[[], None], tiny_bert: str, tmp_path: Path
) -> None:
    from fedtune.runs.own import import_modules

    import_modules(["my_module"], "--import")
    module = sys.modules["my_module"].Bag(2)
    data = fedtune.FederatedDataModule("weather", tiny_bert, num_clients=3, batch_size=4, max_length=8)
    make_loop(run_dir="r").fit(module, data)
    code, out, err = command("describe", "--import=my_module", "--config=r/config.yaml", "--data.num_clients=2")
    assert (code, "weather, split iid, 2 clients" in out) == (0, True), err
    code, _, err = command("run", "--import=my_module", "--config=r/config.yaml")
    assert (code, "r/config.yaml: model: got 'my_module.Bag'; allowed: a module that a command can build" in err) == (2, True)
    with pytest.raises(fedtune.UsageError, match="module: got None; allowed: the module that takes the weights, a 'Bag'"):
        fedtune.load("r")
    Path("other.yaml").write_text("data: {class: Mine, from: my_module}\n")
    code, _, err = command("describe", "--config=other.yaml")
    assert (code, "other.yaml: data: got 'my_module.Mine'; allowed: data of a FederatedDataModule" in err) == (2, True)
    torch.manual_seed(7)
    loaded = fedtune.load("r", module=sys.modules["my_module"].Bag(2))
    assert_equal(dict(loaded.module.state_dict()), dict(module.state_dict()))
    with pytest.raises(fedtune.UsageError, match="a run whose weights fit Bag"):
        fedtune.load("r", module=sys.modules["my_module"].Bag(3))


def small(values: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The content of a sweep file of runs that take a second."""
    fixed = {"data.num_clients": 2, "data.batch_size": 8, "data.max_length": 8, "loop.max_rounds": 1, "loop.baselines": []}
    parameters = {name: {"value": value} for name, value in fixed.items()}
    return {"method": "grid", "parameters": parameters | values} | more


def test_a_sweep_in_python_runs_ones_own_code_in_its_processes(
    own: Callable[[], None], tiny_bert: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    values = {"data.task": {"value": "weather"}, "model.name": {"value": tiny_bert}}
    values |= {"model.class_path": {"value": "my_module.Bag"}, "model.init_args.rate": {"values": [0.1, 0.2]}}
    assert fedtune.sweep(small(values), "runs", dry_run=True, imports=["my_module"]) == 0
    assert not (tmp_path / "runs").exists()
    assert fedtune.sweep(small(values), "runs", imports=["my_module"]) == 0, capfd.readouterr().out
    assert fedtune.report("runs", tmp_path / "report") == tmp_path / "report"
    assert (tmp_path / "report" / "report.html").exists()
    assert fedtune.read_runs("runs").run.nunique() == 2
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(small(values, command=["fedtune", "run", "${args}", "--import=my_module"])))
    own()
    capfd.readouterr()
    assert fedtune.sweep(file, "runs", dry_run=True) == 0  # the same runs
    assert capfd.readouterr().out.count("finished") == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data.batch_sice": {"value": 3}}, "the sweep: --data.batch_sice: no such flag; nearest: --data.batch_size"),
        ({"data.batch_size": {"value": "many"}}, "the sweep: --data.batch_size: got 'many'; allowed: a whole number"),
        ({"data.seed": {"values": []}}, "parameter data.seed, values: got .* allowed: a list with a value or more"),
        ({"data.folder": {"value": Path("/x")}}, "sweep file: got .* allowed: plain values"),
    ],
    ids=range(4),
)
def test_a_sweep_in_python_that_cannot_be_one_is_an_exception(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(fedtune.UsageError, match=said):
        fedtune.sweep(small(given), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_sweeps_that_come_with_fedtune_are_found_by_name(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = list(shipped(sweeps=True))
    assert {"fedtune:paper", "fedtune:quick"} <= set(names)
    code, _, err = command("sweep", "fedtune:nonsense")
    assert (code, err.count("\n")) == (2, 1)
    assert all(name in err for name in names)
    assert "hilmkil2021" not in err
    monkeypatch.chdir(tmp_path)
    code, out, err = command("sweep", "fedtune:paper", "--dry-run", "--only", "task=imdb", "--only", "num_clients=32")
    assert code == 0, err
    assert "hilmkil2021" in out
    code, out, err = command("run", "--config=fedtune:hilmkil2021/iid", "--print_config")
    assert (code, yaml.safe_load(out)["model"]["optimizer"]) == (0, "sgd")
    code, _, err = command("run", "--config=fedtune:paper")
    assert (code, "fedtune:hilmkil2021/iid" in err) == (2, True)


def test_the_repository_has_no_symbolic_links_of_which_git_on_windows_makes_text_files() -> None:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        pytest.skip("no checkout of git")
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=root, capture_output=True, text=True, check=True).stdout
    assert len(listed.splitlines()) > 100
    assert not [line for line in listed.splitlines() if line.startswith("120000")]


def test_every_name_of_an_experiment_in_pages_and_makefile_is_one_that_comes_with_fedtune() -> None:
    root, known = Path(__file__).parent.parent, {**shipped(sweeps=True), **shipped(sweeps=False)}
    pages = [root / "Makefile", *root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("experiments/**/*.md")]
    named = {
        (page.name, name) for page in pages for name in re.findall(r"\bfedtune:[a-z]\w*(?:/\w+)?", page.read_text("utf-8"))
    }
    assert len(named) > 10
    assert not [one for one in named if one[1] not in known]


@pytest.mark.parametrize("which", ["classifier", "lora", "causal"])
def test_a_run_is_opened_with_the_weights_data_and_numbers_that_it_had(which: str, tiny_bert: str, tmp_path: Path) -> None:
    if which == "causal":
        model, file = save_decoder(tmp_path / "llama"), tmp_path / "chats.jsonl"
        file.write_text("".join(json.dumps({"messages": one}) + "\n" for one in make_chats().messages))
        options = {"path": str(file)}
        data = fedtune.FederatedDataModule("instructions", model, 2, batch_size=4, max_length=48, task_options=options)
        module: Any = fedtune.CausalLM(model, lora={"rank": 2}, learning_rate=1e-2)
    else:
        csv = tmp_path / "data.csv"
        csv.write_text("text,label\n" + "".join(f"word{i % 9} word{i % 5},{'ab'[i % 2]}\n" for i in range(80)))
        data = fedtune.FederatedDataModule("csv", tiny_bert, 2, batch_size=8, max_length=8, task_options={"path": str(csv)})
        lora = {"rank": 2, "targets": ["query"]} if which == "lora" else None
        module = fedtune.BertClassifier(tiny_bert, 2, learning_rate=1e-2, lora=lora)
    make_loop(max_rounds=2, run_dir=str(tmp_path / "run")).fit(module, data)
    loaded = fedtune.load(tmp_path / "run")
    assert_equal(weights_of(loaded.module), weights_of(module))
    assert not loaded.module.training
    assert (loaded.round, len(loaded.history)) == (2, 2)
    assert dict(loaded.module.hparams) | {"label_names": None} == dict(module.hparams) | {"label_names": None}
    name = "perplexity" if which == "causal" else "accuracy"
    found = make_loop().validate(loaded.module, loaded.data)[0]
    assert found[name] == loaded.history[-1].metrics[name]
    best = fedtune.load(tmp_path / "run", "best")
    values = [record.metrics["loss_nats" if which == "causal" else "accuracy"] for record in best.history]
    assert best.round == 1 + values.index(min(values) if which == "causal" else max(values))


def test_a_directory_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(fedtune.UsageError, match=r"run: got .* allowed: a directory of a run, with config\.yaml"):
        fedtune.load(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {name: minilm}\n")
    with pytest.raises(fedtune.UsageError, match="has None for data"):
        fedtune.load(tmp_path)


def test_data_that_are_no_longer_there_do_not_stand_in_the_way_of_the_weights(tiny_bert: str, tmp_path: Path) -> None:
    module = fedtune.BertClassifier(tiny_bert, 3)
    make_loop(max_rounds=1, run_dir=str(tmp_path / "run")).fit(module, data_maker(tiny_bert, make_task())())
    loaded = fedtune.load(tmp_path / "run")
    assert_equal(weights_of(loaded.module), weights_of(module))
    with pytest.raises(fedtune.UsageError, match="task: got 'tiny'"):
        loaded.data.setup()
    with pytest.raises(fedtune.UsageError, match="which: got 'first'; allowed: last, best"):
        fedtune.load(tmp_path / "run", "first")


def test_version_help_and_the_module_are_the_command(command: Run) -> None:
    assert command("--version") == (0, f"fedtune {fedtune.__version__}\n", "")
    code, out, err = command("help")
    assert (code, err) == (0, "")
    assert "\n  sweep " in out
    assert command("--help")[1] == out
    assert command("help", "export")[1] == command("export", "--help")[1]
    code, _, err = command("help", "exprot")
    assert (code, err) == (2, "fedtune: exprot: no such command; nearest: export\n")
    said = subprocess.run([sys.executable, "-m", "fedtune", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == f"fedtune {fedtune.__version__}\n"


def test_imports_of_run_options_are_a_list_of_modules() -> None:
    assert fedtune.RunOptions(imports=["json"]).imports == ["json"]
    for given in ("json", [3], ["no such module"], ["os; x"]):
        with pytest.raises(fedtune.UsageError, match=r"options\.imports: got"):
            fedtune.RunOptions(imports=given)


def test_every_command_that_the_page_on_extending_shows_parses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.cli import parser

    text = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
    shown = [line for block in re.findall("```sh\n(.*?)```", text, flags=re.S) for line in block.splitlines()]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("data: {task: authors}\n")
    for line in shown:
        _, name, *words = shlex.split(line, comments=True)
        parser(name).parse_args(words)
    assert len(shown) == 4
