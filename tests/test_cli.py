from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import WORDS

pytestmark = pytest.mark.usefixtures("pictures")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(command: Run) -> Run:
    def run(*arguments: str, as_they_are: bool = False) -> tuple[int, str, str]:
        """What a command says; a later --flag=value takes the place of an earlier."""
        last = {
            word.partition("=")[0]: word for word in arguments if word.startswith("--") and "=" in word and "+=" not in word
        }
        return command(*(word for word in arguments if as_they_are or last.get(word.partition("=")[0], word) == word))

    return run


@pytest.fixture
def csv(tmp_path: Path) -> str:
    path = tmp_path / "data.csv"
    path.write_text("text,label,author\n" + "".join(f"word{i % 9} word{i % 5},{'ab'[i % 2]},w{i % 4}\n" for i in range(80)))
    return str(path)


@pytest.fixture
def tiny(csv: str, tiny_bert: str) -> list[str]:
    """Flags of a run that takes a second."""
    options = {"path": csv, "author": "author"}
    flags = {"data.task": "csv", "data.task_options": json.dumps(options), "data.max_length": "8", "data.num_clients": "2"}
    flags |= {"data.batch_size": "8", "model.name": tiny_bert, "loop.max_rounds": "2"}
    return [f"--{name}={value}" for name, value in flags.items()]


def test_a_run_prints_a_line_a_round_and_keeps_everything(run: Run, tiny: list[str], tmp_path: Path) -> None:
    code, out, err = run("run", *tiny, f"--run_dir={tmp_path / 'r'}", "--data.split=by_author")
    assert code == 0, err
    assert "federated round 2/2" in out
    assert "centralised round 2/2" in out
    assert "local client 1" in out
    assert f"curves: {tmp_path / 'r'}" in out.replace("\n", "")
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["rounds"] == 2


