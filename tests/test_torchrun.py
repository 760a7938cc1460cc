"""Real processes over gloo do one run together: the numbers are those of one process to the bit, and no rank fails silently."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
import yaml
from conftest import GivenLoaders, data_maker, make_loop, make_task, module_maker, weights_of, without_times
from decoders import make_chats, save_decoder

import fedtune
from fedtune import cli
from fedtune.errors import Elsewhere
from fedtune.federated.shared import is_shared
from fedtune.runs.launcher import MeetingPoint, threads_of
from fedtune.runtimes.dealing import longest_first
from fedtune.runtimes.environment import place_of
from fedtune.sweeps.several import of_wandb
from fedtune.tensors import sha256
from fedtune.testing import TinyData, TinyModule

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["fedtune.cli", "fedtune.runs.loop", "fedtune.data.classification", "fedtune.models", "transformers", "conftest"]
)
Make = Callable[..., Any]
CASES: dict[str, dict[str, Any]] = {
    "fedavg with baselines": {"baselines": ("centralised", "local")},
    "scaffold + adam": {"algorithm": {"name": "scaffold", "server": ["Control", {"name": "Adam", "learning_rate": 0.01}]}},
    "fedprox + quantised": {"algorithm": {"name": "fedprox", "mu": 0.1, "up": ["Quantise"]}},
    "scaffold + channels": {
        "algorithm": {"name": "scaffold", "up": [{"name": "PowerSGD", "rank": 1}, "HalfPrecision"], "down": ["Sign"]},
        "clients_per_round": 3,
    },
    "trimmed mean": {"algorithm": {"aggregator": {"name": "TrimmedMean", "num_malicious": 1}}},
    "ditto, two of five clients": {"algorithm": "ditto", "clients_per_round": 2, "max_rounds": 3},
    "faults": {"faults": [{"name": "Drop", "rate": 0.3}, {"name": "SignFlip", "clients": [1]}], "min_clients": 1},
    "flora": {"algorithm": "flora"},
    "fedex": {"algorithm": "fedex_lora"},
    "fedkseed": {"algorithm": {"name": "fedkseed", "seeds": 8}, "clients_per_round": 3},
    "evaluated on clients": {"evaluation": "clients", "evaluate_on": "test"},
    "decoder": {"monitor": "loss_nats", "mode": "min"},
}


def case(name: str, folder: Path, model: str, **changes: Any) -> dict[str, Any]:
    """All numbers of a run."""
    plain_sgd = {"optimizer": "sgd", "learning_rate": 0.05} if "scaffold" in name else {}
    plain_sgd |= {"optimizer": "sgd", "learning_rate": 1e-4} if name == "fedkseed" else {}
    adapters = {"lora": {"rank": 2}} if name in ("flora", "fedex") else {}
    if name == "decoder":
        model = str(decoder_beside(model))
        module: Any = fedtune.CausalLM(model, exact_match=True, learning_rate=3e-2)
        data = fedtune.FederatedDataModule(make_chats(), model, num_clients=5, batch_size=4, eval_batch_size=2)
    else:
        module, data = module_maker(model)(**plain_sgd, **adapters), data_maker(model, make_task())(num_clients=5)
        module.evaluates_by_batch = name != "trimmed mean"
    loop = make_loop(run_dir=str(folder / name), **CASES[name] | changes)
    loop.fit(module, data)
    times = ("seconds", "peak_memory_bytes")
    local = [{key: value for key, value in one.items() if key != "seconds"} for one in loop.baseline_runs.get("local", [])]
    return {
        "weights": sha256(weights_of(module)),
        "records": without_times(loop.history),
        "summary": {key: value for key, value in loop.summary.items() if key not in times},
        "centralised": without_times(loop.baseline_runs.get("centralised", [])),
        "local": local,
    }


def decoder_beside(model: str) -> Path:
    return Path(model).with_name("decoder")


def all_cases(folder: Path, model: str) -> dict[str, Any]:
    return {name: case(name, folder, model) for name in CASES}


def _rank(work: Callable[..., Any], values: tuple[Any, ...], environment: dict[str, str], line: Connection) -> None:
    """What a process does: its answer, or what it raised."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        line.send(work(*values))
    except Exception as error:
        line.send((type(error).__name__, str(error)))


