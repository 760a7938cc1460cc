"""What a module and its user know from a `Trainer` holds in a federation; each row of docs/lightning.md against a real one."""

from __future__ import annotations

import gc
import inspect
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from conftest import GivenLoaders, make_loop
from lightning_utilities.core import rank_zero
from pytorch_lightning.core import hooks as lightning_hooks
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fedtune
from fedtune.runs.counterparts import COUNTERPARTS

Make = Callable[..., Any]
PAGE = (Path(__file__).parent.parent / "docs" / "lightning.md").read_text()
pytestmark = [  # of a real Trainer
    pytest.mark.filterwarnings("ignore::pytorch_lightning.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*returned `None`.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:You have overridden `.*` in `LightningModule` but:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),
]

_GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(72, 6, generator=_GENERATOR)
Y = (X @ torch.randn(6, generator=_GENERATOR) > 0).long()


def loader(first: int, last: int, size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X[first:last], Y[first:last]), batch_size=size)


class Data(pl.LightningDataModule):
    """One client with 44 examples in six batches, the last one smaller; 16 for validation, 12 for the test."""

    num_clients = 1

    def client_dataloader(self, client: int) -> Any:
        return loader(0, 44)

    def train_dataloader(self) -> Any:
        return loader(0, 44)

    def val_dataloader(self) -> Any:
        return loader(44, 60)

    def test_dataloader(self) -> Any:
        return loader(60, 72)


class Three(Data):
    """Three clients."""

    num_clients = 3

    def client_dataloader(self, client: int) -> Any:
        return loader(12 * client, 12 * client + 12, 4)


class Net(pl.LightningModule):
    """A linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Linear(6, 2)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("accuracy", (self.net(batch[0]).argmax(-1) == batch[1]).float().mean())
        self.log("loss_nats", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.5)


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", devices=1, **(quiet | {"num_sanity_val_steps": 0, "max_epochs": 1} | options))


def both(make: Callable[[], Any], data: Any = None, epochs: int = 2, **options: Any) -> tuple[Any, Any]:
    """A module after a `Trainer`'s epochs, and one after the epochs of the only client."""
    ours, theirs = make(), make()
    trainer(max_epochs=epochs, limit_val_batches=0, **options).fit(theirs, datamodule=data or Data())
    make_loop(max_rounds=1, local_epochs=epochs, **options).fit(ours, datamodule=data or Data())
    return ours, theirs


def same(one: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    for name, tensor in one.state_dict().items():
        assert torch.allclose(tensor, theirs[name], rtol=1e-5, atol=1e-6), name


# ---------------------------------------------------------------- hooks


def hooks_of_lightning() -> list[str]:
    """The hooks of modules, and what else of a module is there to be overridden."""
    classes = (lightning_hooks.ModelHooks, lightning_hooks.DataHooks, lightning_hooks.CheckpointHooks)
    found = [name for one in classes for name in vars(one) if not name.startswith("_")]
    own = (
        "configure_callbacks",
        "configure_optimizers",
        "backward",
        "optimizer_step",
        "optimizer_zero_grad",
        "lr_scheduler_step",
    )
    steps = ("training_step", "validation_step", "test_step", "predict_step", "configure_gradient_clipping")
    return sorted({*found, *own, *steps})


def rows(title: str) -> dict[str, str]:
    """The first table of the page below a title: first column (names in back ticks) -> second column."""
    section = PAGE.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]
    found = {}
    for line in re.findall(r"^\|(.*)\|$", section, flags=re.M)[2:]:
        names, what = (cell.strip() for cell in line.split("|")[:2])
        found |= dict.fromkeys(re.findall(r"`(\w+)`", names), what)
    return found


HOOKS = rows("Hooks of a module")
CALLED = sorted(name for name, what in HOOKS.items() if what.startswith(("once", "for each", "around", "before", "in each")))
REFUSED = sorted(name for name, what in HOOKS.items() if what.startswith("refused"))
NOT_IN_FIT = sorted(name for name, what in HOOKS.items() if what.startswith("not called"))


def test_the_page_has_every_hook_of_lightning() -> None:
    assert sorted(HOOKS) == hooks_of_lightning()
    assert sorted([*CALLED, *REFUSED, *NOT_IN_FIT]) == hooks_of_lightning()


def recording(base: type[Any], names: list[str]) -> type[Any]:
    """A class that writes down which of its hooks are called, and then does what its base does."""

    def recorded(name: str) -> Any:
        plain = getattr(base, name)

        def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return plain(self, *args, **kwargs)

        hook.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
        return hook

    def __init__(self: Any) -> None:
        base.__init__(self)
        self.calls = []

    return type("Recording", (base,), {"__init__": __init__, **{name: recorded(name) for name in names}})


class Stepped(Net):
    """A test step and a schedule by steps."""

    test_step = Net.validation_step

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_validation_model_train(self) -> None:
        self.train()

    def on_test_model_train(self) -> None:
        self.train()


