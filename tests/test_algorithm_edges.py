"""What algorithms do at the edges: rates of 0, losses of 0, many steps, tensors without gradients, parts that stay, stops."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import GivenLoaders, assert_equal, make_loop, weights_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fedtune
from fedtune.algorithms.ditto import ditto
from fedtune.algorithms.fedavg import Mean, fedavg
from fedtune.algorithms.fedavgm import fedavgm
from fedtune.algorithms.feddyn import feddyn
from fedtune.algorithms.fednova import fednova
from fedtune.algorithms.fedper import fedper, fedrep
from fedtune.algorithms.fedprox import fedprox
from fedtune.algorithms.qfedavg import qfedavg
from fedtune.algorithms.scaffold import scaffold
from fedtune.algorithms.torch_optim import OPTIMIZERS, diloco, fedopt
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.memory import MemoryOnDisk
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm
from fedtune.storage import checkpoint
from fedtune.tensors import Groups
from fedtune.testing import TinyData, TinyModule, play

HEAD = ("network.4.*",)


class TinyLoaders(GivenLoaders):
    """The tiny federation, evaluated on the batches of one client."""

    def __init__(self) -> None:
        data = TinyData()
        super().__init__([data.client_dataloader(client) for client in range(4)], data.client_dataloader(0))

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


class Changed(pl.LightningModule):
    """A small classifier, with what a test changes of it."""

    def __init__(self, optimizer: Callable[[Any], Any], scale: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)).to(dtype)
        self.unused, self.frozen = nn.Linear(3, 2), nn.Linear(5, 8).requires_grad_(False)
        self.tied = self.network[0].weight  # so it goes by this name
        self.optimizer, self.scale = optimizer, scale

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        dtype = self.network[0].weight.dtype
        return F.cross_entropy(self.network(batch[0].to(dtype) + self.frozen(batch[0]).mean().to(dtype)), batch[1]) * self.scale

    def configure_optimizers(self) -> Any:
        return self.optimizer(self)


def sgd(module: Changed) -> Any:
    return torch.optim.SGD(module.parameters(), 0.1)


def warmed(module: Changed) -> Any:
    optimizer = sgd(module)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 40))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(algorithm: Any, module: pl.LightningModule, data: Any = None, rounds: int = 3, **options: Any) -> Any:
    loop = make_loop(
        max_rounds=rounds,
        algorithm=algorithm,
        evaluate_on="test",
        clients_per_round=options.pop("clients_per_round", 3),
        **options,
    )
    loop.fit(module, data or TinyLoaders())
    return loop


SHARED: dict[str, Algorithm] = {
    "fedprox": fedprox(0.5),
    "scaffold": scaffold(),
    "scaffold, option 1": scaffold(1),
    "fednova": fednova(0.5),
    "feddyn": feddyn(0.5),
    "qfedavg": qfedavg(2.0),
    "diloco": diloco(),
    "fedavgm": fedavgm(),
    "fedopt": fedopt("AdamW", 0.01),
}


# ---------------------------------------------------------------- parts that stay


@pytest.mark.parametrize("name", SHARED)
def test_an_algorithm_leaves_what_is_personal_to_the_client(name: str, tmp_path: Path) -> None:
    results = play(replace(SHARED[name], personal=(*HEAD, "network.1.*")), tmp_path, 3)
    assert bool(results[-1].state.weights["network.0.weight"].isfinite().all())
    kept = MemoryOnDisk(tmp_path / "clients", 4).load(0, 9)["personal"]
    assert set(kept) == {
        "network.4.weight",
        "network.4.bias",
        *(f"network.1.{n}" for n in ("weight", "bias", "running_mean", "running_var")),
    }


def test_a_client_with_a_whole_model_of_its_own_has_no_part_of_its_own() -> None:
    with pytest.raises(fedtune.UsageError, match=r"algorithm\.personal.*Beside") as caught:
        replace(ditto(), personal=HEAD)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make", [lambda: fedper((*HEAD, "network.1.*")), lambda: fedrep(HEAD, 2), ditto, diloco, feddyn, scaffold]
)
def test_a_run_that_is_stopped_after_two_rounds_goes_on_with_the_same_bits(make: Any, tmp_path: Path) -> None:
    modules = {name: TinyModule() for name in ("whole", "first", "again")}
    whole = fit(make(), modules["whole"], rounds=4, run_dir=str(tmp_path / "whole"))
    fit(make(), modules["first"], rounds=3, run_dir=str(tmp_path / "cut"))
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "round-0003")
    again = fit(make(), modules["again"], rounds=4, run_dir=str(tmp_path / "cut"))
    assert_equal(weights_of(modules["whole"]), weights_of(modules["again"]))
    assert [record.own_accuracy for record in whole.history] == [record.own_accuracy for record in again.history]
    memories = [MemoryOnDisk(tmp_path / name / "clients", 4) for name in ("whole", "cut")]
    for client in range(4):
        one, other = (memory.load(client, 9) for memory in memories)
        assert one.keys() == other.keys()
        for group in one:
            assert_equal(one[group], other[group])


@dataclass(frozen=True)
class InPlace(ClientUpdate):
    """Counts its rounds in place, and sends what the server cannot use in a round."""

    lost: int = 2
    seen: list[float] = field(default_factory=list)

    def __call__(self, client: Client) -> Groups:
        count = client.memory.setdefault("count", {"n": torch.zeros(())})["n"]
        self.seen.append(float(count))
        count.add_(1)
        client.train()
        update = client.update()
        if client.request.round == self.lost:
            next(iter(update.values())).fill_(float("nan"))
        return {"update": update}


def test_what_is_changed_in_place_is_forgotten_with_a_reply_that_does_not_count() -> None:
    part, data = InPlace(), TinyData().client_dataloader(1)
    loaders = GivenLoaders([data, data], data)

    @dataclass(frozen=True)
    class OneOf(ClientUpdate):
        def __call__(self, client: Client) -> Groups:
            if client.request.client == 0:
                return part(client)
            client.train()
            return {"update": client.update()}

    make_loop(max_rounds=4, algorithm=Algorithm(OneOf(), Mean()), min_clients=1).fit(TinyModule(), loaders)
    assert part.seen == [0, 1, 1, 2]


# ---------------------------------------------------------------- many steps, rates and losses of 0


def test_fednova_has_room_for_many_steps() -> None:
    module, plain = TinyModule(), TinyModule()
    same = GivenLoaders([TinyData().client_dataloader(2)] * 2, TinyData().client_dataloader(0))
    for one, algorithm in ((module, fednova()), (plain, fedavg())):
        make_loop(max_rounds=1, local_epochs=30, algorithm=algorithm).fit(one, same)  # 150 steps each
    for name, tensor in weights_of(plain).items():
        torch.testing.assert_close(weights_of(module)[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("q", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("scale", [0.0, 1e-6])
def test_q_fedavg_bears_losses_of_nothing(q: float, scale: float) -> None:
    module = Changed(sgd, scale)
    before = weights_of(module)
    fit(qfedavg(q), module)
    for name, tensor in weights_of(module).items():
        assert bool(tensor.isfinite().all())
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-5)


def test_q_fedavg_with_small_losses_is_its_formula() -> None:
    """In another unit of the loss, to which the rate is fitted, nothing is another."""
    small, large = (
        Changed(lambda m, r=rate: torch.optim.SGD(m.parameters(), r), scale)
        for scale, rate in ((2.0**-20, 0.1 * 2**20), (1.0, 0.1))
    )
    for module in (small, large):
        fit(qfedavg(1.0), module)
    assert_near_all(weights_of(small), weights_of(large))


def assert_near_all(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SHARED)
def test_a_rate_of_nothing_in_the_first_step_and_round(name: str, tmp_path: Path) -> None:
    """The first round of this client has one step, of rate 0."""
    data = [[TinyData().client_dataloader(client)[0]] for client in range(4)]
    module = Changed(warmed)
    before = weights_of(module)
    fit(SHARED[name], module, GivenTest(data), rounds=1, clients_per_round=4)
    still = name != "fedopt"  # AdamW decays the weights
    assert all(torch.equal(tensor, before[key]) for key, tensor in weights_of(module).items()) or not still
    module = Changed(warmed)
    fit(SHARED[name], module, GivenTest(data), rounds=6, run_dir=str(tmp_path / "run"))
    assert not torch.equal(weights_of(module)["tied"], before["tied"])
    assert all(bool(tensor.isfinite().all()) for tensor in weights_of(module).values())


class GivenTest(GivenLoaders):
    def __init__(self, clients: list[Any]) -> None:
        super().__init__(clients, clients[0])

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


def control_of(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    state, memory = checkpoint.latest(folder / "checkpoints"), MemoryOnDisk(folder / "clients", 4)
    assert state is not None
    return state.memory["Control"]["control"], [memory.load(client, 99).get("control", {}) for client in range(4)]


class Halves(pl.LightningModule):
    """Two weights, of which a client's batch, (which, target), has a gradient for one."""

    def __init__(self, optimizer: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self.w = nn.ParameterList([torch.zeros(1), torch.zeros(1)])

    def training_step(self, batch: Tensor) -> Tensor:
        which, target = int(batch[0, 0]), batch[0, 1]
        return (self.w[which] - target).square().sum() / 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.3)


