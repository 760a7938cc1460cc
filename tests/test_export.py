"""A run's model opens in Transformers, with the logits that it had in the run and the task's names of classes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from conftest import data_maker, make_loop, make_task, save_tokenizer
from safetensors.torch import load_file, save_file
from test_families import TINY

import fedtune
from fedtune import cli
from fedtune.storage import checkpoint

Make = Callable[..., Any]
TEXTS = ["word1 word7 word30", "word12", "word3 word4 word5 word6 word3 word3"]


def finished(model: str, folder: Path, rounds: int = 2, **options: Any) -> Any:
    """The module of a finished run."""
    module = fedtune.build_classifier(model, 3, learning_rate=5e-3, **options)
    make_loop(max_rounds=rounds, run_dir=str(folder)).fit(module, data_maker(model, make_task())())
    return module.eval()


def logits_of(folder: Path) -> torch.Tensor:
    """As whoever gets the folder computes them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(**tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")).logits


def own_logits(module: Any, model: str) -> torch.Tensor:
    batch = transformers.AutoTokenizer.from_pretrained(model)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return module.network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.fixture(scope="module", params=sorted(TINY))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("family") / request.param
    torch.manual_seed(0)
    transformers.AutoModel.from_config(TINY[request.param]).save_pretrained(path)
    save_tokenizer(path)
    return str(path)


@pytest.mark.parametrize(
    "options", [{}, {"freeze_embeddings": True, "freeze_layers": 1}, {"init": "random", "freeze_layers": 1}]
)
def test_the_exported_model_has_the_logits_of_the_run(model: str, options: dict[str, Any], tmp_path: Path) -> None:
    module = finished(model, tmp_path / "run", **options)
    assert fedtune.export(tmp_path / "run", tmp_path / "out") == tmp_path / "out"
    found = logits_of(tmp_path / "out")
    assert torch.equal(found, own_logits(module, model))
    batch = transformers.AutoTokenizer.from_pretrained(model)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        torch.testing.assert_close(found, module(batch["input_ids"], batch["attention_mask"]))  # packed: to rounding


def test_a_pipeline_answers_with_the_names_of_the_tasks_classes(tiny_bert: str, tmp_path: Path) -> None:
    module = finished(tiny_bert, tmp_path / "run")
    fedtune.export(tmp_path / "run", tmp_path / "out")
    answers = transformers.pipeline("text-classification", model=str(tmp_path / "out"))(TEXTS)
    expected = [f"label {number}" for number in own_logits(module, tiny_bert).argmax(-1).tolist()]
    assert [answer["label"] for answer in answers] == expected
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "label 0", "1": "label 1", "2": "label 2"}
    assert config["label2id"] == {"label 0": 0, "label 1": 1, "label 2": 2}
    assert config["problem_type"] == "single_label_classification"
    summary, card = json.loads((tmp_path / "run" / "summary.json").read_text()), (tmp_path / "out" / "README.md").read_text()
    assert "after round 2, the last one" in card
    assert f"| {summary['accuracy']:.4f} |" in card


def test_minilm_in_the_architecture_of_distilbert_answers_in_a_pipeline(tmp_path: Path) -> None:
    texts = ["The sun is warm.", "It rains."] * 8
    parts = {"train": [0, 1, 2, 3, 4, 5, 6, 7], "validation": [8, 9], "test": [10, 11, 12, 13, 14, 15]}
    parts = {name: torch.tensor(rows).numpy() for name, rows in parts.items()}
    task = fedtune.TextTask("weather", texts, torch.tensor([0, 1] * 8).numpy(), ("dry", "wet"), parts)
    data = fedtune.FederatedDataModule(task, "minilm-distilbert", num_clients=2, batch_size=4, max_length=16)
    module = fedtune.build_classifier("minilm-distilbert", 2, freeze_layers=6)
    make_loop(max_rounds=1, run_dir=str(tmp_path / "run")).fit(module, data)
    fedtune.export(tmp_path / "run", tmp_path / "out")
    answer = transformers.pipeline("text-classification", model=str(tmp_path / "out"))("It rains.")
    assert answer[0]["label"] in ("dry", "wet")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 16


