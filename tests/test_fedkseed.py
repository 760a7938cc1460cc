"""FedKSeed: what a step is, what travels, and that weights are rebuilt to the bit by whoever has the first ones."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import GivenLoaders, assert_equal, make_loop, weights_of, without_times
from torch import Tensor, nn

import fedtune
from fedtune.algorithms.compression import HalfPrecision, Quantise, Sign, TopK
from fedtune.algorithms.fedavgm import Momentum
from fedtune.algorithms.fedkseed import ZerothOrder, fedkseed
from fedtune.algorithms.robust import Median
from fedtune.federated.client import ClientUpdate
from fedtune.federated.directions import SCALARS, Directions
from fedtune.federated.rebuilt import MEMORY
from fedtune.federated.state import ServerState
from fedtune.storage import checkpoint
from fedtune.storage.records import read_rounds
from fedtune.tensors import Tensors
from fedtune.testing import check_algorithm, quadratics

Make = Callable[..., Any]
RATE, NAMES = 0.01, {"above": (4,), "left": (2, 3)}  # names in order, as directions are drawn


class Bowl(pl.LightningModule):
    """Two tensors whose loss is quadratic: half the squared distances to the rows of a batch, each element with its weight.

    `seen` are the weights of every loss, `graphs` whether it would have had gradients, `outputs` the loss that each step tells.
    """

    def __init__(self, kind: torch.dtype = torch.float64, **optimizer: Any) -> None:
        super().__init__()
        drawn = {name: torch.randn(shape, generator=torch.Generator().manual_seed(5)) for name, shape in NAMES.items()}
        self.left, self.above = (nn.Parameter(drawn[name].to(kind)) for name in ("left", "above"))
        self._kind, self._optimizer = kind, {"lr": RATE} | optimizer
        self.seen: list[Tensor] = []
        self.starts: list[Tensor] = []
        self.graphs: list[bool] = []
        self.outputs: list[float] = []

    def flat(self) -> Tensor:
        return torch.cat([self.above.detach().view(-1), self.left.detach().view(-1)]).clone()

    def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
        self.outputs.append(float(outputs["loss"]))

    def on_train_start(self) -> None:
        self.starts.append(self.flat())

    def training_step(self, batch: Tensor) -> Tensor:
        self.seen.append(self.flat())
        here = torch.cat([self.above.view(-1), self.left.view(-1)])
        loss = (_scales().to(self._kind) * (here - batch) ** 2).sum(1).mean() / 2
        self.graphs.append(loss.requires_grad)
        return loss

    def validation_step(self, batch: Tensor) -> None:
        self.log("loss_nats", (_scales().to(self._kind) * (self.flat() - batch) ** 2).sum(1).mean() / 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), **self._optimizer)


def _scales() -> Tensor:
    return torch.arange(1, 11, dtype=torch.float64) / 5


def batches(*sizes: int, kind: torch.dtype = torch.float64) -> GivenLoaders:
    """A client for each size: four batches of so many rows, around its own centre."""
    drawn = torch.Generator().manual_seed(2)
    rows = [[torch.randn((size, 10), generator=drawn).to(kind) + client for _ in range(4)] for client, size in enumerate(sizes)]
    return GivenLoaders(rows, [rows[0][0]])


def direction(seed: int, number: int, sizes: Sequence[int] = (4, 6)) -> Tensor:
    """z_j by NumPy alone, of tensors of these sizes: each begins with a new word of four times 16 bits."""
    rng, words = np.random.default_rng([seed, zlib.crc32(b"direction"), number, 0]), 0
    places = rng.integers(2**64, size=sum(math.ceil(size / 4) for size in sizes), dtype=np.uint64).view("<u2")
    found = []
    for size in sizes:
        found.append(QUANTILES[places[4 * words :][:size].astype(int)])
        words += math.ceil(size / 4)
    return torch.from_numpy(np.concatenate(found))


def _quantiles() -> Any:
    """Of the standard normal distribution, in the middle of 65,536 shares, with the variance 1."""
    values = [NormalDist().inv_cdf((place + 0.5) / 65536) for place in range(65536)]
    length = math.sqrt(math.fsum(value**2 for value in values[32768:]) / 32768)
    above = np.array(values[32768:]) / length
    return np.concatenate([-above[::-1], above])


QUANTILES = _quantiles().astype(np.float32)


def fitted(folder: Path, module: pl.LightningModule, data: Any, algorithm: Any, **changes: Any) -> list[ServerState]:
    """The server's states after all rounds, the first one among them."""
    loop = make_loop(algorithm=algorithm, run_dir=str(folder), monitor="loss_nats", mode="min", **{"keep": 99} | changes)
    loop.fit(module, data)
    paths = [folder / "start" / "round-0000", *sorted((folder / "checkpoints").iterdir())]
    return [checkpoint.load(path) for path in paths]


