"""What the speed work rests on: compiled once for all clients and rounds, stacked clients have each client's gradients."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_loop
from torch.func import stack_module_state
from torch.nn import functional as F

import fedtune
from fedtune.runs.hardware import freed_memory_kept

Make = Callable[..., Any]
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def stacked() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("stacked", BENCHMARKS / "stacked.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


def test_stacked_clients_have_the_gradients_that_each_has_alone(stacked: Any, make_module: Make) -> None:
    networks = [make_module(dropout=0.0, seed=seed).network for seed in (1, 2, 3)]
    weights = {name: tensor.detach() for name, tensor in stack_module_state(networks)[0].items()}
    ids = torch.randint(5, 40, (3, 4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 1, 6:] = 0
    labels = torch.tensor([[0, 1, 0, 1]] * 3)
    found = stacked.gradients(networks[0], weights, (ids, mask, labels), contextlib.nullcontext)
    for client, network in enumerate(networks):
        F.cross_entropy(network(input_ids=ids[client], attention_mask=mask[client]).logits, labels[client]).backward()
        for name, parameter in network.named_parameters():
            alone = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            assert torch.allclose(found[name][client], alone, atol=1e-6), name


def test_a_compiled_network_is_compiled_once_for_a_shape_not_for_a_client_or_a_round(
    make_data: Make, make_module: Make
) -> None:
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compiled.append(1)
        return graph.forward

    torch._dynamo.reset()
    module = make_module()
    module.network.compile(backend=backend, dynamic=False)
    counts = []
    for clients, rounds in ((1, 1), (4, 3)):
        data = make_data(num_clients=clients, batch_size=4, drop_last=True, pad_to_multiple_of=32)
        make_loop(max_rounds=rounds).fit(module, data)
        counts.append(len(compiled))
    assert counts[0] > 0
    assert counts[1] == counts[0]


def test_the_reference_job_runs_and_prints_its_table() -> None:
    small = ["--sentences", "16", "--held_out", "4", "--clients", "2", "--repeats", "1", "--name", "-"]
    names = ["fedtune", "floor, pooled batches", "plain loop, fp32"]
    command = [sys.executable, str(BENCHMARKS / "reference.py"), *small, "--only", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    table = done.stdout[done.stdout.index("x training") :].splitlines()[1:]
    assert [line[:28].rstrip() for line in table if line] == names
    assert all(float(line[28:37]) >= 0 for line in table if line)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU on this machine")
def test_cuda_graphs_train_the_same_weights(make_data: Make, make_module: Make) -> None:
    trained = []
    for compiled in (False, True):
        module = make_module(dropout=0.0)
        if compiled:
            module.network.compile(mode="reduce-overhead", dynamic=False)
        make_loop(max_rounds=2).fit(module, make_data(batch_size=4, drop_last=True, pad_to_multiple_of=32))
        trained.append(torch.cat([parameter.detach().cpu().flatten() for parameter in module.parameters()]))
    assert torch.allclose(*trained, atol=1e-3)


def test_batches_are_made_where_the_tokens_are_kept_without_waiting_for_that_device(make_data: Make) -> None:
    data = make_data(num_clients=2)
    expected = [{name: tensor.shape for name, tensor in batch.items()} for batch in data.val_dataloader()]
    data.keep_on(torch.device("meta"))  # this device has shapes only: whoever reads a value from it fails
    made = list(data.val_dataloader())
    assert [{name: tensor.shape for name, tensor in batch.items()} for batch in made] == expected
    assert {tensor.device.type for batch in [*made, *data.client_dataloader(0)] for tensor in batch.values()} == {"meta"}


@pytest.mark.parametrize(("multiple", "expected"), [(8, {8, 16, 24, 30}), (None, None)])
def test_lengths_are_rounded_up_to_multiples_and_never_beyond_the_most(
    multiple: int | None, expected: set[int] | None, tiny_bert: str
) -> None:
    texts = [" ".join(["word1"] * count) for count in (2, 3, 9, 12, 17, 26, 40)]
    parts = {"train": range(len(texts)), "test": [len(texts)]}
    task = fedtune.TextTask("lengths", [*texts, "word2"], [0, 1] * 4, ("a", "b"), parts)
    data = fedtune.FederatedDataModule(task, tiny_bert, num_clients=1, batch_size=1, max_length=30, pad_to_multiple_of=multiple)
    lengths = {batch["input_ids"].shape[1] for batch in data.train_dataloader()}
    assert lengths == (expected or {4, 5, 11, 14, 19, 28, 30})


def faults_of(megabytes: int) -> int:
    """Pages that the system hands out when so much is allocated, filled and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(megabytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_what_a_step_frees_serves_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    fresh = faults_of(64)
    with freed_memory_kept():
        faults_of(65)  # somewhat more: a block of the very same size may miss the few bytes that its alignment took
        assert faults_of(64) * 4 < fresh
    assert faults_of(64) * 4 > fresh
    monkeypatch.setenv("MALLOC_TOP_PAD_", "0")
    with freed_memory_kept():
        faults_of(65)
        assert faults_of(64) * 4 > fresh


THREADS = """
import os, sys
loadavg = sys.argv[1]
import pathlib
real, said = pathlib.Path.read_text, f"0.1 0.1 0.1 {loadavg}/99 7"
pathlib.Path.read_text = lambda self, *a, **k: said if str(self) == "/proc/loadavg" else real(self, *a, **k)
if sys.argv[2] == "torch":
    import torch
import fedtune
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("running", "first", "variables", "expected"),
    [
        ("2", "", {}, "1000"),
        ("1", "", {}, "None"),
        ("2", "torch", {}, "None"),  # too late
        ("2", "", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("2", "", {"OMP_WAIT_POLICY": "active"}, "None"),
        ("many", "", {}, "None"),
    ],
)
def test_threads_wait_less_actively_on_a_busy_machine_unless_the_user_has_chosen(
    running: str, first: str, variables: dict[str, str], expected: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", THREADS, running, first]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
