"""The preset against a second implementation of the protocol, written from its description with torch alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import GivenLoaders, make_loop, weights_of
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, random_split

import fedtune
from fedtune.data.registry import load_task
from fedtune.randomness import stream

LENGTH, BATCH, ROUNDS, EPOCHS, RATE = 48, 8, 3, 2, 0.05
SMALL = {"vocab_size": 30522, "max_position_embeddings": LENGTH}
CONFIGS = {
    "bert": transformers.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **SMALL),
    "distilbert": transformers.DistilBertConfig(dim=16, n_layers=2, n_heads=2, hidden_dim=32, **SMALL),
    "albert": transformers.AlbertConfig(
        embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **SMALL
    ),
}

# ---------------------------------------------------------------- the judge: torch only


def divided(data: Dataset[Any], labels: torch.Tensor, clients: int, iid: bool) -> list[Subset[Any]]:
    n = len(labels) // clients
    if iid:
        return random_split(Subset(data, range(n * clients)), [n] * clients, generator=torch.Generator())
    order = torch.argsort(labels)
    return [Subset(data, order[k * n : (k + 1) * n].tolist()) for k in range(clients)]


def judge(
    model: torch.nn.Module,
    train: Any,
    test: Any,
    clients: int,
    iid: bool,
    seed_of: Callable[[int, int], int],
    starts: list[Any],
) -> tuple[list[dict[str, torch.Tensor]], list[tuple[float, float]]]:
    """Weights, and (loss, accuracy), after each round that begins with the weights in `starts`.

    Rounds do not go on from the judge's own weights: one rounding apart, and steps on sorted texts would drive them further
    apart than any fault.
    """
    parts, test_parts = (divided(data, data.tensors[1], clients, iid) for data in (train, test))
    servers, curve = [], []
    for number, start in enumerate(starts, 1):
        sent = []
        for k in range(clients):
            load(model, start)
            model.train()
            torch.manual_seed(seed_of(number, k))
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
            for _ in range(EPOCHS):
                for ids, labels in DataLoader(parts[k], batch_size=BATCH, shuffle=False, drop_last=True):
                    optimizer.zero_grad()
                    F.cross_entropy(model(input_ids=ids).logits, labels).backward()
                    optimizer.step()
            sent.append(weights_of(model))
        servers.append({name: torch.stack([weights[name] for weights in sent]).mean(0) for name in start})
        load(model, servers[-1])
        model.eval()
        of_clients = []
        for part in test_parts:
            values = []
            with torch.no_grad():
                for ids, labels in DataLoader(part, batch_size=20):
                    logits = model(input_ids=ids).logits
                    right = (logits.argmax(1) == labels).float().mean()
                    values.append((F.cross_entropy(logits, labels).item(), right.item()))
            of_clients.append(np.mean(values, axis=0))
        curve.append(tuple(np.mean(of_clients, axis=0)))
    return servers, curve


def load(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


# ---------------------------------------------------------------- the comparison


@pytest.fixture(scope="module")
def task() -> fedtune.TextTask:
    """Real text: 203 passages to train on and 61 to test, by four authors in turn; neither number is round."""
    whole, rows = load_task("authors"), {}
    for part, count in (("train", 203), ("test", 61)):
        of_authors = [[row for row in whole.parts[part] if whole.labels[row] == author] for author in (0, 5, 8, 15)]
        rows[part] = [author[i] for i in range(count) for author in of_authors if i < len(author)][:count]
    chosen = rows["train"] + rows["test"]
    numbers = {0: 0, 5: 1, 8: 2, 15: 3}
    parts = {"train": np.arange(203), "validation": np.arange(0), "test": np.arange(203, 264)}
    labels = np.asarray([numbers[int(whole.labels[row])] for row in chosen])
    texts = [" ".join(whole.texts[row].split()[: 8 + 5 * (i % 7)]) for i, row in enumerate(chosen)]  # so that there is padding
    return fedtune.TextTask("four", texts, labels, tuple("abcd"), parts)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("hilmkil")
    for name, config in CONFIGS.items():
        torch.manual_seed(3)
        transformers.AutoModel.from_config(config).save_pretrained(root / name)
    return {name: str(root / name) for name in CONFIGS}


class Servers(fedtune.FederatedCallback):
    """Keeps the server's weights before the first round and after each."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_fit_start(self, run: Any, module: Any) -> None:
        self.weights.append(weights_of(module.network))

    def on_round_end(self, run: Any, module: Any, record: Any) -> None:
        self.weights.append(weights_of(module.network))


def ours(task: fedtune.TextTask, folder: str, clients: int, iid: bool, dropout: float, **changes: Any) -> Any:
    """The data module, the server's weights before and after each round, and the records."""
    options = {"padding": "max_length", "mask": False, "shuffle": False, "drop_last": True, "eval_batch_size": 20} | changes
    split = "hilmkil_iid" if iid else "hilmkil_sorted"
    data = fedtune.FederatedDataModule(
        task, folder, clients, split, tokenizer="minilm", batch_size=BATCH, max_length=LENGTH, **options
    )
    module, servers = fedtune.build_classifier(folder, 4, optimizer="sgd", learning_rate=RATE, dropout=dropout), Servers()
    loop = make_loop(
        max_rounds=ROUNDS,
        local_epochs=EPOCHS,
        evaluate_on="test",
        evaluation="clients",
        algorithm={"name": "fedavg", "weighting": "uniform"},
        seed=5,
        fast_dropout=False,
        callbacks=[servers],
    )
    loop.fit(module, data)
    return data, servers.weights, loop.history


