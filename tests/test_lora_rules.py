"""What the aggregations of LoRA do: their identities, second implementations in torch alone, and what they refuse.

Legend: W (out, in) of a layer, A (r, in), B (out, r), s the scale, p_k the weight of client k; u, v: the head (averaged).
"""

from __future__ import annotations

import math
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import GivenLoaders, assert_equal, assert_near, make_loop, weights_of, without_times
from test_robust import OneOfTwo
from torch import Tensor, nn
from torch.nn import functional as F

import fedtune
from fedtune.algorithms import ALGORITHMS
from fedtune.algorithms.compression import Quantise
from fedtune.algorithms.fedavg import Mean, fedavg
from fedtune.algorithms.fedavgm import fedavgm
from fedtune.algorithms.fedex_lora import Residual, fedex_lora
from fedtune.algorithms.fedit import fedit
from fedtune.algorithms.fedsa_lora import fedsa_lora
from fedtune.algorithms.ffa_lora import ffa_lora
from fedtune.algorithms.flexlora import Resized, flexlora
from fedtune.algorithms.flora import Stacking, flora
from fedtune.algorithms.hetlora import Padded, hetlora
from fedtune.algorithms.rolora import rolora
from fedtune.errors import RunError, UsageError
from fedtune.federated.adapters import Adapters, Layer, adapters_of, dealt
from fedtune.federated.memory import MemoryOnDisk
from fedtune.federated.messages import ClientReport, Context, Reply
from fedtune.federated.pieces import Pieces
from fedtune.federated.stacks import Stacks, compact, squared, truncated
from fedtune.federated.state import ServerState
from fedtune.randomness import stream
from fedtune.runtimes.serial import Serial
from fedtune.storage import checkpoint
from fedtune.tensors import Tensors, num_bytes
from fedtune.testing import Adapted

SIZES, BATCH, ROUNDS, EPOCHS, RATE, SEED = (9, 5, 14, 6, 8), 3, 3, 2, 0.2, 7
N, R, S = len(SIZES), 4, 2.0
LAYERS = ("first", "last")
PRESETS = ("fedit", "ffa_lora", "rolora", "fedsa_lora", "flora", "fedex_lora", "flexlora", "hetlora")


