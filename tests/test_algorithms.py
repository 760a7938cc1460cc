from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GivenLoaders, assert_equal, make_loop, weights_of, without_times
from hypothesis import given, settings
from hypothesis import strategies as st

import fedtune
from fedtune.algorithms import ALGORITHMS
from fedtune.algorithms.adaptive import fedadagrad, fedadam, fedyogi
from fedtune.algorithms.compression import Quantise
from fedtune.algorithms.ditto import ditto
from fedtune.algorithms.fedavg import LocalTraining, Mean, fedavg
from fedtune.algorithms.fedavgm import Momentum, fedavgm
from fedtune.algorithms.feddyn import feddyn
from fedtune.algorithms.fedex_lora import fedex_lora
from fedtune.algorithms.fedit import fedit
from fedtune.algorithms.fedkseed import fedkseed
from fedtune.algorithms.fednova import fednova
from fedtune.algorithms.fedper import fedper, fedrep
from fedtune.algorithms.fedprox import fedprox
from fedtune.algorithms.fedsa_lora import fedsa_lora
from fedtune.algorithms.ffa_lora import ffa_lora
from fedtune.algorithms.flexlora import flexlora
from fedtune.algorithms.flora import flora
from fedtune.algorithms.hetlora import hetlora
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
from fedtune.algorithms.rolora import rolora
from fedtune.algorithms.scaffold import scaffold
from fedtune.algorithms.specification import algorithm_of, specification_of
from fedtune.algorithms.torch_optim import diloco, fedopt
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.memory import MemoryOnDisk
from fedtune.federated.messages import Context
from fedtune.federated.parts import Aggregator, Algorithm, ServerStep
from fedtune.tensors import Groups, joined, num_bytes, snapshot, travelling
from fedtune.testing import TinyData, TinyModule, check_algorithm, play

Make = Callable[..., Any]
HEAD = ("network.4.*",)
UNIFORM = {"name": "fedavg", "weighting": "uniform"}
CASES: dict[str, tuple[Algorithm, Algorithm | None, Any]] = {
    "fedavg": (fedavg(), fedavg(), "fedavg"),
    "uniform": (fedavg("uniform"), None, None),
    "fedavgm": (fedavgm(0.7, 0.5), fedavgm(0.0, 1.0), "fedavg"),
    "fedadagrad": (fedadagrad(), None, None),
    "fedadam": (fedadam(), None, None),
    "fedyogi": (fedyogi(), None, None),
    "fedopt": (fedopt("AdamW", 0.01, (("weight_decay", 0.1),)), fedopt("SGD", 1.0), "fedavg"),
    "fedopt, amsgrad": (fedopt("Adam", 0.01, (("amsgrad", True), ("betas", (0.8, 0.9)))), None, None),
    "diloco": (diloco(), None, None),
    "fedprox": (fedprox(0.1), fedprox(0.0), "fedavg"),
    "scaffold": (scaffold(), None, None),
    "scaffold, option 1": (scaffold(1, 0.9), None, None),
    "fednova": (fednova(), None, None),
    "fednova with a proximal term": (fednova(0.1, "uniform"), None, None),
    "feddyn": (feddyn(0.1), feddyn(0.0), UNIFORM),
    "qfedavg": (qfedavg(0.5), qfedavg(0.0), UNIFORM),
    "ditto": (ditto(0.5), ditto(0.5), "fedavg"),
    "fedper": (fedper(("network.4.*",)), None, None),
    "fedrep": (fedrep(("network.4.*",), 2), None, None),
    "norms stay": (replace(fedavg(), personal=("network.1.*",)), None, None),
    "clipped mean": (replace(fedavg(), aggregator=ClippedMean(0.05)), None, None),
    "median": (replace(fedprox(), aggregator=Median()), None, None),
    "trimmed mean": (replace(fedavg(), aggregator=TrimmedMean(0)), None, None),
    "geometric median, mixed": (replace(feddyn(0.1), aggregator=GeometricMedian(0, mix=True)), None, None),
    "multi-krum": (replace(fedadam(), aggregator=MultiKrum(0)), None, None),
    "krum": (replace(ditto(), aggregator=Krum(0)), None, None),
    "centred clipping": (replace(fedper(("network.4.*",)), aggregator=CentredClipping(tau=0.1, steps=2)), None, None),
    "nearest mean": (replace(fedavg(), aggregator=NearestMean(0)), None, None),
    "fedkseed": (fedkseed(), None, None),
    "fedit": (fedit(), None, None),
    "ffa_lora": (ffa_lora(), None, None),
    "ffa_lora, adam": (replace(ffa_lora(), server=fedadam().server), None, None),
    "rolora": (rolora("uniform"), None, None),
    "rolora, momentum": (replace(rolora(), server=fedavgm().server), None, None),
    "rolora, adam": (replace(rolora(), server=fedadam().server), None, None),
    "rolora, adamw": (replace(rolora(), server=fedopt("AdamW", 0.01).server), None, None),
    "fedsa_lora": (fedsa_lora(), None, None),
    "flora": (flora(), None, None),
    "flora, unequal ranks": (flora((1, 3)), None, None),
    "flora, quantised": (replace(flora((1, 3)), up=(Quantise(),)), None, None),
    "flora, a head that stays": (replace(flora(), personal=("network.1.*",)), None, None),
    "fedex_lora": (fedex_lora(), None, None),
    "flexlora": (flexlora((2, 3)), None, None),
    "hetlora": (hetlora((1, 2, 3)), None, None),
    "quantised up": (replace(fedavg(), up=(Quantise(),)), None, None),
    "quantised both ways, with momentum": (replace(fedavgm(), up=(Quantise(),), down=(Quantise(),)), None, None),
}


