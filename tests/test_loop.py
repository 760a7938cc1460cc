"""The identities that make a federated number trustworthy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import GivenLoaders, assert_equal, assert_near, make_loop, make_task, weights_of, without_times
from lightning_fabric import Fabric
from pytorch_lightning.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

import fedtune
from fedtune.federated.batches import exactly
from fedtune.federated.evaluation import attached
from fedtune.federated.state import ServerState
from fedtune.federated.training import Training
from fedtune.randomness import seeded
from fedtune.runs.baselines import centralised
from fedtune.tensors import snapshot, travelling

Make = Callable[..., Any]
NO_DROPOUT = {"dropout": 0.0}


def plain_trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", devices=1, num_sanity_val_steps=0, **(quiet | options))


@pytest.mark.filterwarnings("ignore")  # a plain Trainer has opinions on loaders without workers
def test_one_client_with_all_data_in_one_round_is_ordinary_training(make_data: Make, make_module: Make) -> None:
    data, federated, ordinary = make_data(num_clients=1), make_module(**NO_DROPOUT), make_module(**NO_DROPOUT)
    batches = list(data.train_dataloader())
    loader = DataLoader(batches, batch_size=None)
    make_loop(max_rounds=1, local_epochs=2).fit(federated, GivenLoaders([loader], data.val_dataloader()))
    plain_trainer(max_epochs=2, limit_val_batches=0).fit(ordinary, loader)
    assert_near(weights_of(federated), weights_of(ordinary))


@pytest.mark.filterwarnings("ignore:batch_size")
def test_one_full_batch_sgd_step_a_client_is_one_on_the_pooled_data(make_data: Make, make_module: Make) -> None:
    options = {"optimizer": "sgd", "learning_rate": 0.5, **NO_DROPOUT}
    clients = make_data(split="by_author", batch_size=1000)
    assert len({len(part) for part in clients.client_indices}) > 1  # the weights of the mean matter
    federated, pooled = make_module(**options), make_module(**options)
    make_loop(max_rounds=1).fit(federated, clients)
    make_loop(max_rounds=1).fit(pooled, make_data(num_clients=1, batch_size=1000))
    assert_near(weights_of(federated), weights_of(pooled))


@pytest.mark.parametrize("warmup", [0, 11])
def test_four_rounds_are_two_a_stop_and_two_more_bit_for_bit(
    make_data: Make, make_module: Make, tmp_path: Any, warmup: int
) -> None:
    options = {"clients_per_round": 2, "baselines": ["centralised", "local"]}
    through, stopped = (
        make_loop(max_rounds=4, run_dir=str(tmp_path / "a"), **options),
        {"run_dir": str(tmp_path / "b"), **options},
    )
    one, other = make_module(warmup_steps=warmup), make_module(warmup_steps=warmup)
    through.fit(one, make_data())
    make_loop(max_rounds=2, **stopped).fit(make_module(warmup_steps=warmup), make_data())
    resumed = make_loop(max_rounds=4, **stopped)
    resumed.fit(other, make_data())
    assert_equal(weights_of(one), weights_of(other))
    assert without_times(through.history) == without_times(resumed.history)
    assert without_times(through.baseline_runs["centralised"]) == without_times(resumed.baseline_runs["centralised"])
    strip = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in loop.baseline_runs["local"]] for loop in (through, resumed)
    ]
    assert strip[0] == strip[1]
    names = [{k for k in loop.summary if k not in ("seconds", "peak_memory_bytes")} for loop in (through, resumed)]
    assert {k: through.summary[k] for k in names[0]} == {k: resumed.summary[k] for k in names[1]}


def test_the_order_in_which_clients_train_changes_nothing(
    make_data: Make, make_module: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = make_module(), make_module()
    first = make_loop().fit(one, make_data())
    monkeypatch.setattr("fedtune.runs.loop.cohort", lambda *_: [2, 0, 1])
    second = make_loop().fit(other, make_data())
    assert_equal(weights_of(one), weights_of(other))
    for record, again in zip(without_times(first), without_times(second), strict=True):
        clients = [sorted(one.pop("clients"), key=lambda report: report["client"]) for one in (record, again)]
        assert clients[0] == clients[1]  # each client's batches and dropout are its own
        losses = [one.pop("train_loss_nats") for one in (record, again)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-14)
        assert record == again


def seen_and_losses(make_data: Make, module: fedtune.BertClassifier, **options: Any) -> tuple[list[Any], list[float]]:
    """The batches of a run in their order, and the training losses."""
    seen, step = [], module.training_step
    module.training_step = lambda batch, batch_idx: seen.append(batch["input_ids"].tolist()) or step(batch, batch_idx)  # type: ignore[method-assign]
    history = make_loop(max_rounds=1, **options).fit(module, make_data())
    return seen, [client.train_loss_nats for client in history[0].clients]


def test_the_seed_changes_batches_and_dropout(make_data: Make, make_module: Make) -> None:
    (one, same, other) = (seen_and_losses(make_data, make_module(), seed=seed) for seed in (0, 0, 1))
    assert one == same
    assert one[0] != other[0]
    fixed = [{"input_ids": torch.ones(8, 6, dtype=torch.long) * 7, "labels": torch.zeros(8, dtype=torch.long)}]
    losses = []
    for seed in (0, 1):
        loaders = GivenLoaders([DataLoader(fixed, batch_size=None)], DataLoader(fixed, batch_size=None))
        losses.append(make_loop(max_rounds=1, seed=seed).fit(make_module(), loaders)[0].train_loss_nats)
    assert losses[0] != losses[1]  # the same batch and weights: only dropout is left to differ


def test_a_round_leaves_the_global_generator_alone(make_data: Make, make_module: Make) -> None:
    module, data = make_module(), make_data()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    make_loop(max_rounds=1).fit(module, data)
    assert torch.equal(before, torch.random.get_rng_state())


def test_metrics_do_not_depend_on_how_examples_are_batched(make_data: Make, make_module: Make) -> None:
    module, results = make_module(), []
    for size in (1, 7, 1000):
        results += make_loop().validate(module, make_data(eval_batch_size=size))
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-5)
    assert set(results[0]) == {"loss_nats", "accuracy", "macro_f1"}


def test_pooled_loss_is_the_example_weighted_mean_of_the_clients(make_data: Make, make_module: Make) -> None:
    module, data = make_module(), make_data(split="by_author")
    sizes = [len(part) for part in data.client_indices]

    def loss(loader: Any) -> float:
        return make_loop().validate(module, GivenLoaders([loader], loader))[0]["loss_nats"]

    losses, pooled = [loss(data.client_dataloader(k)) for k in range(3)], loss(data.train_dataloader())
    assert pooled == pytest.approx(sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / sum(sizes), rel=1e-6)


def test_the_record_says_what_the_round_did(make_data: Make, make_module: Make) -> None:
    module, data = make_module(), make_data(split="by_author")
    record = make_loop(max_rounds=1, local_epochs=2).fit(module, data)[0]
    texts = sum(map(len, data.client_indices))
    assert record.num_examples == 2 * texts
    assert record.num_clients == 3
    assert record.num_tokens == 2 * sum(row["tokens"] for row in data.describe())
    assert record.num_steps == sum(2 * -(-len(part) // 8) for part in data.client_indices)
    assert record.bytes_up == record.bytes_down == 3 * sum(p.numel() * 4 for p in module.parameters())
    assert record.seconds >= record.seconds_train + record.seconds_aggregate + record.seconds_evaluate - 1e-6
    assert record.accuracy == record.to_dict()["accuracy"]
    assert all(client.update_norm > 0 for client in record.clients)
    with pytest.raises(AttributeError, match="the module logged"):
        record.perplexity  # noqa: B018


@pytest.mark.parametrize("part", ["validation", "test"])
def test_accuracy_for_a_client_is_that_on_texts_mixed_like_its_own(make_data: Make, make_module: Make, part: str) -> None:
    module, data = make_module(), make_data(split="by_author", skew=0.5)
    record = make_loop(max_rounds=1, evaluate_on=part).fit(module, data)[0]
    rows, task = data.task.parts[part], data.task
    batch = data.tokens.batch(torch.from_numpy(rows))
    right = module.eval()(**batch).argmax(-1).numpy() == task.labels[rows]
    of_author = {author: right[task.authors[rows] == author].mean() for author in set(task.authors[rows].tolist())}
    assert len(of_author) == 6
    for client, mine in enumerate(data.client_indices):
        expected = sum(of_author[author] for author in task.authors[mine].tolist()) / len(mine)
        assert record.client_accuracy[client] == pytest.approx(expected)
    if part == "validation":
        assert fedtune.RoundRecord.from_dict(record.to_dict()) == record


def test_accuracy_for_a_client_leaves_out_what_the_part_does_not_have(make_data: Make) -> None:
    data = make_data(num_clients=6, split="by_author", skew=1.0)
    held_out = data.task.parts["validation"]
    absent = int(data.task.authors[data.client_indices[2]][0])
    parts = data.task.parts | {"validation": held_out[data.task.authors[held_out] != absent]}
    data = make_data(task=dataclasses.replace(data.task, parts=parts), num_clients=6, split="by_author", skew=1.0)
    found = data.client_accuracy("validation", torch.ones(len(parts["validation"]), dtype=torch.bool))
    assert found == [None if client == 2 else 1.0 for client in range(6)]


def test_without_the_agreement_weights_and_norms_are_the_same(make_data: Make, make_module: Make) -> None:
    modules, records = [make_module(), make_module()], []
    for module, agreement in zip(modules, (True, False), strict=True):
        records.append(make_loop(agreement=agreement).fit(module, make_data())[-1])
    assert_equal(weights_of(modules[0]), weights_of(modules[1]))
    assert records[0].mean_update_norm == pytest.approx(records[1].mean_update_norm, rel=1e-6)
    assert [c.update_norm for c in records[0].clients] == pytest.approx([c.update_norm for c in records[1].clients], rel=1e-6)
    assert (records[1].update_cosine, records[1].drift) == (None, {})
    assert records[0].update_cosine is not None
    assert records[0].drift


def test_frozen_layers_neither_change_nor_travel(make_data: Make, make_module: Make) -> None:
    module = make_module(freeze_embeddings=True, freeze_layers=1)
    before = weights_of(module)
    record = make_loop(max_rounds=1).fit(module, make_data())[0]
    changed = {name for name, value in weights_of(module).items() if not torch.equal(value, before[name])}
    assert not [name for name in changed if "embeddings" in name or "layer.0." in name]
    assert [name for name in changed if "layer.1." in name]
    assert record.bytes_up == 3 * sum(p.numel() * 4 for p in module.parameters() if p.requires_grad)


def test_federated_training_learns(make_data: Make, make_module: Make) -> None:
    data = make_data(task=make_task(texts_per_author=80))
    history = make_loop(max_rounds=12).fit(make_module(), data)
    assert history[-1].accuracy > 0.45 > 0.4 > data.majority_accuracy("validation")
    assert history[-1].loss_nats < 0.9 < math.log(3)
    assert history[-1].loss_nats < history[0].loss_nats


@pytest.mark.filterwarnings("ignore")
def test_the_same_module_and_data_work_in_a_plain_trainer_before_and_after(make_data: Make, make_module: Make) -> None:
    module, data = make_module(), make_data()
    for _ in range(2):
        trainer = plain_trainer(max_epochs=1)
        trainer.fit(module, data)
        assert set(trainer.callback_metrics) >= {"loss_nats", "accuracy", "macro_f1", "train_loss_nats"}
        assert trainer.test(module, data, verbose=False)[0]["accuracy"] > 0
        before = weights_of(module)
        make_loop(max_rounds=1).fit(module, data)
        assert any(not torch.equal(value, before[name]) for name, value in weights_of(module).items())


class LoggingBoring(BoringModel):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("mean_input", batch.mean())

    def on_validation_epoch_end(self) -> None:
        self.log("epoch_end", 3.0)


def test_lightnings_boring_model_is_federated_unchanged() -> None:
    sizes = [(32, 10), (32, 64), (32, 5)]
    torch.manual_seed(0)
    clients = [DataLoader(RandomDataset(*size), batch_size=4, shuffle=True) for size in sizes]
    validation = RandomDataset(32, 10)
    module = BoringModel()
    before = weights_of(module)
    history = make_loop().fit(module, GivenLoaders(clients, DataLoader(validation, batch_size=4)))
    assert [record.num_examples for record in history] == [79, 79]
    assert any(not torch.equal(value, before[name]) for name, value in weights_of(module).items())
    logged = make_loop(max_rounds=1).fit(LoggingBoring(), GivenLoaders(clients, DataLoader(validation, batch_size=4)))[0]
    # ten rows in batches of 4, 4, 2: only a mean over examples gives the mean of the data
    assert logged.mean_input == pytest.approx(float(validation.data.mean()), rel=1e-5)
    assert logged.epoch_end == 3.0


def test_schedules_go_on_where_the_last_round_stopped(make_data: Make, make_module: Make) -> None:
    rates: list[float] = []

    class Spy(fedtune.FederatedCallback):
        def on_client_end(self, run: Any, module: Any, report: Any) -> None:
            rates.append(last["rate"])

    module, last = make_module(warmup_steps=20, learning_rate=1.0e-3), {}
    configure = module.configure_optimizers

    def remember() -> Any:
        found = configure()
        found["optimizer"].register_step_pre_hook(lambda optimizer, *_: last.update(rate=optimizer.param_groups[0]["lr"]))
        return found

    module.configure_optimizers = remember
    data = make_data()
    make_loop(max_rounds=3, callbacks=[Spy()]).fit(module, data)
    steps = -(-len(data.client_indices[0]) // 8)
    assert rates[::3] == pytest.approx([1e-3 * min(1.0, steps * r / 20) for r in (1, 2, 3)])


def test_callbacks_are_called_in_order_and_can_stop_the_run(make_data: Make, make_module: Make) -> None:
    calls: list[str] = []

    class Spy(fedtune.FederatedCallback):
        def on_fit_start(self, run: Any, module: Any) -> None:
            calls.append("fit")

        def on_round_start(self, run: Any, module: Any, number: int) -> None:
            calls.append(f"start {number}")

        def on_client_end(self, run: Any, module: Any, report: Any) -> None:
            calls.append(f"client {report.client}")

        def on_round_end(self, run: Any, module: Any, record: Any) -> None:
            calls.append(f"end {record.round}")
            run.should_stop = record.round == 1

        def on_fit_end(self, run: Any, module: Any) -> None:
            calls.append(f"done {run.summary['rounds']}")

    make_loop(max_rounds=5, callbacks=[Spy()]).fit(make_module(), make_data())
    assert calls == ["fit", "start 1", "client 0", "client 1", "client 2", "end 1", "done 1"]


def test_the_centralised_baseline_sees_exactly_as_many_examples(make_data: Make, make_module: Make) -> None:
    loop = make_loop(max_rounds=3, clients_per_round=2, local_epochs=2, baselines=["centralised"])
    loop.fit(make_module(), make_data(split="by_author"))
    pooled = loop.baseline_runs["centralised"]
    assert [record.num_examples for record in pooled] == [record.num_examples for record in loop.history]
    assert loop.summary["centralised_accuracy"] is not None
    assert loop.summary["local_accuracy"] is None


def test_gradients_left_by_somebody_else_change_nothing(make_data: Make, make_module: Make) -> None:
    clean, stained = make_module(), make_module()
    for parameter in stained.parameters():
        parameter.grad = torch.ones_like(parameter)
    for module in (clean, stained):
        make_loop(max_rounds=1).fit(module, make_data())
    assert_equal(weights_of(clean), weights_of(stained))


def test_baselines_start_where_the_federation_started_also_after_a_resume(
    make_data: Make, make_module: Make, tmp_path: Any
) -> None:
    module, options = make_module(), {"run_dir": str(tmp_path / "r"), "baselines": ["centralised", "local"]}
    make_loop(max_rounds=1, **options).fit(module, make_data())
    again, fresh = make_loop(max_rounds=2, **options), make_loop(max_rounds=2, baselines=["centralised", "local"])
    again.fit(module, make_data())  # the module holds trained weights by now
    fresh.fit(make_module(), make_data())
    for name in ("centralised_accuracy", "local_accuracy", "accuracy"):
        assert again.summary[name] == fresh.summary[name]
    assert without_times(again.baseline_runs["centralised"]) == without_times(fresh.baseline_runs["centralised"])


def test_a_baseline_is_shared_only_by_runs_with_the_same_module_and_text(
    make_data: Make, make_module: Make, tmp_path: Any
) -> None:
    options = {"baselines": ["centralised"], "baseline_dir": str(tmp_path / "b"), "max_rounds": 1}
    make_loop(**options).fit(make_module(), make_data())
    make_loop(**options).fit(make_module(seed=1), make_data())
    make_loop(**options).fit(make_module(), make_data(task=make_task(seed=1)))
    make_loop(**options).fit(make_module(), make_data())
    assert len(list((tmp_path / "b").iterdir())) == 3


def test_fewer_rounds_than_a_directory_has_are_refused(make_data: Make, make_module: Make, tmp_path: Any) -> None:
    make_loop(max_rounds=2, run_dir=str(tmp_path)).fit(make_module(), make_data())
    with pytest.raises(fedtune.UsageError, match="max_rounds: got 1; allowed: 2 or more"):
        make_loop(max_rounds=1, run_dir=str(tmp_path)).fit(make_module(), make_data())


def files_of(folder: Path) -> dict[str, bytes]:
    """What a folder has, but for who has its lock."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.startswith(".lock"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