class Small(pl.LightningModule):
    """Two layers with adapters and a head; trained by plain SGD."""

    def __init__(self, rank: int = R, dtype: torch.dtype = torch.float64, rate: float = RATE) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.head = (nn.Linear(*sizes) for sizes in ((6, 8), (8, 7), (7, 3)))
        self.first, self.last = Adapted(self.first, rank, S), Adapted(self.last, rank, S)
        self.rate = rate
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.last(torch.tanh(self.first(x)))))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0].to(self.head.weight)), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("accuracy", (self(batch[0].to(self.head.weight)).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.rate)


def examples() -> list[list[tuple[Tensor, Tensor]]]:
    """Batches of uneven clients with different classes."""
    generator, found = torch.Generator().manual_seed(1), []
    for client, size in enumerate(SIZES):
        x = torch.randn(size, 6, generator=generator, dtype=torch.float64) + client / 3
        y = (torch.randint(2, (size,), generator=generator) + client) % 3
        found.append(list(zip(x.split(BATCH), y.split(BATCH), strict=True)))
    return found


def fit(algorithm: Any, module: pl.LightningModule | None = None, clients: int = N, **options: Any) -> tuple[Any, Any]:
    """The loop and the module after a run over the first clients."""
    module = Small() if module is None else module
    batches = examples()[:clients]
    run = {"max_rounds": ROUNDS, "local_epochs": EPOCHS, "clients_per_round": min(3, clients), "seed": SEED}
    loop = make_loop(algorithm=algorithm, **(run | options))
    data: Any = GivenLoaders(batches, batches[0])
    data.client_indices = [range(size) for size in SIZES[:clients]]  # so many examples at most: the grid of sums is fine
    loop.fit(module, data)
    return loop, module


def values(module: Any) -> Tensors:
    """W, A, B of both layers and the head, as the judges name them."""
    found = {"u": module.head.weight, "v": module.head.bias}
    for place, name in enumerate(LAYERS):
        layer = getattr(module, name)
        pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        found |= {f"W{place}": layer.base_layer.weight, f"c{place}": layer.base_layer.bias}
        found |= {f"A{place}": pair[0], f"B{place}": pair[1]}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def whole(x: Tensors, s: float = S) -> Tensors:
    """What the model computes with: W + s B A, and the head."""
    found = {f"W{i}": x[f"W{i}"] + s * x[f"B{i}"] @ x[f"A{i}"] for i in (0, 1)}
    return found | {"u": x["u"], "v": x["v"]}


# ---------------------------------------------------------------- the judges: torch only


class World:
    """Data and local steps of the clients, and the cohort of each round."""

    def __init__(self, cohorts: list[list[int]], ranks: tuple[int, ...] = ()) -> None:
        self.batches, self.cohorts, self.start = examples(), cohorts, values(Small())
        self.ranks = ranks or (R,) * N

    def local(self, x: Tensors, k: int, only: str = "ABuv", s: float = S) -> Tensors:
        y = dict(x)
        for _ in range(EPOCHS):
            for inputs, labels in self.batches[k]:
                z = {name: one.clone().requires_grad_(name[0] in only) for name, one in y.items()}
                hidden = inputs
                for i in (0, 1):
                    hidden = torch.tanh(hidden @ (z[f"W{i}"] + s * z[f"B{i}"] @ z[f"A{i}"]).T + z[f"c{i}"])
                F.cross_entropy(hidden @ z["u"].T + z["v"], labels).backward()
                y = {name: one.detach() - (0 if one.grad is None else RATE * one.grad) for name, one in z.items()}
        return y

    def cut(self, x: Tensors, k: int) -> Tensors:
        """Local steps of a client that has r_k rows of A and columns of B, and the scale s_k; its B as it has it."""
        r, s_k = self.ranks[k], S * R / self.ranks[k]
        own = {f"A{i}": x[f"A{i}"][:r] for i in (0, 1)} | {f"B{i}": x[f"B{i}"][:, :r] * S / s_k for i in (0, 1)}
        return self.local(x | own, k, s=s_k)

    def rounds(self) -> Any:
        """t, S_t, and p_k for each of its clients."""
        for t, cohort in enumerate(self.cohorts, 1):
            yield t, cohort, {k: SIZES[k] / sum(SIZES[j] for j in cohort) for k in cohort}


def mean(y: dict[int, Tensors], p: dict[int, float], names: str) -> Tensors:
    keys = [name for name in next(iter(y.values())) if name[0] in names]
    return {name: sum(p[k] * y[k][name] for k in p) for name in keys}


def judge_fedit(world: World) -> Tensors:
    x = world.start
    for _, cohort, p in world.rounds():
        y = {k: world.local(x, k) for k in cohort}
        x = x | mean(y, p, "ABuv")
    return x


def judge_ffa(world: World) -> Tensors:
    x = world.start
    for _, cohort, p in world.rounds():
        y = {k: world.local(x, k, "Buv") for k in cohort}
        x = x | mean(y, p, "Buv")
    return x


def judge_rolora(world: World) -> Tensors:
    x = world.start
    for t, cohort, p in world.rounds():
        names = "Buv" if t % 2 == 1 else "Auv"
        y = {k: world.local(x, k, names) for k in cohort}
        x = x | mean(y, p, names)
    return x


def judge_rolora_momentum(world: World) -> Tensors:
    x, v = world.start, {}
    for t, cohort, p in world.rounds():
        names = "Buv" if t % 2 == 1 else "Auv"
        y = {k: world.local(x, k, names) for k in cohort}
        for name, one in mean(y, p, names).items():
            v[name] = 0.9 * v.get(name, 0) + one - x[name]  # that of the other factor rests
            x = x | {name: x[name] + v[name]}
    return x


def judge_fedsa(world: World) -> Tensors:
    x, own = world.start, {}
    for _, cohort, p in world.rounds():
        y = {k: world.local(x | own.get(k, {}), k) for k in cohort}
        own |= {k: {name: y[k][name] for name in ("B0", "B1")} for k in cohort}
        x = x | mean(y, p, "Auv")
    return x | {f"{name} of {k}": one for k, b in own.items() for name, one in b.items()}


def judge_flora(world: World) -> Tensors:
    x = world.start
    for t, cohort, p in world.rounds():
        y, rng = {k: world.cut(x, k) for k in cohort}, stream(SEED, "lora", t)
        for i in (0, 1):
            for k in cohort:
                x[f"W{i}"] = x[f"W{i}"] + p[k] * (S * R / world.ranks[k]) * y[k][f"B{i}"] @ y[k][f"A{i}"]
            most = x[f"A{i}"].shape[1] ** -0.5
            x[f"A{i}"] = torch.from_numpy(rng.uniform(-most, most, x[f"A{i}"].shape))
            x[f"B{i}"] = torch.zeros_like(x[f"B{i}"])
        x = x | mean(y, p, "uv")
    return x


def judge_fedex(world: World) -> Tensors:
    x = world.start
    for _, cohort, p in world.rounds():
        y = {k: world.local(x, k) for k in cohort}
        x = x | mean(y, p, "ABuv")
        for i in (0, 1):
            products = sum(p[k] * y[k][f"B{i}"] @ y[k][f"A{i}"] for k in cohort)
            x[f"W{i}"] = x[f"W{i}"] + S * (products - x[f"B{i}"] @ x[f"A{i}"])
    return x


def judge_flexlora(world: World) -> Tensors:
    x = world.start
    for _, cohort, p in world.rounds():
        y = {k: world.cut(x, k) for k in cohort}
        x = x | mean(y, p, "uv")
        for i in (0, 1):
            total = sum(p[k] * (S * R / world.ranks[k]) * y[k][f"B{i}"] @ y[k][f"A{i}"] for k in cohort)
            u, d, v = torch.linalg.svd(total)
            x = x | {f"B{i}": u[:, :R] * d[:R] / S, f"A{i}": v[:R]}
    return x


def judge_hetlora(world: World) -> Tensors:
    x = world.start
    for _, cohort, p in world.rounds():
        y = {k: world.cut(x, k) for k in cohort}
        x = x | mean(y, p, "uv")
        for i in (0, 1):
            a, b = torch.zeros_like(x[f"A{i}"]), torch.zeros_like(x[f"B{i}"])
            for k, r in ((k, world.ranks[k]) for k in cohort):
                a[:r] += p[k] * y[k][f"A{i}"]
                b[:, :r] += p[k] * y[k][f"B{i}"] * R / r
            x = x | {f"A{i}": a, f"B{i}": b}
    return x


CASES: dict[str, tuple[Any, Callable[[World], Tensors]]] = {
    "fedit": (fedit(), judge_fedit),
    "ffa_lora": (ffa_lora(), judge_ffa),
    "rolora": (rolora(), judge_rolora),
    "rolora, momentum": (replace(rolora(), server=fedavgm().server), judge_rolora_momentum),
    "fedsa_lora": (fedsa_lora(), judge_fedsa),
    "flora": (flora(), judge_flora),
    "flora, ranks": (flora((1, 2, 4)), judge_flora),
    "fedex_lora": (fedex_lora(), judge_fedex),
    "flexlora": (flexlora(), judge_flexlora),
    "flexlora, ranks": (flexlora((1, 3, 4)), judge_flexlora),
    "hetlora, ranks": (hetlora((1, 3, 4)), judge_hetlora),
}


@pytest.mark.parametrize("name", CASES)
def test_an_aggregation_computes_what_a_second_implementation_does(name: str, tmp_path: Path) -> None:
    algorithm, judge = CASES[name]
    loop, module = fit(algorithm, run_dir=str(tmp_path / "run"))
    ranks = dealt(algorithm.client.ranks, N, SEED)
    expected, start = judge(World([record.cohort for record in loop.history], ranks)), whole(values(Small()))
    found = whole(values(module))
    assert_near(found, whole(expected), 1e-9)
    assert max(float((found[key] - start[key]).abs().max()) for key in found) > 0.05
    if name == "fedsa_lora":
        memory = MemoryOnDisk(tmp_path / "run" / "clients", N)
        for key, tensor in expected.items():
            if " of " in key:
                kept = memory.load(int(key[-1]), ROUNDS + 1)["personal"][f"{LAYERS[int(key[1])]}.lora_B.default.weight"]
                torch.testing.assert_close(kept, tensor, rtol=0, atol=1e-9)


# ---------------------------------------------------------------- identities of whole runs


class Products(fedtune.FederatedCallback):
    """|W' + s B' A' - (W + sum p_k s_k B_k A_k)| / |the sum| of each round, from the module as clients and server leave it."""

    def __init__(self) -> None:
        self.errors: list[float] = []
        self._clients: list[tuple[int, list[Tensor]]] = []

    def on_round_start(self, run: Any, module: Any, number: int) -> None:
        self._before, self._clients = {name: one.double() for name, one in values(module).items()}, []

    def on_client_end(self, run: Any, module: Any, report: Any) -> None:
        found, scales = values(module), [getattr(module, name).scaling["default"] for name in LAYERS]
        products = [s * found[f"B{i}"].double() @ found[f"A{i}"].double() for i, s in enumerate(scales)]
        self._clients.append((report.num_examples, products))

    def on_round_end(self, run: Any, module: Any, record: Any) -> None:
        after, apart, size = {name: one.double() for name, one in values(module).items()}, 0.0, 0.0
        total = sum(count for count, _ in self._clients)
        for i in (0, 1):
            aim = sum(count / total * products[i] for count, products in self._clients)
            result = whole(after)[f"W{i}"] - self._before[f"W{i}"]
            apart, size = apart + float((result - aim).square().sum()), size + float(aim.square().sum())
        self.errors.append(math.sqrt(apart / size))


EXACT = {"flora": flora(), "flora, ranks": flora((1, 3, 4)), "fedex": fedex_lora(), "ffa": ffa_lora(), "rolora": rolora()}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_exact_is_so_in_fp32_and_in_fp64(name: str) -> None:
    for dtype, most in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        products = Products()
        loop, _ = fit(EXACT[name], Small(dtype=dtype), callbacks=[products], max_rounds=4)
        assert max(products.errors) < most
        assert max(record.diagnostics["adapter_error"] for record in loop.history) < 1e-13


@pytest.mark.parametrize("algorithm", [fedit(), flexlora(), flexlora((1, 4)), hetlora((1, 4))])
def test_the_recorded_error_is_that_of_the_products(algorithm: Any) -> None:
    products = Products()
    loop, _ = fit(algorithm, callbacks=[products], max_rounds=4)
    recorded = [record.diagnostics["adapter_error"] for record in loop.history]
    assert recorded == pytest.approx(products.errors, rel=1e-8)
    assert max(recorded) > 1e-3


def test_a_common_scale_for_unequal_ranks_is_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    products = Products()
    monkeypatch.setattr(Adapters, "_scaled", lambda self, tensors, rank, up: tensors)  # B as the client has it
    fit(flora((1, 3, 4)), callbacks=[products])
    assert min(products.errors) > 0.3


def test_without_adapters_or_agreement_no_error_is_recorded_and_personal_factors_have_none() -> None:
    class Plain(Small):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = self.first.base_layer.requires_grad_(True), self.last.base_layer.requires_grad_(True)

    assert all(not record.diagnostics for record in fit(fedavg(), Plain())[0].history)
    assert all(not record.diagnostics for record in fit(fedit(), agreement=False)[0].history)
    assert all(not record.diagnostics for record in fit(fedsa_lora())[0].history)
    assert all(set(record.diagnostics) == {"adapter_error"} for record in fit(fedavg())[0].history)


def test_one_client_alone_is_local_training_of_adapters() -> None:
    plain, batches = Small(), examples()[0]
    for _ in range(ROUNDS):
        optimizer = plain.configure_optimizers()
        for _, batch in [(epoch, batch) for epoch in range(EPOCHS) for batch in batches]:
            optimizer.zero_grad()
            plain.training_step(batch).backward()
            optimizer.step()
    loop, module = fit(fedit(), clients=1)
    assert_near(weights_of(module), weights_of(plain), 1e-12)
    assert all(record.diagnostics["adapter_error"] < 1e-13 for record in loop.history)
    for algorithm in (fedex_lora(), hetlora()):
        assert_near(weights_of(fit(algorithm, clients=1)[1]), weights_of(plain), 1e-12)


def test_full_rank_and_one_client_give_the_whole_product() -> None:
    plain = fit(fedit(), Small(rank=6), clients=1, max_rounds=1)[1]
    for algorithm in (flora(), flexlora()):
        module = fit(algorithm, Small(rank=6), clients=1, max_rounds=1)[1]
        assert_near(whole(values(module)), whole(values(plain)), 1e-12)
    assert not float(values(fit(flora(), clients=1, max_rounds=1)[1])["B0"].abs().max())


def test_a_run_with_a_base_that_moves_goes_on_with_the_same_bits_after_a_lost_checkpoint(tmp_path: Path) -> None:
    for name, algorithm in {"flora": flora((2, 4)), "fedex": fedex_lora()}.items():
        folder, options = tmp_path / name, {"max_rounds": 4, "baselines": ("centralised",)}
        one, expected = fit(algorithm, run_dir=str(tmp_path / f"{name} whole"), **options)
        fit(algorithm, run_dir=str(folder), max_rounds=3)
        shutil.rmtree(folder / "checkpoints" / "round-0003")
        other, module = fit(algorithm, expected if name == "fedex" else None, run_dir=str(folder), **options)
        assert without_times(one.history) == without_times(other.history)
        assert without_times(one.baseline_runs["centralised"]) == without_times(other.baseline_runs["centralised"])
        state, same = (checkpoint.latest(path / "checkpoints") for path in (folder, tmp_path / f"{name} whole"))
        assert_equal(state.weights, same.weights)
        assert torch.equal(state.weights["first.base_layer.weight"], module.first.base_layer.weight)
        assert not torch.equal(module.first.base_layer.weight, Small().first.base_layer.weight)


def test_baselines_have_the_base_with_which_the_run_began(tmp_path: Path) -> None:
    options = {"baselines": ("centralised", "local"), "baseline_dir": str(tmp_path)}
    found = [fit(algorithm, **options)[0].baseline_runs for algorithm in (fedit(), flora())]
    assert without_times(found[0]["centralised"]) == without_times(found[1]["centralised"])
    assert len(list(tmp_path.glob("centralised-*/config.yaml"))) + len(list(tmp_path.glob("local-*/config.yaml"))) == 2


def test_a_client_that_drops_out_counts_for_nothing() -> None:
    for algorithm in (flora((1, 2, 4)), fedex_lora(), flexlora(), rolora()):
        products = Products()
        faults = [{"name": "Drop", "clients": [1]}, {"name": "NotFinite", "clients": [2]}]
        loop, _ = fit(algorithm, callbacks=[products], faults=faults, clients_per_round=None)
        assert all([one.client for one in record.failures] == [1, 2] for record in loop.history)
        assert all(set(record.cohort) == set(range(N)) for record in loop.history)
        assert all(record.diagnostics["adapter_error"] < 1e-13 for record in loop.history) or algorithm == flexlora()


# ---------------------------------------------------------------- what travels


def test_bytes_are_those_of_what_travels() -> None:
    whole_bytes = {name: num_bytes({name: one}) for name, one in values(Small()).items()}
    a, b, head = (sum(whole_bytes[name] for name in names) for names in (("A0", "A1"), ("B0", "B1"), ("u", "v")))

    def traffic(algorithm: Any, **options: Any) -> tuple[list[float], list[float]]:
        records = fit(algorithm, **options)[0].history
        return [record.bytes_up / 3 for record in records], [record.bytes_down / 3 for record in records]

    assert traffic(fedit()) == ([a + b + head] * 3, [a + b + head] * 3)
    assert traffic(ffa_lora()) == ([b + head] * 3, [b + head] * 3)
    assert traffic(fedsa_lora()) == ([a + head] * 3, [a + head] * 3)
    assert traffic(rolora()) == ([b + head, a + head, b + head], [a + b + head] * 3)
    assert traffic(flexlora((2,))) == ([(a + b) / 2 + head] * 3, [(a + b) / 2 + head] * 3)


@pytest.mark.parametrize(("algorithm", "share"), [(flora((1,)), 3), (fedex_lora(), 2)])
def test_of_the_base_a_client_is_sent_the_factors_that_it_lacks_and_never_more_than_the_matrices(
    algorithm: Any, share: int
) -> None:
    module = Small(rank=1)
    loop, _ = fit(algorithm, module, max_rounds=6)
    sizes = [(8, 6), (7, 8)]
    factors, matrices = share * sum(map(sum, sizes)) * 8, sum(one * other for one, other in sizes) * 8
    rest, seen = loop.history[0].bytes_down // 3, dict.fromkeys(range(N), 0)
    for record in loop.history:
        done = record.round - 1
        needed = [min(matrices, (done - seen[client]) * factors) for client in record.cohort]
        assert record.bytes_down == 3 * rest + sum(needed)
        seen |= dict.fromkeys(record.cohort, done)
        assert record.bytes_up == 3 * rest
    assert factors < matrices < 5 * factors


def test_where_a_matrix_is_smaller_than_its_factors_it_is_sent_in_their_place() -> None:
    module = Small()  # rank 4: three clients' factors of the first layer are larger than its matrix
    module.last = Adapted(module.last.base_layer, 1, S).double()
    history = fit(flora(), module, clients=3, max_rounds=2)[0].history
    assert history[1].bytes_down - history[0].bytes_down == 3 * 8 * (8 * 6 + 3 * (7 + 8))


def test_a_client_whose_reply_was_lost_is_sent_the_same_factors_again() -> None:
    faults = [{"name": "Drop", "clients": [1]}]
    history = fit(flora((1,)), Small(rank=1), clients=3, max_rounds=3, faults=faults)[0].history
    factors = 2 * 8 * (8 + 6 + 7 + 8)  # of two clients in each round, fewer than the matrices' after two, too
    added = [record.bytes_down - history[0].bytes_down for record in history]
    assert added == [0, 3 * factors, 2 * factors + min(2 * factors, 8 * (8 * 6 + 7 * 8))]


def test_ranks_are_dealt_evenly_by_seed_and_clients_train_with_their_own_scale() -> None:
    assert sorted(dealt((2, 4, 8), 7, 0)) == [2, 2, 2, 4, 4, 8, 8]
    assert len({dealt((2, 4, 8), 7, seed) for seed in range(9)}) > 1
    seen: dict[int, tuple[float, int, int]] = {}

    class Watching(fedtune.FederatedCallback):
        def on_client_end(self, run: Any, module: Any, report: Any) -> None:
            rows = (module.first.lora_A["default"].weight.abs().sum(1) > 0).sum()
            columns = (module.first.lora_B["default"].weight.abs().sum(0) > 0).sum()
            seen[report.client] = module.first.scaling["default"], int(rows), int(columns)

    _, module = fit(flexlora((1, 2, 4)), clients_per_round=None, callbacks=[Watching()])
    ranks = dealt((1, 2, 4), N, SEED)
    assert seen == {client: (S * R / rank, rank, rank) for client, rank in enumerate(ranks)}
    assert module.first.scaling["default"] == S
    layer = Layer("", "", "", "", "", rank=16, inputs=1, outputs=1, scale=1.0, rooted=True)
    assert layer.ratio(4) == 2.0  # alpha / sqrt(4) beside alpha / sqrt(16)


def test_what_is_frozen_neither_moves_nor_travels_and_is_trained_again_afterwards(tmp_path: Path) -> None:
    module = Small()
    before = values(module)
    loop, _ = fit(ffa_lora(), module, run_dir=str(tmp_path / "run"), baselines=("centralised",))
    after = values(module)
    assert torch.equal(before["A0"], after["A0"])
    assert not torch.equal(before["B0"], after["B0"])
    assert loop.config["loop"]["algorithm"]["frozen"] == ["*.lora_A.*"]
    assert all("lora_A" not in name for name in checkpoint.latest(tmp_path / "run" / "checkpoints").weights)
    assert all(one.requires_grad == ("base_layer" not in name) for name, one in module.named_parameters())
    (folder,) = (tmp_path / "run" / "baselines").glob("centralised-*")
    assert all("lora_A" not in name for name in checkpoint.latest(folder / "checkpoints").weights)
    whole_run, again = fit(ffa_lora(), max_rounds=4), fit(ffa_lora(), max_rounds=4, run_dir=str(tmp_path / "run"))
    assert_equal(weights_of(whole_run[1]), weights_of(again[1]))


def test_best_weights_have_the_base_that_moved(tmp_path: Path) -> None:
    for folder in (None, str(tmp_path / "run")):
        best = fedtune.BestWeights(monitor="accuracy", mode="min")
        kept: dict[int, Tensors] = {}

        class Keeping(fedtune.FederatedCallback):
            def on_round_end(self, run: Any, module: Any, record: Any, kept: Any = kept) -> None:
                kept[record.round] = values(module)

        _, module = fit(flora(), callbacks=[best, Keeping()], run_dir=folder)
        best.load(module)
        assert_equal(values(module), kept[int(best.best_round or 0)])


# ---------------------------------------------------------------- figures of single rounds, 64 x 48, rank 4, 8 clients, fp64


def once(
    aggregator: Any,
    bs: list[Tensor],
    as_: list[Tensor],
    start: tuple[Tensor, Tensor] | None = None,
    runtime: Any = None,
    mine: Sequence[int] | None = None,
) -> tuple[Tensor, float]:
    """What one aggregation makes of factors, W being 0, on a worker with the replies of some; and the error by `Stacks`."""
    runtime = runtime or Serial(None)  # type: ignore[arg-type]  # it only gathers
    rank, count = max(len(a) for a in as_), len(as_)
    layer = Layer("l", "default", "A", "B", "W", rank, as_[0].shape[1], len(bs[0]), 1.0)
    adapters = Adapters((layer,), ranks=tuple(len(a) for a in as_))
    b, a = start or (torch.zeros(len(bs[0]), rank).double(), torch.zeros(rank, as_[0].shape[1]).double())
    state = ServerState(0, {"A": a, "B": b, "W": torch.zeros(len(b), a.shape[1]).double()})
    replies = []
    for client in reversed(range(count) if mine is None else mine):  # in any order
        own = len(as_[client])
        update = adapters.widened({"A": as_[client] - a[:own], "B": bs[client] - b[:, :own]}, own)
        report = ClientReport(client, 1, 1, 1, 0.0, 0.0)
        replies.append(Reply(client, 1, {"update": update}, report, 0, {"update": Pieces(update)}))
    context = Context(0, 1, count, tuple(range(count)), 64, adapters=adapters)
    groups = aggregator(iter(replies), state, context, runtime)
    with Stacks(adapters, state.weights, runtime, count) as stacks:
        list(stacks.watching(iter(replies), lambda reply: 1))
        error = stacks.error(groups)
    new = {name: one + groups["update"][name] for name, one in state.weights.items() if name != "W"} | groups.get("set", {})
    base = groups["base.left"]["W"] @ groups["base.right"]["W"] if "base.left" in groups else 0
    return new["B"] @ new["A"] + base, float(error or 0.0)


def factors(ranks: list[int], drift: float | None = None) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, Tensor] | None]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *sizes: torch.randn(*sizes, generator=generator, dtype=torch.float64)  # noqa: E731
    if drift is None:
        return [draw(64, r) for r in ranks], [draw(r, 48) for r in ranks], None
    b, a = draw(64, ranks[0]), draw(ranks[0], 48)
    return [draw(64, r) for r in ranks], [a + drift * draw(r, 48) for r in ranks], (b, a)