def scalars(state: ServerState) -> Tensor:
    return state.memory[MEMORY]["sum"][SCALARS]


def flat(state: ServerState) -> Tensor:
    return torch.cat([state.weights[name].view(-1) for name in NAMES])


# ---------------------------------------------------------------- a step


def test_one_step_is_the_formula(tmp_path: Path) -> None:
    data, epsilon = batches(3), 0.05
    data._clients[0] = data._clients[0][:1]
    start, end = fitted(tmp_path, module := Bowl(), data, fedkseed(seeds=5, epsilon=epsilon), max_rounds=1)
    (number,) = scalars(end).nonzero().view(-1).tolist()
    z, batch = direction(0, number).double(), data._clients[0][0]

    def loss(weights: Tensor) -> Tensor:
        return (_scales() * (weights - batch) ** 2).sum(1).mean() / 2

    slope = (loss(flat(start) + epsilon * z) - loss(flat(start) - epsilon * z)) / (2 * epsilon)
    assert float(scalars(end)[number]) == pytest.approx(RATE * float(slope), rel=1e-7)
    torch.testing.assert_close(flat(end), flat(start) - RATE * slope * z, rtol=1e-8, atol=1e-9)
    assert torch.equal(module.flat(), flat(end))


def test_a_client_walks_by_the_exact_slope_of_a_quadratic_loss_and_adds_up_its_steps(tmp_path: Path) -> None:
    data, epsilon, seeds = batches(3), 0.3, 4
    _, end = fitted(tmp_path, module := Bowl(), data, fedkseed(seeds, epsilon), max_rounds=1, local_epochs=3)
    drawn, gone = [direction(0, number).double() for number in range(seeds)], torch.zeros(seeds, dtype=torch.float64)
    assert len(module.seen) == 2 * 3 * 4  # two losses, three epochs of four batches
    assert not any(module.graphs)
    assert all(parameter.grad is None for parameter in module.parameters())
    middles = [(above + below) / 2 for above, below in zip(module.seen[::2], module.seen[1::2], strict=True)]
    used = set()
    for step, here in enumerate(middles):
        z = (module.seen[2 * step] - module.seen[2 * step + 1]) / (2 * epsilon)
        number = min(range(seeds), key=lambda one: float((drawn[one] - z).abs().max()))
        torch.testing.assert_close(z, drawn[number], rtol=1e-9, atol=1e-9)
        gradient = _scales() * (here - data._clients[0][step % 4].mean(0))
        slope = float(z @ gradient)
        gone[number] += RATE * slope
        assert module.outputs[step] == pytest.approx(_mean_of_both(module, data._clients[0][step % 4], step), rel=1e-9)
        used.add(number)
        if step + 1 < len(middles):
            torch.testing.assert_close(middles[step + 1], here - RATE * slope * z, rtol=1e-9, atol=1e-9)
    assert len(used) > 1
    torch.testing.assert_close(scalars(end), gone, rtol=1e-8, atol=1e-9)


