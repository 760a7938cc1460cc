"""What `run_round` alone does: checks, failures, quorum, positions, buffers; and that a run says so."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import pytest
import torch
from conftest import GivenLoaders, assert_equal, make_loop, weights_of, without_times
from torch import nn

import fedtune
from fedtune.algorithms.fedavg import Mean, fedavg
from fedtune.algorithms.fednova import fednova
from fedtune.algorithms.qfedavg import qfedavg
from fedtune.algorithms.scaffold import scaffold
from fedtune.federated.client import Client, ClientUpdate
from fedtune.federated.messages import ClientReport, Context, Failure, Position, Reply, Request
from fedtune.federated.parts import Algorithm, Runtime, ServerStep
from fedtune.federated.round import RoundOptions, run_round
from fedtune.federated.state import ServerState
from fedtune.tensors import Groups
from fedtune.testing import TinyData, TinyModule

Make = Callable[..., Any]
STATE = ServerState(4, {"w": torch.tensor([1.0, 2.0]), "running": torch.tensor([100.0])}, Position(7, 3), examples=50)
FEDAVG = fedavg()
OPTIONS = RoundOptions(local_epochs=2, buffers=frozenset(["running"]), min_clients=1)


@final
class Scripted(Runtime):
    """Clients that answer what they are told to."""

    def __init__(self, answers: dict[int, Any]) -> None:
        self.answers, self.discarded, self.requests = answers, [], []

    def replies(self, requests: Sequence[Request], context: Context) -> Iterator[Reply | Failure]:
        self.requests = list(requests)
        for request in requests:
            answer = self.answers[request.client]
            yield answer if isinstance(answer, Failure) else reply(request.client, **answer)

    def add_up_(self, tensors: list[torch.Tensor]) -> None: ...

    def gather(self, values: list[Any]) -> list[Any]:
        return values

    def discard(self, round: int, clients: Sequence[int]) -> None:
        self.discarded.append((round, list(clients)))


def reply(client: int, update: Any, weight: int = 1, steps: int = 1, running: float = 0.0, **groups: Any) -> Reply:
    report = ClientReport(client, weight, steps, 0, 1.0, 0.1)
    tensors = {"update": {"w": torch.tensor(update)}, "buffers": {"running": torch.tensor([running])}} | groups
    return Reply(client, weight, tensors, report, bytes_up=12)


def after(answers: dict[int, Any], algorithm: Algorithm = FEDAVG, **options: Any) -> Any:
    runtime = Scripted(answers)
    context = Context(0, 5, 9, tuple(answers), 1000)
    return run_round(STATE, algorithm, context, runtime, replace(OPTIONS, **options)), runtime


def test_a_round_takes_a_state_and_returns_the_next() -> None:
    before = {name: tensor.clone() for name, tensor in STATE.weights.items()}
    result, runtime = after({3: {"update": [1.0, 0.0], "weight": 3, "steps": 9}, 1: {"update": [0.0, 4.0], "steps": 2}})
    assert result.state.weights["w"].tolist() == [1.75, 3.0]
    assert result.state.position == Position(7 + 9, 3 + 2)  # the steps of the client that did most, the local epochs
    assert (result.state.round, result.state.examples) == (5, 54)
    assert [report.client for report in result.clients] == [1, 3]  # in order, whoever answered first
    assert [report.update_norm for report in result.clients] == [4.0, 1.0]
    assert (result.bytes_up, result.bytes_down) == (24, 2 * 12)
    assert [request.groups["weights"].keys() for request in runtime.requests] == [{"w"}] * 2
    assert {request.position for request in runtime.requests} == {Position(7, 3)}
    assert all(torch.equal(STATE.weights[name], tensor) for name, tensor in before.items())


def test_buffers_are_averaged_plainly_whatever_the_server_step_does() -> None:
    @dataclass(frozen=True)
    class Nothing(ServerStep):
        def __call__(self, groups: Groups, memory: Groups, context: Context) -> tuple[Groups, Groups]:
            assert groups.keys() == {"update"}
            return {"update": {name: torch.zeros_like(tensor) for name, tensor in groups["update"].items()}}, {}

    answers = {0: {"update": [1.0, 1.0], "running": 5_000.0, "weight": 3}, 1: {"update": [1.0, 1.0], "running": -1_000.0}}
    result, _ = after(answers, replace(fedavg(), server=(Nothing(),)))
    assert result.state.weights["w"].tolist() == [1.0, 2.0]
    assert result.state.weights["running"].item() == 100.0 + (3 * 5_000 - 1_000) / 4


BAD: list[tuple[Any, str]] = [
    ({"update": [math.nan, 0.0]}, "its update is not finite (in w); lower the learning rate"),
    ({"update": [math.inf, 0.0]}, "its update is not finite"),
    ({"update": [0.0, -9.5]}, "its update goes up to 9.5 (in w), the limit is 8; lower the learning rate"),
    ({"update": [0.0, 0.0], "running": 1e10}, "its buffers goes up to 1e+10 (in running)"),
    ({"update": [0.0]}, "its update has (1,) for w, where (2,) belongs"),
    ({"update": [[0.0, 0.0]]}, "its update has (1, 2) for w, where (2,) belongs"),
    ({"update": [0.0, 0.0], "weight": 1001}, "it says that it has 1001 examples, where all clients together have 1000"),
    ({"update": [0.0, 0.0], "weight": -1}, "it says that it has -1 examples"),
    (Failure(1, "dropped"), "dropped"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_reply_that_cannot_be_right_is_a_failure_that_names_the_client(bad: Any, reason: str) -> None:
    good = {"update": [1.0, 0.0], "weight": 3, "steps": 2}
    result, runtime = after({0: good, 1: bad})
    expected, _ = after({0: good})
    assert [failure.client for failure in result.failures] == [1]
    assert reason in result.failures[0].reason
    assert_equal(result.state.weights, expected.state.weights)
    assert result.state.position == expected.state.position
    assert runtime.discarded == [(5, [1])]
    with pytest.raises(fedtune.RunError, match="round 5, client 1: ") as caught:
        after({0: good, 1: bad}, min_clients=None)
    assert reason in str(caught.value)


def test_a_round_needs_its_quorum() -> None:
    answers: dict[int, Any] = {0: {"update": [1.0, 0.0]}, 1: Failure(1, "dropped"), 2: {"update": [math.nan, 0.0]}}
    assert after(answers, min_clients=1)[0].state.round == 5
    with pytest.raises(fedtune.RunError, match=r"5: the replies of 1 of 3 clients count, min_clients is 2 \(client 1: dr"):
        after(answers, min_clients=2)
    with pytest.raises(fedtune.RunError, match="the replies of 0 of 1 clients count, min_clients is 1"):
        after({1: Failure(1, "dropped")}, min_clients=1)


@dataclass(frozen=True)
class Controlling(ClientUpdate):
    """Says that it sends two groups."""

    makes = ("update", "control")

    def __call__(self, client: Client) -> Groups:
        client.train()
        return {"update": client.update(), "control": client.update()}


@dataclass(frozen=True)
class Keeping(ServerStep):
    """Takes a group and leaves it where it is."""

    needs = ("update", "control")

    def __call__(self, groups: Groups, memory: Groups, context: Context) -> tuple[Groups, Groups]:
        return groups, {}


def test_a_group_that_no_server_step_takes_is_refused() -> None:
    algorithm = replace(fedavg(), client=Controlling(), server=(Keeping(),))
    with pytest.raises(fedtune.RunError, match="no server step for the groups control"):
        after({0: {"update": [1.0, 0.0], "control": {"w": torch.ones(2)}}}, algorithm)


@pytest.mark.parametrize(
    ("algorithm", "sent", "reason"),
    [
        (FEDAVG, {"control": {"w": torch.ones(2)}}, "where ['buffers', 'update'] belong"),
        (scaffold(), {}, "its control has nothing for w, where (2,) belongs"),
        (scaffold(), {"control": {"w": torch.ones(3)}}, "its control has (3,) for w, where (2,) belongs"),
        (scaffold(), {"control": {"w": torch.ones(2, dtype=torch.int8)}}, "its control has whole numbers for w"),
        (fednova(), {}, "it has the groups ['buffers', 'update'], where ['buffers', 'lengths', 'update'] belong"),
        (fednova(), {"lengths": {"w": torch.ones(2)}}, "it has several numbers for w, where one belongs"),
        (qfedavg(), {"scale": {"h": torch.ones(3)}}, "it has several numbers for h, where one belongs"),
    ],
)
def test_groups_that_cannot_be_right_are_a_failure_that_names_the_client(algorithm: Any, sent: Groups, reason: str) -> None:
    good: dict[str, Groups] = {
        "Controlled": {"control": {"w": torch.ones(2)}},
        "Normalised": {"lengths": {"w": torch.ones(())}},
        "Fair": {"scale": {name: torch.ones(()) for name in ("h", "loss", "rest")}},
    }
    mine = good.get(type(algorithm.client).__name__, {})
    result, _ = after({0: {"update": [1.0, 0.0], **mine}, 1: {"update": [1.0, 0.0], **sent}}, algorithm)
    assert [failure.client for failure in result.failures] == [1]
    assert reason in result.failures[0].reason


@dataclass(frozen=True)
class Sender(ServerStep):
    """Remembers the mean of a group and sends it down."""

    needs = ("update", "control")
    sends = ("control",)

    def __call__(self, groups: Groups, memory: Groups, context: Context) -> tuple[Groups, Groups]:
        rest = {name: group for name, group in groups.items() if name != "control"}
        return rest, {"control": groups["control"], "kept": {"step": torch.ones((), dtype=torch.int64)}}


def test_what_a_server_step_sends_reaches_the_next_round_in_the_type_of_the_weights() -> None:
    algorithm = replace(fedavg(), client=Controlling(), server=(Sender(),))
    answers = {0: {"update": [1.0, 0.0], "control": {"w": torch.tensor([2.0, 6.0])}}}
    result, runtime = after(answers, algorithm)
    assert "control" not in runtime.requests[0].groups  # there was none yet
    memory = result.state.memory["Sender"]
    assert (memory["control"]["w"].dtype, memory["kept"]["step"].dtype) == (torch.float32, torch.int64)
    again = Scripted(answers)
    second = run_round(result.state, algorithm, Context(0, 6, 9, (0,), 1000), again, OPTIONS)
    assert again.requests[0].groups["control"]["w"].tolist() == [2.0, 6.0]
    assert second.bytes_down == 12 + 8


def test_a_client_that_never_trains_is_refused() -> None:
    @dataclass(frozen=True)
    class Idle(ClientUpdate):
        def __call__(self, client: Client) -> Groups:
            return {"update": client.update()}

    with pytest.raises(fedtune.RunError, match="round 1, client 0: Idle never trained it"):
        fit(Algorithm(Idle(), Mean()))


def test_an_error_in_an_algorithm_says_where_and_keeps_its_cause() -> None:
    @dataclass(frozen=True)
    class Broken(ClientUpdate):
        def __call__(self, client: Client) -> Groups:
            raise KeyError("control")

    with pytest.raises(fedtune.RunError, match="round 1, client 0: KeyError: 'control'") as caught:
        fit(Algorithm(Broken(), Mean()))
    assert isinstance(caught.value.__cause__, KeyError)


# ---------------------------------------------------------------- the same in a run


class Loaders(GivenLoaders):
    """The tiny clients, and nothing to evaluate."""

    def __init__(self) -> None:
        data = TinyData()
        super().__init__([data.client_dataloader(client) for client in range(4)], [])


class Breaking(TinyModule.__base__):  # type: ignore[name-defined,misc]
    """A linear model; once, after the last step of an epoch, one of its weights is no number any more."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at, self.ended, self.started = at, 0, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network = nn.Linear(5, 3)

    def training_step(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: Any) -> None: ...

    def on_train_epoch_start(self) -> None:
        self.started += 1

    def on_train_epoch_end(self) -> None:
        self.ended += 1
        if self.ended == self.at:
            with torch.no_grad():
                self.network.weight[0, 0] = math.inf

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(algorithm: Any = "fedavg", at: int | None = None, **options: Any) -> Any:
    module = Breaking(at)
    history = make_loop(**({"max_rounds": 2, "algorithm": algorithm} | options)).fit(module, Loaders())
    return module, history