@pytest.mark.parametrize("option", [1, 2])
def test_scaffold_trains_what_only_some_clients_have_a_gradient_for(option: int, tmp_path: Path) -> None:
    data = GivenLoaders([[torch.tensor([[which, 3.0]])] * 4 for which in (0, 1, 1)], [torch.tensor([[0, 3.0]])])
    module = Halves()
    make_loop(max_rounds=90, algorithm=scaffold(option), run_dir=str(tmp_path / "r"), local_epochs=1).fit(module, data)
    assert [one.item() for one in module.w] == pytest.approx([3.0, 3.0], abs=1e-2)
    clients = [MemoryOnDisk(tmp_path / "r" / "clients", 3).load(client, 999)["control"] for client in range(3)]
    assert clients[0]["w.1"].item() == clients[1]["w.0"].item() == 0.0


def test_scaffold_learns_nothing_of_steps_of_rate_nothing(tmp_path: Path) -> None:
    data = [[TinyData().client_dataloader(client)[0]] for client in range(4)]

    def paused(module: Changed) -> Any:  # the third and fourth rounds, of one step each, have rate 0
        optimizer = sgd(module)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step not in (2, 3)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    fit(scaffold(), Changed(paused), GivenTest(data), rounds=2, run_dir=str(tmp_path / "two"))
    fit(scaffold(), Changed(paused), GivenTest(data), rounds=4, run_dir=str(tmp_path / "four"))
    before, after = control_of(tmp_path / "two"), control_of(tmp_path / "four")
    assert any(bool(tensor.any()) for tensor in before[0].values())
    assert_equal(before[0], after[0])
    for one, other in zip(before[1], after[1], strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("option", [1, 2])
def test_scaffolds_control_variate_is_the_mean_of_the_clients_in_a_run(option: int, tmp_path: Path) -> None:
    fit(scaffold(option), Changed(warmed), rounds=5, run_dir=str(tmp_path / "run"), local_epochs=2)
    control, clients = control_of(tmp_path / "run")
    for name, tensor in control.items():
        kept = [one.get(name, torch.zeros_like(tensor)) for one in clients]
        torch.testing.assert_close(tensor, sum(kept) / 4, rtol=1e-4, atol=1e-6)
    assert not any("frozen" in name for name in control)
    assert not bool(control["unused.weight"].any())


@pytest.mark.parametrize("lost", [[(2, 1)], [(1, 0), (2, 3), (3, 1)]])
def test_memories_of_server_and_clients_agree_where_replies_are_lost(lost: list[tuple[int, int]], tmp_path: Path) -> None:
    """c is the mean of all c_k, and h that of all g_k, whoever was away or lost."""
    for name, algorithm, factor in (("Control", scaffold(), 1.0), ("Drift", feddyn(0.3), -1 / 0.3)):
        folder, group = tmp_path / name, {"Control": "control", "Drift": "linear"}[name]
        state = play(algorithm, folder, 4, lost)[-1].state
        clients = [MemoryOnDisk(folder / "clients", 4).load(client, 9).get(group, {}) for client in range(4)]
        for tensor_name, tensor in state.memory[name][name.lower()].items():
            kept = [one.get(tensor_name, torch.zeros_like(tensor)) for one in clients]
            torch.testing.assert_close(tensor, factor * sum(kept) / 4, rtol=1e-4, atol=1e-6)


def test_q_fedavg_refuses_negative_losses() -> None:
    with pytest.raises(fedtune.UsageError, match=r"q: got 2\.0; allowed: 0, where a loss is negative"):
        fit(qfedavg(2.0), Changed(sgd, -1.0))
    fit(qfedavg(0.0), Changed(sgd, -0.01))


# ---------------------------------------------------------------- types, and what draws


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("name", SHARED)
def test_a_round_with_frozen_tied_and_unused_tensors_goes_on_with_the_same_bits(
    name: str, precision: str, tmp_path: Path
) -> None:
    modules = [Changed(warmed) for _ in range(3)]
    options: dict[str, Any] = {"precision": precision, "local_epochs": 2}
    fit(SHARED[name], modules[0], **options)
    fit(SHARED[name], modules[1], rounds=2, run_dir=str(tmp_path / "run"), **options)
    fit(SHARED[name], modules[2], rounds=3, run_dir=str(tmp_path / "run"), **options)
    assert_equal(weights_of(modules[0]), weights_of(modules[2]))
    start = weights_of(Changed(warmed))
    found = weights_of(modules[0])
    assert all(torch.equal(found[f"frozen.{one}"], start[f"frozen.{one}"]) for one in ("weight", "bias"))
    assert not torch.equal(found["tied"], start["tied"])


class Sampled(GivenLoaders):
    """Loaders that shuffle by the number of the epoch."""

    def __init__(self) -> None:
        rows = TinyData()
        sets = [
            TensorDataset(*(torch.cat(column) for column in zip(*rows.client_dataloader(k), strict=True))) for k in range(4)
        ]
        super().__init__([DataLoader(one, 3, sampler=ByEpoch(len(one))) for one in sets], rows.client_dataloader(0))

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


class ByEpoch:
    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        return iter(torch.randperm(self.size, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@pytest.mark.parametrize("make", [lambda: qfedavg(2.0), lambda: scaffold(1)])
def test_the_pass_before_training_is_that_of_the_round(make: Any) -> None:
    """Whoever was trained before, a client's pass is over the first epoch of its round."""
    epochs: list[list[int]] = []

    class Watched(Sampled):
        def client_dataloader(self, client: int) -> Any:
            loader = super().client_dataloader(client)
            loader.sampler.set_epoch = lambda epoch, sampler=loader.sampler: (
                epochs[-1].append(epoch),
                setattr(sampler, "epoch", epoch),
            )
            epochs.append([])
            return loader

    fit(make(), Changed(sgd), Watched(), rounds=2, local_epochs=2)
    assert [one for one in epochs if one] == [[0], [0, 1]] * 3 + [[2], [2, 3]] * 3


def test_a_state_of_the_server_is_kept_in_fp32_at_least(tmp_path: Path) -> None:
    module = Changed(lambda m: torch.optim.SGD(m.network.parameters(), 0.1), dtype=torch.bfloat16)
    fit(fedopt("Adam", 0.01), module, run_dir=str(tmp_path / "run"))
    state = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert state is not None
    for tensors in state.memory["TorchOptimizer"].values():
        assert tensors["tied"].dtype == torch.float32


# ---------------------------------------------------------------- every optimizer of torch


SETTINGS: dict[str, Sequence[dict[str, Any]]] = {
    "SGD": [{}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "weight_decay": 0.1, "maximize": False}],
    "Adam": [{}, {"amsgrad": True}, {"weight_decay": 0.1}, {"fused": True}, {"foreach": True}],
    "AdamW": [{}, {"amsgrad": True}],
    "RMSprop": [{}, {"centered": True, "momentum": 0.5}],
    "Adagrad": [{"fused": True}, {"lr_decay": 0.1, "initial_accumulator_value": 0.1}],
    "NAdam": [{}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "ASGD": [{}, {"t0": 1.0}],
}
EVERY = [(name, settings) for name in OPTIMIZERS for settings in SETTINGS.get(name, [{}])]


def reference(name: str, settings: dict[str, Any], starts: list[Any], updates: list[Any]) -> dict[str, Tensor]:
    """The optimizer itself, alive for all rounds, in fp64."""
    weights = {key: one.double().requires_grad_() for key, one in starts[0].items()}
    optimizer = OPTIMIZERS[name](list(weights.values()), lr=0.01, **settings)
    for update in updates:
        for key, one in weights.items():
            one.grad = -update[key].double()
        optimizer.step()
    return {key: one.detach() for key, one in weights.items()}


@pytest.mark.parametrize(("name", "settings"), EVERY, ids=str)
def test_every_optimizer_of_torch_at_the_server_goes_on_where_it_was(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    if name == "Muon":  # takes matrices only
        with pytest.raises(fedtune.UsageError, match="Muon"):
            fedopt(name, 0.01)
        return
    step = fedopt(name, 0.01, tuple(settings.items())).server[0]
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.randn(4, 3, generator=generator), "b": torch.randn(3, generator=generator)}
    updates = [{key: torch.randn(one.shape, generator=generator) for key, one in weights.items()} for _ in range(5)]
    expected, memory = reference(name, settings, [weights], updates), {}
    found = {key: one.double() for key, one in weights.items()}
    for update in updates:
        context = Context(0, 1, 1, (0,), 1, weights=found)
        moved, memory = step({"update": {key: one.double() for key, one in update.items()}}, memory, context)
        found = {key: one + moved["update"][key] for key, one in found.items()}
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-9, atol=1e-9)
    algorithm = fedopt(name, 0.01, tuple(settings.items()))
    whole = play(algorithm, tmp_path / "a", 3)[-1].state
    play(algorithm, tmp_path / "b", 2)
    again = play(algorithm, tmp_path / "b", 3)[-1].state
    assert_equal(whole.weights, again.weights)
    assert bool(whole.memory["TorchOptimizer"]) == bool(again.memory["TorchOptimizer"])
    for group, tensors in whole.memory["TorchOptimizer"].items():
        assert_equal(tensors, again.memory["TorchOptimizer"][group])


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "Muon"])
def test_diloco_keeps_the_state_of_every_optimizer_of_torch(name: str, tmp_path: Path) -> None:
    def make(module: Changed) -> Any:
        return OPTIMIZERS[name](module.parameters(), lr=0.01)

    modules = [Changed(make) for _ in range(3)]
    fit(diloco(), modules[0])
    fit(diloco(), modules[1], rounds=2, run_dir=str(tmp_path / "run"))
    fit(diloco(), modules[2], rounds=3, run_dir=str(tmp_path / "run"))
    assert_equal(weights_of(modules[0]), weights_of(modules[2]))
