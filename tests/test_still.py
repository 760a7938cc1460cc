"""What a client leaves behind in the one module of its process, and other quiet ways to wrong numbers."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import GivenLoaders, assert_equal, make_loop, weights_of, without_times
from test_lightning import Data, Net, Stepped, Three, X, Y, both, loader, logging_module, module_with, same, scores, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import fedtune

pytestmark = [  # of a real Trainer
    pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning"),
]


class Teacher(Net):
    """A frozen copy of the layer that follows it."""

    def __init__(self, data: bool = False) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.through_data = data

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                (mine.data if self.through_data else mine).mul_(0.9).add_(theirs, alpha=0.1)


@pytest.mark.parametrize("through_data", [False, True])
def test_a_frozen_parameter_that_training_moves_is_refused_by_name(through_data: bool) -> None:
    with pytest.raises(fedtune.RunError, match=r"round 1, client 0: training changed teacher.weight, which is frozen"):
        make_loop().fit(Teacher(through_data), Three())


class Scaled(Net):
    """A buffer that is not part of the state, and that every step changes; the loss depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.scale *= 0.9
        return self.loss(batch) * self.scale


def test_buffers_that_do_not_travel_start_alike_for_every_client_and_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_loop(max_rounds=4, run_dir=str(tmp_path / "whole")).fit(Scaled(), Three())
    make_loop(max_rounds=2, run_dir=str(tmp_path / "cut")).fit(Scaled(), Three())
    assert without_times(make_loop(max_rounds=4, run_dir=str(tmp_path / "cut")).fit(Scaled(), Three())) == without_times(whole)
    one, other = Scaled(), Scaled()
    for module, order in ((one, [0, 1, 2]), (other, [2, 0, 1])):
        monkeypatch.setattr("fedtune.runs.loop.cohort", lambda *_, order=order: order)
        make_loop(max_rounds=2).fit(module, Three())
    assert_equal(weights_of(one), weights_of(other))


def test_an_attribute_that_training_counts_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen += 1
            return super().training_step(batch, batch_idx)

    make_loop(max_rounds=3).fit(Counting(), Three())
    (record,) = [one for one in caplog.records if one.name == "fedtune"]
    assert "round 1, client 0: training changed seen of the module" in record.getMessage()


def test_a_parameter_with_a_new_tensor_travels() -> None:
    def renewed(self: Any, *_: Any) -> None:
        self.net.weight.data = self.net.weight.data.clamp(-0.2, 0.2).clone()

    ours, theirs = both(module_with(on_train_epoch_end=renewed))
    same(ours, theirs)