def test_the_written_configuration_repeats_the_run(run: Run, tiny: list[str], tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    assert run("run", *tiny, f"--run_dir={one}", "--loop.baselines=[]")[0] == 0
    code, _, err = run("run", f"--config={one / 'config.yaml'}", f"--run_dir={other}")
    assert code == 0, err
    weights = [(folder / "checkpoints" / "round-0002" / "weights.safetensors").read_bytes() for folder in (one, other)]
    assert weights[0] == weights[1]
    config = yaml.safe_load((one / "config.yaml").read_text())
    assert set(config) == {"model", "data", "loop", "content", "versions"}
    assert set(config["versions"]) == {"fedtune", "torch", "lightning", "transformers", "python", "git_commit"}


def test_print_config_prints_the_complete_resolved_configuration(run: Run, tiny: list[str]) -> None:
    code, out, _ = run("run", *tiny, "--print_config")
    assert code == 0
    config = yaml.safe_load(out)
    assert config["loop"]["max_rounds"] == 2
    assert config["data"]["batch_size"] == 8
    assert config["model"]["learning_rate"] == 1e-4


ALGORITHM = ["--loop.algorithm", "fedavgm", "--loop.algorithm.beta=0.5", "--loop.algorithm.up+=Quantise", "--loop.baselines=[]"]


def test_an_algorithm_its_parameters_and_its_parts_are_flags(run: Run, tiny: list[str], tmp_path: Path) -> None:
    one, other, plain = (tmp_path / name for name in ("one", "other", "plain"))
    code, _, err = run("run", *tiny, *ALGORITHM, f"--run_dir={one}")
    assert code == 0, err
    config = yaml.safe_load((one / "config.yaml").read_text())["loop"]["algorithm"]
    assert config["server"] == [{"name": "Momentum", "beta": 0.5, "learning_rate": 1.0}]
    assert (config["client"], config["down"]) == ({"name": "LocalTraining"}, [])
    assert config["up"] == [{"name": "Quantise", "bits": 8, "feedback": False}]
    code, _, err = run("run", *tiny, *ALGORITHM, f"--run_dir={one}", "--loop.max_rounds=3")  # the same run goes on
    assert code == 0, err
    assert run("run", f"--config={one / 'config.yaml'}", "--loop.max_rounds=3", f"--run_dir={other}")[0] == 0
    weights = [(folder / "checkpoints" / "round-0003" / "weights.safetensors").read_bytes() for folder in (one, other)]
    assert weights[0] == weights[1]
    code, _, err = run("run", f"--config={one / 'config.yaml'}", "--loop.algorithm.server=[]", f"--run_dir={one}")
    assert code == 2
    assert "loop.algorithm.server: [{'name': 'Momentum'" in err
    assert run("run", *tiny, "--loop.baselines=[]", f"--run_dir={plain}")[0] == 0
    sent = [json.loads((folder / "rounds.jsonl").read_text().splitlines()[0])["bytes_up"] for folder in (one, plain)]
    assert sent[0] < 0.3 * sent[1]


@pytest.mark.filterwarnings("default::FutureWarning")
def test_old_names_work_for_a_while_with_a_line_that_says_so(run: Run, tiny: list[str], tmp_path: Path) -> None:
    old, new = ["--loop.keep", "1", "--loop.weighting=uniform"], ["--loop.options.keep=1", "--loop.algorithm.weighting=uniform"]
    for folder, flags in (("old", old), ("new", new)):
        code, _, err = run("run", *tiny, *flags, "--loop.baselines=[]", f"--run_dir={tmp_path / folder}")
        assert code == 0, err
        said = "the command: --loop.keep is now --loop.options.keep; the old name works until version 0.3"
        assert (said in err) == (folder == "old")
    configs = [yaml.safe_load((tmp_path / folder / "config.yaml").read_text())["loop"] for folder in ("old", "new")]
    assert configs[0] == configs[1]
    assert len(list((tmp_path / "old" / "checkpoints").iterdir())) == 1
    (tmp_path / "old.yaml").write_text("loop: {evaluation: clients, evaluate_on: test, fast_dropout: false}")
    code, out, err = run("run", f"--config={tmp_path / 'old.yaml'}", "--print_config")
    assert code == 0, err
    options = yaml.safe_load(out)["loop"]["options"]
    assert (options["evaluation"], options["fast_dropout"]) == ("clients", False)
    assert "loop.evaluation is now loop.options.evaluation" in err
    assert err.count("\n") == 1


def test_dotted_names_in_a_configuration_are_nested_ones(run: Run, tiny: list[str], tmp_path: Path) -> None:
    file = tmp_path / "args.json"  # as an agent of W&B writes it
    file.write_text(json.dumps({"loop.algorithm.beta": 0.25, "loop.algorithm": "fedavgm", "loop.max_rounds": 4}))
    code, out, err = run("run", *tiny, "--config", str(file), "--print_config")
    assert code == 0, err
    config = yaml.safe_load(out)["loop"]
    assert (config["algorithm"], config["max_rounds"]) == ({"name": "fedavgm", "beta": 0.25}, 4)
    file.write_text("[1, 2]")
    assert "--config: got" in run("run", "--config", str(file))[2]
    file.write_text("loop: {max_round: 3}")
    said = f"fedtune: {file}: --loop.max_round: no such flag; nearest: --loop.max_rounds"
    assert run("run", "--config", str(file))[2].startswith(said)


def test_describe_shows_a_table_and_draws_a_picture(run: Run, tiny: list[str], tmp_path: Path) -> None:
    picture = tmp_path / "split.png"
    flags = [flag for flag in tiny if not flag.startswith("--loop")]
    code, out, err = run("describe", *flags, "--data.split=by_author", f"--picture={picture}")
    assert code == 0, err
    assert "entropy" in out
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_describe_writes_nothing_but_what_it_was_told_to(
    run: Run, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [flag for flag in tiny if not flag.startswith("--loop")]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    code, out, err = run("describe", *flags)
    assert code == 0, err
    assert not list(Path().iterdir())
    assert "picture" not in out
    assert "in place of" not in run("describe", *flags, "--picture=mine.png")[1]
    assert "mine.png, in place of the file that was there" in run("describe", *flags, "--picture=mine.png")[1]


def test_describe_says_how_many_texts_each_part_has(run: Run, tiny: list[str]) -> None:
    flags = [flag for flag in tiny if not flag.startswith("--loop")]
    (line,) = [line for line in run("describe", *flags)[1].splitlines() if "for training" in line]
    training, validation, test = map(int, re.findall(r"(\d+) for", line))
    assert training > max(validation, test) > 0
    assert training + validation + test == 80
    out = run("describe", *flags, "--data.limit=24")[1]
    assert (
        f"texts: {training} for training (the clients have 24 of them), {validation} for validation, {test} for the test" in out
    )


def test_describe_shows_names_as_they_are(run: Run, tiny_bert: str, tmp_path: Path) -> None:
    names = ("[/red]", "[bold]:smile:", "\x1b[31m", "x" * 5000)
    rows = [{"text": f"word{i} word1", "label": names[i % 4]} for i in range(40)]
    (tmp_path / "[").mkdir()
    file = tmp_path / "[" / "]$x_{$[red].jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    flags = ["--data.task=csv", f"--data.task_options.path={file}", f"--model.name={tiny_bert}", "--data.max_length=8"]
    shown = set()
    for limit in range(1, 12):  # another label is the most frequent
        flags_of = [*flags, f"--data.limit={limit}", "--data.num_clients=1", f"--picture={tmp_path / 'split.png'}"]
        code, out, err = run("describe", *flags_of, "--data.batch_size=1")
        assert code == 0, err
        assert "$x_{$[red].jsonl" in out
        assert "\x1b[31m" not in out
        shown |= {name for name in ("[/red]", "[bold]:smile:", "[31m", "x" * 8) if name in "".join(out.split())}
    assert len(shown) == 4


def test_a_picture_that_cannot_be_drawn_is_one_line(run: Run, tiny: list[str], tmp_path: Path) -> None:
    flags = [flag for flag in tiny if not flag.startswith("--loop")]
    os.mkfifo(tmp_path / "fifo.png")
    for name, said in (("fifo.png", "it is a FIFO"), ("split.xyz", "not supported"), ("n" * 300 + ".png", "too long")):
        code, _, err = run("describe", *flags, f"--picture={tmp_path / name}")
        assert code == 2
        assert err.startswith("fedtune: --picture: got ")
        assert said in err


BAD = [
    (["--data.task=autors"], "--data.task: got 'autors'; allowed: authors (nearest)"),
    (["--data.split=by_autor"], "--data.split: got 'by_autor'; allowed: by_author (nearest)"),
    (["--model.name=minlm"], "--model.name: got 'minlm'; allowed: minilm (nearest)"),
    (["--data.num_client=3"], "--data.num_client: no such flag; nearest: --data.num_clients"),
    (["--data.num_clients=0"], "--data.num_clients: got 0; allowed: 1 or more"),
    (["--data.num_clients=many"], "--data.num_clients: got 'many'; allowed: a whole number"),
    (["--data.num_clients=999"], "--data.num_clients: got 999; allowed: at most the number of training texts"),
    (["--data.batch_size=-4"], "--data.batch_size: got -4; allowed: 1 or more"),
    (["--data.max_length=99"], "--data.max_length: got 99; allowed: at most 32"),
    (["--data.split=by_author", "--data.skew=1.5"], "--data.skew: got 1.5; allowed: a probability between 0 and 1"),
    (["--model.optimizer=adam"], "--model.optimizer: got 'adam'; allowed: adamw (nearest)"),
    (["--loop.max_rounds=0"], "--loop.max_rounds: got 0; allowed: 1 or more"),
    (["--loop.clients_per_round=5"], "--loop.clients_per_round: got 5; allowed: at most num_clients, 2"),
    (["--run_dir=/proc/nowhere"], "--run_dir: got '/proc/nowhere'; allowed: a directory that can be written"),
    (["--logger=tensorboard"], "--logger: got 'tensorboard'; allowed: none, wandb"),
    (["--config=/no/such.yaml"], "--config: got '/no/such.yaml'; allowed: a YAML or JSON file that can be read"),
    (["--loop.options.keep=0"], "--loop.options.keep: got 0; allowed: 1 or more"),
    (["--loop.options.evaluation=pool"], "--loop.options.evaluation: got 'pool'; allowed: pooled (nearest), clients"),
    (["--loop.mode=maximum"], "--loop.mode: got 'maximum'; allowed: max (nearest), min"),
    (["--loop.algorithm=fedavgn"], "--loop.algorithm: got 'fedavgn'; allowed: fedavg (nearest), qfedavg (nearest), fedavgm"),
    (["--loop.algorithm.beta=0.5"], "--loop.algorithm.beta: got 0.5; allowed: weighting"),
    (["--loop.algorithm=fedavgm", "--loop.algorithm.beta", "much"], "--loop.algorithm.beta: got 'much'; allowed: a number"),
    (["--loop.algorithm.client=os.system"], "--loop.algorithm.client: got 'os.system'; allowed: LocalTraining"),
    (["--loop.algorithm.up+=Halve"], "--loop.algorithm.up: got 'Halve'; allowed: Quantise"),
    (
        ["--loop.algorithm.up+=TopK", "--loop.algorithm.up.share=2"],
        "--loop.algorithm.up.share: got 2.0; allowed: above 0 and up",
    ),
    (
        ["--loop.algorithm.aggregator.weighting=all"],
        "--loop.algorithm.aggregator.weighting: got 'all'; allowed: examples, uniform",
    ),
]


@pytest.mark.parametrize(("flags", "said"), BAD, ids=[bad[0][-1] for bad in BAD])
def test_a_bad_value_ends_with_code_2_and_one_line(run: Run, tiny: list[str], flags: list[str], said: str) -> None:
    code, _, err = run("run", *tiny, *flags)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--seed=1", "--seed", "2"], "--seed: got '1' and '2'; allowed: one value"),
        (["--seed=1", "--data.seed=2"], "--data.seed: got '2'; allowed: nothing beside --seed"),
        (["--seed", "9" * 6000], "allowed: whole numbers below 2**63"),
        (["--data.alpha=.nan"], "--data.alpha: got nan; allowed: a finite number"),
        (
            ["--loop.algorithm=fedavgm", "--loop.algorithm.beta=.inf"],
            "--loop.algorithm.beta: got inf; allowed: a finite number",
        ),
        (["--data.task=\udcff"], "--data.task: got '--data.task=\\udcff'; allowed: text in UTF-8"),
        (["--data.mask=null"], "--data.mask: got 'None'; allowed: true or false"),
        (["--data=5"], "--data: got 5; allowed: a dictionary of names and values"),
        (["--loop.options=os.getcwd"], "--loop.options: got 'os.getcwd'; allowed: a dictionary"),
        (["--loop.options={class_path: os.getcwd}"], "no such flag"),
        (["--data.task_options={a: 1, a: 2}"], "allowed: a dictionary, null"),
        (["--data.task=" + "x" * 5000], "x…"),
        (["--data.task", "a\0b"], "allowed: text in UTF-8"),
        (["--data.task_options.path=a\x1bb.csv"], "allowed: text in UTF-8 without control characters"),
    ],
    ids=range(14),
)
def test_a_flag_has_one_plain_value(run: Run, flags: list[str], said: str) -> None:
    code, _, err = run("run", *flags, "--data.limit=3", as_they_are=True)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert len(err) < 620


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: 5", ": data: got 5; allowed: names and values"),
        ("data: {mask: }", "'mask' has no value, line 1"),
        ("data: {mask: null}", ": --data.mask: got null; allowed: true or false"),
        ("data: {seed: 1, seed: 2}", "the key 'seed' is there twice"),
        ("seed: 1\ndata: {seed: 2}", ": data.seed: got 2; allowed: nothing beside seed"),
        ("data: {split: {class_path: os.getcwd}}", "'class_path'"),
        ("loop: {options: {class_path: os.getcwd}}", "--loop.options.class_path: no such flag"),
        ("loop: {options: 5}", ": loop.options: got 5"),
        ("data: {num_clients: many}", ": --data.num_clients: got 'many'; allowed: a whole number"),
        ("data: {task_options: [1]}", ": --data.task_options: got '[1]'; allowed: a dictionary, null"),
        ("a: &a [*a]", "*a is within what it names"),
        ("data: {seed: " + "9" * 6000 + "}", "whole numbers are below 2**63"),
        ("data: {alpha: .inf}", ": --data.alpha: got inf; allowed: a finite number"),
    ],
    ids=range(13),
)
def test_a_configuration_with_an_odd_value_is_named(run: Run, tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    code, _, err = run("run", "--config", str(file))
    assert code == 2
    assert said in err
    assert str(file) in err
    assert err.count("\n") == 1


def test_plain_values_stay_as_they_are(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "data: {task: csv, task_options: {path: '1e5', label: '7', author: 'no'}, split: dirichlet, alpha: 1e-3}\n"
        "loop: {options: {keep: 3}}"
    )
    code, out, err = run("run", "--config", str(file), "--data.task_options.text=body", "--loop.options={agreement: false}")
    assert code == 2  # there is no such file of texts
    code, out, err = run("run", "--config", str(file), "--data.task_options.text=body", "--print_config")
    assert code == 0, err
    found = yaml.safe_load(out)
    assert found["data"]["task_options"] == {"path": "1e5", "label": "7", "author": "no", "text": "body"}
    assert (found["data"]["alpha"], found["loop"]["options"]["keep"]) == (0.001, 3)


def test_describe_says_what_a_split_leaves_out_and_what_has_no_effect(run: Run, tiny: list[str], tmp_path: Path) -> None:
    flags = [flag for flag in tiny if not flag.startswith(("--loop", "--data.num_clients"))]
    rows = [
        f"{' '.join(WORDS[: 1 + word])},{name},{name}"
        for name, count in (("[/b]", 20), ("$_", 15), ("c", 3))
        for word in range(count)
    ]
    (tmp_path / "few.csv").write_text("\n".join(["text,label,author", *rows]))
    picture = f"--picture={tmp_path / 'split.png'}"
    options = json.dumps({"path": str(tmp_path / "few.csv"), "author": "author"})
    flags += ["--data.task=csv", f"--data.task_options={options}", "--data.split=natural", "--data.min_size=5", picture]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, out, err = run("describe", *flags, "--data.num_clients=2", "--data.alpha=0.3", "--data.batch_size=1")
    assert code == 0, err
    assert "1 of 3 authors has fewer than 5 texts: " in err
    assert "alpha 0.3 has no effect with the split natural: it is for dirichlet, by_author_and_label" in err
    assert "1 of 3 authors has fewer than 5 texts: " in " ".join(out.split())
    assert "[/b] " in out
    assert "characters" in out
    code, out, err = run("describe", *flags, "--data.num_clients=3")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(
        "fedtune: --data.num_clients: got 3; allowed: 2 with the split natural: one for each author with at least 5"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"body,label\nx,a\n", "text: got 'text'; allowed: a column of"),
        (b"text,label\nx,a\n ,b\n", "row 2 of"),
        (b"text,label\n" + b"x,a\n" * 30, "at least two labels"),
        ("text,label\ncafé,a\n".encode("latin-1"), "a file in UTF-8"),
    ],
)
def test_a_bad_csv_ends_with_code_2_and_one_line(run: Run, tiny_bert: str, tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "bad.csv").write_bytes(content)
    options = json.dumps({"path": str(tmp_path / "bad.csv")})
    code, _, err = run(
        "run", "--data.task=csv", f"--data.task_options={options}", f"--model.name={tiny_bert}", "--data.max_length=8"
    )
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