def test_an_update_that_is_not_finite_ends_the_run_though_every_loss_was(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    class Spy(fedtune.FederatedCallback):
        def on_exception(self, run: Any, module: Any, error: BaseException) -> None:
            errors.append(error)

    with pytest.raises(fedtune.RunError, match=r"round 2, client 1: its update is not finite \(in network.weight\)") as caught:
        fit(at=6, run_dir=str(tmp_path), callbacks=[Spy()])
    assert errors == [caught.value]
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["round-0001"]


def test_with_a_quorum_the_run_goes_on_and_its_record_names_the_client(tmp_path: Path) -> None:
    module, history = fit(at=6, min_clients=3, run_dir=str(tmp_path))
    assert [record.num_clients for record in history] == [4, 3]
    assert [(failure.client, failure.reason[:24]) for failure in history[1].failures] == [(1, "its update is not finite")]
    assert history[1].cohort == [0, 1, 2, 3]
    assert all(bool(tensor.isfinite().all()) for tensor in weights_of(module).values())
    assert fedtune.RoundRecord.from_dict(history[1].to_dict()) == history[1]


def test_epoch_hooks_are_called_in_every_epoch_of_every_client() -> None:
    module, _ = fit(local_epochs=3)
    assert (module.started, module.ended) == (2 * 4 * 3, 2 * 4 * 3)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        # two epochs in each of two rounds
        ("epoch", [1, 2] * 4 + [3, 4] * 4),
        # the clients make 3, 2, 5 and 2 steps in an epoch; the second round begins behind the third client
        ("step", [1, 4, 1, 3, 1, 6, 1, 3, 11, 14, 11, 13, 11, 16, 11, 13]),
    ],
)
def test_a_schedule_goes_on_behind_the_client_that_did_most(interval: str, expected: list[int]) -> None:
    rates: list[float] = []
    optimizers: list[torch.optim.Optimizer] = []

    class Rate(Breaking):
        def on_train_epoch_start(self) -> None:
            rates.append(optimizers[-1].param_groups[0]["lr"])

        def configure_optimizers(self) -> Any:
            optimizers.append(torch.optim.SGD(self.parameters(), lr=1e-3))
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizers[-1], lambda done: done + 1.0)
            return {"optimizer": optimizers[-1], "lr_scheduler": {"scheduler": schedule, "interval": interval}}

    make_loop(max_rounds=2, local_epochs=2).fit(Rate(None), Loaders())
    assert [rate / 1e-3 for rate in rates] == pytest.approx(expected)