@pytest.mark.parametrize("name", CASES)
def test_what_every_algorithm_holds(name: str, tmp_path: Path) -> None:
    algorithm, neutral, like = CASES[name]
    check_algorithm(algorithm, tmp_path, neutral, like)


MADE = {name: (make(HEAD) if name in ("fedper", "fedrep") else make()) for name, make in ALGORITHMS.items()}
RULES = {name: part for name, part in fedtune.ALGORITHM_PARTS.items() if issubclass(part, Aggregator)}
OF_PRODUCTS = [name for name, part in RULES.items() if part.adapters]
SEVERAL_GROUPS, UNIFORM_ONLY = ("scaffold", "fednova", "qfedavg"), ("scaffold", "feddyn", "qfedavg")
REFUSED = {(name, rule) for name in SEVERAL_GROUPS for rule in RULES if rule != "Mean"} | {
    (name, rule)
    for name in UNIFORM_ONLY
    for rule in ("Mean", "ClippedMean", *OF_PRODUCTS)  # by default weighted by examples
}
REFUSED |= {("rolora", "CentredClipping"), *(("fedkseed", rule) for rule in OF_PRODUCTS)}
NOT_BOTH = ("ffa_lora", "rolora", "fedsa_lora", "fedper", "fedrep")  # of A and B of each layer in each round


@pytest.mark.parametrize("rule", RULES)
def test_an_algorithm_with_another_aggregator_is_refused_or_holds_it_too(rule: str, tmp_path: Path) -> None:
    aggregator = RULES[rule]()
    if hasattr(aggregator, "num_malicious"):
        aggregator = replace(aggregator, num_malicious=0)
    for name, algorithm in MADE.items():
        if (name, rule) in REFUSED:
            with pytest.raises(
                fedtune.UsageError, match=rf"algorithm\.aggregator.*allowed: for {type(algorithm.client).__name__}"
            ):
                replace(algorithm, aggregator=aggregator)
            continue
        if aggregator.adapters and algorithm.server:
            with pytest.raises(fedtune.UsageError, match=rf"algorithm\.server.*allowed: for {rule}, no step"):
                replace(algorithm, aggregator=aggregator)
            continue
        algorithm, folder = replace(algorithm, aggregator=aggregator), tmp_path / name
        if aggregator.adapters and name in NOT_BOTH:
            with pytest.raises(fedtune.UsageError, match=rf"algorithm\.aggregator: got '{rule}'; .* does not travel"):
                play(algorithm, folder / "whole", 2)
            continue
        whole = play(algorithm, folder / "whole", 2)[-1].state
        play(algorithm, folder / "other", 1, reverse=True)
        other = play(algorithm, folder / "other", 2, reverse=True)[-1].state
        assert_equal(whole.weights, other.weights)
        for step, groups in whole.memory.items():
            for group, tensors in groups.items():
                assert_equal(tensors, other.memory[step][group])
        for client in range(TinyData.num_clients):
            one, two = (MemoryOnDisk(folder / kind / "clients", 4).load(client, 9) for kind in ("whole", "other"))
            assert_equal(joined(one), joined(two))