def test_training_calls_the_hooks_of_a_trainer_in_its_order() -> None:
    names = [name for name in CALLED if "validation" not in name and "test" not in name]
    ours, theirs = both(recording(Stepped, names), accumulate_grad_batches=2, gradient_clip_val=0.1)
    assert set(names) <= set(theirs.calls)
    once = ["prepare_data", "setup", "configure_model", "on_fit_start", "teardown", "on_fit_end"]  # a run's
    for calls in (ours.calls, theirs.calls):
        assert [calls.count(name) for name in once if name not in ("setup", "teardown")] == [1] * 4
    ordered = [calls[calls.index("on_train_start") : calls.index("on_train_end") + 1] for calls in (ours.calls, theirs.calls)]
    assert ordered[0] == ordered[1]
    assert len(ordered[0]) > 100
    same(ours, theirs)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_calls_the_hooks_of_a_trainer_in_its_order(stage: str) -> None:
    names = [name for name in CALLED if not name.startswith(("on_fit", "on_train", "optimizer", "configure_op", "training"))]
    ours, theirs = (recording(Stepped, names)() for _ in range(2))
    found = getattr(trainer(), stage)(theirs, datamodule=Data(), verbose=False)
    mine = getattr(make_loop(), stage)(ours, datamodule=Data())
    assert ours.calls == theirs.calls
    assert mine == [pytest.approx(one) for one in found]


@pytest.mark.parametrize("name", CALLED)
def test_a_hook_that_the_page_calls_called_is_called(name: str) -> None:
    module = recording(Stepped, [name])()
    loop = make_loop(max_rounds=1, check_val_every_n_epoch=1, baselines=["centralised"])
    loop.fit(module, Three())
    assert module.calls


@pytest.mark.parametrize("name", REFUSED)
def test_a_hook_that_nobody_calls_is_refused_before_anything_is_done(name: str) -> None:
    module = recording(Stepped, [name])()
    with pytest.raises(fedtune.UsageError, match=f"module: got 'Recording'; allowed: .*{name}.*instead: ") as caught:
        make_loop().fit(module, Data())
    assert "\n" not in str(caught.value)
    assert not module.calls


@pytest.mark.parametrize("name", ["state_dict", "load_state_dict"])
def test_state_of_the_data_that_nobody_would_keep_is_refused(name: str) -> None:
    data = type("Stateful", (Data,), {name: lambda self, *_: {}})()
    with pytest.raises(fedtune.UsageError, match=f"data: got 'Stateful'; allowed: .*{name}"):
        make_loop().fit(Net(), data)


def test_hooks_of_the_data_are_called_once_a_stage_and_move_batches() -> None:
    calls: list[Any] = []

    class Hooked(Data):
        def prepare_data(self) -> None:
            calls.append("prepare_data")

        def setup(self, stage: str) -> None:
            calls.append(f"setup {stage} {self.trainer is not None}")

        def teardown(self, stage: str) -> None:
            calls.append(f"teardown {stage}")

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 2, batch[1]

        def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + 1, batch[1]

    ours, theirs = both(Net, Hooked())
    same(ours, theirs)
    calls.clear()
    make_loop(max_rounds=2).fit(Net(), Hooked())
    assert calls == ["prepare_data", "setup fit True", "setup test True", "teardown fit", "teardown test"]


def test_an_exception_is_reported_to_the_data() -> None:
    seen: list[str] = []

    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise KeyError("lost")

    class Told(Data):
        def on_exception(self, exception: BaseException) -> None:
            seen.append(str(exception))

        def teardown(self, stage: str) -> None:
            seen.append("teardown")

    with pytest.raises(fedtune.RunError, match="round 1, client 0, training step 1: KeyError"):
        make_loop().fit(Broken(), Told())
    assert seen == ["round 1, client 0, training step 1: KeyError: 'lost'", "teardown"]


# ---------------------------------------------------------------- what hooks do


def module_with(**methods: Any) -> Callable[[], Any]:
    """Makes modules with some methods; a method is given the module and its other arguments."""
    return type("With", (Stepped,), methods)


def skip_second(self: Any, batch: Any, batch_idx: int) -> Any:
    return None if batch_idx == 1 else self.loss(batch)


def zero_first_row(self: Any) -> None:
    self.net.weight.grad[0] = 0


def clamp(self: Any, *_: Any) -> None:
    self.net.weight.data.clamp_(-0.2, 0.2)


def halve_gradients(self: Any, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        for one in group["params"]:
            one.grad.mul_(0.5)


def never(self: Any, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
    closure()


def by_hand(self: Any, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
    closure()
    optimizer.step()


def warm_up(self: Any, epoch: int, index: int, optimizer: Any, closure: Any = None) -> None:
    optimizer.step(closure=closure)
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * (self.trainer.global_step + 1)


def clip_half(self: Any, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None) -> None:
    self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="value")


def end_early(self: Any, batch: Any, batch_idx: int) -> int | None:
    return -1 if batch_idx == 3 else None


def keep_gradients(self: Any, epoch: int, index: int, optimizer: Any) -> None:
    if index % 2 == 0:
        optimizer.zero_grad()


def twice(self: Any, loss: Tensor, *args: Any, **kwargs: Any) -> None:
    (2 * loss).backward()


def by_epoch(self: Any) -> Any:
    optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}}


def one_cycle(self: Any) -> Any:
    optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
    steps = self.trainer.estimated_stepping_batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=int(steps))
    return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def lbfgs(self: Any) -> Any:
    return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


def double_rate(self: Any, scheduler: Any, metric: Any) -> None:
    scheduler.step()
    scheduler.step()