def metrics(folder: Path, values: list[float]) -> None:
    """Give the rounds of a run other accuracies."""
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    lines = [json.dumps(record | {"accuracy": value}) for record, value in zip(records, values, strict=True)]
    (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n")


def test_the_best_round_is_exported_while_its_weights_are_there(tiny_bert: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finished(tiny_bert, run, rounds=3)
    for which, number, values in (("last", 3, [0.9, 0.1, 0.2]), ("best", 2, [0.1, 0.9, 0.2]), ("best", 3, [0.1, 0.2, 0.9])):
        metrics(run, values)
        folder = tmp_path / f"{which}-{number}"
        fedtune.export(run, folder, which)
        expected = checkpoint.load(run / "checkpoints" / f"round-000{number}").weights
        found = load_file(folder / "model.safetensors")
        assert all(torch.equal(found[name.removeprefix("network.")], tensor) for name, tensor in expected.items())
    metrics(run, [0.9, 0.1, 0.2])
    with pytest.raises(fedtune.UsageError, match=r"allowed: last: the weights of round 1, the best by accuracy, are not kept"):
        fedtune.export(run, tmp_path / "pruned", "best")
    assert not (tmp_path / "pruned").exists()


def test_the_best_weights_that_a_callback_kept_are_exported(tiny_bert: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finished(tiny_bert, run, rounds=3)
    metrics(run, [0.9, 0.1, 0.2])
    weights = checkpoint.load(run / "checkpoints" / "round-0002").weights
    for number in (2, 1):
        save_file(weights, run / "best.safetensors", metadata={"round": str(number), "monitor": "accuracy", "value": "0.9"})
        if number == 2:  # of another round than the best one
            with pytest.raises(fedtune.UsageError, match="round 1, the best by accuracy, are not kept"):
                fedtune.export(run, tmp_path / "out", "best")
    fedtune.export(run, tmp_path / "out", "best")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name.removeprefix("network.")], tensor) for name, tensor in weights.items())


