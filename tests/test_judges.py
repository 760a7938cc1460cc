"""Every algorithm against a second implementation, written from its paper's equations with torch alone, on flat vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import GivenLoaders, make_loop
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fedtune.algorithms.adaptive import fedadagrad, fedadam, fedyogi
from fedtune.algorithms.ditto import ditto
from fedtune.algorithms.fedavg import fedavg
from fedtune.algorithms.fedavgm import fedavgm
from fedtune.algorithms.feddyn import feddyn
from fedtune.algorithms.fednova import fednova
from fedtune.algorithms.fedper import fedper, fedrep
from fedtune.algorithms.fedprox import fedprox
from fedtune.algorithms.qfedavg import qfedavg
from fedtune.algorithms.robust import (
    CentredClipping,
    ClippedMean,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NearestMean,
    TrimmedMean,
)
from fedtune.algorithms.scaffold import scaffold
from fedtune.algorithms.torch_optim import diloco, fedopt
from fedtune.federated.memory import MemoryOnDisk
from fedtune.federated.rows import Rows
from fedtune.federated.spool import Spool
from fedtune.randomness import stream
from fedtune.runtimes.serial import Serial
from fedtune.storage import checkpoint
from fedtune.tensors import Tensors

SIZES, BATCH, ROUNDS, EPOCHS, RATE, SEED = (9, 5, 14, 6, 8), 3, 3, 2, 0.2, 7
N = len(SIZES)
Step = Callable[[Tensor, Tensor], Tensor]  # from weights y and their gradient g to the next weights
Found = tuple[Tensor, dict[int, Tensor]]  # the server's weights, and what each client remembers


def network(norms: bool) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(8) if norms else nn.Identity()
    return nn.Sequential(nn.Linear(5, 8), middle, nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))


def examples() -> list[list[tuple[Tensor, Tensor]]]:
    """Batches of uneven clients with different classes."""
    generator, found = torch.Generator().manual_seed(1), []
    for client, size in enumerate(SIZES):
        x = torch.randn(size, 5, generator=generator) + client / 3
        y = (torch.randint(2, (size,), generator=generator) + client) % 3
        found.append(list(zip(x.split(BATCH), y.split(BATCH), strict=True)))
    return found


# ---------------------------------------------------------------- the judges: torch only


class World:
    """What the judges have in common: data, gradients and dropout of the clients; S_t, the cohort of each round."""

    def __init__(self, cohorts: list[list[int]], norms: bool = False, every: int = 1) -> None:
        self.net, self.batches, self.cohorts, self.every = network(norms), examples(), cohorts, every
        self.start = parameters_to_vector(self.net.parameters()).detach().clone()

    def gradient(self, y: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        vector_to_parameters(y, self.net.parameters())
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return torch.cat([one.flatten() for one in torch.autograd.grad(loss, list(self.net.parameters()))]), loss.detach()

    def seed(self, t: int, k: int, purpose: str = "client") -> None:
        torch.manual_seed(int(stream(SEED, purpose, t, k).integers(2**63)))

    def local(self, y: Tensor, k: int, step: Step, epochs: int = EPOCHS) -> Tensor:
        for _ in range(epochs):
            g = torch.zeros_like(y)
            for i, batch in enumerate(self.batches[k], 1):
                g = g + self.gradient(y, batch)[0] / self.every
                if i % self.every == 0 or i == len(self.batches[k]):
                    y, g = step(y, g), torch.zeros_like(y)
        return y

    def steps(self, k: int) -> int:
        return EPOCHS * math.ceil(len(self.batches[k]) / self.every)

    def at(self, x: Tensor, t: int, k: int) -> tuple[Tensor, Tensor]:
        """The mean gradient and the mean loss of all examples of a client."""
        self.seed(t, k, "pass")
        found = [(self.gradient(x, batch), len(batch[1]) / SIZES[k]) for batch in self.batches[k]]
        return sum(share * g for (g, _), share in found), sum(share * loss for (_, loss), share in found)

    def rounds(self) -> Any:
        """t, S_t, and p_k for each of its clients."""
        for t, cohort in enumerate(self.cohorts, 1):
            yield t, cohort, {k: SIZES[k] / sum(SIZES[j] for j in cohort) for k in cohort}


def sgd(y: Tensor, g: Tensor) -> Tensor:
    return y - RATE * g


def clipped(g: Tensor, most: float) -> Tensor:
    return g * min(1.0, most / float(g.norm()))


def averaged(world: World, server: Callable[[Tensor, Tensor], Tensor], client: Callable[..., Step] = lambda *_: sgd) -> Found:
    """Any server on the weighted mean update D, any step of clients."""
    x = world.start
    for t, cohort, p in world.rounds():
        mean = torch.zeros_like(x)
        for k in cohort:
            world.seed(t, k)
            mean = mean + p[k] * (world.local(x, k, client(x, k)) - x)
        x = server(x, mean)
    return x, {}


def judge_fedavg(world: World) -> Found:
    return averaged(world, lambda x, d: x + d)


def judge_fedavgm(world: World) -> Found:
    v = [torch.zeros_like(world.start)]

    def server(x: Tensor, d: Tensor) -> Tensor:
        v[0] = 0.7 * v[0] + d
        return x + 0.5 * v[0]

    return averaged(world, server)


def adaptive(second: Callable[[Tensor, Tensor], Tensor], beta1: float) -> Callable[[World], Found]:
    def judge(world: World) -> Found:
        m, v = torch.zeros_like(world.start), torch.full_like(world.start, 1e-3**2)

        def server(x: Tensor, d: Tensor) -> Tensor:
            nonlocal m, v
            m, v = beta1 * m + (1 - beta1) * d, second(v, d * d)
            return x + 0.1 * m / (v.sqrt() + 1e-3)

        return averaged(world, server)

    return judge


def judge_adamw(world: World) -> Found:
    m, v, t = torch.zeros_like(world.start), torch.zeros_like(world.start), 0

    def server(x: Tensor, d: Tensor) -> Tensor:
        nonlocal m, v, t
        t, m, v = t + 1, 0.9 * m - 0.1 * d, 0.95 * v + 0.05 * d * d
        return x - 0.02 * 0.1 * x - 0.02 * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-3)

    return averaged(world, server)


def judge_nesterov(world: World) -> Found:
    v = [torch.zeros_like(world.start)]

    def server(x: Tensor, d: Tensor) -> Tensor:
        v[0] = 0.9 * v[0] - d
        return x - 0.7 * (0.9 * v[0] - d)

    return averaged(world, server)


def judge_diloco(world: World) -> Found:
    x, v, inner = world.start, torch.zeros_like(world.start), {}
    for t, cohort, _ in world.rounds():
        mean = torch.zeros_like(x)
        for k in cohort:
            weights, adam = inner.setdefault(k, (y := nn.Parameter(x.clone()), torch.optim.AdamW([y], lr=0.02)))

            def step(y: Tensor, g: Tensor, weights: Any = weights, adam: Any = adam) -> Tensor:
                weights.data, weights.grad = y.clone(), g
                adam.step()
                return weights.detach().clone()

            world.seed(t, k)
            mean = mean + (world.local(x, k, step) - x) / len(cohort)
        v = 0.9 * v - mean
        x = x - 0.7 * (0.9 * v - mean)
    return x, {k: adam.state[weights]["exp_avg_sq"] for k, (weights, adam) in inner.items()}


def judge_fedprox(world: World) -> Found:
    return averaged(world, lambda x, d: x + d, lambda x, k: lambda y, g: y - RATE * (g + 0.5 * (y - x)))


def judge_fedprox_clipped(world: World) -> Found:
    return averaged(world, lambda x, d: x + d, lambda x, k: lambda y, g: y - RATE * clipped(g + 0.5 * (y - x), 0.3))


def judge_clipped(world: World) -> Found:
    return averaged(world, lambda x, d: x + d, lambda x, k: lambda y, g: y - RATE * clipped(g, 0.3))


def scaffolds(option: int, rate: Callable[[int], float] = lambda step: RATE) -> Callable[[World], Found]:
    def judge(world: World) -> Found:
        x, c, done = world.start, torch.zeros_like(world.start), 0
        c_of = {k: torch.zeros_like(x) for k in range(N)}
        for t, cohort, _ in world.rounds():
            ends, changes = [], []
            for k in cohort:
                etas = [rate(done + j) for j in range(world.steps(k))]
                each = iter(etas)
                new = world.at(x, t, k)[0]
                world.seed(t, k)
                y = world.local(x, k, lambda y, g, k=k, c=c, each=each: y - next(each) * (g - c_of[k] + c))
                new = new if option == 1 else c_of[k] - c + (x - y) / sum(etas)
                ends, changes = [*ends, y], [*changes, new - c_of[k]]
                c_of[k] = new
            x = x + 0.9 * (sum(ends) / len(cohort) - x)
            c, done = c + sum(changes) / N, done + max(map(world.steps, cohort))
        return torch.cat([x, c]), c_of

    return judge


def novas(length: Callable[[int], float], client: Callable[[Tensor], Step]) -> Callable[[World], Found]:
    """`length` is |a_k|_1 of so many steps, times the rate."""

    def judge(world: World) -> Found:
        x = world.start
        for t, cohort, p in world.rounds():
            a, d = {k: length(world.steps(k)) / RATE for k in cohort}, {}
            for k in cohort:
                world.seed(t, k)
                d[k] = (x - world.local(x, k, client(x))) / (RATE * a[k])
            x = x - sum(p[k] * a[k] for k in cohort) * RATE * sum(p[k] * d[k] for k in cohort)
        return x, {}

    return judge


def with_momentum(_: Tensor) -> Step:
    v = [None]

    def step(y: Tensor, g: Tensor) -> Tensor:
        v[0] = g if v[0] is None else 0.9 * v[0] + g
        return y - RATE * v[0]

    return step


def momentum_length(steps: int) -> float:
    return RATE * (steps - 0.9 * (1 - 0.9**steps) / 0.1) / 0.1


def warm(step: int) -> float:
    """A rate that begins with 0 and is 0.9 as large with every step."""
    return RATE * min(1.0, step / 3) * 0.9**step


def judge_nova_with_a_schedule(world: World) -> Found:
    x, done = world.start, 0
    for t, cohort, p in world.rounds():
        a, d = {}, {}
        for k in cohort:
            etas = [warm(done + j) for j in range(world.steps(k))]
            each = iter(etas)
            world.seed(t, k)
            a[k] = sum(etas)
            d[k] = (x - world.local(x, k, lambda y, g, each=each: y - next(each) * g)) / a[k]
        x = x - sum(p[k] * a[k] for k in cohort) * sum(p[k] * d[k] for k in cohort)
        done += max(map(world.steps, cohort))
    return x, {}


def judge_feddyn(world: World, alpha: float = 0.3) -> Found:
    x, h = world.start, torch.zeros_like(world.start)
    linear = {k: torch.zeros_like(x) for k in range(N)}
    for t, cohort, _ in world.rounds():
        ends = {}
        for k in cohort:
            world.seed(t, k)
            ends[k] = world.local(x, k, lambda y, g, x=x, k=k: y - RATE * (g - linear[k] + alpha * (y - x)))
            linear[k] = linear[k] - alpha * (ends[k] - x)
        h = h - alpha / N * sum(ends[k] - x for k in cohort)
        x = sum(ends.values()) / len(cohort) - h / alpha
    return torch.cat([x, -h / alpha]), linear


def judge_qfedavg(world: World, q: float = 2.0) -> Found:
    x, big = world.start, 1 / RATE
    for t, cohort, _ in world.rounds():
        top, bottom = torch.zeros_like(x), 0.0
        for k in cohort:
            loss = float(world.at(x, t, k)[1])
            world.seed(t, k)
            moved = big * (x - world.local(x, k, sgd))
            top = top + loss**q * moved
            bottom += q * loss ** (q - 1) * float(moved @ moved) + big * loss**q
        x = x - top / bottom
    return x, {}


def judge_ditto(world: World) -> Found:
    x, own = world.start, {}
    for t, cohort, p in world.rounds():
        mean = torch.zeros_like(x)
        for k in cohort:
            world.seed(t, k, "personal")
            own[k] = world.local(own.get(k, x), k, lambda v, g, x=x: v - RATE * (g + 0.6 * (v - x)), epochs=3)
            world.seed(t, k)
            mean = mean + p[k] * (world.local(x, k, sgd) - x)
        x = x + mean
    return x, own


def heads(turns: bool) -> Callable[[World], Found]:
    """The last layer (27 numbers) is each client's own; in turns, it is trained before the others, for 3 epochs."""

    def judge(world: World) -> Found:
        x, own, is_own = world.start, {}, torch.arange(len(world.start)) >= len(world.start) - 27
        for t, cohort, p in world.rounds():
            ends = {}
            for k in cohort:
                world.seed(t, k)
                y = torch.cat([x[:-27], own.get(k, x[-27:])])
                if turns:
                    y = world.local(y, k, lambda y, g: y - RATE * g * is_own, epochs=3)
                ends[k] = world.local(y, k, lambda y, g: y - RATE * g * ~(is_own & turns))
                own[k] = ends[k][-27:]
            x = torch.cat([sum(p[k] * ends[k][:-27] for k in cohort), x[-27:]])
        return x, own

    return judge