def test_a_directory_of_another_run_is_refused(run: Run, tiny: list[str], tmp_path: Path) -> None:
    assert run("run", *tiny, f"--run_dir={tmp_path / 'r'}", "--loop.baselines=[]")[0] == 0
    code, _, err = run("run", *tiny, f"--run_dir={tmp_path / 'r'}", "--data.seed=7")
    assert code == 2
    assert "data.seed: 0 -> 7" in err


def test_a_loss_that_diverges_ends_with_code_2_and_one_line(run: Run, tiny: list[str]) -> None:
    code, _, err = run("run", *tiny, "--model.optimizer=sgd", "--model.learning_rate=1e30", "--loop.baselines=[]")
    assert code == 2
    assert "round 1, client 0" in err
    assert "lower the learning rate" in err
    assert err.count("\n") == 1


def test_without_wandb_the_pip_command_is_named(run: Run, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    code, _, err = run("run", *tiny, "--logger=wandb")
    assert code == 2
    assert "--logger: got 'wandb'; allowed: after: pip install wandb" in err
    assert run("run", *tiny, "--loop.baselines=[]")[0] == 0


def test_a_traceback_is_for_our_mistakes(run: Run, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr("fedtune.runs.conclusion.summarise", broken)
    with pytest.raises(AssertionError, match="ours"):
        run("run", *tiny, "--loop.baselines=[]")


def test_no_command_is_a_usage_error(run: Run) -> None:
    code, _, err = run()
    assert code == 2
    assert all(f"\n  {name} " in err for name in ("run", "sweep", "report", "describe"))


def test_help_and_a_misspelt_command_name_the_commands(run: Run) -> None:
    code, out, _ = run("--help")
    assert (code, "a grid of runs" in out) == (0, True)
    code, _, err = run("rum", "--data.task=authors")
    assert (code, err) == (2, "fedtune: rum: no such command; nearest: run\n")


def test_help_imports_nothing_heavy() -> None:
    script = "import sys; from fedtune.cli import main\ntry: main(['--help'])\nexcept SystemExit: print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert "fedtune.cli" in loaded
    assert not [name for name in ("torch", "jsonargparse", "transformers", "numpy") if f"'{name}'" in loaded]