def ranks(size: int, work: Callable[..., Any], *values: Any, **environment: str) -> list[Any]:
    """What so many processes answer; the exit code of one that answers nothing."""
    point, found, started = MeetingPoint(size), [], []
    for rank in range(size):
        ours, theirs = PROCESSES.Pipe()
        given = (work, values, os.environ | point.environment(rank) | environment, theirs)
        process = PROCESSES.Process(target=_rank, args=given)
        process.start()
        theirs.close()
        started.append((process, ours))
    for process, line in started:
        try:
            found.append(line.recv() if line.poll(120) else "no answer")
        except EOFError:
            process.join()
            found.append(process.exitcode)
    for process, _ in started:
        process.kill()
        process.join()
    return found


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str) -> dict[str, Any]:
    save_decoder(decoder_beside(tiny_bert))
    return all_cases(tmp_path_factory.mktemp("serial"), tiny_bert)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_several_processes_have_the_bits_of_one(serial: dict[str, Any], tmp_path: Path, tiny_bert: str, size: int) -> None:
    found = ranks(size, all_cases, tmp_path, tiny_bert)
    for answer in found:
        assert isinstance(answer, dict), answer
        for name, expected in serial.items():
            for what, value in expected.items():
                assert answer[name][what] == value, (name, what)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")}
    assert any("clients/" in one for one in files)
    assert not list(tmp_path.rglob("*.tmp"))


def resumed(folder: Path, model: str) -> dict[str, Any]:
    return case("ditto, two of five clients", folder, model)


def test_a_run_goes_on_with_another_number_of_processes(serial: dict[str, Any], tmp_path: Path, tiny_bert: str) -> None:
    name = "ditto, two of five clients"
    case(name, tmp_path, tiny_bert, max_rounds=1)
    for answer in ranks(3, resumed, tmp_path, tiny_bert):
        assert answer == serial[name]


# ---------------------------------------------------------------- what goes wrong


class Loaders(GivenLoaders):
    """The tiny clients."""

    def __init__(self) -> None:
        data = TinyData()
        super().__init__([data.client_dataloader(client) for client in range(4)], data.client_dataloader(2))


class Failing(fedtune.FederatedCallback):
    """Something happens to the process that trains client 1 in round 2, or to one rank."""

    def __init__(self, what: str, rank: int | None = None) -> None:
        self.what, self.rank = what, rank

    def on_client_end(self, run: Any, module: pl.LightningModule, report: Any) -> None:
        if len(run.history) == 1 and report.client == 1:
            if self.what == "raise":
                raise fedtune.RunError("nothing goes any more")
            if self.what == "sleep":
                time.sleep(20)
            os.kill(os.getpid(), signal.SIGKILL)


def failing(folder: Path, *whats: str) -> list[Any]:
    """What each of some runs raises."""
    found = []
    for what in whats:
        own = int(os.environ["RANK"])
        callbacks = [Failing(what)] if what in ("raise", "sleep", "kill") else []
        changes: dict[str, Any] = {"seed": own} if what == "seeds" else {}
        changes |= {"max_rounds": 3 + own} if what == "rounds" else {}
        changes |= {"algorithm": "ditto", "run_dir": None} if what == "memory" else {}
        changes |= {"faults": [{"name": "Alie", "clients": [0]}]} if what == "lie" else {}
        loop = make_loop(**({"max_rounds": 3, "run_dir": str(folder / what), "callbacks": callbacks} | changes))
        try:
            loop.fit(TinyModule(), Loaders())
            found.append(("ended", sha256(loop._position and weights_of(TinyModule()))))
        except (fedtune.RunError, fedtune.UsageError) as error:
            found.append((isinstance(error, Elsewhere), str(error)))
    return found


def test_an_error_of_one_rank_ends_all_and_the_next_run_works(tmp_path: Path) -> None:
    whats = ("raise", "seeds", "rounds", "memory", "lie", "calm")
    found = ranks(3, failing, tmp_path, *whats)
    by_what = {what: [answer[place] for answer in found] for place, what in enumerate(whats)}
    here = [text for elsewhere, text in by_what["raise"] if not elsewhere]
    assert len(here) == 1
    assert "round 2, client 1: nothing goes any more" in here[0]
    (rank,) = (place for place, (elsewhere, _) in enumerate(by_what["raise"]) if not elsewhere)
    others = [text for elsewhere, text in by_what["raise"] if elsewhere]
    assert others == [f"rank {rank}: {here[0]}"] * 2
    for what, name in (("seeds", "loop.seed"), ("rounds", "loop.max_rounds")):
        assert [text for _, text in by_what[what] if f"{name} on rank" in text and "all ranks do one run" in text]
    assert all("a run_dir, in a folder that all ranks see" in text for _, text in by_what["memory"])
    assert all("faults: got 'Alie'" in text for _, text in by_what["lie"])
    assert {what for what, _ in by_what["calm"]} == {"ended"}


