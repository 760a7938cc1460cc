"""What every algorithm holds, to be tested on one's own.

def test_my_algorithm(tmp_path):
    check_algorithm(mine(mu=0.1), tmp_path, neutral=mine(mu=0.0), like="fedavg")
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from fedtune.algorithms.fedavg import Mean
from fedtune.algorithms.specification import algorithm_of, specification_of
from fedtune.federated.adapted import adapted, resting_factors
from fedtune.federated.base import moving
from fedtune.federated.client import Worker
from fedtune.federated.directions import Directions
from fedtune.federated.evaluation import attached
from fedtune.federated.memory import ClientMemory, MemoryInRam, MemoryOnDisk
from fedtune.federated.messages import Context, Failure, Reply, Request
from fedtune.federated.parts import Algorithm, Runtime
from fedtune.federated.personal import personal_names
from fedtune.federated.rebuilt import run_rebuilt
from fedtune.federated.round import RoundOptions, run_round
from fedtune.federated.state import RoundResult, ServerState
from fedtune.federated.sums import Value
from fedtune.federated.training import Training
from fedtune.runtimes.serial import Serial
from fedtune.storage import checkpoint
from fedtune.tensors import Tensors, buffers, carried, counters, snapshot, trainable, travelling

SIZES = (9, 5, 14, 6)  # examples of the clients, none left over alone


@final
class Adapted(nn.Module):
    """A linear layer with an adapter (LoRA), as peft names its parts.

    Args:
        base: the layer, which is frozen.
        rank, scale: r and s.
    """

    def __init__(self, base: nn.Linear, rank: int = 3, scale: float = 2.0) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        a, b = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(b.weight)
        self.lora_A, self.lora_B = nn.ModuleDict({"default": a}), nn.ModuleDict({"default": b})
        self.scaling = {"default": scale}

    def forward(self, inputs: Tensor) -> Tensor:
        """W x + s B A x."""
        adapter = self.lora_B["default"](self.lora_A["default"](inputs))
        return self.base_layer(inputs) + self.scaling["default"] * adapter


@final
class TinyModule(pl.LightningModule):
    """A classifier with dropout and a batch norm, trained by plain SGD; its linear layers may have adapters."""

    def __init__(self, adapters: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            linear = [nn.Linear(5, 8), nn.Linear(8, 3)]
            first, last = map(Adapted, linear) if adapters else linear
            self.network = nn.Sequential(first, nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), last)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD, which every algorithm allows."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


@final
class TinyData:
    """Four uneven clients with different classes, batches of three."""

    num_clients = len(SIZES)

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        inputs = [torch.randn(size, 5, generator=generator) for size in SIZES]
        labels = [(torch.randint(2, (size,), generator=generator) + client) % 3 for client, size in enumerate(SIZES)]
        self._clients = [list(zip(x.split(3), y.split(3), strict=True)) for x, y in zip(inputs, labels, strict=True)]

    def client_dataloader(self, client: int) -> list[tuple[Tensor, Tensor]]:
        """The client's batches, always the same."""
        return self._clients[client]


@final
class Unreliable(Runtime):
    """A runtime whose clients answer in reverse, or whose replies are lost in some rounds."""

    def __init__(self, inner: Runtime, lost: Collection[tuple[int, int]] = (), reverse: bool = False) -> None:
        self._inner, self._lost, self._reverse = inner, lost, reverse

    def replies(self, requests: Sequence[Request], context: Context) -> Iterator[Reply | Failure]:
        """Those of the inner runtime."""
        for reply in self._inner.replies(requests[::-1] if self._reverse else requests, context):
            yield Failure(reply.client, "dropped") if (context.round, reply.client) in self._lost else reply

    def add_up_(self, tensors: list[Tensor]) -> None:
        """As the inner runtime."""
        self._inner.add_up_(tensors)

    def gather(self, values: list[Value]) -> list[Value]:
        """As the inner runtime."""
        return self._inner.gather(values)

    def discard(self, round: int, clients: Sequence[int]) -> None:
        """As the inner runtime."""
        self._inner.discard(round, clients)