def relative(found: Tensor, bs: list[Tensor], as_: list[Tensor]) -> float:
    aim = sum(b @ a for b, a in zip(bs, as_, strict=True)) / len(bs)
    return float((found - aim).norm() / aim.norm())


def test_the_mean_of_factors_is_not_that_of_products() -> None:
    for drift, low, high in ((None, 0.9, 0.96), (0.05, 0.04, 0.052)):
        bs, as_, start = factors([4] * 8, drift)
        found, error = once(Mean("uniform"), bs, as_, start)
        assert low < relative(found, bs, as_) < high
        assert error == pytest.approx(relative(found, bs, as_), rel=1e-6)
        mean_b, mean_a = sum(bs) / 8, sum(as_) / 8
        covariance = sum((b - mean_b) @ (a - mean_a) for b, a in zip(bs, as_, strict=True)) / 8
        aim = sum(b @ a for b, a in zip(bs, as_, strict=True)) / 8
        torch.testing.assert_close(aim - found, covariance, rtol=0, atol=1e-10)


def test_stacking_and_the_residual_are_exact_to_fp64() -> None:
    for ranks in ([4] * 8, [2, 4, 8, 16, 4, 2, 8, 32]):
        bs, as_, _ = factors(ranks)
        found, error = once(Stacking("uniform"), bs, as_)
        assert relative(found, bs, as_) < 1e-14
        assert error < 1e-14
    bs, as_, start = factors([4] * 8, 0.05)
    found, error = once(Residual("uniform"), bs, as_, start)
    assert relative(found, bs, as_) < 1e-13
    assert error < 1e-13
    alone, _ = once(Residual("uniform"), bs[:1], as_[:1], start)
    assert relative(alone, bs[:1], as_[:1]) < 1e-13