class Refuses(fedtune.FederatedCallback):
    """A callback that does not want to go on."""

    def on_fit_start(self, run: Any, module: Any) -> None:
        raise fedtune.UsageError("a callback", 1, "nothing")


def test_a_refused_command_rewrites_nothing_in_the_directory_of_a_run(
    make_data: Make, make_module: Make, tmp_path: Path
) -> None:
    private = {
        "privacy": {"name": "Gaussian", "noise": 1.0, "delta": 1e-3},
        "algorithm": {"name": "fedavg", "aggregator": {"weighting": "uniform"}},
        "run_dir": str(tmp_path),
    }
    make_loop(max_rounds=3, **private, keep=2).fit(make_module(), make_data())
    before = files_of(tmp_path)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"max_rounds": 1}, "max_rounds: got 1; allowed: 3 or more"),
        ({"max_rounds": 9, "callbacks": [Refuses()], "keep": 1}, "a callback: got 1"),
        ({"max_rounds": 9, "seed": 1}, "run_dir: got"),
    ]
    for options, said in refused:
        with pytest.raises(fedtune.UsageError, match=said):
            make_loop(**(private | options)).fit(make_module(), make_data())
        after = files_of(tmp_path)
        assert [name for name in {**before, **after} if before.get(name) != after.get(name)] == []