@pytest.mark.parametrize(("what", "says"), [("kill", "has ended"), ("sleep", "gives no sign for")])
def test_a_rank_that_dies_or_hangs_is_named_and_the_run_goes_on_later(tmp_path: Path, what: str, says: str) -> None:
    found = ranks(3, failing, tmp_path, what, FEDTUNE_RANK_TIMEOUT="6")
    lost = [place for place, answer in enumerate(found) if not isinstance(answer, list)]
    if what == "sleep":  # it wakes up, and is too late
        lost = [
            place for place, answer in enumerate(found) if f"rank {place} " not in str(answer) and "gives no" not in str(answer)
        ]
    assert len(lost) == 1, found
    said = [answer[0][1] for place, answer in enumerate(found) if place != lost[0]]
    assert all(f"rank {lost[0]} (process " in text and says in text for text in said), said
    assert len((tmp_path / what / "rounds.jsonl").read_text().splitlines()) == 1
    calm = ranks(2, failing_not, tmp_path / what)
    alone = make_loop(max_rounds=3, run_dir=str(tmp_path / "alone"))
    module = TinyModule()
    alone.fit(module, Loaders())
    assert calm == [(sha256(weights_of(module)), without_times(alone.history))] * 2


def failing_not(folder: Path) -> tuple[str, list[Any]]:
    """The run goes on without what had happened."""
    module, loop = TinyModule(), make_loop(max_rounds=3, run_dir=str(folder))
    loop.fit(module, Loaders())
    return sha256(weights_of(module)), without_times(loop.history)


# ---------------------------------------------------------------- as commands


@pytest.fixture
def flags(tmp_path: Path, tiny_bert: str) -> dict[str, Any]:
    """Of a run that takes a second."""
    rows = (f"{' '.join(f'word{(i * j) % 37}' for j in range(1, 9))},{'abc'[i % 3]}\n" for i in range(90))
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(rows))
    values: dict[str, Any] = {
        "data.task": "csv",
        "data.task_options": {"path": str(tmp_path / "data.csv")},
        "data.batch_size": 8,
    }
    values |= {"data.num_clients": 3, "data.max_length": 16, "model.name": tiny_bert, "loop.max_rounds": 2}
    return values | {"loop.baselines": [], "loop.precision": "32-true"}