def test_the_target_must_be_empty_and_nothing_is_half_written(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(tiny_bert, tmp_path / "run", rounds=1)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    with pytest.raises(fedtune.UsageError, match="a directory that is empty, or not there yet"):
        fedtune.export(tmp_path / "run", taken)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
        with pytest.raises(fedtune.UsageError, match=r"can be written \(full\)"):
            fedtune.export(tmp_path / "run", tmp_path / "deep" / "out")
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == []
    (tmp_path / "deep" / "out").mkdir()
    fedtune.export(tmp_path / "run", tmp_path / "deep" / "out")
    assert (tmp_path / "deep" / "out" / "model.safetensors").exists()


def test_files_of_a_run_and_of_an_export_follow_the_umask(tiny_bert: str, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        finished(tiny_bert, tmp_path / "run", rounds=1, freeze_layers=1)
        fedtune.export(tmp_path / "run", tmp_path / "out")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]  # that is the locks' own
    assert {path.name for path in files} > {"weights.safetensors", "resting.safetensors", "model.safetensors", "config.yaml"}
    assert {str(path.relative_to(tmp_path)): oct(path.stat().st_mode & 0o777) for path in files} == {
        str(path.relative_to(tmp_path)): "0o640" for path in files
    }


def changed(file: Path, **values: Any) -> None:
    content = yaml.safe_load(file.read_text())
    for name, value in values.items():
        content[name] = value(content[name]) if callable(value) else value
    file.write_text(yaml.safe_dump(content))


def test_a_run_that_does_not_know_its_names_is_told_them(tiny_bert: str, tmp_path: Path) -> None:
    finished(tiny_bert, tmp_path / "run", rounds=1)
    with pytest.raises(fedtune.UsageError, match=r"label_names: .*nothing, as the run knows them"):
        fedtune.export(tmp_path / "run", tmp_path / "out", label_names=["a", "b", "c"])
    changed(tmp_path / "run" / "config.yaml", content=lambda old: {key: old[key] for key in old if key != "label_names"})
    with pytest.raises(fedtune.UsageError, match="label_names: got None; allowed: the names of the classes"):
        fedtune.export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(fedtune.UsageError, match="with 2 classes"):
        fedtune.export(tmp_path / "run", tmp_path / "out", label_names=["a", "b"])
    fedtune.export(tmp_path / "run", tmp_path / "out", label_names=["a", "b", "c"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]["2"] == "c"


def test_a_model_whose_files_have_changed_since_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    transformers.AutoModel.from_config(TINY["bert"]).save_pretrained(model)
    save_tokenizer(model)
    finished(str(model), tmp_path / "run", rounds=1, freeze_embeddings=True)
    config, weights = (model / "config.json").read_text(), (model / "model.safetensors").read_bytes()
    (model / "config.json").write_text(config.replace('"gelu"', '"relu"'))
    with pytest.raises(fedtune.UsageError, match=r"has the config.json that it had then"):
        fedtune.export(tmp_path / "run", tmp_path / "out")
    (model / "config.json").write_text(config)
    other = {name: tensor + 1 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(other, model / "model.safetensors")
    with pytest.raises(fedtune.UsageError, match=r"has the files that it had then; network.bert.embeddings"):
        fedtune.export(tmp_path / "run", tmp_path / "out")
    (model / "model.safetensors").write_bytes(weights)
    fedtune.export(tmp_path / "run", tmp_path / "out")


def test_the_command_exports_and_says_in_one_line_why_not(
    tiny_bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tiny_bert, tmp_path / "run", rounds=1)
    cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert f"model: {tmp_path / 'out'}" in capsys.readouterr().out
    for arguments, said in (
        ((tmp_path / "none", tmp_path / "new"), "run: got"),
        ((tmp_path / "run", tmp_path / "out"), "a directory that is empty, or not there yet"),
        ((tmp_path / "run", tmp_path / "new", "--which=newest"), "--which: got 'newest'; allowed: "),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", *map(str, arguments)])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_run_of_another_kind_of_module_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    finished(tiny_bert, tmp_path / "run", rounds=1)
    changed(tmp_path / "run" / "config.yaml", model={"class": "Mine"})
    with pytest.raises(
        fedtune.UsageError, match=r"a TextClassifier or a CausalLM \(this is of 'Mine'; fedtune.load opens it\)"
    ):
        fedtune.export(tmp_path / "run", tmp_path / "out")


def test_a_finished_run_without_its_last_weights_is_not_exported_as_if_it_had_them(tiny_bert: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finished(tiny_bert, run, rounds=3)
    (run / "checkpoints" / "round-0003" / "state.json").unlink()
    with (
        pytest.warns(UserWarning, match="DAMAGED CHECKPOINT"),
        pytest.raises(fedtune.RunError, match=r"ended with round 3, whose weights .*; the last ones are of round 2"),
    ):
        fedtune.export(run, tmp_path / "out")
    (run / "summary.json").unlink()  # as of a run that was interrupted in its last round
    with pytest.warns(UserWarning, match="DAMAGED CHECKPOINT"):
        fedtune.export(run, tmp_path / "out")
    assert "after round 2, the last one" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("target", ["dangling", "loop", "loop/below", "a\0b", "x" * 5000, "file/below"])
def test_a_target_that_cannot_be_a_new_directory_is_refused(tiny_bert: str, tmp_path: Path, target: str) -> None:
    finished(tiny_bert, tmp_path / "run", rounds=1)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(fedtune.UsageError, match="folder: got"):
        fedtune.export(tmp_path / "run", tmp_path / target)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_home_that_nobody_has_is_a_folder_like_any_other(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(tiny_bert, tmp_path / "run", rounds=1)
    monkeypatch.chdir(tmp_path)
    fedtune.export("run", "~nobody-has-this/out")
    assert (tmp_path / "~nobody-has-this" / "out" / "model.safetensors").exists()