def test_a_command_refused_in_a_new_directory_leaves_it_to_the_next(tmp_path: Path) -> None:
    loader, options = DataLoader(RandomDataset(32, 8), batch_size=4), {"max_rounds": 1, "run_dir": str(tmp_path)}
    with pytest.raises(fedtune.UsageError, match="evaluate_on: got 'test'"):
        make_loop(evaluate_on="test", **options).fit(BoringModel(), GivenLoaders([loader], loader))
    assert len(make_loop(**options).fit(BoringModel(), GivenLoaders([loader], loader))) == 1


class Steps(BoringModel):
    """Steps without the number of the batch, and one metric under two names: a Trainer takes both."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = MeanMetric()

    def training_step(self, batch: Any) -> Any:  # type: ignore[override]
        return super().training_step(batch, 0)

    def validation_step(self, batch: Any) -> None:  # type: ignore[override]
        self.seen.update(batch.mean())
        self.log("one", self.seen)
        self.log("other", self.seen)


def test_steps_without_batch_idx_and_a_metric_under_two_names_work_as_in_a_trainer() -> None:
    loaders = GivenLoaders([DataLoader(RandomDataset(32, 8), batch_size=4)], DataLoader(RandomDataset(32, 8), batch_size=4))
    record = make_loop(max_rounds=1).fit(Steps(), loaders)[0]
    assert record.one == record.other != 0


def test_a_part_that_the_data_do_not_have_is_refused() -> None:
    loader = DataLoader(RandomDataset(32, 8), batch_size=4)
    with pytest.raises(fedtune.UsageError, match="evaluate_on: got 'test'; allowed: a part that the data have"):
        make_loop(evaluate_on="test").fit(BoringModel(), GivenLoaders([loader], loader))


def test_an_accelerator_that_is_not_there_is_refused(make_data: Make, make_module: Make) -> None:
    with pytest.raises(fedtune.UsageError, match="accelerator: got 'gpuu'; allowed: one that this machine has"):
        make_loop(accelerator="gpuu").fit(make_module(), make_data())


def test_the_batches_of_a_faithful_preset_are_fixed_unmasked_and_whole(make_data: Make) -> None:
    data = make_data(shuffle=False, mask=False, drop_last=True, padding="max_length", split="hilmkil_sorted")
    one, again = ([batch["input_ids"] for batch in data.client_dataloader(0)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert {batch.shape for batch in one} == {(8, 24)}
    assert len(one) == len(data.client_indices[0]) // 8
    assert "attention_mask" not in next(iter(data.client_dataloader(0)))


def test_exactly_cuts_the_last_batch_and_goes_round_again() -> None:
    loader = DataLoader(torch.arange(10), batch_size=4)
    assert [[len(batch) for batch in one] for one in exactly(loader, 13)] == [[4, 4, 2], [3]]


def test_the_centralised_baseline_is_ordinary_training_with_one_optimizer(make_data: Make, make_module: Make) -> None:
    """Three rounds of one epoch are three epochs of a loop that never stops, though each round restores its optimizer."""
    data, plain = make_data(num_clients=1), make_module(**NO_DROPOUT)
    module = make_module(**NO_DROPOUT)
    training = Training(Fabric(accelerator="cpu", devices=1), module, seed=4)
    module.log = lambda *_, **__: None
    state = ServerState(0, snapshot(travelling(module)))
    with attached(training):
        for _ in range(3):
            state = centralised(training, state, data.train_dataloader(), len(data.client_indices[0]), 1).state
    optimizer = plain.configure_optimizers()["optimizer"]
    plain.log = lambda *_, **__: None
    for number in (1, 2, 3):
        with seeded(4, "centralised", number):
            for batch in data.train_dataloader():
                plain.training_step(batch, 0).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert_near(dict(state.weights), weights_of(plain))


def test_baselines_leave_the_averaged_weights_in_the_module(make_data: Make, make_module: Make) -> None:
    without, beside = make_module(), make_module()
    make_loop().fit(without, make_data())
    loop = make_loop(baselines=["centralised", "local"])
    loop.fit(beside, make_data())
    assert_equal(weights_of(without), weights_of(beside))
    assert len(loop.baseline_runs["local"]) == 3
    assert 0 <= loop.summary["local_accuracy"] <= 1


def test_runs_that_differ_in_the_split_share_the_centralised_baseline(
    make_data: Make, make_module: Make, tmp_path: Any
) -> None:
    options = {"baselines": ["centralised"], "baseline_dir": str(tmp_path / "baselines")}
    make_loop(run_dir=str(tmp_path / "a"), **options).fit(make_module(), make_data(split="iid"))
    make_loop(run_dir=str(tmp_path / "b"), **options).fit(make_module(), make_data(split="by_author", num_clients=2))
    uneven = make_data(split="quantity", exponent=0.5, num_clients=2)
    make_loop(run_dir=str(tmp_path / "uneven"), **options).fit(make_module(), uneven)
    assert len(list((tmp_path / "baselines").iterdir())) == 1
    make_loop(run_dir=str(tmp_path / "c"), **options).fit(make_module(learning_rate=1e-3), make_data())
    assert len(list((tmp_path / "baselines").iterdir())) == 2


def test_a_loss_that_is_nan_names_round_client_and_step_and_keeps_the_last_good_round(
    make_data: Make, make_module: Make, tmp_path: Any
) -> None:
    module = make_module()
    step, calls = module.training_step, []
    module.training_step = lambda batch, batch_idx: (
        calls.append(1),
        step(batch, batch_idx) * (float("nan") if len(calls) == 17 else 1),
    )[1]
    per_client = [-(-len(part) // 8) for part in make_data().client_indices]
    assert sum(per_client) < 17 <= sum(per_client) + per_client[0] + per_client[1]
    position = 17 - sum(per_client)
    client, at = (0, position) if position <= per_client[0] else (1, position - per_client[0])
    with pytest.raises(fedtune.RunError, match=f"round 2, client {client}, training step {at}: the loss became nan"):
        make_loop(max_rounds=3, run_dir=str(tmp_path)).fit(module, make_data())
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["round-0001"]


def test_an_error_in_a_module_says_where_and_keeps_its_cause(make_data: Make, make_module: Make) -> None:
    module = make_module()
    module.training_step = lambda batch, batch_idx: 1 / 0
    with pytest.raises(fedtune.RunError, match="round 1, client 0, training step 1: ZeroDivisionError") as caught:
        make_loop().fit(module, make_data())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_rounds": 0}, "max_rounds: got 0; allowed: 1 or more"),
        ({"local_epochs": -1}, "local_epochs: got -1"),
        ({"precision": "16"}, "precision: got '16'; allowed:"),
        ({"evaluate_on": "tset"}, "test (nearest)"),
        ({"logger": "wandbb"}, "wandb (nearest)"),
        ({"baselines": ["centralized"]}, "centralised (nearest)"),
        ({"clients_per_round": 4}, "clients_per_round: got 4; allowed: at most num_clients, 3"),
        ({"gradient_clip_val": -1.0}, "gradient_clip_val: got -1.0; allowed: 0 or more"),
    ],
)
def test_a_bad_value_of_the_loop_is_refused(make_data: Make, make_module: Make, options: dict, said: str) -> None:
    with pytest.raises(fedtune.UsageError) as caught:
        make_loop(**options).fit(make_module(), make_data())
    assert said in str(caught.value)


def test_old_names_of_arguments_work_for_a_while_with_a_line_that_says_so() -> None:
    with pytest.warns(
        FutureWarning, match="FederatedLoop: keep is now options.keep, weighting is now algorithm.weighting; the old"
    ):
        loop = fedtune.FederatedLoop(keep=5, weighting="uniform", algorithm="fedavgm")  # type: ignore[call-arg]
    assert loop.options == fedtune.RunOptions(keep=5)
    with pytest.warns(FutureWarning, match="progress is now options.progress"):
        loop = fedtune.FederatedLoop(progress=False, options=fedtune.RunOptions(keep=5))  # type: ignore[call-arg]
    assert loop.options == fedtune.RunOptions(keep=5, progress=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'progres'"):
        fedtune.FederatedLoop(progres=False)  # type: ignore[call-arg]


def test_data_without_clients_are_refused(make_module: Make, make_data: Make) -> None:
    with pytest.raises(fedtune.UsageError, match="a data module that has client_dataloader, num_clients"):
        make_loop().fit(make_module(), pl.LightningDataModule())


def test_gradients_are_clipped_to_the_given_norm(make_data: Make, make_module: Make) -> None:
    options = {"optimizer": "sgd", "learning_rate": 1.0, **NO_DROPOUT}
    data = make_data(num_clients=1)
    record = make_loop(max_rounds=1, gradient_clip_val=1e-3).fit(make_module(**options), data)[0]
    assert record.clients[0].update_norm <= 1e-3 * record.num_steps * 1.001


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_a_round_on_the_gpu_is_a_round_on_the_cpu(make_data: Make, make_module: Make) -> None:
    modules = [make_module(**NO_DROPOUT) for _ in range(2)]
    for module, accelerator in zip(modules, ("cpu", "gpu"), strict=True):
        make_loop(accelerator=accelerator).fit(module, make_data())
    assert_near(weights_of(modules[0]), weights_of(modules[1].cpu()), 1e-3)
