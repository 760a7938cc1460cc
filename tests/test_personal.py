"""Models, and parts of models, that stay with each client; and how they are evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import assert_equal, make_loop, weights_of, without_times
from safetensors.torch import load_file

import fedtune
from fedtune.algorithms.fedavg import fedavg
from fedtune.algorithms.fedper import fedper, fedrep
from fedtune.errors import UsageError
from fedtune.federated.client import Client
from fedtune.federated.personal import over_clients, personal_names
from fedtune.tensors import assign_, num_bytes, travelling

Make = Callable[..., Any]
FOUR = {"num_clients": 4, "batch_size": 8, "split": "by_author"}


def kept_by(folder: Path, client: int) -> dict[str, torch.Tensor]:
    newest = max((folder / "clients" / f"{client:06d}").iterdir())
    return {name.removeprefix("personal/"): tensor for name, tensor in load_file(newest).items()}


@pytest.mark.parametrize("name", ["fedper", "fedrep", "ditto"])
def test_own_accuracy_is_that_of_the_shared_model_with_what_the_client_kept(
    name: str, make_data: Make, make_module: Make, tmp_path: Path
) -> None:
    module, data, folder = make_module(), make_data(**FOUR), tmp_path / "run"
    records = make_loop(max_rounds=3, clients_per_round=3, algorithm=name, run_dir=str(folder)).fit(module, data)
    unwritten = make_loop(max_rounds=3, clients_per_round=3, algorithm=name).fit(make_module(), make_data(**FOUR))
    assert without_times(records) == without_times(unwritten)
    took_part = {client for record in records for client in record.cohort}
    shared, here, found = weights_of(module), travelling(module), []
    labels = np.array([data.task.labels[row] for row in data._by_length(data.task.parts["validation"])])
    for client in range(4):
        own = kept_by(folder, client) if client in took_part else {}
        assert all("classifier" in key for key in own) or name == "ditto"
        assign_({key: here[key] for key in own}, own)
        module.eval()
        with torch.no_grad():
            answers = [
                module.network(batch["input_ids"], batch["attention_mask"]).logits.argmax(1) for batch in data.val_dataloader()
            ]
        right = (torch.cat(answers).numpy() == labels).astype(float)
        by_author = data.task.authors[data._by_length(data.task.parts["validation"])]
        mine = data.task.authors[data.client_indices[client]]
        known = [right[by_author == author].mean() for author in mine if (by_author == author).any()]
        found.append(float(np.mean(known)))
        assign_({key: here[key] for key in own}, shared)
    last = records[-1]
    assert last.own_accuracy == pytest.approx(found, abs=1e-9)
    assert last.own_accuracy_mean == pytest.approx(np.mean(found))
    assert last.own_accuracy_worst_decile == min(found)
    assert last.shared_accuracy_mean == pytest.approx(np.mean(last.client_accuracy))
    assert_equal(weights_of(module), shared)


def test_what_stays_does_not_travel_and_a_client_that_was_away_finds_its_own(
    make_data: Make, make_module: Make, tmp_path: Path
) -> None:
    module, folder = make_module(), tmp_path / "run"
    head = {name: tensor.clone() for name, tensor in travelling(module).items() if "classifier" in name}
    records = make_loop(max_rounds=5, clients_per_round=2, algorithm=fedper(), run_dir=str(folder), keep=9).fit(
        module, make_data(**FOUR)
    )
    whole = num_bytes(travelling(module)) - num_bytes(head)
    assert all(record.bytes_up == record.bytes_down == 2 * whole for record in records)
    assert all(torch.equal(tensor, travelling(module)[name]) for name, tensor in head.items())  # the server's stay as they were
    for client in range(4):
        rounds = [record.round for record in records if client in record.cohort]
        files = sorted(int(file.stem) for file in (folder / "clients" / f"{client:06d}").glob("*"))
        assert files == rounds
    # a client's head is what it was after its last round, and not that of another
    assert len({kept_by(folder, client)["network.classifier.bias"].sum().item() for client in range(4)}) == 4


def test_a_resumed_run_of_personal_models_ends_with_the_same_bits(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    for name in ("fedrep", "ditto"):
        whole, again, folder = make_module(), make_module(), str(tmp_path / name)
        options: dict[str, Any] = {"algorithm": name, "clients_per_round": 3}
        one = make_loop(max_rounds=4, **options).fit(whole, make_data(**FOUR))
        make_loop(max_rounds=2, run_dir=folder, **options).fit(make_module(), make_data(**FOUR))
        other = make_loop(max_rounds=4, run_dir=folder, **options).fit(again, make_data(**FOUR))
        assert_equal(weights_of(whole), weights_of(again))
        assert without_times(one) == without_times(other)


def test_dittos_shared_model_is_fedavgs(make_data: Make, make_module: Make) -> None:
    one, other = make_module(dropout=0.2), make_module(dropout=0.2)
    make_loop(max_rounds=2, algorithm={"name": "ditto", "epochs": 2}).fit(one, make_data(**FOUR))
    make_loop(max_rounds=2).fit(other, make_data(**FOUR))
    assert_equal(weights_of(one), weights_of(other))


def test_fedrep_trains_what_is_its_own_first_and_then_what_is_shared(
    make_data: Make, make_module: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[set[str]] = []
    train = Client.train

    def watched(client: Client, *arguments: Any, **options: Any) -> Any:
        module = client._worker.training.module
        before = {name: tensor.clone() for name, tensor in travelling(module).items()}
        report = train(client, *arguments, **options)
        after = travelling(module)
        moved.append({name for name, tensor in before.items() if not torch.equal(tensor, after[name])})
        return report

    monkeypatch.setattr(Client, "train", watched)
    module = make_module()
    make_loop(max_rounds=1, algorithm=fedrep(own_epochs=2)).fit(module, make_data())
    own, shared = moved[0], moved[1]
    assert own
    assert all("classifier" in name for name in own)
    assert not any("classifier" in name for name in shared)
    assert shared
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_what_is_personal_is_meant_by_presets_and_patterns() -> None:
    names = ["net.embeddings.word.weight", "net.layer.0.LayerNorm.weight", "net.layer.0.dense.weight", "net.classifier.bias"]
    assert personal_names(["head"], names) == {"net.classifier.bias"}
    assert personal_names(["embeddings", "net.layer.0.LayerNorm*"], names) == set(names[:2])
    assert personal_names([], names) == frozenset()
    with pytest.raises(UsageError, match=r"algorithm.personal: got 'heads'; allowed: head, embeddings, .* or a pattern"):
        personal_names(["heads"], names)
    with pytest.raises(UsageError, match=r"algorithm.personal: got \['\*'\]; allowed: a part of the tensors"):
        personal_names(["*"], names)


def test_a_pattern_that_means_nothing_is_refused_before_anything_is_trained(make_data: Make, make_module: Make) -> None:
    algorithm = replace(fedavg(), personal=("net.*",))
    with pytest.raises(UsageError, match=r"algorithm\.personal"):
        make_loop(algorithm=algorithm).fit(make_module(), make_data())


def test_over_clients_takes_those_that_are_known() -> None:
    found = over_clients("own", [0.1 * value for value in range(20)] + [None])
    assert found["own_worst_decile"] == pytest.approx(0.05)
    assert found["own_mean"] == pytest.approx(0.95)
    assert over_clients("own", [None]) == {}
    assert isinstance(fedtune.ALGORITHMS["fedper"](), fedtune.Algorithm)