@pytest.mark.parametrize("rank", [4, 8, 16, 32])
def test_resizing_is_as_near_as_eckart_and_young_say(rank: int) -> None:
    bs, as_, _ = factors([4] * 8)
    if rank > 4:  # room for a larger rank: zero rows
        bs = [torch.cat([b, torch.zeros(64, rank - 4).double()], 1) for b in bs]
        as_ = [torch.cat([a, torch.zeros(rank - 4, 48).double()]) for a in as_]
    found, error = once(Resized("uniform"), bs, as_)
    singular = torch.linalg.svdvals(sum(b @ a for b, a in zip(bs, as_, strict=True)) / 8)
    best = float(singular[rank:].norm() / singular.norm())
    assert relative(found, bs, as_) == pytest.approx(best, abs=1e-12)
    assert error == pytest.approx(best, abs=1e-12)
    assert best < 1e-14 if rank == 32 else best > 0.1


def test_each_client_gets_the_nearest_of_its_rank_and_no_row_is_dead() -> None:
    bs, as_, _ = factors([2, 4, 8, 16])
    left, right = torch.cat([b / 4 for b in bs], 1), torch.cat(as_)
    first, second = truncated(left, right, 16)
    singular = torch.linalg.svdvals(left @ right)
    for rank in (2, 4, 8, 16):
        apart = math.sqrt(squared(torch.cat([left, -first[:, :rank]], 1), torch.cat([right, second[:rank]])))
        assert apart == pytest.approx(float(singular[rank:].norm()), rel=1e-9)
    torch.testing.assert_close(second @ second.T, torch.eye(16).double(), rtol=0, atol=1e-12)
    assert bool((second.gather(1, second.abs().argmax(1, keepdim=True)) > 0).all())  # one of the two signs, on any machine
    bs, as_ = [torch.ones(64, 4).double()], [torch.ones(4, 48).double()]  # one singular value
    layer = Layer("l", "default", "A", "B", "W", 4, 48, 64, 1.0)
    groups = Resized("uniform").combine(
        {}, _Given(left=bs[0], right=as_[0]), _state(4), Context(0, 1, 1, (0,), 1, adapters=Adapters((layer,)))
    )
    assert bool((groups["set"]["A"].norm(dim=1) > 0.1).all())
    assert groups["set"]["B"][:, 1:].abs().max() == 0