def test_every_registered_algorithm_is_checked_above() -> None:
    assert set(ALGORITHMS) <= set(CASES)


# ---------------------------------------------------------------- what the check itself notices


@dataclass(frozen=True)
class Counting(ClientUpdate):
    """Local training, then a step that grows with the rounds that the client remembers."""

    growth: float = 0.0
    forgetful: bool = False

    def __call__(self, client: Client) -> Groups:
        client.train()
        update = client.update()
        count = client.memory.get("count", {}).get("n", torch.zeros(()))
        for tensor in update.values():
            tensor.add_(self.growth * count)
        if not self.forgetful:
            client.memory["count"] = {"n": count + 1}
        return {"update": update}


def test_clients_that_remember_hold_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fedtune.ALGORITHM_PARTS, "Counting", Counting)
    algorithm = replace(fedavg(), client=Counting(0.1))
    check_algorithm(algorithm, tmp_path / "a", replace(fedavg(), client=Counting(0.0)))
    remembered = {int(p.parent.name): int(p.stem) for p in sorted((tmp_path / "a" / "whole" / "clients").glob("*/*"))}
    assert remembered == {0: 3, 1: 4, 2: 4, 3: 4}  # client 0 was not in the cohort of round 4
    forgetful = replace(fedavg(), client=Counting(0.1, forgetful=True))
    states = [play(one, tmp_path / name, 3)[-1].state for one, name in ((algorithm, "b"), (forgetful, "c"))]
    assert not torch.equal(*(state.weights["network.0.weight"] for state in states))


def test_memory_of_clients_is_part_of_a_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fedtune.ALGORITHM_PARTS, "Counting", Counting)
    options: dict[str, Any] = {"algorithm": {"client": {"name": "Counting", "growth": 0.1}}, "evaluate_on": "test", "keep": 2}

    def fit(folder: str, rounds: int) -> TinyModule:
        module = TinyModule()
        make_loop(max_rounds=rounds, clients_per_round=3, run_dir=str(tmp_path / folder), **options).fit(module, TinyLoaders())
        return module

    def files(folder: str) -> list[str]:
        return sorted(str(file.relative_to(tmp_path / folder)) for file in (tmp_path / folder / "clients").rglob("*.*"))

    whole = fit("whole", 6)
    fit("cut", 6)
    kept = files("cut")
    assert kept == files("whole")
    # the newest that the oldest checkpoint, of round 5, can need, and what is newer; a client that was away keeps an old one
    assert all(1 <= sum(file.startswith(f"clients/00000{client}") for file in kept) <= 2 for client in range(4))
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "round-0006")
    content = (tmp_path / "cut" / kept[0]).read_bytes()
    for client in range(4):  # of rounds that the run has lost, or never had
        for number in (6, 9):
            (tmp_path / "cut" / "clients" / f"00000{client}" / f"000{number}.safetensors").write_bytes(content)
    again = fit("cut", 6)
    assert files("cut") == kept
    assert_equal(weights_of(whole), weights_of(again))