def test_tensors_that_share_memory_are_refused_by_name() -> None:
    class Shared(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(6, 2)
            self.other.weight = nn.Parameter(self.net.weight.data)

    class Expanded(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(1).expand(6))

    with pytest.raises(fedtune.UsageError, match=r"module: got 'Shared'; .*\((net|other).weight and (net|other).weight share"):
        make_loop().fit(Shared(), Three())
    with pytest.raises(fedtune.UsageError, match=r"module: got 'Expanded'; .*\(mean share"):
        make_loop().fit(Expanded(), Three())


class Averaged(Net):
    """A moving average and a mask, as buffers."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.step = step
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, torch.nan]))

    def on_train_batch_end(self, *_: Any) -> None:
        self.average.mul_(0.9).add_(torch.tensor([self.step, -self.step, 0.0]))


@pytest.mark.parametrize("step", [1e-30, 1e-12, 1e-8, 1e-3, 1.0, 1e6, 1e8])
def test_buffers_of_any_size_and_unchanged_ones_that_are_no_number_travel(step: float) -> None:
    ours, theirs = Averaged(step), Averaged(step)
    make_loop(max_rounds=1).fit(ours, Data())
    trainer(max_epochs=1, limit_val_batches=0).fit(theirs, datamodule=Data())
    assert torch.allclose(ours.average, theirs.average, rtol=1e-5, atol=0)
    assert torch.equal(ours.mask.isnan(), theirs.mask.isnan())


def test_the_plan_is_known_from_setup_on() -> None:
    asked: list[Any] = []

    def setup(self: Any, stage: str) -> None:
        if stage == "fit":
            asked.append((self.trainer.max_epochs, self.trainer.estimated_stepping_batches))

    both(module_with(setup=setup), epochs=3)
    assert asked == [(3, 18)] * 2


def test_schedules_go_on_through_rounds_as_in_epochs_of_a_trainer() -> None:
    def two(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8, eta_min=0.05)
        decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}, {"scheduler": decay, "interval": "epoch"}]

    def twice(self: Any, scheduler: Any, metric: Any) -> None:
        scheduler.step()
        scheduler.step()

    for methods in ({"configure_optimizers": two}, {"lr_scheduler_step": twice}):
        ours, theirs = module_with(**methods)(), module_with(**methods)()
        plain = {"on_train_epoch_start": lambda self: self.trainer.optimizers[0].state.clear()}
        theirs = module_with(**methods, **plain)()  # a client's optimizer is fresh
        trainer(max_epochs=4, limit_val_batches=0).fit(theirs, datamodule=Data())
        make_loop(max_rounds=4).fit(ours, Data())
        same(ours, theirs)


def test_a_schedule_that_skips_steps_is_refused() -> None:
    def skipping(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 4}]

    with pytest.raises(fedtune.RunError, match="a schedule over steps has another frequency than 1"):
        make_loop().fit(module_with(configure_optimizers=skipping)(), Data())


def test_a_run_that_is_longer_than_its_schedule_knew_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def asking(self: Any) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def setup(self: Any, stage: str) -> None:
        self.length = self.trainer.max_epochs

    for number, methods in enumerate(({"configure_optimizers": asking}, {"setup": setup})):
        for rounds in (2, 2, 4):
            folder = str(tmp_path / str(number))
            make_loop(max_rounds=rounds, run_dir=folder, progress=True).fit(module_with(**methods)(), Three())
            said = "its first rounds were of a run of 2 rounds: a run of 4 from the start" in capsys.readouterr().out
            assert said == (rounds == 4)


def test_a_finished_run_is_tested_where_it_stopped(tmp_path: Path) -> None:
    def annealed(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("loss_nats", self.loss(batch) * (1 + self.current_epoch))

    found = []
    for _ in range(2):
        module = module_with(validation_step=annealed, test_step=annealed)()
        loop = make_loop(max_rounds=3, run_dir=str(tmp_path))
        loop.fit(module, Three())
        found.append(loop.summary["test_loss_nats"])
    assert found[0] == found[1]
    assert loop.validate(module, Three())[0]["loss_nats"] == pytest.approx(loop.history[-1].loss_nats)


# ---------------------------------------------------------------- callbacks


def test_callbacks_of_one_class_are_told_apart_by_their_metric(tmp_path: Path) -> None:
    def log(self: Any, batch: Any, index: int) -> None:
        self.log("a", float(self.current_epoch))
        self.log("b", -float(self.current_epoch))

    def stopping(order: int) -> list[Any]:
        return [fedtune.EarlyStopping("a", mode="max", patience=2), fedtune.EarlyStopping("b", mode="min", patience=2)][::order]

    def rounds(folder: str, many: int, order: int) -> int:
        loop = make_loop(max_rounds=many, run_dir=str(tmp_path / folder), callbacks=stopping(order), monitor="a")
        return len(loop.fit(logging_module(log), Three()))

    assert rounds("whole", 6, 1) == 6
    rounds("cut", 3, 1)
    assert rounds("cut", 6, -1) == 6


def test_a_callback_of_a_second_run_begins_anew() -> None:
    stopping, best = fedtune.EarlyStopping(patience=2), fedtune.BestWeights(restore=True)
    loop = make_loop(max_rounds=5, callbacks=[stopping, best])
    loop.fit(scores([0.9, 0.1, 0.1, 0.1, 0.1]), Three())
    second, alone = scores([0.1, 0.2, 0.3, 0.4, 0.5]), scores([0.1, 0.2, 0.3, 0.4, 0.5])
    assert len(loop.fit(second, Three())) == 5
    make_loop(max_rounds=5).fit(alone, Three())
    same(second, alone)


def test_a_metric_that_the_run_no_longer_monitors_is_forgotten(tmp_path: Path) -> None:
    def log(self: Any, batch: Any, index: int) -> None:
        self.log("a", 0.6 if self.current_epoch == 2 else 0.1)
        self.log("b", 0.1 * self.current_epoch)

    best = fedtune.BestWeights()
    make_loop(max_rounds=2, run_dir=str(tmp_path), callbacks=[best], monitor="a").fit(logging_module(log), Three())
    assert (best.best_round, best.best_score) == (2, pytest.approx(0.6))
    other = fedtune.BestWeights()
    make_loop(max_rounds=4, run_dir=str(tmp_path), callbacks=[other], monitor="b").fit(logging_module(log), Three())
    assert (other.best_round, other.best_score) == (4, pytest.approx(0.4))


def test_two_best_weights_have_a_file_each(tmp_path: Path) -> None:
    callbacks = [fedtune.BestWeights(restore=True), fedtune.BestWeights("loss_nats", "min")]
    module = scores([0.1, 0.9, 0.2, 0.2])
    module.validation_step = lambda batch, batch_idx: [
        type(module).validation_step(module, batch, batch_idx),
        module.log("loss_nats", module.loss(batch)),
    ][0]  # type: ignore[method-assign]
    make_loop(max_rounds=4, run_dir=str(tmp_path), callbacks=callbacks).fit(module, Three())
    assert [one.best_round for one in callbacks] == [2, 4]
    assert sorted(file.name for file in tmp_path.glob("best*")) == ["best-loss_nats-min.safetensors", "best.safetensors"]
    two = scores([0.1, 0.9])
    make_loop(max_rounds=2).fit(two, Three())
    same(module, two)
    with pytest.raises(fedtune.UsageError, match="callbacks: got 'BestWeights None None'; allowed: each once"):
        make_loop(callbacks=[fedtune.BestWeights(), fedtune.BestWeights()])


def test_a_stopped_run_stays_stopped_for_fewer_rounds(tmp_path: Path) -> None:
    def rounds(many: int) -> int:
        loop = make_loop(max_rounds=many, run_dir=str(tmp_path), callbacks=[fedtune.EarlyStopping(patience=2)])
        return len(loop.fit(scores([0.9, 0.1, 0.1]), Three()))

    assert [rounds(9), rounds(5), rounds(9)] == [3, 3, 3]


def test_an_error_in_on_exception_hides_nothing() -> None:
    told: list[str] = []

    class Bad(fedtune.FederatedCallback):
        def on_exception(self, run: Any, module: Any, error: BaseException) -> None:
            raise KeyError("another")

    class Good(fedtune.FederatedCallback):
        def on_exception(self, run: Any, module: Any, error: BaseException) -> None:
            told.append(str(error))

    def broken(self: Any, *_: Any) -> None:
        raise ValueError("first")

    with pytest.warns(UserWarning, match="Bad.on_exception: KeyError"), pytest.raises(fedtune.RunError, match="first"):
        make_loop(callbacks=[Bad(), Good()]).fit(module_with(on_train_start=broken)(), Data())
    assert len(told) == 1


def test_any_monitor_may_be_evaluated_now_and_then() -> None:
    def log(self: Any, batch: Any, index: int) -> None:
        self.log("perplexity", 1.0)

    history = make_loop(max_rounds=4, monitor="perplexity", check_val_every_n_rounds=2).fit(logging_module(log), Three())
    assert [len(record.metrics) for record in history] == [0, 1, 0, 1]
    with pytest.raises(fedtune.UsageError, match="callbacks: got 'EarlyStopping'; allowed: a run whose rounds are evaluated"):
        make_loop(max_rounds=2, check_val_every_n_rounds=3, callbacks=[fedtune.EarlyStopping()]).fit(Net(), Three())


# ---------------------------------------------------------------- logs


def test_a_name_logged_in_two_hooks_and_a_metric_over_two_loaders_are_as_in_a_trainer() -> None:
    class Twice(Net):
        def __init__(self) -> None:
            super().__init__()
            self.right = MulticlassAccuracy(2, average="micro")

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.right.update(self.net(batch[0]), batch[1])
            self.log("right", self.right)
            self.log("z", float(batch_idx))

        def on_validation_epoch_end(self) -> None:
            self.log("z", 10.0)

    class TwoLoaders(Data):
        def val_dataloader(self) -> Any:
            return [loader(44, 60), loader(0, 30)]

    theirs = trainer().validate(Twice(), datamodule=TwoLoaders(), verbose=False)
    ours = make_loop(monitor="z").validate(Twice(), TwoLoaders())
    assert ours == [pytest.approx(one) for one in theirs]


def test_a_module_may_have_a_log_of_its_own() -> None:
    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            self.report = self.log

        def log(self, name: str, value: Any, **more: Any) -> None:  # type: ignore[override]
            super().log(f"val/{name}", value, **more)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.report("size", np.float32(len(batch[0])))

    (theirs,) = trainer().validate(Named(), datamodule=Data(), verbose=False)
    (ours,) = make_loop().validate(Named(), Data())
    assert ours == pytest.approx(theirs)
    assert set(ours) == {"val/accuracy", "val/loss_nats", "val/size"}


def test_logging_where_a_trainer_does_not_allow_it_is_refused() -> None:
    with pytest.raises(fedtune.RunError, match=r"evaluation on the validation part: .*on_validation_end"):
        make_loop().fit(module_with(on_validation_end=lambda self: self.log("x", 1.0))(), Data())


def test_metrics_logged_in_training_begin_anew_in_every_epoch() -> None:
    counted: list[float] = []

    class Training(Net):
        def __init__(self) -> None:
            super().__init__()
            self.right = MulticlassAccuracy(2, average="micro")

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.right.update(self.net(batch[0]), batch[1])
            self.log("right", self.right, on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            counted.append(float(self.right.tp.sum() + self.right.fn.sum()))

    make_loop(max_rounds=2, local_epochs=2).fit(Training(), Three())
    assert counted == [12.0] * 12


def test_precision_of_hooks_is_that_of_a_trainer() -> None:
    def types(make: Any) -> Any:
        found: dict[str, Any] = {}

        def step(self: Any, batch: Any, batch_idx: int) -> None:
            found["step"] = (batch[0] @ batch[0].T).dtype

        def end(self: Any) -> None:
            found["end"] = (torch.ones(2, 2) @ torch.ones(2, 2)).dtype

        make(module_with(validation_step=step, on_validation_epoch_end=end)())
        return found

    ours = types(lambda module: make_loop(precision="bf16-mixed").validate(module, Data()))
    assert ours == types(lambda module: trainer(precision="bf16-mixed").validate(module, datamodule=Data(), verbose=False))
    assert ours == {"step": torch.bfloat16, "end": torch.float32}


# ---------------------------------------------------------------- loaders and batches


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(X[:16], Y[:16], strict=True))


def test_a_share_needs_a_length_and_a_batch() -> None:
    streamed = DataLoader(Streamed(), batch_size=4)
    data = GivenLoaders([streamed], loader(0, 16))
    assert make_loop(max_rounds=1, limit_train_batches=2).fit(Net(), data)[0].num_examples == 8
    with pytest.raises(fedtune.RunError, match=r"client 0: a share of 0\.5 was chosen, and DataLoader has no length"):
        make_loop(max_rounds=1, limit_train_batches=0.5).fit(Net(), data)
    with pytest.raises(fedtune.RunError, match=r"the validation part: a share of 0\.1 of 2 batches is none; allowed: 0\.5"):
        make_loop(max_rounds=1, limit_val_batches=0.1).fit(Net(), data)


def test_random_numbers_of_data_sets_and_loaders_belong_to_the_round(tmp_path: Path) -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            x, y = super().__getitem__(index)
            return x + np.random.rand() + random.random(), y  # noqa: NPY002 - as data sets of users do

    def data() -> Any:
        generator = torch.Generator().manual_seed(3)
        noisy = DataLoader(Noisy(X[:24], Y[:24]), batch_size=4, shuffle=True, generator=generator)
        return GivenLoaders([noisy, noisy], loader(44, 60))

    whole = make_loop(max_rounds=4, run_dir=str(tmp_path / "a")).fit(Net(), data())
    make_loop(max_rounds=2, run_dir=str(tmp_path / "b")).fit(Net(), data())
    assert without_times(make_loop(max_rounds=4, run_dir=str(tmp_path / "b")).fit(Net(), data())) == without_times(whole)


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`:UserWarning")
def test_only_what_has_a_row_for_each_example_is_cut() -> None:
    class Weighted(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y, weights, scale = batch
            assert (len(weights), scale.ndim) == (2, 0)
            assert len(x) == len(y)
            return F.cross_entropy(self.net(x), y, weights) * scale

    def batches(first: int, last: int) -> list[Any]:
        return [(X[i : i + 4], Y[i : i + 4], torch.ones(2), torch.tensor(1.0)) for i in range(first, last, 4)]

    class Some(GivenLoaders):
        def train_dataloader(self) -> Any:
            return batches(0, 24)

    data = Some([batches(0, 12), batches(12, 22)], loader(44, 60))
    loop = make_loop(max_rounds=2, clients_per_round=1, baselines=["centralised"])
    loop.fit(Weighted(), data)
    pooled = loop.baseline_runs["centralised"]
    assert [record.num_examples for record in pooled] == [record.num_examples for record in loop.history]


def test_batches_without_tensors_and_losses_of_one_element_are_trained() -> None:
    class Plain(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x = torch.tensor([[float(len(text))] * 6 for text in batch["texts"]])
            return F.cross_entropy(self.net(x), torch.zeros(len(x), dtype=torch.long)).reshape(1)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("accuracy", 0.5, batch_size=len(batch["texts"]))

    texts = [{"texts": ["a", "bb", "ccc"]}, {"texts": ["dd"]}]
    record = make_loop(max_rounds=1).fit(Plain(), GivenLoaders([texts], texts))[0]
    assert (record.num_examples, record.accuracy) == (4, 0.5)


def test_a_loader_that_is_used_up_or_empty_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    class Once(Three):
        def __init__(self) -> None:
            super().__init__()
            self.batches = iter(loader(44, 60))

        def val_dataloader(self) -> Any:
            return self.batches

    with pytest.raises(fedtune.RunError, match=r"val_dataloader returned the same .*Iter again, which has one pass"):
        make_loop(max_rounds=3).fit(Net(), Once())
    record = make_loop(max_rounds=1, progress=True).fit(Net(), GivenLoaders([loader(0, 8)], []))[0]
    assert record.metrics == {}
    assert "the validation part has no batch" in capsys.readouterr().out


@pytest.mark.parametrize(("loaders", "message"), [(1, "needs a dataloader_idx"), (2, "takes no dataloader_idx")])
def test_a_step_and_its_loaders_must_agree(loaders: int, message: str) -> None:
    class Step(Net):
        if loaders == 1:

            def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:  # type: ignore[override]
                pass

    given = GivenLoaders([loader(0, 8)], loader(44, 60) if loaders == 1 else [loader(44, 60), loader(44, 60)])
    with pytest.raises(fedtune.RunError, match=f"there (is|are) .*validation_step {message}; allowed: "):
        make_loop().fit(Step(), given)


def test_the_epoch_reaches_the_samplers_of_a_clients_loader() -> None:
    seen: list[int] = []

    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch: int) -> None:
            seen.append(epoch)

    dataset = TensorDataset(X[:8], Y[:8])
    data = GivenLoaders([DataLoader(dataset, batch_size=4, sampler=Sampler(dataset))], loader(44, 60))
    make_loop(max_rounds=2, local_epochs=2).fit(Net(), data)
    assert seen == [0, 1, 2, 3]


# ---------------------------------------------------------------- arguments and modes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baselines": None}, "baselines: got None; allowed: a list of centralised, local; an empty one for none"),
        ({"precision": ["32"]}, "precision: got ['32']; allowed: auto, 32-true, bf16-mixed"),
        ({"mode": []}, "mode: got []; allowed: max, min"),
        ({"run_dir": 5}, "run_dir: got 5; allowed: the path of a directory, or None"),
        ({"run_dir": ""}, "run_dir: got ''; allowed: the path of a directory, or None"),
        ({"check_val_every_n_epoch": 2, "check_val_every_n_rounds": 3}, "check_val_every_n_epoch: got 2; allowed: one of"),
    ],
)
def test_arguments_of_another_type_end_in_a_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fedtune.UsageError) as caught:
        make_loop(**options)
    assert message in str(caught.value)


def test_options_may_be_a_dictionary_and_nothing_else() -> None:
    assert fedtune.FederatedLoop(options={"keep": 5}).options == fedtune.RunOptions(keep=5)  # type: ignore[arg-type]
    with pytest.raises(fedtune.UsageError, match="options: got None; allowed: a RunOptions"):
        fedtune.FederatedLoop(options=None)  # type: ignore[arg-type]


def test_a_path_may_be_a_path_and_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (tmp_path / "run", "~/another"):
        make_loop(max_rounds=1, run_dir=folder, baselines=["centralised"], baseline_dir="~/shared").fit(Net(), Data())
    assert {"run", "another", "shared"} <= {path.name for path in tmp_path.iterdir()}


def test_a_fast_dev_run_writes_no_baseline_either(tmp_path: Path) -> None:
    make_loop(fast_dev_run=True, baselines=["centralised"], baseline_dir=str(tmp_path / "b")).fit(Net(), Three())
    assert not list(tmp_path.iterdir())


def test_parts_that_are_in_evaluation_mode_are_said_to_be_trained_so(capsys: pytest.CaptureFixture[str]) -> None:
    module = Net()
    module.net.eval()
    make_loop(max_rounds=1, progress=True).fit(module, Data())
    assert "parts of the module are in evaluation mode, and trained so (1): net" in capsys.readouterr().out


def test_baselines_are_shared_only_by_runs_with_the_same_frozen_weights(tmp_path: Path) -> None:
    class Projected(Net):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.fixed = nn.Linear(6, 6).requires_grad_(False)

        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.net(torch.tanh(self.fixed(batch[0]))), batch[1])

    for seed in (1, 2):
        loop = make_loop(run_dir=str(tmp_path / str(seed)), baselines=["centralised"], baseline_dir=str(tmp_path / "shared"))
        loop.fit(Projected(seed), Three())
    assert len(list((tmp_path / "shared").iterdir())) == 2


class Plain:
    """Data that are no LightningDataModule."""

    num_clients = 1

    def setup(self, stage: str) -> None:
        self.ready = stage

    def client_dataloader(self, client: int) -> Any:
        assert self.ready
        return loader(0, 8)

    def val_dataloader(self) -> Any:
        return loader(44, 60)


def test_data_of_any_class_are_set_up() -> None:
    assert len(make_loop().fit(Net(), Plain())) == 2
    assert isinstance(Stepped(), pl.LightningModule)


def test_the_averaged_model_is_evaluated_with_the_counters_that_clients_start_with() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen += 1
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("seen", self.seen.float())

    loop = make_loop(max_rounds=2, evaluate_on="test", monitor="seen")
    history = loop.fit(Counting(), Three())
    assert [record.metrics["seen"] for record in history] == [0.0, 0.0]
    assert loop.summary["test_seen"] == 0.0


def test_buffers_that_are_only_read_may_share_and_those_that_travel_may_lie_side_by_side() -> None:
    class Views(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(1, 1).expand(4, 4), persistent=False)
            self.register_buffer("places", torch.arange(8).expand(4, -1))
            both = torch.zeros(2, 6)
            self.register_buffer("left", both[:, :3])
            self.register_buffer("right", both[:, 3:])

    assert len(make_loop().fit(Views(), Three())) == 2


def test_a_frozen_embedding_that_is_looked_at_has_not_moved() -> None:
    class Looked(Net):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding.from_pretrained(F.normalize(torch.ones(3, 4)), freeze=True, max_norm=5.0)

        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch) + self.words(torch.tensor([0, 2])).sum()

    assert len(make_loop().fit(Looked(), Three())) == 2