@pytest.mark.parametrize(
    ("methods", "options"),
    [
        ({"training_step": skip_second}, {}),
        ({"training_step": skip_second}, {"accumulate_grad_batches": 2}),
        ({"on_after_backward": zero_first_row}, {}),
        ({"on_train_batch_end": clamp}, {}),
        ({"on_train_epoch_end": clamp}, {}),
        ({"on_before_optimizer_step": halve_gradients}, {"gradient_clip_val": 0.1}),
        ({"optimizer_step": never}, {}),
        ({"optimizer_step": by_hand}, {}),
        ({"optimizer_step": warm_up}, {}),
        ({"configure_gradient_clipping": clip_half}, {}),
        ({"on_train_batch_start": end_early}, {}),
        ({"on_train_batch_start": end_early, "configure_optimizers": by_epoch}, {}),
        ({"optimizer_zero_grad": keep_gradients}, {}),
        ({"backward": twice}, {}),
        ({"configure_optimizers": by_epoch}, {}),
        ({"configure_optimizers": one_cycle}, {}),
        ({"configure_optimizers": one_cycle}, {"accumulate_grad_batches": 4}),
        ({"configure_optimizers": lbfgs}, {}),
        ({"lr_scheduler_step": double_rate}, {}),
        ({}, {"accumulate_grad_batches": 4}),
        ({}, {"gradient_clip_val": 0}),
        ({}, {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}),
        ({}, {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "norm"}),
        ({}, {"limit_train_batches": 3}),
        ({}, {"limit_train_batches": 0.5}),
        ({}, {"limit_train_batches": 1}),
        ({}, {"precision": 32}),
        ({}, {"deterministic": True}),
    ],
)
def test_a_client_is_trained_as_by_a_trainer(methods: dict[str, Any], options: dict[str, Any]) -> None:
    ours, theirs = both(module_with(**methods), **options)
    same(ours, theirs)
    start = module_with()().net.weight
    assert torch.equal(start, ours.net.weight) == (methods.get("optimizer_step") is never)