def test_a_callback_that_stops_the_rounds_does_not_stop_the_baselines(make_data: Make, make_module: Make) -> None:
    class Stop(fedtune.FederatedCallback):
        def on_round_end(self, run: Any, module: Any, record: Any) -> None:
            run.should_stop = record.round == 2

    loop = make_loop(max_rounds=5, callbacks=[Stop()], baselines=["centralised", "local"])
    assert len(loop.fit(make_module(), make_data())) == 2
    assert [record.round for record in loop.baseline_runs["centralised"]] == [1, 2]
    assert len(loop.baseline_runs["local"]) == 3


def test_a_metric_that_no_round_logs_cannot_be_monitored(make_data: Make, make_module: Make) -> None:
    loop = make_loop(max_rounds=3, monitor="loss_nats", mode="min")
    history = loop.fit(make_module(), make_data())
    least = min(record.loss_nats for record in history)
    assert (loop.summary["best_loss_nats"], loop.summary["best_validation_loss_nats"]) == (least, least)
    assert history[loop.summary["best_round"] - 1].loss_nats == least
    with pytest.raises(fedtune.UsageError, match=r"monitor: got 'los_nats'; allowed: loss_nats \(nearest\), acc"):
        make_loop(monitor="los_nats").fit(make_module(), make_data())