def _mean_of_both(module: Bowl, batch: Tensor, step: int) -> float:
    """The mean of the two losses of a step."""
    both = [(_scales() * (here - batch) ** 2).sum(1).mean() / 2 for here in module.seen[2 * step : 2 * step + 2]]
    return float(sum(both)) / 2


class Masked(Bowl):
    """A loss of dropout alone, whatever the weights are."""

    def training_step(self, batch: Tensor) -> Tensor:
        return nn.functional.dropout(torch.ones(1000, dtype=torch.float64), 0.5).sum() + 0 * self.left.sum()


@pytest.mark.parametrize("fast", [True, False])
def test_both_losses_of_a_step_have_the_same_dropout_and_steps_have_others(fast: bool, tmp_path: Path) -> None:
    found: list[float] = []

    class Kept(Masked):
        def training_step(self, batch: Tensor) -> Tensor:
            loss = super().training_step(batch)
            found.append(float(loss))
            return loss

    start, end = fitted(tmp_path, Kept(), batches(2), fedkseed(4), max_rounds=1, fast_dropout=fast)
    assert found[::2] == found[1::2]
    assert len(set(found)) > 1
    assert not scalars(end).any()
    assert torch.equal(flat(start), flat(end))


def test_a_batch_that_the_module_skips_moves_nothing(tmp_path: Path) -> None:
    class Skipping(Bowl):
        def training_step(self, batch: Tensor) -> Tensor | None:  # type: ignore[override]
            return None if len(batch) == 2 else super().training_step(batch)

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            assert ("loss" in outputs) == (len(batch) == 3)

    data = batches(2)
    data._clients[0][0] = torch.zeros(3, 10, dtype=torch.float64)
    _, end = fitted(tmp_path, module := Skipping(), data, fedkseed(40), max_rounds=1)
    assert int(scalars(end).count_nonzero()) == 1
    assert len(module.seen) == 2


def test_the_rate_is_that_of_the_modules_schedule(tmp_path: Path) -> None:
    class Halved(Bowl):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.0), "interval": "step"}]

    _, end = fitted(tmp_path, Halved(), batches(3), fedkseed(40), max_rounds=1)  # after the first step the rate is 0
    assert int(scalars(end).count_nonzero()) == 1


# ---------------------------------------------------------------- what travels, and what is made of it