class _Given:
    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._factors = left, right

    def of(self, layer: Any) -> tuple[Tensor, Tensor]:
        return self._factors


def _state(rank: int) -> ServerState:
    return ServerState(0, {"A": torch.zeros(rank, 48).double(), "B": torch.zeros(64, rank).double()})


def test_padding_counts_zero_for_rows_that_are_missing() -> None:
    bs, as_, _ = factors([1, 2, 4, 4])
    start = torch.randn(64, 4).double(), torch.randn(4, 48).double()
    found, error = once(Padded("uniform"), bs, as_, start)
    wide = [(F.pad(b, (0, 4 - b.shape[1])), F.pad(a, (0, 0, 0, 4 - len(a)))) for b, a in zip(bs, as_, strict=True)]
    torch.testing.assert_close(found, sum(b for b, _ in wide) / 4 @ (sum(a for _, a in wide) / 4), rtol=0, atol=1e-9)
    assert error == pytest.approx(relative(found, bs, as_), rel=1e-9)
    assert error > 0.5


@pytest.mark.parametrize("mine", [[], [2], [0, 3]])
def test_two_workers_make_the_bits_of_one(mine: list[int]) -> None:
    bs, as_, _ = factors([1, 2, 4, 4])
    for rule in (Mean("uniform"), Stacking("uniform"), Resized("uniform"), Padded("uniform")):
        barrier, shared = threading.Barrier(2), [None, None]
        parts = mine, [client for client in range(4) if client not in mine]

        def work(number: int, rule: Any = rule, parts: Any = parts, shared: Any = shared, barrier: Any = barrier) -> Any:
            return once(rule, bs, as_, None, OneOfTwo(number, shared, barrier), parts[number])

        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(work, range(2)))
        alone = once(rule, bs, as_)
        assert all(torch.equal(product, alone[0]) and error == alone[1] for product, error in found)