def verdict(task: fedtune.TextTask, folder: str, data: Any, clients: int, iid: bool, dropout: float, starts: Any) -> Any:
    store, labels = data.tokens, torch.from_numpy(task.labels)
    sets = [
        TensorDataset(store.batch(rows, LENGTH)["input_ids"], labels[rows])
        for rows in (torch.from_numpy(task.parts[part]) for part in ("train", "test"))
    ]
    model = fedtune.build_classifier(folder, 4, dropout=dropout).network  # the same network, and from here on plain torch
    return judge(model, *sets, clients, iid, lambda number, k: int(stream(5, "client", number, k).integers(2**63)), starts)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative to the size of the whole tensor; of a tensor near zero (a key's bias has no gradient) to 0.05."""
    return max(float((one[name].detach() - other[name]).norm() / other[name].norm().clamp(min=0.05)) for name in other)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("iid", [True, False], ids=["iid", "sorted"])
@pytest.mark.parametrize("clients", [1, 2, 4])
@pytest.mark.parametrize("family", CONFIGS)
def test_hilmkil_preset_computes_what_a_plain_implementation_does(
    family: str, clients: int, iid: bool, dropout: float, task: fedtune.TextTask, folders: dict[str, str]
) -> None:
    data, weights, history = ours(task, folders[family], clients, iid, dropout)
    fresh = fedtune.build_classifier(folders[family], 4, dropout=dropout).network
    assert largest_difference(weights[0], weights_of(fresh)) == 0  # the judge's first round begins where a fresh model does
    expected, curve = verdict(task, folders[family], data, clients, iid, dropout, weights[:-1])
    for found, server in zip(weights[1:], expected, strict=True):
        assert largest_difference(found, server) < 1e-6
    assert [record.accuracy for record in history] == pytest.approx([accuracy for _, accuracy in curve], abs=1e-7)
    assert [record.loss_nats for record in history] == pytest.approx([loss for loss, _ in curve], rel=1e-5)
    assert len({record.loss_nats for record in history}) == ROUNDS  # something was learnt that could differ


@pytest.mark.parametrize("mutation", [{"mask": True}, {"drop_last": False}, {"shuffle": True}], ids=str)
def test_hilmkil_judge_notices_a_mutation(mutation: dict, task: fedtune.TextTask, folders: dict[str, str]) -> None:
    data, weights, _ = ours(task, folders["bert"], 2, True, 0.0, **mutation)
    expected, _ = verdict(task, folders["bert"], data, 2, True, 0.0, weights[:-1])
    assert largest_difference(weights[-1], expected[-1]) > 1e-4


def test_hilmkil_mean_is_not_weighted_by_examples(folders: dict[str, str]) -> None:
    """The protocol's clients are equally large, so only unequal ones can tell the two means apart."""
    batches = [torch.randint(5, 999, (n, 9), generator=torch.Generator().manual_seed(n)) for n in (3, 9)]
    clients = [[{"input_ids": ids, "labels": torch.arange(len(ids)) % 4}] for ids in batches]

    def after(chosen: list[int], weighting: str) -> dict[str, torch.Tensor]:
        module = fedtune.build_classifier(folders["bert"], 4, optimizer="sgd", learning_rate=RATE, dropout=0.0)
        data = GivenLoaders([clients[k] for k in chosen], clients[0])
        make_loop(max_rounds=1, algorithm={"weighting": weighting}).fit(module, data)
        return weights_of(module)

    alone = [after([k], "uniform") for k in (0, 1)]
    plain = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    weighted = {name: (3 * alone[0][name] + 9 * alone[1][name]) / 12 for name in alone[0]}
    assert largest_difference(after([0, 1], "uniform"), plain) < 1e-6
    assert largest_difference(after([0, 1], "examples"), weighted) < 1e-6
    assert largest_difference(plain, weighted) > 1e-4


def test_hilmkil_accuracy_has_one_definition(task: fedtune.TextTask, folders: dict[str, str]) -> None:
    """The last round's, the summary's and that of `test` are one number, which is not the share of all right answers."""
    data = fedtune.FederatedDataModule(
        task, folders["bert"], 3, "hilmkil_sorted", tokenizer="minilm", batch_size=BATCH, max_length=LENGTH, eval_batch_size=17
    )
    module = fedtune.build_classifier(folders["bert"], 4, optimizer="sgd", learning_rate=RATE)
    loop = make_loop(max_rounds=1, evaluate_on="test", evaluation="clients", baselines=("centralised",))
    loop.fit(module, data)
    last = loop.history[-1].accuracy
    assert loop.summary["accuracy"] == loop.summary["test_accuracy"] == last
    assert loop.summary["centralised_accuracy"] == loop.baseline_runs["centralised"][-1].accuracy
    assert loop.test(module, data)[0]["accuracy"] == last
    assert make_loop(max_rounds=1).test(module, data)[0]["accuracy"] != last


def test_hilmkil_files_are_the_protocol() -> None:
    import yaml

    folder = Path(fedtune.__file__).parent / "experiments" / "hilmkil2021"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for file in files:
        config = yaml.safe_load(file.read_text())
        expected = {"max_rounds": 100, "local_epochs": 2, "baselines": [], "evaluate_on": "test", "precision": "32-true"}
        expected |= {"algorithm": {"name": "fedavg", "weighting": "uniform"}}
        expected |= {"options": {"evaluation": "clients", "fast_dropout": False}}
        assert config["loop"] == expected
        assert config["model"].items() >= {"optimizer": "sgd", "learning_rate": 2e-5}.items()
        batches = {"batch_size": 32, "eval_batch_size": 512, "max_length": 128, "padding": "max_length"}
        assert config["data"].items() >= (batches | {"mask": False, "shuffle": False, "drop_last": True}).items()