def said(values: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code and what was printed of `fedtune run`, by all its processes."""
    try:
        cli.main(
            ["run", *(f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in values.items())]
        )
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    found = capfd.readouterr()
    return code, found.out, found.err


def weights_in(run_dir: Path) -> bytes:
    return (run_dir / "checkpoints" / "round-0002" / "weights.safetensors").read_bytes()


def test_workers_of_a_command_are_one_run(
    flags: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert said(flags | {"run_dir": str(tmp_path / "one")}, capfd)[0] == 0
    code, out, err = said(flags | {"run_dir": str(tmp_path / "two"), "workers": 2}, capfd)
    assert code == 0, err
    assert out.count("federated round 2/2") == out.count("test part:") == 1
    assert weights_in(tmp_path / "one") == weights_in(tmp_path / "two")
    assert (tmp_path / "one" / "config.yaml").read_bytes() == (tmp_path / "two" / "config.yaml").read_bytes()
    code, out, err = said(flags | {"run_dir": str(tmp_path / "two"), "workers": 2, "loop.seed": 7}, capfd)
    assert code == 2
    assert [line for line in err.splitlines() if "fedtune: " in line] == [
        line for line in err.splitlines() if "seed: 0 -> 7" in line
    ]
    assert err.count("fedtune: rank 0: --run_dir") == 1
    assert "Traceback" not in err
    assert said(flags | {"workers": 2, "loop.runtime": "serial"}, capfd)[2].startswith("fedtune: --loop.runtime: got 'serial'")


def test_a_sweep_gives_each_run_the_workers_that_its_file_asks_for(
    flags: dict[str, Any], tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    parameters = {name: {"value": value} for name, value in flags.items()} | {"loop.algorithm": {"values": ["fedavg", "ditto"]}}
    for each in (1, 2):
        file = {"method": "grid", "workers_per_run": each, "parameters": parameters}
        (tmp_path / f"{each}.yaml").write_text(yaml.safe_dump(file))
        code, out, err = command("sweep", str(tmp_path / f"{each}.yaml"), "--workers=2", f"--runs_dir={tmp_path / str(each)}")
        assert code == 0, out + err
        assert f"{2 // each} at a time" in out
    runs = sorted(path.parent.name for path in (tmp_path / "1").glob("*/summary.json"))
    assert len(runs) == 2
    for run in runs:
        assert weights_in(tmp_path / "1" / run) == weights_in(tmp_path / "2" / run)
        assert json.loads((tmp_path / "2" / run / "status.json").read_text())["state"] == "finished"
    code, _, err = command("sweep", str(tmp_path / "2.yaml"), "--workers=1", f"--runs_dir={tmp_path / '3'}")
    assert code == 2
    assert "--workers: got 1; allowed: 2 or more, the workers_per_run of the sweep file" in err
    content = yaml.safe_load((tmp_path / "2.yaml").read_text())
    assert "workers_per_run" not in of_wandb(content)


# ---------------------------------------------------------------- without processes


def test_evaluation_is_shared_out_only_where_that_is_exact(make_module: Make, tmp_path: Path) -> None:
    module = make_module()
    assert is_shared(module, "validation")
    assert is_shared(module, "test")
    assert is_shared(fedtune.CausalLM(save_decoder(tmp_path), exact_match=True), "validation")
    module.loss = torchmetrics.MeanMetric()
    assert not is_shared(module, "validation")
    del module.loss
    module.both = torchmetrics.MetricCollection([torchmetrics.classification.MulticlassAccuracy(3)])
    assert not is_shared(module, "validation")
    del module.both
    module.evaluates_by_batch = False
    assert not is_shared(module, "validation")

    class Watching(type(module)):  # type: ignore[misc]
        def on_validation_batch_end(self, *given: Any) -> None: ...

    module.evaluates_by_batch, module.__class__ = True, Watching
    assert not is_shared(module, "validation")
    assert is_shared(module, "test")
    assert not is_shared(TinyModule(), "validation")


def test_clients_are_dealt_longest_first_to_the_least_loaded() -> None:
    assert longest_first([3, 3, 2, 2, 2], 2) == [[0, 2, 4], [1, 3]]
    assert longest_first([1.0], 3) == [[0], [], []]
    assert sorted(place for one in longest_first(list(range(50)), 7) for place in one) == list(range(50))


def test_the_environment_says_where_a_process_stands() -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "there", "MASTER_PORT": "77"}
    place = place_of("auto", torchrun)
    assert place is not None
    assert (place.rank, place.size, place.local_rank, place.address, place.port) == (1, 3, 0, "there", 77)
    slurm = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8"}
    assert place_of("auto", slurm) is None  # a batch script is one process, and nobody has said where to meet
    place = place_of("torchrun", slurm | {"MASTER_ADDR": "node1"})
    assert place is not None
    assert (place.rank, place.size, place.local_rank, place.port) == (5, 8, 1, 29500)
    assert place_of("serial", torchrun) is None
    assert place_of("auto", torchrun | {"RANK": "0", "WORLD_SIZE": "1"}) is None
    with pytest.raises(fedtune.UsageError, match=r"runtime: got 'torchrun'.*RANK, WORLD_SIZE"):
        place_of("torchrun", {})
    with pytest.raises(fedtune.UsageError, match="RANK: got 3; allowed: a number from 0 to 2"):
        place_of("auto", torchrun | {"RANK": "3"})
    with pytest.raises(fedtune.UsageError, match="auto, serial, torchrun"):
        fedtune.FederatedLoop(runtime="ray")


@pytest.mark.parametrize(("said", "expected"), [("3", 3), ("", 2), ("0", 2), ("4,2", 2)])
def test_threads_are_what_the_user_says_or_the_cores_divided(said: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert threads_of(4) == expected