def test_lengths_of_products_need_no_product() -> None:
    left, right = torch.randn(50, 7).double(), torch.randn(7, 30).double()
    assert squared(left, right) == pytest.approx(float((left @ right).square().sum()), rel=1e-12)
    wide = torch.randn(50, 40).double(), torch.randn(40, 30).double()
    assert [one.shape for one in compact(*wide)] == [(50, 30), (30, 30)]
    assert [one.shape for one in compact(left, right)] == [(50, 7), (7, 30)]
    torch.testing.assert_close(torch.matmul(*compact(*wide)), wide[0] @ wide[1], rtol=0, atol=1e-12)
    assert squared(*wide) == pytest.approx(float((wide[0] @ wide[1]).square().sum()), rel=1e-12)
    assert squared(left[:, :0], right[:0]) == 0.0


# ---------------------------------------------------------------- what is found, and what is refused


def test_adapters_are_found_by_their_parts_and_never_by_shape() -> None:
    module = Small(rank=8)  # A of the last layer is square
    found = adapters_of(module)
    assert [layer.path for layer in found.layers] == list(LAYERS)
    assert [layer.a for layer in found.layers] == [f"{name}.lora_A.default.weight" for name in LAYERS]
    assert [(one.rank, one.inputs, one.outputs, one.scale) for one in found.layers] == [(8, 6, 8, S), (8, 8, 7, S)]
    module.first.requires_grad_(False)
    assert [layer.path for layer in adapters_of(module).layers] == ["last"]
    module.last.lora_A["other"] = module.last.lora_B["other"] = nn.Linear(8, 8)
    module.last.scaling["other"] = 1.0
    with pytest.raises(UsageError, match="one trained adapter a layer"):
        adapters_of(module)


