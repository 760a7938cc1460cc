"""Small messages: what channels leave of a tensor, what error feedback makes up for, what travels, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_equal, make_loop, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from test_algorithm_edges import TinyLoaders
from torch import Tensor

import fedtune
from fedtune.algorithms import ALGORITHM_PARTS
from fedtune.algorithms.adaptive import fedadam
from fedtune.algorithms.compression import QSGD, HalfPrecision, PowerSGD, Quantise, Sign, TopK
from fedtune.algorithms.fedavg import fedavg
from fedtune.algorithms.fedex_lora import fedex_lora
from fedtune.algorithms.fedit import fedit
from fedtune.algorithms.scaffold import scaffold
from fedtune.federated.channel import Channel
from fedtune.federated.feedback import fed_back
from fedtune.federated.memory import MemoryOnDisk
from fedtune.federated.messages import Context, Failure, Reply, Request, Stage, bytes_of, decoded, encoded
from fedtune.federated.parts import Algorithm, Runtime
from fedtune.federated.round import RoundOptions, run_round
from fedtune.federated.state import ServerState
from fedtune.storage import checkpoint
from fedtune.tensors import Groups, Tensors, joined
from fedtune.testing import TinyModule, check_algorithm, play

CHANNELS: dict[str, tuple[Channel, Channel]] = {  # up, down
    "bf16": (HalfPrecision(), HalfPrecision()),
    "fp16, fed back": (HalfPrecision("fp16", feedback=True), HalfPrecision("fp16", feedback=True)),
    "int8": (Quantise(), Quantise()),
    "int4, fed back": (Quantise(4, feedback=True), Quantise(4, feedback=True)),
    "qsgd": (QSGD(4, 16), QSGD(8, 16, feedback=True)),
    "sign": (Sign(), Sign()),
    "top-k": (TopK(0.1), TopK(0.1)),
    "powersgd": (PowerSGD(1), PowerSGD(1)),
}
SHAPES = {"matrix": (24, 10), "tall": (3, 4, 5), "row": (7,), "one": (1,), "scalar": ()}


def tensors(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def context(weights: Tensors, seed: int = 0, memory: Groups | None = None) -> Context:
    return Context(seed, 1, 2, (0, 1), 10, client=0, weights=weights, memory={} if memory is None else memory)


def through(stages: Stage | tuple[Stage, ...], found: Tensors, seed: int = 0) -> Tensors:
    """What arrives of an update."""
    stages, here = stages if isinstance(stages, tuple) else (stages,), context(found, seed)
    return decoded(encoded({"update": found}, stages, here), stages, here)["update"]


def square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


# ---------------------------------------------------------------- what is left of a tensor

some = st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40).map(torch.tensor)


@given(some, st.floats(0.01, 1.0))
@settings(deadline=None)
def test_top_k_keeps_exactly_k_of_the_largest_and_loses_no_more_than_its_bound(values: Tensor, share: float) -> None:
    kept = max(1, round(share * len(values)))
    message = TopK(share).encode({"update": {"w": values}}, context({"w": values}))
    index = message["update.TopK.index"]["w"].long()
    assert index.tolist() == sorted(set(index.tolist()))
    assert len(index) == kept
    assert torch.equal(message["update"]["w"], values[index])
    others = values.abs().index_fill(0, index, 0.0)
    assert float(others.max()) <= float(values[index].abs().min())
    lost = square(through(TopK(share), {"w": values})["w"] - values)
    assert lost <= (1 - kept / len(values)) * square(values) * (1 + 1e-6)


def test_of_equal_values_the_first_travel() -> None:
    values = torch.tensor([1.0, -2.0, 2.0, 0.5, 2.0, -2.0])
    assert through(TopK(0.5), {"w": values})["w"].tolist() == [0.0, -2.0, 2.0, 0.0, 2.0, 0.0]
    assert through(TopK(1 / 3), {"w": torch.ones(6)})["w"].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


@given(some)
@settings(deadline=None)
def test_the_error_of_signs_is_what_the_length_leaves(values: Tensor) -> None:
    expected = square(values) - float(values.double().abs().sum()) ** 2 / len(values)
    found = through(Sign(), {"w": values})["w"]
    least = 1e-75  # squares of numbers so small that fp32 has few digits of them
    assert square(found - values) == pytest.approx(expected, rel=1e-4, abs=max(1e-6 * square(values), least))
    assert found.abs().unique().numel() == 1


@pytest.mark.parametrize("channel", [QSGD(2, 64), QSGD(4, 64), QSGD(8, 50), Quantise(), Quantise(4)])
def test_stochastic_channels_are_unbiased(channel: Channel) -> None:
    values, draws = torch.randn(150, generator=torch.Generator().manual_seed(1)), 3000
    found = torch.stack([through(channel, {"w": values}, seed)["w"] for seed in range(draws)])
    error = found.std(0).max() / math.sqrt(draws)
    assert float(error) > 0
    assert float((found.mean(0) - values).abs().max()) < 5 * float(error)  # of 150 means, none so far off


@pytest.mark.parametrize(("bits", "bucket"), [(2, 16), (2, 400), (4, 64), (4, 512), (8, 512)])
def test_the_variance_of_qsgd_is_within_its_bound(bits: int, bucket: int) -> None:
    values, levels = torch.randn(400, generator=torch.Generator().manual_seed(2)), 2 ** (bits - 1) - 1
    found = torch.stack([through(QSGD(bits, bucket), {"w": values}, seed)["w"] for seed in range(200)])
    for row, drawn in zip(values.split(bucket), found.split(bucket, 1), strict=True):
        most = min(len(row) / levels**2, math.sqrt(len(row)) / levels) * square(row)
        assert float((drawn - row).square().sum(1).mean()) < 1.1 * most


@given(some, st.sampled_from([4, 8]), st.integers(0, 99))
@settings(deadline=None)
def test_a_quantised_value_is_within_one_level(values: Tensor, bits: int, seed: int) -> None:
    level = float(values.abs().max()) / (2 ** (bits - 1) - 1)
    assert float((through(Quantise(bits), {"w": values}, seed)["w"] - values).abs().max()) <= level * 1.00001 + 2e-45


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_powersgd_is_exact_for_a_matrix_of_its_rank(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    matrix = torch.randn(30, rank, generator=generator) @ torch.randn(rank, 20, generator=generator)
    assert torch.allclose(through(PowerSGD(rank), {"w": matrix})["w"], matrix, atol=1e-5)
    folded = matrix.view(30, 4, 5)
    assert torch.allclose(through(PowerSGD(rank), {"w": folded})["w"], folded, atol=1e-5)


def test_powersgd_comes_nearer_to_the_best_factors_from_round_to_round() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 30, generator=generator) + 3 * torch.outer(torch.randn(40, generator=generator), torch.ones(30))
    _, values, _ = torch.linalg.svd(matrix)
    here, errors = context({"w": matrix}), []
    for _ in range(30):
        message = PowerSGD(2).encode({"update": {"w": matrix}}, here)
        errors.append(square(PowerSGD(2).decode(message, here)["update"]["w"] - matrix))
    best = square(values[2:])
    assert errors[0] > 1.02 * best
    assert errors[-1] == pytest.approx(best, rel=0.01)


def test_what_would_not_be_smaller_travels_as_it_is() -> None:
    found = tensors()
    message = PowerSGD(3).encode({"update": found}, context(found))
    assert set(message["update.PowerSGD.right"]) == {"matrix"}  # 3 (24 + 10) of 240; 3 (3 + 20) would be more than 60
    assert torch.equal(message["update"]["row"], found["row"])


@pytest.mark.parametrize("name", CHANNELS)
def test_a_channel_leaves_what_it_is_given_and_gives_back_names_and_shapes(name: str) -> None:
    channel, found = CHANNELS[name][0], tensors()
    before = {key: tensor.clone() for key, tensor in found.items()}
    count = {"n": torch.tensor(3), "none": torch.zeros(0), "length": torch.tensor(2.5, dtype=torch.float64)}
    here = context(found)
    groups = decoded(encoded({"update": found, "extra": count}, (channel,), here), (channel,), here)
    assert_equal(found, before)
    assert {key: tensor.shape for key, tensor in groups["update"].items()} == {key: t.shape for key, t in found.items()}
    assert all(tensor.dtype == torch.float32 for tensor in groups["update"].values())
    assert groups["extra"]["n"].item() == 3
    assert groups["extra"]["none"].shape == (0,)
    assert groups["extra"]["length"].item() == pytest.approx(2.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", CHANNELS)
def test_no_channel_hides_what_is_not_finite(name: str, bad: float) -> None:
    for key in ("matrix", "row"):
        found = tensors()
        found[key].view(-1)[3] = bad
        assert not bool(through(CHANNELS[name][0], found)[key].isfinite().all())


def test_channels_follow_one_another() -> None:
    found = tensors()
    twice, once = through((TopK(0.5), HalfPrecision()), found), through(TopK(0.5), found)
    assert all(torch.equal(tensor, once[name].bfloat16().float()) for name, tensor in twice.items())
    here = context(found)
    message = encoded({"update": found}, (PowerSGD(1), Quantise(4)), here)
    assert message["update"]["matrix"].dtype == message["update.PowerSGD.right"]["matrix"].dtype == torch.uint8
    assert decoded(message, (PowerSGD(1), Quantise(4)), here)["update"]["matrix"].shape == (24, 10)


# ---------------------------------------------------------------- bytes


@pytest.mark.parametrize("name", CHANNELS)
def test_bytes_are_those_that_safetensors_writes(name: str) -> None:
    channel, found = CHANNELS[name][0], tensors()
    message = encoded({"update": found, "control": tensors(1)}, (channel,), context(found))
    file = save(joined(message))
    assert bytes_of(message) == len(file) - 8 - int.from_bytes(file[:8], "little")  # without the names and shapes at its head
    read = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    assert {one.partition("/")[0] for one in read} == set(message)


def test_bytes_of_each_channel_are_what_the_table_says() -> None:
    found = {"w": torch.randn(64, 64)}
    elements, matrix = 64 * 64, 4 * 2 * (64 + 64)
    for channel, expected in (
        (HalfPrecision(), 2 * elements),
        (Quantise(), elements + 4),
        (Quantise(4), elements // 2 + 4 + 8),
        (QSGD(2, 512), elements // 4 + 4 * elements // 512 + 8),
        (QSGD(4, 512), elements // 2 + 4 * elements // 512 + 8),
        (Sign(), elements // 8 + 4),
        (TopK(0.25), 8 * elements // 4),
        (PowerSGD(2), matrix),
    ):
        assert bytes_of(encoded({"update": found}, (channel,), context(found))) == expected


# ---------------------------------------------------------------- error feedback


def descend(
    stages: tuple[Stage, ...], gradients: Sequence[Callable[[Tensor], Tensor]], x: Tensor, rate: float, steps: int
) -> list[Tensor]:
    """Where distributed gradient descent goes whose clients send through stages, one step a round."""
    memories: list[Groups] = [{} for _ in gradients]
    path = [x]
    for step in range(steps):
        arrived = []
        for client, gradient in enumerate(gradients):
            here = Context(0, step + 1, len(gradients), (), 1, client=client, weights={"x": x}, memory=memories[client])
            update = {"update": {"x": -rate * gradient(x)}}
            send = fed_back if any(stage.feedback for stage in stages) else encoded
            arrived.append(decoded(send(update, stages, here), stages, here)["update"]["x"])
        x = x + torch.stack(arrived).mean(0)
        path.append(x)
    return path


def inner(b: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """The gradient of <b, x>^2 + |x|^2 / 4."""
    vector = torch.tensor(b, dtype=torch.float64)
    return lambda x: 2 * torch.dot(vector, x) * vector + x / 2


ROTATED = [inner(b) for b in ((-3.0, 2.0, 2.0), (2.0, -3.0, 2.0), (2.0, 2.0, -3.0))]
ONES = torch.ones(3, dtype=torch.float64)


def test_top_1_diverges_without_feedback_and_converges_with_it() -> None:
    """The counterexample of Beznosikov et al. 2020."""
    without = descend((TopK(0.3, feedback=False),), ROTATED, ONES, 0.01, 760)
    assert float(without[-1].norm()) > 1e5
    fed = descend((TopK(0.3),), ROTATED, ONES, 0.01, 3000)
    assert float(fed[-1].norm()) < 1e-4


def test_signs_stay_where_they_are_without_feedback_and_converge_with_it() -> None:
    """Karimireddy et al. 2019, counterexample 2: the sign of each gradient is +-(1, -1), so x_1 + x_2 never changes."""
    epsilon = 0.3

    def gradient(x: Tensor) -> Tensor:
        """Of epsilon |x_1 + x_2| + |x_1 - x_2|."""
        return epsilon * torch.sign(x[0] + x[1]) * torch.ones(2) + torch.where(x[0] > x[1], 1.0, -1.0) * torch.tensor(
            [1.0, -1.0]
        )

    start = torch.tensor([1.0, 1.0])
    without = descend((Sign(feedback=False),), [gradient], start, 0.01, 2000)
    assert all(float(x.sum()) == pytest.approx(2.0, abs=1e-3) for x in without)
    fed = descend((Sign(),), [gradient], start, 0.01, 2000)
    assert float(fed[-1].abs().max()) < 0.05


@pytest.mark.parametrize("name", CHANNELS)
def test_what_has_arrived_and_what_is_remembered_are_all_that_was_sent(name: str) -> None:
    stages, memory = (replace(CHANNELS[name][0], feedback=True),), Groups()
    weights = tensors()
    whole, arrived = ({key: torch.zeros_like(tensor) for key, tensor in weights.items()} for _ in range(2))
    for number in range(1, 9):
        update = tensors(number)
        here = Context(0, number, 1, (0,), 1, client=0, weights=weights, memory=memory)
        found = decoded(fed_back({"update": update}, stages, here), stages, here)["update"]
        for key in weights:
            whole[key] += update[key]
            arrived[key] += found[key]
    for key in weights:
        assert torch.allclose(arrived[key] + memory["up.update"][key], whole[key], atol=2e-5)


# ---------------------------------------------------------------- rounds


@pytest.mark.parametrize("make", [fedavg, scaffold, fedadam])
@pytest.mark.parametrize("name", CHANNELS)
def test_every_channel_holds_with_every_kind_of_algorithm_both_ways(name: str, make: Any, tmp_path: Path) -> None:
    up, down = CHANNELS[name]
    check_algorithm(replace(make(), up=(up,), down=(down,)), tmp_path)


def test_all_of_an_update_is_fedavg_to_the_bit(tmp_path: Path) -> None:
    whole = play(fedavg(), tmp_path / "plain", 3)[-1].state
    assert_equal(whole.weights, play(replace(fedavg(), up=(TopK(1.0),)), tmp_path / "all", 3)[-1].state.weights)


def test_every_registered_channel_is_checked_above() -> None:
    known = {part for part in ALGORITHM_PARTS.values() if issubclass(part, Channel)}
    assert known == {type(channel) for channel, _ in CHANNELS.values()}


def test_those_who_took_part_get_changes_and_others_the_whole(tmp_path: Path) -> None:
    algorithm = replace(fedavg(), down=(TopK(0.1),))
    results = play(algorithm, tmp_path, 3)  # of clients 0 to 3 all but 1, all but 2, all but 3
    state, memory = results[-1].state, MemoryOnDisk(tmp_path / "clients", 4)
    assert state.memory["down"]["holders"]["clients"].tolist() == [0, 1, 2]
    for client in (0, 1, 2):
        assert_equal(memory.load(client, 4)["down.weights"], state.memory["down"]["weights"])  # to the bit
    trained = state.memory["down"]["weights"]
    buffers = 4 * sum(tensor.numel() for name, tensor in state.weights.items() if name not in trained)
    whole = 4 * sum(map(torch.Tensor.numel, trained.values())) + buffers
    small = 8 * sum(max(1, round(0.1 * tensor.numel())) for tensor in trained.values()) + buffers
    assert [one.bytes_down for one in results] == [3 * whole, 2 * small + whole, 2 * small + whole]


def test_a_client_whose_reply_was_lost_gets_the_whole_the_next_time(tmp_path: Path) -> None:
    algorithm = replace(fedavg(), down=(Sign(),), up=(Sign(),))
    kept, lost = play(algorithm, tmp_path / "a", 3), play(algorithm, tmp_path / "b", 3, lost=[(2, 0)])
    assert lost[1].state.memory["down"]["holders"]["clients"].tolist() == [1, 3]
    assert lost[2].bytes_down > kept[2].bytes_down
    assert lost[2].state.memory["down"]["holders"]["clients"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "algorithm",
    [
        {"name": "scaffold", "up": [{"name": "PowerSGD", "rank": 1}, {"name": "Quantise", "bits": 4}], "down": ["Sign"]},
        {"name": "fedadam", "up": ["TopK", "HalfPrecision"], "down": [{"name": "PowerSGD", "rank": 1}]},
    ],
    ids=["scaffold", "fedadam"],
)
def test_a_run_that_lost_a_round_goes_on_with_the_same_bits_and_memories(algorithm: Any, tmp_path: Path) -> None:
    modules = {name: TinyModule() for name in ("whole", "cut", "again")}
    options: dict[str, Any] = {"algorithm": algorithm, "clients_per_round": 3, "evaluate_on": "test"}
    make_loop(max_rounds=4, run_dir=str(tmp_path / "whole"), **options).fit(modules["whole"], TinyLoaders())
    make_loop(max_rounds=3, run_dir=str(tmp_path / "cut"), **options).fit(modules["cut"], TinyLoaders())
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "round-0003")
    make_loop(max_rounds=4, run_dir=str(tmp_path / "cut"), **options).fit(modules["again"], TinyLoaders())
    assert_equal(weights_of(modules["whole"]), weights_of(modules["again"]))
    states = [checkpoint.latest(tmp_path / name / "checkpoints") for name in ("whole", "cut")]
    assert all(state is not None for state in states)
    one, other = (joined({key: joined(groups) for key, groups in state.memory.items()}) for state in states if state)
    assert_equal(one, other)
    for client in range(4):
        mine, again = (joined(MemoryOnDisk(tmp_path / name / "clients", 4).load(client, 9)) for name in ("whole", "cut"))
        assert any(key.startswith("up.update/") for key in mine) == bool(mine)
        assert_equal(mine, again)


def test_liars_lie_through_the_channel(tmp_path: Path) -> None:
    options: dict[str, Any] = {"algorithm": {"up": ["TopK"], "down": ["Sign"]}, "evaluate_on": "test", "max_rounds": 2}
    modules = [TinyModule(), TinyModule()]
    for module, faults in zip(modules, ([], [{"name": "SignFlip", "clients": [1]}]), strict=True):
        make_loop(faults=faults, **options).fit(module, TinyLoaders())
    assert not torch.equal(*(weights_of(module)["network.0.weight"] for module in modules))


# ---------------------------------------------------------------- what a site may send

WEIGHTS = {"w": torch.zeros(6, 4), "b": torch.zeros(3)}


@dataclass
class Answering(Runtime):
    """Client 0 answers well, client 1 with what it is given."""

    channel: Channel
    change: Callable[[Groups], Any]

    def replies(self, requests: Sequence[Request], context: Context) -> Iterator[Reply | Failure]:
        for client in (0, 1):
            here = context.of(client)
            groups = encoded({"update": {"w": torch.ones(6, 4), "b": torch.ones(3)}}, (self.channel,), here)
            if client:
                self.change(groups)
            report = fedtune.federated.messages.ClientReport(client, 1, 1, 1, 0.0, 0.0)
            yield Reply(client, 1, groups, report, bytes_of(groups))

    def add_up_(self, tensors: list[Tensor]) -> None: ...

    def gather(self, values: list[Any]) -> list[Any]:
        return values

    def discard(self, round: int, clients: Sequence[int]) -> None: ...


def _set(group: str, value: Any, name: str = "w") -> Callable[[Groups], Any]:
    return lambda groups: groups[group].__setitem__(name, value)


def _gone(group: str, name: str | None = None) -> Callable[[Groups], Any]:
    return lambda groups: groups.pop(group) if name is None else groups[group].pop(name)


HUGE = torch.tensor([2**30, 2**30], dtype=torch.int32)
SENT: list[tuple[Channel, Callable[[Groups], Any]]] = [
    *((channel, change) for channel, _ in CHANNELS.values() for change in (_gone("update"), _gone("update", "w"))),
    *((channel, _set("update", torch.zeros(1000))) for channel, _ in CHANNELS.values()),
    *((channel, _set("update", torch.tensor([3], dtype=torch.int64))) for channel, _ in CHANNELS.values()),
    (HalfPrecision(), _set("update", torch.zeros(6, 4, dtype=torch.bool))),
    (Quantise(), _gone("update.Quantise.scale")),
    (Quantise(), _set("update.Quantise.scale", torch.ones(10**4, 1, 1))),
    (Quantise(), _set("update.Quantise.scale", torch.tensor(math.nan))),
    (Quantise(4), _gone("update.Quantise.shape")),
    (Quantise(4), _set("update.Quantise.shape", HUGE)),
    (QSGD(4), _set("update.QSGD.shape", HUGE)),
    (QSGD(4), _set("update.QSGD.shape", -HUGE)),
    (QSGD(4), _set("update.QSGD.shape", torch.zeros(40, dtype=torch.int32))),
    (QSGD(4), _set("update.QSGD.scale", torch.ones(7))),
    (Sign(), _set("update.Sign.scale", torch.ones(7))),
    (Sign(), _set("update", torch.zeros(10**6, dtype=torch.uint8))),
    (TopK(0.1), _gone("update.TopK.index")),
    (TopK(0.1), _set("update.TopK.index", torch.tensor([24, 1], dtype=torch.int32))),
    (TopK(0.1), _set("update.TopK.index", torch.tensor([1, 24], dtype=torch.int32))),
    (TopK(0.1), _set("update.TopK.index", torch.tensor([-1, 3], dtype=torch.int32))),
    (TopK(0.1), _set("update.TopK.index", torch.tensor([2, 2], dtype=torch.int32))),
    (TopK(0.1), _set("update.TopK.index", torch.tensor([2.0, 3.0]))),
    (PowerSGD(1), _gone("update.PowerSGD.right")),
    (PowerSGD(1), _set("update.PowerSGD.right", torch.zeros(10**6, 1))),
    (PowerSGD(1), _set("update", torch.zeros(6, 9))),
]


@pytest.mark.parametrize("place", range(len(SENT)))
def test_a_message_that_is_none_is_a_failure_of_its_client(place: int) -> None:
    channel, change = SENT[place]
    algorithm, state = replace(fedavg(), up=(channel,)), ServerState(0, WEIGHTS)
    runtime = Answering(channel, change)
    result = run_round(state, algorithm, Context(0, 1, 2, (0, 1), 10), runtime, RoundOptions(min_clients=1))
    assert [failure.client for failure in result.failures] == [1]
    assert "\n" not in result.failures[0].reason
    assert len(result.failures[0].reason) < 400
    alone = decoded(encoded({"update": {"w": torch.ones(6, 4)}}, (channel,), context(WEIGHTS)), (channel,), context(WEIGHTS))
    assert torch.allclose(result.state.weights["w"], alone["update"]["w"], atol=1.0)
    with pytest.raises(fedtune.RunError, match=r"round 1, client 1: ") as caught:
        run_round(state, algorithm, Context(0, 1, 2, (0, 1), 10), runtime, RoundOptions())
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Quantise(3), "bits: got 3; allowed: 4 or 8"),
        (lambda: QSGD(True), "bits: got True; allowed: 2, 4 or 8"),
        (lambda: QSGD(4, 0), "bucket: got 0; allowed: a whole number, 1 or more"),
        (lambda: QSGD(4, 49, feedback=True), "bucket: got 49; allowed: for 4 bits with feedback, up to 48"),
        (lambda: QSGD(2, 1, feedback=True), "bucket: got 1; allowed: no feedback with 2 bits"),
        (lambda: TopK(0.0), "share: got 0.0; allowed: above 0 and up to 1"),
        (lambda: PowerSGD(0), "rank: got 0; allowed: a whole number, 1 or more"),
        (lambda: HalfPrecision("fp8"), "kind: got 'fp8'; allowed: bf16 or fp16"),
        (lambda: replace(fedavg(), up=(Quantise(), TopK())), "algorithm.up: got ['Quantise', 'TopK']; allowed: TopK before"),
        (
            lambda: replace(fedavg(), up=(Quantise(), Quantise(4))),
            "algorithm.up: got ['Quantise', 'Quantise']; allowed: stages of",
        ),
        (lambda: replace(fedavg(), down=(Sign(False),)), "algorithm.down.feedback: got False; allowed: for Sign, true"),
        (lambda: replace(fedex_lora(), up=(TopK(),)), "algorithm.up: got ['TopK']; allowed: for Residual, stages without"),
        (lambda: replace(fedex_lora(), up=(TopK(feedback=False),), down=(TopK(),)), None),
        (lambda: replace(fedit(), up=(PowerSGD(),)), None),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(make: Callable[[], Any], said: str | None) -> None:
    if said is None:
        assert isinstance(make(), Algorithm)
        return
    with pytest.raises(fedtune.UsageError) as caught:
        make()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_channels_are_flags() -> None:
    found = fedtune.FederatedLoop(algorithm={"up": [{"name": "TopK", "share": "1e-2"}], "down": "PowerSGD"})
    assert found._algorithm == replace(fedavg(), up=(TopK(0.01),), down=(PowerSGD(),))
    assert list(itertools.chain(found._algorithm.up, found._algorithm.down)) == [TopK(0.01), PowerSGD()]