def judge_norms(world: World) -> Found:
    """Of 48 + 16 + 27 parameters, and 16 buffers of the batch norm, these buffers and the 16 are each client's own."""
    norm: Any = world.net[1]
    x, own, first = world.start, {}, (world.start[48:64], norm.running_mean.clone(), norm.running_var.clone())
    for t, cohort, p in world.rounds():
        ends = {}
        for k in cohort:
            weights, mean, variance = own.get(k, first)
            norm.running_mean, norm.running_var = mean.clone(), variance.clone()
            world.seed(t, k)
            ends[k] = world.local(torch.cat([x[:48], weights, x[64:]]), k, sgd)
            own[k] = ends[k][48:64], norm.running_mean.clone(), norm.running_var.clone()
        x = sum(p[k] * ends[k] for k in cohort)
        x = torch.cat([x[:48], first[0], x[64:]])
    return x, {k: torch.cat(parts) for k, parts in own.items()}


def krum_scores(x: list[Tensor], f: int) -> list[float]:
    """Of each x_i, the sum of the squared distances to its n - f - 2 nearest others."""
    n = len(x)
    return [sum(sorted(float((x[i] - x[j]) @ (x[i] - x[j])) for j in range(n) if j != i)[: n - f - 2]) for i in range(n)]


def by_krum(x: list[Tensor], f: int, chosen: int) -> Tensor:
    scores = krum_scores(x, f)
    return sum(x[i] for i in sorted(range(len(x)), key=scores.__getitem__)[:chosen]) / chosen