class Bare(Small):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8).double(), nn.Linear(8, 7).double()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_refuses_a_module_without_adapters(name: str) -> None:
    with pytest.raises(
        UsageError, match=r"module: got 'Bare without adapters'; allowed: for .*, a module with trained adapters"
    ):
        fit(name, Bare())


def test_what_does_not_go_together_is_refused() -> None:
    server = ALGORITHMS["fedadam"]().server
    for make in (flora, fedex_lora, flexlora, hetlora):
        with pytest.raises(UsageError, match=r"algorithm\.server: got 'Adam'; allowed: for \w+, no step"):
            replace(make(), server=server)
    with pytest.raises(UsageError, match=r"algorithm\.client\.ranks: got \[2\]; allowed: for Residual, none"):
        replace(fedex_lora(), client=flora((2,)).client)
    with pytest.raises(UsageError, match=r"algorithm\.client\.ranks: got 5; allowed: at most 4"):
        fit(flora((2, 5)))
    uneven = Small()
    uneven.last = Adapted(uneven.last.base_layer, 2, S).double()
    with pytest.raises(UsageError, match=r"algorithm\.client\.ranks: got 3; allowed: at most 2"):  # the smallest adapter's
        fit(flora((1, 3)), uneven)
    with pytest.raises(UsageError, match="ranks: got 0; allowed: whole numbers"):
        flora((0,))
    with pytest.raises(
        UsageError, match=r"algorithm\.aggregator: got 'Stacking'.*lora_B.default.weight, which does not travel"
    ):
        fit(replace(fedsa_lora(), aggregator=Stacking()))
    with pytest.raises(
        UsageError, match=r"algorithm\.aggregator: got 'Residual'.*lora_A.default.weight, which does not travel"
    ):
        fit(replace(ffa_lora(), aggregator=Residual()))
    with pytest.raises(UsageError, match=r"algorithm\.aggregator: got 'Resized'"):
        fit(replace(rolora(), aggregator=Resized()))
    with pytest.raises(UsageError, match=r"algorithm\.frozen: got '\*nothing\*'"):
        fit(replace(fedavg(), frozen=("*nothing*",)))
    with pytest.raises(UsageError, match=r"algorithm\.frozen: got \['\*'\]; allowed: .* nothing would be trained"):
        fit(replace(fedavg(), frozen=("*",)))
    with pytest.raises(UsageError, match=r"faults: got 'Alie'; allowed: with clients of different ranks"):
        fit(flora((2,)), faults=[{"name": "Alie", "clients": [0]}])