def test_on_client_end_sees_the_weights_that_the_client_has_trained(make_data: Make, make_module: Make) -> None:
    seen: dict[int, tuple[float, dict[str, torch.Tensor]]] = {}

    class Spy(fedtune.FederatedCallback):
        def on_client_end(self, run: Any, module: Any, report: ClientReport) -> None:
            seen[report.client] = report.update_norm, weights_of(module)

    module, data = make_module(), make_data(split="by_author")
    start = weights_of(module)
    record = make_loop(max_rounds=1, callbacks=[Spy()]).fit(module, data)[0]
    sizes = [len(part) for part in data.client_indices]
    for name, tensor in weights_of(module).items():
        mean = sum(size * seen[client][1][name].double() for client, size in enumerate(sizes)) / sum(sizes)
        torch.testing.assert_close(tensor, mean.float(), rtol=1e-6, atol=1e-7)
    for report in record.clients:
        length, weights = seen[report.client]
        assert length == pytest.approx(report.update_norm, rel=1e-5)
        assert length**2 == pytest.approx(sum(float((weights[name] - start[name]).square().sum()) for name in start), rel=1e-5)
    without = make_loop(max_rounds=1).fit(make_module(), data)
    assert without_times([record]) == without_times(without)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"algorithm": {"weighting": "uniform"}}, "loop.algorithm.aggregator.weighting: 'examples' -> 'uniform'"),
        ({"algorithm": "fedavgm"}, "loop.algorithm.server: [] -> [{'name': 'Momentum', 'beta': 0.9, 'learning_rate': 1.0}]"),
        ({"evaluation": "clients"}, "loop.options.evaluation: 'pooled' -> 'clients'"),
        ({"gradient_clip_val": 2.0}, "loop.gradient_clip_val: 1.0 -> 2.0"),
        ({"gradient_clip_val": None}, "loop.gradient_clip_val: 1.0 -> None"),
        ({"min_clients": 1}, "loop.options.min_clients: None -> 1"),
    ],
)
def test_what_makes_the_numbers_cannot_change_at_a_resume(
    make_data: Make, make_module: Make, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    options: dict[str, Any] = {"run_dir": str(tmp_path), "evaluate_on": "test", "gradient_clip_val": 1.0}
    make_loop(max_rounds=1, **options).fit(make_module(), make_data())
    with pytest.raises(fedtune.UsageError) as caught:
        make_loop(max_rounds=2, **(options | changed)).fit(make_module(), make_data())
    assert said in str(caught.value)
    make_loop(max_rounds=2, **options, keep=1, monitor="loss_nats", mode="min").fit(make_module(), make_data())