def trimmed(x: list[Tensor], f: int) -> Tensor:
    return torch.stack([sum(sorted(values)[f : len(x) - f]) / (len(x) - 2 * f) for values in zip(*x, strict=True)])


def middle(x: list[Tensor], f: int) -> Tensor:
    return trimmed(x, (len(x) - 1) // 2)


def mixed(x: list[Tensor], f: int) -> list[Tensor]:
    """The mean of its n - f nearest, itself among them, in the place of each."""
    return [sum(sorted(x, key=lambda other, one=one: float((one - other).norm()))[: len(x) - f]) / (len(x) - f) for one in x]


def geometric(x: list[Tensor], f: int) -> Tensor:
    z = sum(x) / len(x)
    for _ in range(3000):
        weights = [1 / max(1e-6, float((one - z).norm())) for one in x]
        z = sum(w * one for w, one in zip(weights, x, strict=True)) / sum(weights)
    return z


def centred(x: list[Tensor], f: int, v: Tensor, tau: float = 0.8, steps: int = 3) -> Tensor:
    for _ in range(steps):
        v = v + sum((one - v) * min(1.0, tau / float((one - v).norm())) for one in x) / len(x)
    return v


# ---------------------------------------------------------------- what is judged


class Judged(pl.LightningModule):
    """The same network."""

    def __init__(self, norms: bool, optimizer: str, schedule: bool) -> None:
        super().__init__()
        self.network, self.kind, self.schedule = network(norms), optimizer, schedule

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("accuracy", (self.network(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        if self.kind == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.02)
        found = torch.optim.SGD(self.parameters(), lr=RATE, momentum=0.9 if self.kind == "momentum" else 0.0)
        if not self.schedule:
            return found
        schedule = torch.optim.lr_scheduler.LambdaLR(found, lambda step: warm(step) / RATE)
        return {"optimizer": found, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


Case = tuple[Callable[[], Any], Callable[[World], Found], dict[str, Any]]
ADAMW = (("betas", (0.9, 0.95)), ("eps", 1e-3), ("weight_decay", 0.1))
NESTEROV = (("momentum", 0.9), ("nesterov", True))
CASES: dict[str, Case] = {
    "fedavg": (lambda: fedavg(), judge_fedavg, {}),
    "fedavg, accumulated": (lambda: fedavg(), judge_fedavg, {"accumulate_grad_batches": 2}),
    "fedavg, clipped": (lambda: fedavg(), judge_clipped, {"gradient_clip_val": 0.3}),
    "fedavgm": (lambda: fedavgm(0.7, 0.5), judge_fedavgm, {}),
    "fedadagrad": (lambda: fedadagrad(0.1), adaptive(lambda v, dd: v + dd, 0.0), {}),
    "fedadam": (lambda: fedadam(0.1), adaptive(lambda v, dd: 0.99 * v + 0.01 * dd, 0.9), {}),
    "fedyogi": (lambda: fedyogi(0.1), adaptive(lambda v, dd: v - 0.01 * dd * torch.sign(v - dd), 0.9), {}),
    "fedopt, adamw": (lambda: fedopt("AdamW", 0.02, ADAMW), judge_adamw, {}),
    "fedopt, nesterov": (lambda: fedopt("SGD", 0.7, NESTEROV), judge_nesterov, {}),
    "diloco": (lambda: diloco(), judge_diloco, {"optimizer": "adamw", "memory": "exp_avg_sq"}),
    "fedprox": (lambda: fedprox(0.5), judge_fedprox, {}),
    "fedprox, accumulated": (lambda: fedprox(0.5), judge_fedprox, {"accumulate_grad_batches": 2}),
    "fedprox, clipped": (lambda: fedprox(0.5), judge_fedprox_clipped, {"gradient_clip_val": 0.3}),
    "scaffold, option 1": (lambda: scaffold(1, 0.9), scaffolds(1), {"memory": "control"}),
    "scaffold, option 2": (lambda: scaffold(2, 0.9), scaffolds(2), {"memory": "control"}),
    "scaffold, accumulated": (lambda: scaffold(2, 0.9), scaffolds(2), {"memory": "control", "accumulate_grad_batches": 2}),
    "scaffold, schedule": (lambda: scaffold(2, 0.9), scaffolds(2, warm), {"memory": "control", "schedule": True}),
    "fednova": (lambda: fednova(), novas(lambda steps: RATE * steps, lambda x: sgd), {}),
    "fednova, momentum": (lambda: fednova(), novas(momentum_length, with_momentum), {"optimizer": "momentum"}),
    "fednova, mu": (
        lambda: fednova(0.5),
        novas(lambda steps: (1 - (1 - RATE * 0.5) ** steps) / 0.5, lambda x: lambda y, g: y - RATE * (g + 0.5 * (y - x))),
        {},
    ),
    "fednova, schedule": (lambda: fednova(), judge_nova_with_a_schedule, {"schedule": True}),
    "feddyn": (lambda: feddyn(0.3), judge_feddyn, {"memory": "linear"}),
    "feddyn, accumulated": (lambda: feddyn(0.3), judge_feddyn, {"memory": "linear", "accumulate_grad_batches": 2}),
    "qfedavg": (lambda: qfedavg(2.0), judge_qfedavg, {}),
    "ditto": (lambda: ditto(0.6, 3), judge_ditto, {"memory": "personal"}),
    "fedper": (lambda: fedper(("network.4.*",)), heads(False), {"memory": "personal"}),
    "fedrep": (lambda: fedrep(("network.4.*",), 3), heads(True), {"memory": "personal"}),
    "norms stay": (
        lambda: replace(fedavg(), personal=("network.1.*",)),
        judge_norms,
        {"memory": "personal", "norms": True, "dtype": torch.float64},  # a norm of two examples makes much of a rounding
    ),
}


def ours(
    make: Callable[[], Any], folder: Path, norms: bool = False, optimizer: str = "sgd", schedule: bool = False, **options: Any
) -> tuple[list[list[int]], Tensors, dict[str, Any], list[dict[str, Tensors]]]:
    """Cohorts, the server's weights and memory, and what clients remember."""
    module, batches = Judged(norms, optimizer, schedule), examples()
    run = {"max_rounds": ROUNDS, "local_epochs": EPOCHS, "clients_per_round": 3, "seed": SEED, "fast_dropout": False}
    loop = make_loop(algorithm=make(), run_dir=str(folder), **(run | options))
    loop.fit(module, GivenLoaders(batches, batches[0]))
    state, memory = checkpoint.latest(folder / "checkpoints"), MemoryOnDisk(folder / "clients", N)
    assert state is not None
    cohorts = [[report.client for report in record.clients] for record in loop.history]
    return cohorts, state.weights, state.memory, [memory.load(k, ROUNDS + 1) for k in range(N)]


def flat(tensors: Tensors) -> Tensor:
    """Parameters in their order, then buffers."""
    names = [name for name, _ in Judged(True, "sgd", False).named_parameters()] + [
        "network.1.running_mean",
        "network.1.running_var",
    ]
    return torch.cat([tensors[name].flatten() for name in names if name in tensors])


def of_optimizer(state: Tensors, kind: str) -> Tensor:
    return torch.cat([state[f"{i}.{kind}"].flatten() for i in range(4)])


def differences(name: str, folder: Path) -> tuple[float, float, float]:
    """The largest between the judge and ours, of the server and of the clients; and how far the server has moved."""
    make, judge, options = CASES[name]
    options = dict(options)
    kind, dtype = options.pop("memory", None), options.pop("dtype", torch.float32)
    torch.set_default_dtype(dtype)
    cohorts, weights, server, clients = ours(make, folder, **options)
    world = World(cohorts, options.get("norms", False), options.get("accumulate_grad_batches", 1))
    start = world.start.clone()
    expected, memories = judge(world)
    found = flat({key: one for key, one in weights.items() if "running" not in key})
    moved = float((found - start).abs().max())
    for step in ("Control", "Drift"):
        found = torch.cat([found, flat(server[step][step.lower()])]) if step in server else found
    apart = [0.0]
    for k in range(N) if kind else ():
        seen = any(k in cohort for cohort in cohorts)
        assert bool(clients[k]) == seen
        if seen:
            mine = of_optimizer(clients[k]["optimizer"], kind) if kind == "exp_avg_sq" else flat(clients[k][str(kind)])
            apart.append(float((mine - memories[k]).abs().max()))
    return float((found - expected).abs().max()), max(apart), moved


@pytest.mark.parametrize("name", CASES)
def test_an_algorithm_computes_what_a_second_implementation_does(name: str, tmp_path: Path, request: Any) -> None:
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    server, clients, moved = differences(name, tmp_path / "run")
    assert server < 1e-6
    assert clients < 1e-6
    assert moved > 0.01


RULES: dict[str, tuple[Callable[..., Any], Callable[[list[Tensor], int], Tensor]]] = {
    "median": (lambda f, mix: Median(f, mix), middle),
    "trimmed mean": (lambda f, mix: TrimmedMean(f, mix), trimmed),
    "geometric median": (lambda f, mix: GeometricMedian(f, mix, max_steps=3000, tolerance=1e-16), geometric),
    "krum": (lambda f, mix: Krum(f, mix), lambda x, f: by_krum(x, f, 1)),
    "multi-krum": (lambda f, mix: MultiKrum(f, mix), lambda x, f: by_krum(x, f, len(x) - f)),
    "multi-krum of 3": (lambda f, mix: MultiKrum(f, mix, 3), lambda x, f: by_krum(x, f, 3)),
    "centred clipping": (
        lambda f, mix: CentredClipping(f, mix, 0.8, 3),
        lambda x, f: centred(x, f, torch.full_like(x[0], 0.1)),
    ),
    "nearest mean": (lambda f, mix: NearestMean(f, mix), lambda x, f: sum(x) / len(x)),
}


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize(("n", "f"), [(7, 1), (8, 2), (9, 3)])
@pytest.mark.parametrize("name", RULES)
def test_a_robust_rule_computes_what_a_second_implementation_does(name: str, n: int, f: int, mix: bool) -> None:
    make, judge = RULES[name]
    slow = name == "geometric median"
    for seed in range(2 if slow else 20):
        rows = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows[:f] *= 1.5
        x = mixed(list(rows), f) if mix else list(rows)
        scores = sorted(krum_scores(x, f))
        if "krum" in name and scores[-1] - scores[0] < 1e-9:
            continue  # all as good as each other, so that a rounding chooses
        with Spool(Serial(None), n) as spool:  # type: ignore[arg-type]  # it only gathers
            for client, row in enumerate(rows):
                spool.add(client, {"w": row})
            spool.complete()
            given = Rows(spool)
            if mix:
                given.mix(f)
            found = make(f, mix).combine(given, torch.full((5,), 0.1, dtype=torch.float64))
        torch.testing.assert_close(found, judge(x, f), rtol=0, atol=1e-7 if slow else 1e-12)


def test_clipped_means_are_cut_to_their_length(tmp_path: Path) -> None:
    def judge(world: World) -> Tensor:
        x = world.start
        for t, cohort, p in world.rounds():
            updates = {}
            for k in cohort:
                world.seed(t, k)
                updates[k] = world.local(x, k, sgd) - x
            x = x + sum(p[k] * clipped(updates[k], 0.6) for k in cohort)
        return x

    cohorts, weights, _, _ = ours(lambda: replace(fedavg(), aggregator=ClippedMean(0.6)), tmp_path / "run")
    assert float((flat(weights) - judge(World(cohorts))).abs().max()) < 1e-6