@pytest.mark.parametrize(("weighting", "shares"), [("examples", (0.25, 0.75)), ("uniform", (0.5, 0.5))])
def test_the_server_adds_the_mean_of_what_clients_send(
    weighting: str, shares: tuple[float, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Tensor] = []

    def noted(part: ZerothOrder, client: Any, usual: Any = ZerothOrder.__call__) -> Any:
        groups = usual(part, client)
        sent.append(groups["update"][SCALARS].clone())
        return groups

    monkeypatch.setattr(ZerothOrder, "__call__", noted)
    _, *states = fitted(tmp_path, Bowl(), batches(1, 3), fedkseed(3, weighting=weighting), max_rounds=2)
    before = torch.zeros(3, dtype=torch.float64)
    for state, two in zip(states, (sent[:2], sent[2:]), strict=True):
        assert not torch.equal(*two)
        expected = before + sum(share * one for share, one in zip(shares, two, strict=True))
        torch.testing.assert_close(scalars(state), expected, rtol=1e-8, atol=1e-9)
        before = scalars(state)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_who_missed_rounds_has_the_bits_of_who_took_part_and_of_a_plain_sum(kind: torch.dtype, tmp_path: Path) -> None:
    data = batches(2, 2, 2, 2, kind=kind)
    module, seeds = Bowl(kind), 6
    start, *states = fitted(tmp_path, module, data, fedkseed(seeds), max_rounds=4, clients_per_round=2)
    history = read_rounds(tmp_path / "rounds.jsonl", 4)
    assert len({client for record in history for client in record.cohort}) > 2
    assert any(set(history[0].cohort) != set(record.cohort) for record in history)
    begun = [one for pair in zip(module.starts[::2], module.starts[1::2], strict=True) for one in pair]
    for number, state in enumerate([start, *states[:-1]]):  # both clients of a round start from what the server has
        assert torch.equal(begun[2 * number], flat(state))
        assert torch.equal(begun[2 * number + 1], flat(state))
    for state in states:
        weights = flat(start).clone()
        for number, value in enumerate(scalars(state)):
            weights -= direction(0, number).to(kind) * value
        assert torch.equal(flat(state), weights)
        late = Directions(0, {"left": start.weights["left"], "above": start.weights["above"]}, seeds).weights(scalars(state))
        assert_equal(late, state.weights)
    assert not torch.equal(flat(states[0]), flat(states[1]))


def test_a_sum_in_pieces_and_of_tensors_that_are_not_contiguous_is_the_plain_sum() -> None:
    drawn = torch.Generator().manual_seed(1)
    start = {"tall": torch.randn(700, 400, generator=drawn), "b": torch.randn(5, generator=drawn)}  # in three pieces
    a = torch.tensor([0.5, 0.0, -0.25, 3e-9])
    found, plain = Directions(4, start, 4).weights(a), torch.cat([start["b"], start["tall"].view(-1)])
    for number, value in enumerate(a):
        plain -= direction(4, number, (5, 280_000)) * value
    assert torch.equal(found["b"], plain[:5])
    assert torch.equal(found["tall"], plain[5:].view(700, 400))
    turned = {"tall": start["tall"].t().contiguous().t(), "b": start["b"]}
    assert not turned["tall"].is_contiguous()
    assert_equal(Directions(4, turned, 4).weights(a), found)
    moved = {name: tensor.clone() for name, tensor in turned.items()}
    Directions(4, start, 4).add_(moved, 2, -1.5)
    assert torch.equal(moved["b"], start["b"] + direction(4, 2, (5, 280_000))[:5] * -1.5)
    assert torch.equal(moved["tall"], start["tall"] + (direction(4, 2, (5, 280_000))[5:] * -1.5).view(700, 400))


def test_weights_of_half_precision_are_summed_in_fp32() -> None:
    start = {"w": torch.randn(50, generator=torch.Generator().manual_seed(3)).bfloat16()}
    a, plain = torch.full((64,), 1e-4), start["w"].float()
    for number in range(64):
        plain -= direction(0, number, (50,)) * a[number]
    assert torch.equal(Directions(0, start, 64).weights(a)["w"], plain.bfloat16())


def test_directions_differ_by_number_and_by_seed_and_are_standard_normal() -> None:
    zeros, drawn = {"w": torch.zeros(40_000)}, []
    for seed, number in ((0, 0), (0, 1), (1, 0)):
        drawn.append({"w": zeros["w"].clone()})
        Directions(seed, zeros, 2).add_(drawn[-1], number, 1.0)
    for one in drawn:
        assert abs(float(one["w"].mean())) < 0.025  # five standard errors
        assert abs(float(one["w"].square().mean()) - 1) < 0.036
        shares = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
        apart = (torch.special.ndtr(one["w"].double().sort().values) - shares).abs().max()
        assert float(apart) < 1.95 / 200  # as Kolmogorov and Smirnov have it, one in a thousand
    correlations = torch.corrcoef(torch.stack([one["w"] for one in drawn])) - torch.eye(3)
    assert float(correlations.abs().max()) < 0.025


@pytest.mark.parametrize(
    ("stages", "up", "down"),
    [({}, 64 * 4, 64 * 4), ({"up": (HalfPrecision(),)}, 64 * 2, 64 * 4), ({"down": (Quantise(),)}, 64 * 4, 64 + 4)],
)
def test_bytes_are_those_of_the_scalars(stages: dict[str, Any], up: int, down: int, tmp_path: Path) -> None:
    loop = make_loop(algorithm=replace(fedkseed(64), **stages), monitor="loss_nats", mode="min")
    for record in loop.fit(Bowl(torch.float32), batches(2, 2, 3, kind=torch.float32)):
        assert (record.bytes_up, record.bytes_down) == (3 * up, 3 * down)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize(
    "algorithm",
    [
        replace(fedkseed(16), server=(Momentum(0.5),), up=(TopK(0.5),), down=(Sign(),)),
        replace(fedkseed(16), aggregator=Median()),
    ],
)
def test_it_holds_what_every_algorithm_holds_with_other_parts_too(algorithm: fedtune.Algorithm, tmp_path: Path) -> None:
    check_algorithm(algorithm, tmp_path)


def test_it_learns() -> None:
    data = batches(4, kind=torch.float32)
    rows = data._clients[0][0]
    data._clients[0] = [rows] * 4
    loop = make_loop(algorithm=fedkseed(50), max_rounds=40, monitor="loss_nats", mode="min")
    history = loop.fit(Bowl(torch.float32, lr=0.03), data)
    least = float((_scales() * (rows.mean(0) - rows) ** 2).sum(1).mean() / 2)
    assert history[0].loss_nats - least > 1
    assert history[-1].loss_nats - least < 0.1


def test_one_weight_goes_to_the_optimum_to_the_bit_of_the_scalars() -> None:
    found, state, _ = quadratics(fedkseed(4), (5,), 60, functions=((3.0, 10.0),))
    assert found == pytest.approx(10, abs=1e-4)
    weights = Directions(3, {"w": torch.tensor([5.0], dtype=torch.float64)}, 4).weights(scalars(state))
    assert torch.equal(weights["w"], state.weights["w"])


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    def run(folder: str, rounds: int) -> tuple[Tensors, list[Any], Any]:
        module = make_module(optimizer="sgd", learning_rate=1e-4, lora={"rank": 2})
        loop = make_loop(algorithm=fedkseed(8), run_dir=str(tmp_path / folder), max_rounds=rounds, clients_per_round=2)
        loop.fit(module, make_data())
        return weights_of(module), without_times(loop.history), module

    run("two", 2)
    whole, resumed = run("whole", 4), run("two", 4)
    assert_equal(whole[0], resumed[0])
    assert whole[1] == resumed[1]
    assert_equal(weights_of(fedtune.load(str(tmp_path / "two")).module), whole[0])
    first = weights_of(make_module(optimizer="sgd", learning_rate=1e-4, lora={"rank": 2}))
    moved = {name for name, tensor in whole[0].items() if not torch.equal(tensor, first[name])}
    assert moved == {name for name, one in whole[2].named_parameters() if one.requires_grad}
    assert len(moved) < len(first)


def test_baselines_train_with_gradients_from_the_first_weights(make_data: Make, make_module: Make) -> None:
    runs = {}
    for name in ("fedkseed", "fedavg"):
        loop = make_loop(algorithm=name, baselines=("centralised",), max_rounds=1)
        loop.fit(make_module(optimizer="sgd", learning_rate=1e-3), make_data())
        runs[name] = without_times(loop.baseline_runs["centralised"])
    assert runs["fedkseed"] == runs["fedavg"]


def test_weights_that_the_scalars_do_not_come_to_here_are_refused(tmp_path: Path) -> None:
    fitted(tmp_path, Bowl(), batches(2), fedkseed(4), max_rounds=1)
    state = checkpoint.load(tmp_path / "checkpoints" / "round-0001")
    state.weights["left"][0, 0] += 1e-9
    checkpoint.save(tmp_path / "checkpoints", state, keep=1)
    with pytest.raises(
        fedtune.RunError, match=r"round 2: left is not what the scalars of round 1 come to here; allowed: the version of NumPy"
    ):
        fitted(tmp_path, Bowl(), batches(2), fedkseed(4), max_rounds=2)


def test_with_privacy_the_scalars_are_clipped_and_noised(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    privacy = {"name": "Gaussian", "noise": 1.0, "clip": 1e-3, "delta": 1e-3, "sampling": "fixed"}
    algorithm = fedkseed(2000, weighting="uniform")
    loop = {"privacy": privacy | {"neighbours": "replace_one"}, "max_rounds": 1}
    start, end = fitted(tmp_path, Bowl(torch.float32), batches(2, 2, kind=torch.float32), algorithm, **loop)
    expected = 1e-3 / 2  # of the noise on a mean of two; what was clipped is far shorter
    assert float(scalars(end).std()) == pytest.approx(expected, rel=0.1)
    late = Directions(0, {name: start.weights[name] for name in NAMES}, 2000).weights(scalars(end))
    assert_equal(late, {name: end.weights[name] for name in NAMES})


# ---------------------------------------------------------------- what is refused


class Clipping(Bowl):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        pass


class Part(Bowl):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.left], RATE)