class TinyLoaders(GivenLoaders):
    """The tiny federation, evaluated on the batches of one client."""

    def __init__(self) -> None:
        data = TinyData()
        super().__init__([data.client_dataloader(client) for client in range(4)], data.client_dataloader(0))

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


@dataclass(frozen=True)
class Moody(ServerStep):
    """Depends on what is in no state: how often it was called in this process."""

    calls: tuple[list[int], ...] = ([],)

    def __call__(self, groups: Groups, memory: Groups, context: Context) -> tuple[Groups, Groups]:
        self.calls[0].append(1)
        update = {name: tensor * (1 + 0.01 * len(self.calls[0])) for name, tensor in groups["update"].items()}
        return groups | {"update": update}, {}


def test_the_check_notices_a_part_that_is_not_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fedtune.ALGORITHM_PARTS, "Moody", Moody)
    with pytest.raises(AssertionError, match="is not the same"):
        check_algorithm(replace(fedavg(), server=(Moody(),)), tmp_path)
    with pytest.raises(AssertionError, match="neutral setting"):
        check_algorithm(fedavg(), tmp_path / "b", neutral=fedavgm(0.5))


# ---------------------------------------------------------------- momentum and compression


def test_momentum_is_what_the_paper_says() -> None:
    context, groups = Context(0, 1, 1, (0,), 1), {"update": {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}}
    step, memory, positions, w = Momentum(0.9, 0.5), {}, [], torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        moved, memory = step(groups, memory, context)
        w = w + moved["update"]["w"]
        positions.append(w[0].item())
    assert positions == pytest.approx([0.5, 0.5 + 0.5 * 1.9, 0.5 + 0.5 * 1.9 + 0.5 * 2.71])
    assert groups["update"]["w"].tolist() == [1.0, -2.0]


def test_fedavgm_goes_on_with_the_same_bits_in_a_run(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    whole, stopped, again, plain = (make_module() for _ in range(4))
    records = make_loop(max_rounds=3, algorithm=fedavgm()).fit(whole, make_data())
    first = make_loop(max_rounds=3).fit(plain, make_data())
    assert records[0].metrics == first[0].metrics  # there is no momentum yet
    assert records[2].metrics != first[2].metrics
    folder = str(tmp_path / "run")
    make_loop(max_rounds=2, algorithm="fedavgm", run_dir=folder).fit(stopped, make_data())
    resumed = make_loop(max_rounds=3, algorithm={"name": "fedavgm", "beta": 0.9}, run_dir=folder).fit(again, make_data())
    assert_equal(weights_of(whole), weights_of(again))
    assert without_times(records) == without_times(resumed)


def quantised(values: torch.Tensor, seed: int = 0) -> tuple[Groups, torch.Tensor]:
    context = Context(seed, 1, 1, (0,), 1, client=0)
    encoded = Quantise().encode({"update": {"w": values}}, context)
    return encoded, Quantise().decode(encoded, context)["update"]["w"]


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), st.integers(0, 1000))
@settings(deadline=None)
def test_quantised_values_are_within_one_level_and_the_largest_is_kept(values: list[float], seed: int) -> None:
    given_ = torch.tensor(values)
    encoded, found = quantised(given_, seed)
    scale = float(given_.abs().max())
    assert encoded["update"]["w"].dtype == torch.int8
    assert bool(found.isfinite().all())
    assert float((found - given_).abs().max()) <= scale / 127 * 1.00001 + 2e-45  # the least number of fp32
    if scale > 1e-30:
        assert found[int(given_.abs().argmax())].item() == pytest.approx(given_[int(given_.abs().argmax())].item(), rel=1e-6)


def test_quantisation_is_unbiased() -> None:
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal(size=50).astype(np.float32))
    draws = torch.stack([quantised(values, seed)[1] for seed in range(4000)])
    level = float(values.abs().max()) / 127
    # a mean of 4,000 draws with a standard deviation of at most half a level
    assert float((draws.mean(0) - values).abs().max()) < 5 * level / 2 / math.sqrt(4000)
    assert float(draws.std(0).max()) > 0.4 * level