def test_epoch_and_step_go_on_through_the_federation() -> None:
    seen: list[tuple[int, int, bool]] = []

    class Counting(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append((self.current_epoch, self.global_step, self.trainer.training))
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append((self.current_epoch, self.global_step, self.trainer.training))
            assert self.trainer.validating
            super().validation_step(batch, batch_idx)

    make_loop(max_rounds=2, local_epochs=2).fit(Counting(), Three())
    client = [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]
    expected = [(epoch, step, True) for epoch, step in client] * 3 + [(2, 6, False)] * 2
    later = [(epoch + 2, step + 6, True) for epoch, step in client] * 3 + [(4, 12, False)] * 2
    assert seen[: len(expected) + len(later)] == expected + later


def test_a_trainer_answers_as_far_as_it_has_a_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {}

    class Asking(Net):
        def on_train_start(self) -> None:
            found["optimizer"] = self.optimizers()
            found["schedules"] = self.lr_schedulers()
            found["logger"] = self.logger
            found["steps"] = self.trainer.estimated_stepping_batches
            found["epochs"], found["batches"] = self.trainer.max_epochs, self.trainer.num_training_batches
            found["zero"], found["size"] = self.trainer.is_global_zero, self.trainer.world_size
            found["data"] = self.trainer.datamodule
            found["gathered"] = self.all_gather(torch.ones(2))
            self.print("said", "by the module")
            found["absent"] = hasattr(self.trainer, "fit_loop")
            with pytest.raises(AttributeError) as caught:
                self.trainer.fit_loop  # noqa: B018
            found["error"] = caught.value

    data = Three()
    make_loop(max_rounds=4, local_epochs=2, progress=True).fit(Asking(), data)
    assert isinstance(found["optimizer"], torch.optim.SGD)
    assert (found["schedules"], found["logger"], found["absent"]) == (None, None, False)
    assert (found["steps"], found["epochs"], found["batches"]) == (4 * 2 * 3, 8, 3)
    assert (found["zero"], found["size"]) == (True, 1)
    assert found["data"] is data
    assert found["gathered"].tolist() == [1, 1]
    assert "said by the module" in capsys.readouterr().out
    assert "self.trainer has no 'fit_loop' in a federation; it has " in str(found["error"])


def test_a_client_cannot_stop_the_trainer() -> None:
    def stop(self: Any, *_: Any) -> None:
        self.trainer.should_stop = True

    with pytest.raises(fedtune.RunError, match=r"self\.trainer\.should_stop.*run\.should_stop"):
        make_loop().fit(module_with(on_train_batch_end=stop)(), Data())


def test_a_table_that_evaluation_fills_can_be_trained_with() -> None:
    class Cached(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table: Tensor | None = None

        def loss(self, batch: Any) -> Tensor:
            if self.table is None or len(self.table) < len(batch[0]):
                self.table = torch.linspace(1, 2, len(batch[0]))[:, None] * self.net.bias.exp().mean()
            return F.cross_entropy(self.net(batch[0]) * self.table[: len(batch[0])].detach(), batch[1])

    class Large(Three):
        def val_dataloader(self) -> Any:
            return loader(44, 60, 16)

    assert len(make_loop(max_rounds=2).fit(Cached(), Large())) == 2


@pytest.mark.parametrize(("freeze", "said"), [(True, "frozen: net.bias"), (False, "unfrozen: net.weight")])
def test_layers_frozen_or_unfrozen_during_the_run_are_refused_by_name(freeze: bool, said: str) -> None:
    class Changing(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net.weight.requires_grad_(freeze)

        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 1:
                (self.net.bias if freeze else self.net.weight).requires_grad_(not freeze)

    with pytest.raises(fedtune.RunError, match=f"round 2, client 0: during the run there was {said}; allowed: "):
        make_loop(max_rounds=3).fit(Changing(), Data())


# ---------------------------------------------------------------- what is logged


def logging_module(log: Callable[..., None], **more: Any) -> Any:
    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        log(self, batch, batch_idx)

    return module_with(validation_step=validation_step, test_step=validation_step, **more)()


def log_reduced(self: Any, batch: Any, index: int) -> None:
    for name, reduction in (("sum", "sum"), ("min", torch.min), ("max", "max"), ("mean", torch.mean), ("plain", "mean")):
        self.log(name, float(index + len(batch[0])), reduce_fx=reduction)
    self.log("weighted", float(index), batch_size=2 + 3 * index)
    self.log("step", float(index), on_step=True, on_epoch=False)
    self.log_dict({"a": index, "b": torch.tensor([2.0])})


def test_values_are_reduced_as_by_a_trainer() -> None:
    class Uneven(Data):
        def val_dataloader(self) -> Any:
            return loader(44, 60, 6)

    (theirs,) = trainer().validate(logging_module(log_reduced), datamodule=Uneven(), verbose=False)
    (ours,) = make_loop().validate(logging_module(log_reduced), Uneven())
    assert ours == pytest.approx(theirs)
    assert ours["sum"] == 6 + 7 + 6
    record = make_loop(max_rounds=1, monitor="min").fit(logging_module(log_reduced), Uneven())[0]
    assert record.metrics == pytest.approx(theirs)


def test_what_is_logged_in_training_is_in_the_records_for_every_client_and_round(tmp_path: Path) -> None:
    class Training(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen = torchmetrics.SumMetric()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen.update(len(batch[0]))
            self.log("first", batch[0][:, 0].mean(), prog_bar=True, on_step=True)
            self.log("seen", self.seen)
            return super().training_step(batch, batch_idx)

    class Uneven(Three):
        def client_dataloader(self, client: int) -> Any:
            return loader(12 * client, 12 * client + 4 + 3 * client, 4)

    loop = make_loop(max_rounds=2, local_epochs=2, run_dir=str(tmp_path))
    record = loop.fit(Training(), Uneven())[-1]
    sizes = [4, 7, 10]
    assert [report.metrics["seen"] for report in record.clients] == sizes  # of the last epoch
    firsts = [float(X[12 * client : 12 * client + size, 0].mean()) for client, size in enumerate(sizes)]
    assert [report.metrics["first"] for report in record.clients] == pytest.approx(firsts, rel=1e-5)
    assert record.train_metrics["first"] == pytest.approx(sum(map(lambda a, b: a * b, firsts, sizes)) / 21, rel=1e-5)
    again = make_loop(max_rounds=3, local_epochs=2, run_dir=str(tmp_path)).fit(Training(), Uneven())
    assert again[1].train_metrics == record.train_metrics


class Several(Data):
    def val_dataloader(self) -> Any:
        return [loader(44, 60), loader(0, 20, 5)]


@pytest.mark.parametrize("kind", [list, tuple, lambda many: dict(zip("ab", many, strict=True)), CombinedLoader])
def test_several_validation_loaders_are_named_as_by_a_trainer(kind: Any) -> None:
    class Kind(Several):
        def val_dataloader(self) -> Any:
            loaders = kind(super().val_dataloader()) if kind is not CombinedLoader else super().val_dataloader()
            return CombinedLoader(loaders, "sequential") if kind is CombinedLoader else loaders

    class Many(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            super().validation_step(batch, batch_idx)
            self.log(f"own_{dataloader_idx}", float(len(batch[0])), add_dataloader_idx=False)

    theirs = trainer().validate(Many(), datamodule=Kind(), verbose=False)
    ours = make_loop().validate(Many(), Kind())
    merged = {name: value for one in theirs for name, value in one.items()}
    assert {name: value for one in ours for name, value in one.items()} == pytest.approx(merged)
    assert len(ours) == len(theirs) == 2
    record = make_loop(max_rounds=1, monitor="accuracy/dataloader_idx_1").fit(Many(), Kind())[0]
    assert set(record.metrics) == set(merged)


@pytest.mark.parametrize("name", ["round", "clients", "seconds", "bytes_up", "train_loss_nats"])
def test_a_name_that_records_have_is_refused_at_the_first_log(name: str, tmp_path: Path) -> None:
    module = logging_module(lambda self, *_: self.log(name, 7.0))
    with pytest.raises(fedtune.RunError, match=f"self.log: the name '{name}' is taken"):
        make_loop(run_dir=str(tmp_path)).fit(module, Data())
    assert not (tmp_path / "rounds.jsonl").exists()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(3), "tensor([1., 1., 1.])"),
        ({"a": 1.0}, "{'a': 1.0}"),
        ("0.5", "0.5"),
        (None, "None"),
        ([0.5], "[0.5]"),
    ],
)
def test_what_is_no_number_is_refused_by_name(value: Any, said: str) -> None:
    with pytest.raises(
        fedtune.RunError, match=re.escape(f"evaluation on the validation part: ValueError: `self.log(x, {said})`")
    ):
        make_loop().fit(logging_module(lambda self, *_: self.log("x", value)), Data())


def test_a_metric_that_computes_a_vector_is_refused_by_name() -> None:
    class Vector(Net):
        def __init__(self) -> None:
            super().__init__()
            self.each = torchmetrics.classification.MulticlassAccuracy(2, average=None)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.each.update(self.net(batch[0]), batch[1])
            self.log("each", self.each)

    with pytest.raises(fedtune.RunError, match=r"self.log: 'each' is a Tensor of shape \(2,\)"):
        make_loop().fit(Vector(), Data())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_no_finite_number_is_named_and_null(
    value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = logging_module(lambda self, *_: self.log_dict({"accuracy": value, "other": 1.0}))
    make_loop(run_dir=str(tmp_path), progress=True).fit(module, Data())
    assert f"round 1: accuracy is {value}, no finite number; records have null" in capsys.readouterr().out

    def strict(name: str) -> Any:
        raise AssertionError(name)

    lines = [json.loads(line, parse_constant=strict) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [(one["accuracy"], one["other"]) for one in lines] == [(None, 1.0)] * 2
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=strict)
    assert (summary["best_accuracy"], summary["test_other"]) == (None, 1.0)
    again = make_loop(run_dir=str(tmp_path), max_rounds=3).fit(module, Data())
    assert math.isnan(again[0].metrics["accuracy"])
    assert len(again) == 3


def test_any_metric_is_monitored_through_summary_picture_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("fedtune.runs.figures.save", lambda figure, path, dpi=0: drawn.append(figure))

    def log(self: Any, batch: Any, index: int) -> None:
        self.log("perplexity", self.loss(batch).exp())

    for seed in (0, 1):
        folder = str(tmp_path / str(seed))
        loop = make_loop(
            max_rounds=3, run_dir=folder, seed=seed, monitor="perplexity", mode="min", baselines=["centralised", "local"]
        )
        loop.fit(logging_module(log), Three())
        values = [record.metrics["perplexity"] for record in loop.history]
        assert loop.summary["best_perplexity"] == loop.summary["best_validation_perplexity"] == min(values)
        assert loop.summary["test_perplexity"] == loop.summary["perplexity"]
        assert loop.summary["local_perplexity"] > 0
        assert loop.summary["centralised_perplexity"] > 0
    for figure in drawn:
        assert [axes.get_ylabel() for axes in figure.axes] == ["perplexity", "training loss in nats"]
        assert all(axes.lines for axes in figure.axes)
    rounds = fedtune.read_runs(tmp_path)
    (row,) = fedtune.compare(rounds).to_dict("records")
    assert (row["monitor"], row["seeds"]) == ("perplexity", 2)
    assert row["score"] == pytest.approx(rounds[(rounds.kind == "federated") & (rounds["round"] == 3)].perplexity.mean())
    assert row["baseline"] == pytest.approx(rounds[(rounds.kind == "centralised") & (rounds["round"] == 3)].perplexity.mean())
    assert row["score_min"] <= row["score"] <= row["score_max"]


def test_one_line_says_that_the_accuracy_is_monitored_and_what_is_logged_in_its_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def log(self: Any, batch: Any, index: int) -> None:
        self.log_dict({"val_accuracy": 0.5, "val_loss": self.loss(batch)})

    loop = make_loop(max_rounds=3, check_val_every_n_rounds=2, progress=True)
    loop.fit(logging_module(log), Three())
    said = [line for line in capsys.readouterr().out.splitlines() if "monitor" in line]
    assert len(said) == 1
    name = type(logging_module(log)).__name__
    assert said[0].startswith(f"accuracy is monitored, but {name} logs val_accuracy, val_loss: no round is known as the best; ")
    assert loop.summary["best_round"] is None
    make_loop(max_rounds=2, monitor="val_loss", mode="min", progress=True).fit(logging_module(log), Three())
    assert "no round is known" not in capsys.readouterr().out


# ---------------------------------------------------------------- arguments


ARGUMENTS = rows("Arguments of a `Trainer`")


def test_the_page_has_every_argument_of_a_trainer() -> None:
    known = set(inspect.signature(pl.Trainer).parameters) - {"self"}
    assert set(ARGUMENTS) == known
    ours = set(inspect.signature(fedtune.FederatedLoop).parameters)
    for name, what in ARGUMENTS.items():
        assert (name in ours or name == "check_val_every_n_epoch") == what.startswith("taken"), name
        assert (name in COUNTERPARTS) == what.startswith("refused"), name


@pytest.mark.parametrize("name", sorted(COUNTERPARTS))
def test_an_argument_that_only_a_trainer_has_names_its_counterpart(name: str) -> None:
    with pytest.raises(fedtune.UsageError, match=re.escape(f"{name}: got 3; allowed: {COUNTERPARTS[name]}")):
        fedtune.FederatedLoop(**{name: 3})


def test_the_precision_that_auto_chooses_is_said_once_in_words_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    heard: list[str] = []
    monkeypatch.setattr(rank_zero.log, "callHandlers", lambda record: heard.append(str(record.msg)))
    said = "precision: matrix products in bfloat16, which this CPU is made for, weights in fp32 (32-true: all in fp32)"
    for precision, times in (("auto", 1), ("bf16-mixed", 0), ("32-true", 0)):
        make_loop(max_rounds=1, precision=precision, accelerator="cpu", progress=True).fit(Net(), Three())
        assert capsys.readouterr().out.splitlines().count(said) == times
    assert not heard
    rank_zero.rank_zero_info("something else")
    assert heard == ["something else"]


@pytest.mark.parametrize(("given", "kept"), [(32, "32-true"), ("32", "32-true"), ("bf16", "bf16-mixed")])
def test_precision_is_written_as_for_a_trainer(given: Any, kept: str) -> None:
    loop = make_loop(precision=given, max_rounds=1)
    loop.fit(Net(), Data())
    assert loop.config["loop"]["precision"] == kept


@pytest.mark.parametrize(
    ("given", "reason"), [(16, "loss scaler"), ("16-mixed", "loss scaler"), ("bf16-true", "small updates"), (64, "fp32")]
)
def test_a_precision_that_is_not_there_is_refused_with_the_reason(given: Any, reason: str) -> None:
    with pytest.raises(fedtune.UsageError, match=f"precision: got {given!r}; allowed: auto, 32-true, bf16-mixed; .*{reason}"):
        make_loop(precision=given)


def test_rounds_are_evaluated_as_often_as_asked() -> None:
    loop = make_loop(max_rounds=5, check_val_every_n_epoch=2, baselines=["centralised"])
    history = loop.fit(Net(), Three())
    assert [sorted(record.metrics) for record in history] == [[], ["accuracy", "loss_nats"], [], ["accuracy", "loss_nats"], []]
    assert [bool(record.metrics) for record in loop.baseline_runs["centralised"]] == [False, True, False, True, False]
    assert loop.summary["best_round"] in (2, 4)
    assert loop.summary["test_accuracy"] is not None
    always = make_loop(max_rounds=5).fit(Net(), Three())
    assert [record.train_loss_nats for record in always] == [record.train_loss_nats for record in history]


def test_a_fast_dev_run_touches_everything_and_writes_nothing(tmp_path: Path) -> None:
    loop = make_loop(max_rounds=9, fast_dev_run=True, run_dir=str(tmp_path / "r"), baselines=["centralised", "local"])
    history = loop.fit(Net(), Three())
    assert [record.num_steps for record in history] == [3]
    assert history[0].num_examples == 12
    assert set(loop.baseline_runs) == {"centralised", "local"}
    assert not (tmp_path / "r").exists()
    assert make_loop(fast_dev_run=2).fit(Net(), Three())[0].num_steps == 6


def test_limits_of_evaluation_hold() -> None:
    counted: list[int] = []
    module = logging_module(lambda self, batch, index: counted.append(index))
    make_loop(max_rounds=1, limit_val_batches=1, limit_test_batches=0.5).fit(module, Data())
    assert counted == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit_train_batches": 0}, "limit_train_batches: got 0; allowed: a number of batches, 1 or more, or a share"),
        ({"limit_val_batches": 1.5}, "limit_val_batches: got 1.5; allowed: a number of batches"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches: got 0; allowed: 1 or more"),
        ({"accumulate_grad_batches": {2: 4}}, "accumulate_grad_batches: got {2: 4}; allowed: a whole number"),
        ({"max_rounds": 2.5}, "max_rounds: got 2.5; allowed: a whole number, 1 or more"),
        ({"gradient_clip_algorithm": "normal"}, "gradient_clip_algorithm: got 'normal'; allowed: norm (nearest), value"),
        ({"deterministic": "yes"}, "deterministic: got 'yes'; allowed: true, false, warn"),
        ({"callbacks": [pl.callbacks.EarlyStopping("a")]}, "the counterpart of EarlyStopping is fedtune.EarlyStopping"),
        ({"callbacks": [pl.callbacks.ModelCheckpoint()]}, "the counterpart of ModelCheckpoint is fedtune.BestWeights"),
        ({"callbacks": [fedtune.EarlyStopping]}, "callbacks: got 'the class EarlyStopping'; allowed: an object of it"),
        ({"callbacks": [print]}, "callbacks: got 'builtin_function_or_method'; allowed: objects of FederatedCallback"),
        ({"callbacks": fedtune.EarlyStopping()}, "callbacks: got 'EarlyStopping'; allowed: a list of them"),
        ({"logger": "tensorboard"}, "logger: got 'tensorboard'; allowed: none, wandb, a logger of Lightning, or a list of"),
        ({"baselines": "local"}, None),
    ],
)
def test_arguments_are_checked_when_the_loop_is_made(options: dict[str, Any], message: str | None) -> None:
    if message is None:
        assert make_loop(**options).baselines
        return
    with pytest.raises(fedtune.UsageError) as caught:
        make_loop(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_data_are_given_once() -> None:
    for arguments in ({}, {"data": Data(), "datamodule": Data()}):
        with pytest.raises(fedtune.UsageError, match=r"data: got '.*'; allowed: one data module, as data or as datamodule"):
            make_loop().fit(Net(), **arguments)


def test_a_trainer_with_its_default_logger_takes_ours(make_module: Make, make_data: Make, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        one.fit(make_module(seed=1), datamodule=make_data(seed=2))
    assert list(tmp_path.rglob("*.ckpt"))


def test_a_logger_of_lightning_gets_every_round(tmp_path: Path) -> None:
    seen: list[Any] = []
    logger = pl.loggers.CSVLogger(tmp_path, name="", version="")
    module = module_with(on_train_start=lambda self: seen.append(self.logger))()
    make_loop(max_rounds=3, logger=logger, callbacks=[fedtune.LearningRateMonitor()]).fit(module, Three())
    assert all(one is logger for one in seen)
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(lines) == 5  # names, rounds, summary
    assert {"validation/accuracy", "train/loss_nats", "final/accuracy", "lr-SGD", "step"} <= set(lines[0].split(","))


# ---------------------------------------------------------------- callbacks


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize(
    "options",
    [{"patience": 2}, {"patience": 3, "min_delta": 0.15}, {"stopping_threshold": 0.7}, {"divergence_threshold": 0.45}],
)
def test_early_stopping_ends_where_lightnings_would(
    mode: str, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    values = [0.5, 0.6, 0.55, 0.62, 0.61, 0.6, 0.75, 0.4, 0.3, 0.3, 0.3, 0.3]
    theirs = pl.callbacks.EarlyStopping("x", mode=mode, **options)
    expected = len(values)
    for number, value in enumerate(values, start=1):
        if theirs._evaluate_stopping_criteria(torch.tensor(value))[0]:
            expected = number
            break
    rounds = iter(values)
    module = logging_module(
        lambda self, batch, index: self.log("x", self.now),
        on_validation_start=lambda self: setattr(self, "now", next(rounds, 0.0)),
    )
    stopping = fedtune.EarlyStopping("x", mode=mode, **options)
    history = make_loop(max_rounds=len(values), monitor="x", callbacks=[stopping], progress=True).fit(module, Three())
    assert len(history) == expected
    if expected < len(values):
        assert f"after round {expected}: " in capsys.readouterr().out
        assert stopping.stopped_round == expected


def scores(values: list[float], **more: Any) -> Any:
    """A module whose accuracy on the validation part after each round is given."""

    def validation_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", values[min(int(self.global_step) // 3, len(values)) - 1])

    return type("Scores", (Net,), {"validation_step": validation_step, **more})()


def test_early_stopping_and_best_weights_go_on_after_an_interruption(tmp_path: Path) -> None:
    values = [0.5, 0.7, 0.6, 0.7, 0.65, 0.6, 0.9]

    def run(folder: str, rounds: int) -> tuple[Any, Any, Any]:
        callbacks = [fedtune.EarlyStopping(patience=4), fedtune.BestWeights()]
        module = scores(values)
        loop = make_loop(max_rounds=rounds, run_dir=str(tmp_path / folder), callbacks=callbacks, keep=1)
        return loop.fit(module, Three()), module, callbacks

    whole, module, (stopping, best) = run("whole", 9)
    assert (len(whole), best.best_round, stopping.best_score) == (6, 2, pytest.approx(0.7))
    run("cut", 3)
    cut, _, (again, kept) = run("cut", 9)
    assert (len(cut), again.state_dict(), kept.state_dict()) == (6, stopping.state_dict(), best.state_dict())
    for name in ("whole", "cut"):
        with safe_open(tmp_path / name / "best.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt", "round": "2", "monitor": "accuracy", "value": repr(best.best_score)}
    one, other = (load_file(tmp_path / name / "best.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    two = scores(values)
    make_loop(max_rounds=2).fit(two, Three())
    best.load(module)
    same(module, two)


def test_best_weights_without_a_directory_can_be_restored() -> None:
    best = fedtune.BestWeights("loss_nats", "max", restore=True)
    one, other = Net(), Net()
    make_loop(max_rounds=4, callbacks=[best]).fit(one, Three())
    assert best.best_round == 1
    make_loop(max_rounds=1).fit(other, Three())
    same(one, other)


def test_the_mode_of_another_metric_must_be_said() -> None:
    for callback in (fedtune.EarlyStopping("loss_nats"), fedtune.BestWeights("loss_nats")):
        with pytest.raises(fedtune.UsageError, match=r"mode: got None; allowed: max or min, as loss_nats is not the run's own"):
            make_loop(callbacks=[callback]).fit(Net(), Data())
    with pytest.raises(fedtune.UsageError, match=r"EarlyStopping.monitor: got 'acuracy'; allowed: accuracy \(nearest\)"):
        make_loop(callbacks=[fedtune.EarlyStopping("acuracy", mode="max")]).fit(Net(), Data())


def test_learning_rates_are_kept_for_every_round(tmp_path: Path) -> None:
    def run(rounds: int, folder: str) -> Any:
        monitor = fedtune.LearningRateMonitor()
        make_loop(max_rounds=rounds, callbacks=[monitor], run_dir=str(tmp_path / folder)).fit(Stepped(), Three())
        return monitor.rates

    rates = run(4, "whole")
    assert rates == [{"round": number, "lr-SGD": 0.3 * 0.5 ** (3 * number // 2)} for number in range(1, 5)]
    run(2, "cut")
    assert run(4, "cut") == rates
    named = {"lr-SGD": 0.3 * 0.5 ** (3 // 2)}
    assert [report.learning_rates for report in make_loop(max_rounds=1).fit(Stepped(), Three())[0].clients] == [named] * 3


# ---------------------------------------------------------------- loaders and baselines


def test_a_generator_has_one_epoch() -> None:
    def batches() -> Iterator[Any]:
        yield from loader(0, 16)

    def given() -> Any:
        return GivenLoaders([batches()], loader(0, 16))

    assert make_loop(max_rounds=1).fit(Net(), given())[0].num_examples == 16
    with pytest.raises(fedtune.RunError, match="round 1, client 0: a generator has one epoch; allowed: a loader with 2"):
        make_loop(max_rounds=1, local_epochs=2).fit(Net(), given())


@pytest.mark.parametrize("many", [[loader(0, 8), loader(8, 16)], {"a": loader(0, 8), "b": loader(8, 16)}])
def test_several_loaders_of_a_client_are_refused_by_number(many: Any) -> None:
    with pytest.raises(fedtune.RunError, match="round 1, client 0: client_dataloader returned 2 loaders; allowed: one loader"):
        make_loop(max_rounds=1).fit(Net(), GivenLoaders([many], loader(0, 8)))
    with pytest.raises(fedtune.RunError, match="client_dataloader returned NoneType; allowed: one loader"):
        make_loop(max_rounds=1).fit(Net(), GivenLoaders([None], loader(0, 8)))


@pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`:UserWarning")
def test_a_combined_loader_is_a_clients_loader_as_in_a_trainer() -> None:
    class Paired(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch["a"]) + self.loss(batch["b"])

    class Combined(Data):
        def client_dataloader(self, client: int) -> Any:
            return CombinedLoader({"a": loader(0, 16), "b": loader(16, 44)}, "max_size_cycle")

        def train_dataloader(self) -> Any:
            return self.client_dataloader(0)

    ours, theirs = both(Paired, Combined())
    same(ours, theirs)


def test_a_module_without_validation_step_is_trained_and_said_to_be_unmeasured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Blind(pl.LightningModule):
        __init__, loss = Net.__init__, Net.loss
        training_step, configure_optimizers = Net.training_step, Net.configure_optimizers

    Blind.__init__ = lambda self: (pl.LightningModule.__init__(self), setattr(self, "net", nn.Linear(6, 2)))[0]  # type: ignore[method-assign,assignment]
    loop = make_loop(max_rounds=2, run_dir=str(tmp_path), progress=True)
    history = loop.fit(Blind(), Three())
    assert [record.metrics for record in history] == [{}, {}]
    assert "Blind has no validation_step: the rounds are not evaluated" in capsys.readouterr().out
    with pytest.raises(fedtune.UsageError, match="module: got 'Blind'; allowed: a module with validation_step"):
        make_loop().validate(Blind(), Data())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training_step": pl.LightningModule.training_step}, "a module with training_step"),
        ({"automatic_optimization": False}, "automatic optimisation"),
        ({"training_step": lambda self, dataloader_iter: None}, "steps that take a batch"),
    ],
)
def test_a_module_that_no_client_could_train_is_refused_at_once(change: dict[str, Any], message: str) -> None:
    with pytest.raises(fedtune.UsageError, match=f"module: got 'With'; allowed: {message}"):
        make_loop().fit(module_with(**change)(), Data())
    with pytest.raises(fedtune.UsageError, match=r"module: got 'Linear'; allowed: a pytorch_lightning.LightningModule"):
        make_loop().fit(nn.Linear(1, 1), Data())  # type: ignore[arg-type]


class Many(Data):
    num_clients = 24

    def client_dataloader(self, client: int) -> Any:
        return loader(client, client + 4, 4)


def test_the_local_baseline_is_a_sample_evaluated_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    parts: list[str] = []
    hooks = {"on_test_start": lambda self: parts.append("test"), "on_validation_start": lambda self: parts.append("val")}
    module = module_with(**hooks)()
    loop = make_loop(max_rounds=2, baselines=["local"], local_clients=5, progress=True, run_dir=str(tmp_path))
    loop.fit(module, Many())
    assert parts == ["val", "val", "test"] + ["test"] * 5
    assert "local: 5 of 24 clients, drawn (options.local_clients)" in capsys.readouterr().out
    assert loop.summary["local_clients"] == 5
    drawn = [record["client"] for record in loop.baseline_runs["local"]]
    assert len(set(drawn)) == 5
    assert loop.summary["local_accuracy"] == sum(one["test"]["accuracy"] for one in loop.baseline_runs["local"]) / 5
    again = make_loop(max_rounds=2, baselines=["local"], local_clients=5, run_dir=str(tmp_path))
    again.fit(module_with(**hooks)(), Many())
    assert [record["client"] for record in again.baseline_runs["local"]] == drawn
    everyone = make_loop(max_rounds=1, baselines=["local"])
    everyone.fit(Stepped(), Three())
    assert [record["client"] for record in everyone.baseline_runs["local"]] == [0, 1, 2]


@pytest.mark.parametrize(("agreement", "kept"), [(False, []), (True, [torch.int32])])
def test_a_round_holds_the_servers_weights_and_the_sums_and_no_other_copy(agreement: bool, kept: list[torch.dtype]) -> None:
    found: list[list[Any]] = []

    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 331), nn.Linear(331, 2))

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.trainer.global_step % 3 == 2:
                gc.collect()
                held = {
                    one.data_ptr(): one for one in gc.get_objects() if issubclass(type(one), Tensor) and one.shape == (331, 6)
                }
                found.append(sorted((one.dtype for one in held.values()), key=str))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    make_loop(max_rounds=2, agreement=agreement).fit(Wide(), Three())
    first, *_, last = found
    assert first == [torch.float32] * 2  # the module's and the server's
    assert last == sorted([torch.float32] * 2 + [torch.int64] + kept, key=str)  # and the sums
