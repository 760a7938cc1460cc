"""Clients that fail or lie on purpose, and errors in clients that drop them from a round."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_equal, make_loop, weights_of, without_times

import fedtune
from fedtune.errors import RunError, UsageError
from fedtune.federated.messages import ClientReport, Context, Failure, Reply
from fedtune.runtimes.faults import FAULTS, Alie, InnerProduct, Late, Moments, Scaled, SignFlip, alie_z
from fedtune.runtimes.faulty import Faulty, Poisoned, faults_of, plain_faults
from fedtune.runtimes.serial import Serial
from fedtune.tensors import Tensors

Make = Callable[..., Any]
EIGHT = {"num_clients": 8, "batch_size": 4}


def run(make_data: Make, make_module: Make, rounds: int = 3, **options: Any) -> tuple[list[Any], Tensors]:
    module = make_module()
    records = make_loop(max_rounds=rounds, **options).fit(module, make_data(**EIGHT))
    return records, weights_of(module)


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_goes_on_whatever_strikes_two_of_eight_clients(name: str, make_data: Make, make_module: Make) -> None:
    fault = {"name": name, "clients": [1, 5]}
    records, weights = run(make_data, make_module, 2, faults=[fault])
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    failed = [[failure.client for failure in record.failures] for record in records]
    refused = name in ("Drop", "Late", "Raise", "NotFinite", "WrongShape", "Overweight")
    assert failed == [[1, 5] if refused else []] * 2
    assert [record.injected for record in records] == [{name: [1, 5]}] * 2
    assert all(len(failure.reason) > 3 for record in records for failure in record.failures)
    lies = FAULTS[name].lies
    assert all(("distance_from_honest_mean" in record.diagnostics) == lies for record in records)
    if refused and lies:  # what was refused did no harm
        assert all(record.diagnostics["distance_from_honest_mean"] < 1e-9 for record in records)
    if lies and not refused and name != "Alie":  # of eight clients, two of them liars, Alie's z is 0.21
        assert all(record.diagnostics["distance_from_honest_mean"] > 1e-4 for record in records)


def test_rates_strike_that_share_of_clients_and_the_same_in_another_process_and_order(
    make_data: Make, make_module: Make
) -> None:
    faults = faults_of([{"name": "Drop", "rate": 0.3}, {"name": "SignFlip", "clients": [3]}])
    runtime = Faulty(Serial(None), faults, Poisoned(None))  # type: ignore[arg-type]
    struck = [runtime.injected(Context(0, number, 100, tuple(range(100)), 1)) for number in range(1, 41)]
    dropped = [sum(kind == "Drop" for kind in one.values()) for one in struck]
    assert sum(dropped) / 4000 == pytest.approx(0.3, abs=0.03)
    assert len(set(dropped)) > 3
    assert all(3 in one for one in struck)
    assert {one[3] for one in struck} == {"Drop", "SignFlip"}  # the first in the list counts
    part = runtime.injected(Context(0, 7, 100, (90, 5, 50), 1))
    assert part == {client: kind for client, kind in struck[6].items() if client in (90, 5, 50)}
    one, other = (run(make_data, make_module, faults=[{"name": "Drop", "rate": 0.4}]) for _ in range(2))
    assert without_times(one[0]) == without_times(other[0])
    assert any(record.failures for record in one[0])


def test_a_run_with_faults_is_resumed_bit_for_bit(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    faults = [{"name": "Drop", "rate": 0.2}, {"name": "Alie", "rate": 0.3, "z": 1.5}, {"name": "FlippedLabels", "rate": 0.2}]
    whole, weights = run(make_data, make_module, 4, faults=faults, algorithm="feddyn")
    folder = str(tmp_path / "run")
    run(make_data, make_module, 2, faults=faults, algorithm="feddyn", run_dir=folder)
    again, others = run(make_data, make_module, 4, faults=faults, algorithm="feddyn", run_dir=folder)
    assert_equal(weights, others)
    assert without_times(whole) == without_times(again)
    with pytest.raises(UsageError, match="faults"):
        run(make_data, make_module, 5, faults=faults[:1], algorithm="feddyn", run_dir=folder)


def test_honest_clients_are_as_they_would_be_without_the_others(make_data: Make, make_module: Make) -> None:
    plain, _ = run(make_data, make_module, 1)
    faulty, _ = run(make_data, make_module, 1, faults=[{"name": "Drop", "clients": [0]}, {"name": "SignFlip", "clients": [6]}])
    honest = {report.client: report.train_loss_nats for report in plain[0].clients}
    assert {report.client: report.train_loss_nats for report in faulty[0].clients} == {
        client: loss for client, loss in honest.items() if client != 0
    }


def test_flipped_labels_are_what_liars_train_on(make_data: Make) -> None:
    data = make_data(**EIGHT, shuffle=False)
    poisoned = Poisoned(data)
    poisoned.clients = {2}
    pairs = zip(data.client_dataloader(2), poisoned.client_dataloader(2), strict=True)
    assert all(torch.equal(2 - honest["labels"], lie["labels"]) for honest, lie in pairs)
    assert len(poisoned.client_dataloader(2)) == len(data.client_dataloader(2))
    pairs = zip(data.client_dataloader(1), poisoned.client_dataloader(1), strict=True)
    assert all(torch.equal(honest["labels"], other["labels"]) for honest, other in pairs)


# ---------------------------------------------------------------- each lie


UPDATES = [torch.tensor([1.0, -2.0, 4.0]), torch.tensor([3.0, 0.0, 4.0]), torch.tensor([2.0, 2.0, 7.0])]


def lie(fault: Any, clients: int = 4) -> torch.Tensor:
    honest = Moments()
    for update in UPDATES:
        honest.add({"w": update})
    reply = Reply(3, 5, {}, ClientReport(3, 5, 2, 0, 1.0, 0.5), 0)
    found = fault.after(reply, {"w": torch.ones(3)}, honest, Context(0, 1, 9, tuple(range(clients)), 99, 3))
    return found["w"]


def test_lies_are_what_their_papers_say() -> None:
    rows = torch.stack(UPDATES)
    assert lie(SignFlip(clients=(3,))).tolist() == [-1, -1, -1]
    assert lie(Scaled(clients=(3,), factor=-3.0)).tolist() == [-3, -3, -3]
    assert torch.allclose(lie(InnerProduct(clients=(3,), epsilon=2.0)), -2 * rows.mean(0))
    assert torch.allclose(lie(Alie(clients=(3,), z=1.5)), rows.mean(0) - 1.5 * rows.std(0, correction=0))
    assert torch.allclose(lie(Alie(clients=(3,))), rows.mean(0) - alie_z(4, 1) * rows.std(0, correction=0))
    assert alie_z(50, 12) == pytest.approx(0.336038, abs=1e-6)  # (38 - 14) / 38


def test_a_deadline_in_local_steps_is_met_by_those_that_make_few(make_data: Make, make_module: Make) -> None:
    plain, _ = run(make_data, make_module, 1)
    steps = {report.client: report.num_steps for report in plain[0].clients}
    deadline = sorted(steps.values())[3]
    found, _ = run(make_data, make_module, 1, faults=[{"name": "Late", "rate": 1.0, "steps": deadline}])
    assert {report.client for report in found[0].clients} == {client for client, many in steps.items() if many <= deadline}
    assert all(f"the deadline is {deadline}" in failure.reason for failure in found[0].failures)
    report = ClientReport(0, 5, 2, 0, 1.0, seconds=2.5)
    late = Late(rate=1.0, seconds=2.0).after(Reply(0, 5, {}, report, 0), {}, Moments(), Context(0, 1, 1, (0,), 1))
    assert late == Failure(0, "late: 2.5 s, the deadline is 2 s")


# ---------------------------------------------------------------- quorum, and real errors


def test_too_few_replies_stop_the_run_with_the_last_good_round_kept(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    options: dict[str, Any] = {"faults": [{"name": "Drop", "rate": 0.4}], "run_dir": str(tmp_path / "run")}
    with pytest.raises(RunError, match=r"replies of \d of 8 clients count, min_clients is 4 \(client \d: dropped out; client"):
        run(make_data, make_module, 30, **options, min_clients=4)
    kept = (tmp_path / "run" / "rounds.jsonl").read_text().count("\n")
    assert kept > 1
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == f"round-{kept:04d}"
    with pytest.raises(RunError, match="replies of 0 of 8 clients count"):
        run(make_data, make_module, 1, faults=[{"name": "Drop", "rate": 1.0}])


class Fragile(fedtune.BertClassifier):
    """Raises in the second step of every client whose first label is 1."""

    def training_step(self, batch: Any, *more: Any) -> Any:
        first = getattr(self, "first", None)
        if self.trainer.global_step % 2 == 1 and first == 1:
            self.first = None
            raise ValueError("no\nroom")
        self.first = int(batch["labels"][0])
        return super().training_step(batch, *more)


def fit_fragile(tiny_bert: str, make_data: Make, rounds: int = 2, **options: Any) -> tuple[list[Any], Tensors]:
    module = Fragile(tiny_bert, num_labels=3, learning_rate=5e-3)
    data = make_data(**EIGHT, shuffle=False)
    records = make_loop(max_rounds=rounds, **options).fit(module, data)
    return records, weights_of(module)


def test_an_error_in_a_clients_training_stops_the_run_or_drops_the_client(tiny_bert: str, make_data: Make) -> None:
    with pytest.raises(RunError, match=r"round 1, client \d, training step \d: ValueError: no"):
        fit_fragile(tiny_bert, make_data)
    records, weights = fit_fragile(tiny_bert, make_data, on_client_error="drop")
    failures = records[0].failures
    assert 0 < len(failures) < 8
    assert all(failure.reason in [f"training step {n}: ValueError: no room" for n in (2, 4)] for failure in failures)
    assert all(math.isfinite(float(tensor.sum())) for tensor in weights.values())
    with pytest.raises(RunError, match=r"client \d: training step \d: ValueError"):
        fit_fragile(tiny_bert, make_data, on_client_error="drop", min_clients=8)


def test_what_a_failed_client_left_in_the_module_reaches_no_other_client(
    tiny_bert: str, make_data: Make, make_module: Make
) -> None:
    # the dropped ones train, and fail after a backward pass; in the other run they never begin
    records, weights = fit_fragile(tiny_bert, make_data, 1, on_client_error="drop")
    gone = [failure.client for failure in records[0].failures]
    module = make_module()
    make_loop(max_rounds=1, faults=[{"name": "Drop", "clients": gone}]).fit(module, make_data(**EIGHT, shuffle=False))
    assert_equal(weights, weights_of(module))


# ---------------------------------------------------------------- in plain values


def test_faults_are_said_in_plain_values() -> None:
    given = ["FlippedLabels", {"name": "Late", "rate": "0.5", "steps": 3}, Alie(clients=(1,))]
    found = faults_of([{"name": given[0], "clients": [2]}, *given[1:]])
    assert faults_of(plain_faults(found)) == found
    assert plain_faults(found)[1] == {"name": "Late", "rate": 0.5, "clients": [], "steps": 3, "seconds": 0.0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Drop", "faults: got 'Drop'; allowed: a fault with a rate, or with clients"),
        (["Dorp"], "faults: got 'Dorp'; allowed: Drop (nearest)"),
        ([{"name": "Drop", "rate": 2}], "faults.rate: got 2.0; allowed: a probability, from 0 to 1"),
        ([{"name": "Drop", "clients": [-1]}], "faults.clients: got (-1,); allowed: numbers of clients, from 0"),
        ([{"name": "Drop", "clients": 3}], "faults.clients: got 3; allowed: "),
        ([{"name": "Drop", "how": 1}], "faults.how: got 1; allowed: rate, clients"),
        ([{"name": "NotFinite", "clients": [1], "value": "big"}], "faults.value: got 'big'; allowed: nan, inf"),
        ([3], "faults: got 3; allowed: Drop"),
        (3, "faults: got 3; allowed: a list of Drop"),
        ([{"class_path": "os.system"}], "faults: got None; allowed: "),
    ],
)
def test_what_is_no_fault_is_refused_in_one_line(given: Any, said: str) -> None:
    with pytest.raises(UsageError) as error:
        make_loop(faults=given)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_clients_that_there_are_not_are_refused(make_data: Make, make_module: Make) -> None:
    with pytest.raises(UsageError, match=r"faults.clients: got 8; allowed: clients from 0 to 7"):
        run(make_data, make_module, 1, faults=[{"name": "Drop", "clients": [8]}])