def test_a_base_that_cannot_be_moved_is_refused() -> None:
    tied = Small()
    tied.again = nn.Linear(6, 8)
    tied.again.weight = tied.first.base_layer.weight
    with pytest.raises(UsageError, match=r"module: got 'first.base_layer.weight'; allowed: .*is tied"):
        fit(flora(), tied)
    trained = Small()
    trained.first.base_layer.requires_grad_(True)
    with pytest.raises(UsageError, match=r"module: got 'first.base_layer.weight'; allowed: .*is trained"):
        fit(fedex_lora(), trained)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_base_of_half_precision_becomes_fp32_where_it_moves(kind: torch.dtype) -> None:
    half = Small(dtype=torch.float32)
    half.first.base_layer.to(kind)
    products = Products()
    fit(flora(), half, callbacks=[products])
    assert half.first.base_layer.weight.dtype == half.first.base_layer.bias.dtype == torch.float32
    assert max(products.errors) < 1e-6


def test_compression_does_not_touch_the_base() -> None:
    seen: list[bool] = []

    class Watching(fedtune.FederatedCallback):
        def on_round_start(self, run: Any, module: Any, number: int) -> None:
            self.base = module.first.base_layer.weight.clone()

        def on_client_end(self, run: Any, module: Any, report: Any) -> None:
            seen.append(torch.equal(module.first.base_layer.weight, self.base.to(module.first.base_layer.weight)))

    loop, _ = fit(replace(flora((1, 4)), up=(Quantise(),), down=(Quantise(),)), callbacks=[Watching()])
    assert seen == [True] * 9
    assert all(record.diagnostics["adapter_error"] < 1e-13 for record in loop.history)


def test_every_client_gets_the_base_from_the_server_whatever_the_module_held() -> None:
    class Careless(fedtune.FederatedCallback):
        def on_round_start(self, run: Any, module: Any, number: int) -> None:
            with torch.no_grad():
                module.first.base_layer.weight.add_(number)

    assert_equal(values(fit(flora())[1]), values(fit(flora(), callbacks=[Careless()])[1]))


def test_training_that_moves_the_base_ends_the_run() -> None:
    class Moving(Small):
        def on_train_epoch_end(self) -> None:
            if self.trainer.global_step > 8:
                with torch.no_grad():
                    self.first.base_layer.weight.add_(1e-3)

    with pytest.raises(RunError, match=r"training changed first\.base_layer\.weight, which is frozen"):
        fit(flora(), Moving())


def test_a_transposed_weight_moves_as_any_other() -> None:
    class Turned(Adapted):
        """A layer whose weight lies there as (in, out), as GPT-2 has them."""

        def __init__(self, layer: Adapted) -> None:
            super().__init__(nn.Linear(6, 8).double(), R, S)
            self.load_state_dict(layer.state_dict())
            self.fan_in_fan_out = True
            self.base_layer.weight = nn.Parameter(layer.base_layer.weight.T.clone(), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            adapter = self.lora_B["default"](self.lora_A["default"](x))
            return x @ self.base_layer.weight + self.base_layer.bias + self.scaling["default"] * adapter

    turned = Small()
    turned.first = Turned(turned.first).double()
    for algorithm in (flora(), fedex_lora()):
        one, other = fit(algorithm)[1], fit(algorithm, turned)[1]
        torch.testing.assert_close(one.first.base_layer.weight, other.first.base_layer.weight.T, rtol=0, atol=1e-12)
        turned = Small()
        turned.first = Turned(turned.first).double()


# ---------------------------------------------------------------- with peft, and on the command line


@pytest.mark.parametrize("rslora", [False, True])
def test_it_holds_for_the_layers_of_peft(rslora: bool, make_data: Any, make_module: Any) -> None:
    peft = pytest.importorskip("peft")
    for algorithm in (flora((1, 3, 4)), fedex_lora(), flexlora((2, 4)), ffa_lora()):
        module = make_module()
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], use_rslora=rslora)
        peft.inject_adapter_in_model(config, module.network)
        for name, one in module.named_parameters():
            one.requires_grad_("lora_" in name or "classifier" in name)
        layer = adapters_of(module).layers[0]
        assert (layer.rank, layer.inputs, layer.outputs, layer.rooted) == (4, 16, 16, rslora)
        assert layer.scale == pytest.approx(4.0 if rslora else 2.0)
        assert layer.scale * layer.ratio(2) == pytest.approx(8 / math.sqrt(2) if rslora else 4.0)
        loop = make_loop(algorithm=algorithm, max_rounds=2)
        loop.fit(module, make_data())
        if algorithm.aggregator != Resized():
            assert all(record.diagnostics["adapter_error"] < 1e-13 for record in loop.history)
        assert {part.scaling["default"] for path, part in module.named_modules() if path.endswith("query")} == {layer.scale}


def test_the_flags_say_it(command: Any, make_data: Any) -> None:
    algorithm_of = fedtune.algorithms.specification.algorithm_of
    assert algorithm_of({"name": "flora", "ranks": [2, 4]}) == flora((2, 4))
    assert algorithm_of({"aggregator": "Stacking", "client": {"name": "AdapterTraining", "ranks": [2]}}) == flora((2,))
    assert algorithm_of({"name": "fedavg", "frozen": "*.lora_A.*"}).frozen == ("*.lora_A.*",)
    assert all(algorithm_of(name) == ALGORITHMS[name]() for name in PRESETS)
