"""Five rounds of a tiny model, full digits, against what was written down: a change that must not alter numbers does not.

Digits belong to a processor and a version of torch, as their kernels round in other orders. On those of `golden/rounds.json`
numbers are equal to the last digit and weights to the bit; elsewhere equal to rounding. A change that is meant to
alter them renews the file, and says by how much:

    .venv/bin/python tests/test_golden.py
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import make_loop, make_task, without_times

import fedtune

Make = Callable[..., Any]
FILE = Path(__file__).parent / "golden" / "rounds.json"
RUNS: dict[str, dict[str, Any]] = {
    # uneven clients, some of them left out of each round; the rest of the options are the defaults
    "partial cohorts": {"loop": {"clients_per_round": 3}, "data": {"split": "by_author", "num_clients": 5, "seed": 3}},
    "uniform mean, SGD, warm-up, two epochs": {
        "loop": {"local_epochs": 2, "algorithm": {"weighting": "uniform"}, "gradient_clip_val": 0.5, "fast_dropout": False},
        "data": {"split": "dirichlet", "num_clients": 3, "seed": 1},
        "module": {"optimizer": "sgd", "learning_rate": 0.2, "warmup_steps": 9},
    },
}


def digest(weights: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in weights.items():
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def run(options: dict[str, Any], make_data: Make, make_module: Make) -> dict[str, Any]:
    """Records of the run and of its baselines without times, and what names the weights after each round."""
    digests: list[str] = []

    class Weights(fedtune.FederatedCallback):
        def on_round_end(self, run: Any, module: Any, record: Any) -> None:
            digests.append(digest(module.network.state_dict()))

    loop = make_loop(max_rounds=5, seed=2, baselines=["centralised", "local"], callbacks=[Weights()], **options.get("loop", {}))
    module, data = make_module(**options.get("module", {})), make_data(task=make_task(seed=4), **options.get("data", {}))
    loop.fit(module, data)
    local = [{key: value for key, value in one.items() if key != "seconds"} for one in loop.baseline_runs["local"]]
    return {
        "rounds": without_times(loop.history),
        "centralised": without_times(loop.baseline_runs["centralised"]),
        "local": local,
        "sha256": digests,
    }


def made_with() -> dict[str, str]:
    """What the digits depend on beside the code: the kernels are chosen by what the processor can do."""
    cpu = Path("/proc/cpuinfo")
    said = (
        dict(line.split("\t: ", 1) for line in cpu.read_text().split("\n\n")[0].splitlines() if "\t: " in line)
        if cpu.exists()
        else {}
    )
    said = {key.strip(): value for key, value in said.items()}
    names = [said.get(key, "unknown") for key in ("model name", "cpu family", "model", "stepping")]
    return {
        "processor": " ".join(names),
        "instructions": hashlib.sha256(said.get("flags", "").encode()).hexdigest()[:8],
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def assert_near(found: Any, expected: Any, where: str = "") -> None:
    """Numbers equal to rounding, everything else equal."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_near(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_near(one, other, f"{where}[{place}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-4), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("name", RUNS)
def test_five_rounds_give_the_digits_that_were_written_down(name: str, make_data: Make, make_module: Make) -> None:
    golden = json.loads(FILE.read_text())
    found = json.loads(json.dumps(run(RUNS[name], make_data, make_module)))
    expected = golden["runs"][name]
    if golden["made_with"] == made_with():
        assert found == expected
    else:
        for one in (found, expected):
            del one["sha256"]
        assert_near(found, expected, name)


def largest_difference(one: Any, other: Any) -> float:
    """Of the numbers of two results of the same shape."""
    if isinstance(one, dict):
        return max((largest_difference(one[key], other[key]) for key in one if key in other), default=0.0)
    if isinstance(one, list):
        return max(map(largest_difference, one, other), default=0.0)
    return abs(one - other) if isinstance(one, float) else 0.0


def main() -> None:
    """Write the file, and print how far the numbers have moved."""
    import tempfile

    import conftest

    with tempfile.TemporaryDirectory() as folder:
        task, model = conftest.make_task(), conftest.save_tiny_bert(Path(folder) / "tiny-bert")
        make_data, make_module = conftest.data_maker(model, task), conftest.module_maker(model)
        runs = {name: run(options, make_data, make_module) for name, options in RUNS.items()}
    if FILE.exists():
        before = json.loads(FILE.read_text())["runs"]
        print("largest difference:", {name: largest_difference(runs[name], before[name]) for name in runs if name in before})
    command = shlex.join(["python", "tests/test_golden.py", *sys.argv[1:]])
    content = {"command": command, "date": date.today().isoformat(), "made_with": made_with(), "runs": runs}
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
