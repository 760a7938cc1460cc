"""Where clients have models of their own, each is exported as what its client answers with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import data_maker, make_loop, make_task
from safetensors.torch import load_file

import fedtune
from fedtune import cli


def finished(model: str, run: Path, algorithm: Any, cohort: int = 4, **options: Any) -> tuple[Any, list[Any]]:
    """Data and records of a run."""
    data = data_maker(model, make_task())(num_clients=4)
    loop = make_loop(max_rounds=2, run_dir=str(run), algorithm=algorithm, clients_per_round=cohort)
    loop.fit(fedtune.build_classifier(model, 3, learning_rate=5e-3, **options), data)
    return data, loop.history


def accuracies(folder: Path, data: Any) -> list[float | None]:
    """Of an exported model on each client's share of the validation part."""
    answer = transformers.pipeline("text-classification", model=str(folder), truncation=True)
    rows = data.val_dataloader().dataset.rows.tolist()
    said = [one["label"] for one in answer([data.task.texts[row] for row in rows])]
    right = [name == data.task.label_names[data.task.labels[row]] for name, row in zip(said, rows, strict=True)]
    found: list[float | None] = data.client_accuracy("validation", torch.tensor(right))
    return found


@pytest.mark.parametrize("algorithm", ["fedper", "fedrep", "ditto"])
def test_a_clients_export_is_as_right_as_its_record_says(algorithm: str, tiny_bert: str, tmp_path: Path) -> None:
    data, history = finished(tiny_bert, tmp_path / "run", algorithm)
    own = history[-1].own_accuracy
    assert len(set(own)) > 1
    for client in range(4):
        folder = fedtune.export(tmp_path / "run", tmp_path / f"client{client}", client=client)
        assert accuracies(folder, data)[client] == pytest.approx(own[client])
        assert f"the model of client {client}" in (folder / "README.md").read_text()
        assert f"its accuracy is {own[client]:.4f}" in (folder / "README.md").read_text()


def test_adapters_of_fedsa_are_a_clients_own(tiny_bert: str, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed: pip install 'fedtune[lora]'")
    data, history = finished(tiny_bert, tmp_path / "run", "fedsa_lora", lora={"rank": 4})
    factors = []
    for client in range(4):
        folder = fedtune.export(tmp_path / "run", tmp_path / f"client{client}", merge=True, client=client)
        assert accuracies(folder, data)[client] == pytest.approx(history[-1].own_accuracy[client])
        factors.append(
            load_file(fedtune.export(tmp_path / "run", tmp_path / f"peft{client}", client=client) / "adapter_model.safetensors")
        )
    for name in factors[0]:
        same = all(torch.equal(factors[0][name], other[name]) for other in factors[1:])
        assert same == ("lora_B" not in name)
        assert factors[0][name].any()


def test_without_a_client_a_run_whose_server_has_no_whole_model_is_refused(
    tiny_bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(tiny_bert, tmp_path / "run", "fedper", cohort=2)
    for flags, said in (
        ([], "--client: got None; allowed: a number from 0 to 3"),
        (["--client", "4"], "--client: got 4; allowed: a number from 0 to 3"),
        (["--client", "1", "--which", "best"], "--which: got 'best'; allowed: last"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), *flags])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_client_without_a_model_of_its_own_is_refused(tiny_bert: str, tmp_path: Path) -> None:
    finished(tiny_bert, tmp_path / "shared", "fedavg")
    with pytest.raises(
        fedtune.UsageError, match="client: got 0; allowed: a client with a model of its own; this one has no weights"
    ):
        fedtune.export(tmp_path / "shared", tmp_path / "out", client=0)
    _, history = finished(tiny_bert, tmp_path / "run", "fedper", cohort=1)
    away = min(set(range(4)) - {client for record in history for client in record.cohort})
    with pytest.raises(fedtune.UsageError, match=f"client: got {away}.*has not taken part yet"):
        fedtune.export(tmp_path / "run", tmp_path / "out", client=away)


@pytest.mark.parametrize("client", [True, 1.0, "1", -1])
def test_a_client_is_a_whole_number(client: Any, tiny_bert: str, tmp_path: Path) -> None:
    finished(tiny_bert, tmp_path / "run", "ditto")
    with pytest.raises(fedtune.UsageError, match=f"client: got {client!r}; allowed: a number from 0 to 3"):
        fedtune.export(tmp_path / "run", tmp_path / "out", client=client)


def test_what_a_client_kept_of_an_earlier_round_is_not_exported_as_its_last(tiny_bert: str, tmp_path: Path) -> None:
    finished(tiny_bert, tmp_path / "run", "ditto")
    lost, earlier = (tmp_path / "run" / "clients" / "000001" / f"000{number}.safetensors" for number in (2, 1))
    assert earlier.exists()
    lost.unlink()
    with pytest.raises(fedtune.RunError, match=rf"{lost.name} is missing, what 1 of 4 clients remember is lost"):
        fedtune.export(tmp_path / "run", tmp_path / "out", client=1)
    assert not (tmp_path / "out").exists()


def test_ditto_exports_the_servers_model_too(tiny_bert: str, tmp_path: Path) -> None:
    finished(tiny_bert, tmp_path / "run", "ditto")
    shared = load_file(fedtune.export(tmp_path / "run", tmp_path / "out") / "model.safetensors")
    own = load_file(fedtune.export(tmp_path / "run", tmp_path / "own", client=2) / "model.safetensors")
    assert any(not torch.equal(shared[name], own[name]) for name in shared)