def play(
    algorithm: Algorithm, folder: Path, until: int, lost: Collection[tuple[int, int]] = (), reverse: bool = False
) -> list[RoundResult]:
    """Rounds of a tiny federation, three of its four clients in each, from the last checkpoint in the folder.

    Args:
        until: the last round.
        lost: (round, client) whose reply does not arrive.
        reverse: clients train in reverse order.
    """
    module = TinyModule(adapters=algorithm.client.adapters or algorithm.aggregator.adapters)
    fabric = Fabric(accelerator="cpu", devices=1)
    memory, results = MemoryOnDisk(folder / "clients", TinyData.num_clients), []
    training = Training(fabric, module, 3)
    with attached(training), adapted(module, algorithm, TinyData.num_clients, 3) as adapters:
        base = moving(algorithm, adapters)
        worker = Worker(training, TinyData(), algorithm.client, memory, 2, snapshot(counters(module)))
        names = personal_names(algorithm.personal, travelling(module))
        worker = replace(worker, up=algorithm.up, down=algorithm.down)
        runtime = Unreliable(Serial(worker), lost, reverse)
        options = RoundOptions(local_epochs=2, buffers=frozenset(buffers(module)), personal=names, min_clients=1)
        options = replace(options, resting=resting_factors(module, adapters))
        state = checkpoint.latest(folder / "checkpoints") or ServerState(0, snapshot(carried(module, base)))
        memory.rewind(state.round)
        worker.personal.update({name: state.weights[name] for name in names})
        one_round = _round_of(algorithm, snapshot(trainable(module)))
        while state.round < until:
            number = state.round + 1
            cohort = tuple(client for client in range(TinyData.num_clients) if client != number % TinyData.num_clients)
            context = Context(3, number, TinyData.num_clients, cohort, 2 * sum(SIZES), adapters=adapters)
            results.append(one_round(state, algorithm, context, runtime, options))
            state = results[-1].state
            checkpoint.save(folder / "checkpoints", state, keep=2)
    return results


def _round_of(algorithm: Algorithm, start: Tensors) -> Callable[..., RoundResult]:
    """What does one round, as in a run that begins with these weights."""
    seeds = algorithm.client.seeds
    return functools.partial(run_rebuilt, directions=Directions(3, start, seeds)) if seeds else run_round


QUADRATICS = ((1.0, 0.0), (3.0, 10.0))  # (a, b) of a client's f(w) = a / 2 (w - b)^2; together they are least at 7.5


@final
class Quadratic(pl.LightningModule):
    """One weight, in fp64, trained by SGD; a batch is (1, 2): a and b."""

    def __init__(self, start: float = 5.0, rate: float = 0.05, momentum: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([start], dtype=torch.float64))
        self._rate, self._momentum = rate, momentum

    def training_step(self, batch: Tensor) -> Tensor:
        """a / 2 (w - b)^2."""
        a, b = batch[0]
        return (a / 2 * (self.w - b) ** 2).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), self._rate, self._momentum)


@final
class QuadraticData:
    """Clients that make so many steps in a round, each on its own function."""

    def __init__(self, steps: Sequence[int], functions: Sequence[tuple[float, float]]) -> None:
        self.num_clients, self._steps, self._functions = len(steps), steps, functions

    def client_dataloader(self, client: int) -> list[Tensor]:
        """The same batch, again and again."""
        return [torch.tensor([self._functions[client]], dtype=torch.float64)] * self._steps[client]