def test_what_is_not_finite_is_not_hidden_by_quantisation() -> None:
    for bad in (math.nan, math.inf):
        assert not bool(quantised(torch.tensor([1.0, bad]))[1].isfinite().all())


def test_bytes_are_those_of_the_encoded_messages_in_both_directions(tmp_path: Path) -> None:
    tensors = travelling(TinyModule())
    trained = {name: tensor for name, tensor in tensors.items() if "running" not in name}
    elements, buffers = sum(map(torch.Tensor.numel, trained.values())), num_bytes(tensors) - num_bytes(trained)
    small, whole = elements + 4 * len(trained) + buffers, 4 * elements + buffers
    for algorithm, up, down in (
        (fedavg(), whole, whole),
        (replace(fedavg(), up=(Quantise(),)), small, whole),
        (replace(fedavg(), down=(Quantise(),)), whole, small),
    ):
        result = play(algorithm, tmp_path / f"{up} {down}", 1)[0]
        assert (result.bytes_up, result.bytes_down) == (3 * up, 3 * down)


# ---------------------------------------------------------------- corrections


@dataclass(frozen=True)
class Replaced(ClientUpdate):
    """Every gradient becomes a constant, and what was seen is kept."""

    constant: float = 1.0
    seen: tuple[list[Any], ...] = ([],)

    def __call__(self, client: Client) -> Groups:
        def correct(names: list[str], gradients: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
            self.seen[0].append((names, [weight.clone() for weight in weights]))
            for gradient in gradients:
                gradient.fill_(self.constant)

        client.train(correct=correct)
        return {"update": client.update()}


@pytest.mark.parametrize(("clip", "step"), [(None, 0.1), (1e-3, None)])
def test_a_correction_comes_before_clipping_and_knows_names_and_weights(clip: float | None, step: float | None) -> None:
    module, part = TinyModule(), Replaced(seen=([],))
    start = snapshot(travelling(module))
    make_loop(
        max_rounds=1, algorithm=Algorithm(part, Mean()), gradient_clip_val=clip, clients_per_round=1, evaluate_on="test"
    ).fit(module, Evaluated([TinyData().client_dataloader(1)]))
    steps = len(part.seen[0])
    assert steps == 2  # five examples in batches of three
    names = [name for name, _ in module.named_parameters()]
    assert part.seen[0][0][0] == names
    assert all(torch.equal(weight, start[name]) for name, weight in zip(names, part.seen[0][0][1], strict=True))
    moved = {name: start[name] - tensor for name, tensor in travelling(module).items() if "running" not in name}
    if step is not None:
        assert all(torch.allclose(tensor, torch.full_like(tensor, steps * step)) for tensor in moved.values())
    else:  # clipped after the correction: the norm of each step is rate x clip
        assert float(torch.cat([tensor.flatten() for tensor in moved.values()]).norm()) <= steps * 0.1 * 1e-3 * 1.01


class Evaluated(GivenLoaders):
    """Loaders of clients, and nothing to evaluate on but one batch."""

    def __init__(self, clients: list[Any]) -> None:
        super().__init__(clients, clients[0])

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


# ---------------------------------------------------------------- in plain values


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("fedavg", fedavg()),
        ({"name": "fedavgm", "beta": 0.5}, fedavgm(0.5)),
        ({"name": "fedavgm", "beta": "5e-1", "learning_rate": 2}, fedavgm(0.5, 2.0)),
        ({"weighting": "uniform"}, fedavg("uniform")),
        ({"aggregator": {"weighting": "uniform"}}, fedavg("uniform")),
        (
            {"client": "LocalTraining", "aggregator": {"name": "Mean", "update_limit": 64}},
            Algorithm(LocalTraining(), Mean("examples", 64.0)),
        ),
        ({"up": ["Quantise"], "server": [{"name": "Momentum", "beta": 0}]}, replace(fedavgm(0.0), up=(Quantise(),))),
        ({"up": "Quantise"}, replace(fedavg(), up=(Quantise(),))),
        ({"name": "fedavgm", "server": []}, fedavg()),
        (fedavgm(0.3), fedavgm(0.3)),
    ],
)
def test_an_algorithm_is_said_in_plain_values(given_: Any, expected: Algorithm) -> None:
    found = algorithm_of(given_)
    assert found == expected
    assert algorithm_of(specification_of(found)) == expected
    assert [type(value) for value in vars(found.aggregator).values()] == [str, float, float]


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ("fedavgn", "algorithm: got 'fedavgn'; allowed: fedavg (nearest), qfedavg (nearest), fedavgm"),
        ({"name": "krum"}, "algorithm: got 'krum'; allowed: fedavg, fedavgm"),
        ({"name": "fedavg", "beta": 1}, "algorithm.beta: got 1; allowed: weighting"),
        ({"name": "fedavgm", "beta": 1}, "algorithm.beta: got 1.0; allowed: at least 0 and below 1"),
        ({"name": "fedavgm", "beta": "much"}, "algorithm.beta: got 'much'; allowed: a number"),
        ({"name": "fedavgm", "beta": True}, "algorithm.beta: got True; allowed: a number"),
        ({"name": "fedavgm", "learning_rate": 0}, "algorithm.learning_rate: got 0.0; allowed: a number above 0"),
        ({"client": "Momentum"}, "algorithm.client: got 'Momentum'; allowed: LocalTraining"),
        ({"client": "os.system"}, "algorithm.client: got 'os.system'; allowed: LocalTraining"),
        ({"client": {"class_path": "os.system"}}, "algorithm.client.class_path: got 'os.system'; allowed: nothing"),
        ({"aggregator": {"weighting": "unifrom"}}, "algorithm.aggregator.weighting: got 'unifrom'; allowed: uniform (nearest)"),
        ({"aggregator": {"update_limit": 5}}, "algorithm.aggregator.update_limit: got 5.0; allowed: a power of two"),
        ({"aggregator": 3}, "algorithm.aggregator: got 3; allowed: a part (Mean, ClippedMean, Median"),
        ({"up": 3}, "algorithm.up: got 3; allowed: a list of parts"),
        ({"up": [{"bits": 3}]}, "algorithm.up: got None; allowed: Quantise"),
        (
            {"server": ["Momentum", "Momentum"]},
            "algorithm.server: got ['Momentum', 'Momentum']; allowed: steps of different classes",
        ),
        (3, "algorithm: got 3; allowed: a name (fedavg, fedavgm, fedadagrad"),
        (None, "algorithm: got None; allowed: a name"),
    ],
)
def test_what_is_no_algorithm_is_refused_in_one_line(given_: Any, said: str) -> None:
    with pytest.raises(fedtune.UsageError) as caught:
        fedtune.FederatedLoop(algorithm=given_)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_part_that_nobody_could_know_again_is_refused_with_a_run_directory(
    make_data: Make, make_module: Make, tmp_path: Path
) -> None:
    class Free(ClientUpdate):
        def __call__(self, client: Client) -> Groups:
            client.train()
            return {"update": client.update()}

    @dataclass(frozen=True)
    class Local(ClientUpdate):
        def __call__(self, client: Client) -> Groups:
            client.train()
            return {"update": client.update()}

    for part in (Free(), Local(), Replaced(seen=([object()],))):
        algorithm = Algorithm(part, Mean())
        assert make_loop(max_rounds=1, algorithm=algorithm).fit(make_module(), make_data())  # without a directory anything goes
        with pytest.raises(fedtune.UsageError, match=r"algorithm.client.*allowed: a dataclass of plain values") as caught:
            make_loop(max_rounds=1, algorithm=algorithm, run_dir=str(tmp_path / "r")).fit(make_module(), make_data())
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "r").exists()


def test_parts_that_are_not_registered_go_by_their_module() -> None:
    assert specification_of(Algorithm(Counting(0.5), Mean()))["client"] == {
        "name": "test_algorithms.Counting",
        "growth": 0.5,
        "forgetful": False,
    }