class Rates(Bowl):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([{"params": [self.left]}, {"params": [self.above], "lr": 0.1}], RATE)


class Adam(Bowl):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), RATE)


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "momentum": (lambda: Bowl(momentum=0.9), {}, "FedKSeed with SGD without momentum"),
    "another optimizer": (Adam, {}, "FedKSeed with SGD without momentum"),
    "decay": (lambda: Bowl(weight_decay=0.1), {}, r"weight decay 0.1'; allowed: FedKSeed without"),
    "two rates": (Rates, {}, "the rates .*0.01, 0.1.*one rate for all weights"),
    "a part": (Part, {}, "without above in its optimizer"),
    "a hook": (Clipping, {}, "does not override on_before_optimizer_step, as it has no gradients"),
    "clipping": (Bowl, {"gradient_clip_val": 1.0}, "gradient_clip_val: got 1.0; allowed: for ZerothOrder, none"),
    "accumulation": (Bowl, {"accumulate_grad_batches": 2}, "accumulate_grad_batches: got 2; allowed: for ZerothOrder, 1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_meaning_without_gradients_is_refused(what: str) -> None:
    module, changes, match = REFUSED[what]
    loop = make_loop(algorithm="fedkseed", monitor="loss_nats", mode="min", **changes)
    with pytest.raises(fedtune.UsageError, match=match):
        loop.fit(module(), batches(2))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seeds": 0}, "seeds: got 0; allowed: a whole number, 1 or more"),
        ({"seeds": True}, "seeds: got True"),
        ({"epsilon": 0.0}, "epsilon: got 0.0; allowed: a number above 0"),
        ({"epsilon": float("nan")}, "epsilon: got nan"),
        ({"personal": ["left"]}, r"algorithm.personal: got \['left'\]; allowed: for ZerothOrder, nothing"),
        ({"aggregator": "Stacking"}, "algorithm.aggregator: got 'Stacking'; allowed: for ZerothOrder"),
        ({"server": ["Control"]}, "for Control, one that sends control"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(fedtune.UsageError, match=match):
        make_loop(algorithm={"name": "fedkseed"} | changes)


def test_a_part_without_seeds_has_no_directions() -> None:
    class Asking(ClientUpdate):
        def __call__(self, client: Any) -> Any:
            return client.directions

    algorithm = replace(fedkseed(), client=Asking())
    with pytest.raises(fedtune.RunError, match="Asking has no seeds, so there are no directions"):
        make_loop(algorithm=algorithm, monitor="loss_nats", mode="min").fit(Bowl(), batches(2))


def test_a_loss_that_is_no_number_ends_the_run_with_its_step() -> None:
    loop = make_loop(algorithm=fedkseed(4), monitor="loss_nats", mode="min")
    with pytest.raises(fedtune.RunError, match=r"round 1, client 0.*lower the learning rate"):
        loop.fit(Bowl(torch.float32, lr=1e30), batches(2, kind=torch.float32))