def quadratics(
    algorithm: Algorithm,
    steps: Sequence[int],
    rounds: int,
    rate: float = 0.05,
    momentum: float = 0.0,
    cohorts: Sequence[tuple[int, ...]] = (),
    functions: Sequence[tuple[float, float]] = QUADRATICS,
    start: float = 5.0,
    update_limit: float = 64.0,
) -> tuple[float, ServerState, ClientMemory]:
    """What an algorithm comes to on quadratics, whose right answers are known (docs/algorithms.md).

    Args:
        steps: of each client in a round.
        rate, momentum: of the clients' SGD.
        cohorts: of the rounds, in turn; by default all clients.
        functions: (a, b) of each client.
        start: the first weight.
        update_limit: as in `Mean`; the finer its grid, the nearer the answers.

    Returns:
        the weight in the end, the server's state, and what clients remember.
    """
    module, memory = Quadratic(start, rate, momentum), MemoryInRam()
    if isinstance(algorithm.aggregator, Mean):  # a step of 5 and more is no accident here
        algorithm = replace(algorithm, aggregator=replace(algorithm.aggregator, update_limit=update_limit))
    training = Training(Fabric(accelerator="cpu", devices=1), module, 0)
    with attached(training):
        runtime = Serial(Worker(training, QuadraticData(steps, functions), algorithm.client, memory))
        state, one_round = ServerState(0, snapshot(travelling(module))), _round_of(algorithm, snapshot(trainable(module)))
        for number in range(1, rounds + 1):
            cohort = cohorts[(number - 1) % len(cohorts)] if cohorts else tuple(range(len(steps)))
            context = Context(0, number, len(steps), cohort, sum(steps))
            state = one_round(state, algorithm, context, runtime, RoundOptions()).state
    return state.weights["w"].item(), state, memory


def check_algorithm(algorithm: Algorithm, folder: Path, neutral: Algorithm | None = None, like: Any = "fedavg") -> None:
    """Check what every algorithm holds.

    Its plain values give it back. The order of clients changes no bit. Four rounds are two, a third that is lost, and two more,
    bit for bit, what clients remember included. A round goes on without a client whose reply is lost, and that client is not
    changed by it. At its neutral setting it is FedAvg, bit for bit.

    Args:
        algorithm: at a setting that is not neutral.
        folder: an empty folder.
        neutral: the algorithm at the setting at which it does nothing, or None where there is no such setting.
        like: the algorithm that it then is.

    Raises:
        AssertionError: it does not hold.
    """
    if algorithm_of(specification_of(algorithm)) != algorithm:
        raise AssertionError("its plain values do not give it back: are all its parts in fedtune.ALGORITHM_PARTS?")
    whole = play(algorithm, folder / "whole", 4)
    _same(whole[-1].state, play(algorithm, folder / "reversed", 4, reverse=True)[-1].state, "clients in reverse order")
    play(algorithm, folder / "resumed", 3)
    for lost in (folder / "resumed" / "checkpoints").glob("round-0003/*"):
        lost.unlink()
    (folder / "resumed" / "checkpoints" / "round-0003").rmdir()
    _same(whole[-1].state, play(algorithm, folder / "resumed", 4)[-1].state, "after a lost round")
    if neutral is not None:
        expected = play(algorithm_of(like), folder / "like", 3)[-1].state
        _same(expected, play(neutral, folder / "neutral", 3)[-1].state, "at the neutral setting", memory=False)
    if algorithm.aggregator.least > 2:
        return  # without a reply it stops
    dropped = play(algorithm, folder / "dropped", 3, lost=[(2, 1)])
    if [failure.client for failure in dropped[1].failures] != [1]:
        raise AssertionError("a lost reply is not among the failures of its round")
    if not all(bool(tensor.isfinite().all()) for tensor in dropped[-1].state.weights.values()):
        raise AssertionError("after a lost reply the weights are not finite")
    if (folder / "dropped" / "clients" / "000001" / "0002.safetensors").exists():
        raise AssertionError("a client remembers a round in which its reply was lost")


def _same(one: ServerState, other: ServerState, what: str, memory: bool = True) -> None:
    for name, tensor in one.weights.items():
        if not torch.equal(tensor, other.weights[name]):
            raise AssertionError(f"{what}: {name} is not the same")
    for step, groups in one.memory.items() if memory else ():
        for group, tensors in groups.items():
            for name, tensor in tensors.items():
                if not torch.equal(tensor, other.memory[step][group][name]):
                    raise AssertionError(f"{what}: {group} of {step} is not the same in {name}")
