"""What is written of a run once its rounds are done: summary and curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.federated.batches import is_whole
from fedtune.federated.evaluation import Evaluator
from fedtune.runs.baselines import Baselines
from fedtune.runs.callbacks import Run
from fedtune.runs.figures import plot_run
from fedtune.runs.hardware import peak_memory_bytes
from fedtune.runs.privately import secure_sentence
from fedtune.storage.directory import RunDirectory, writing
from fedtune.storage.summary import summarise, with_known_baselines


def conclude(loop: Any, run: Run, directory: RunDirectory, test: Mapping[str, float], baselines: Baselines) -> None:
    """Sum up what is known by now; memory is that of the process that used most."""
    ranks, majority = baselines.evaluator.ranks, _majority(run.data, loop.evaluate_on)
    found: dict[str, Any] = {**baselines.records, "majority_accuracy": _majority(run.data, "test")}
    if "centralised" in found:
        found["centralised_test"] = baselines.centralised_test
    monitor, mode = run.config["loop"]["monitor"], run.config["loop"]["mode"]
    known = summarise(run.history, loop.evaluate_on, test, found, monitor, mode)
    known[f"majority_{loop.evaluate_on}_accuracy"] = majority
    known |= {f"examples_{part}": _examples(baselines.evaluator, part) for part in ("test", loop.evaluate_on)}
    run.summary.update(with_known_baselines(known, directory.read_json("summary.json")))
    run.summary["peak_memory_bytes"] = max(ranks.gather([peak_memory_bytes(baselines.evaluator.training.fabric.device)]))
    if loop.plan is not None:
        run.summary.update(loop.plan.figures(len(run.history)), privacy=loop.plan.sentence(len(run.history)))
    if loop._secure is not None:
        run.summary["secure_sums"] = secure_sentence(loop, run.data.num_clients)
    run.summary.update(ranks.from_first(lambda: dict(run.summary)))
    if directory.path is not None:
        with writing(directory.path / "curves.png"):
            plot_run(directory.path, run.history, baselines.records, loop.evaluate_on, monitor, majority)
    directory.write_json("summary.json", run.summary)


def _majority(data: Any, part: str) -> float | None:
    """The accuracy on a part of always answering the most frequent label, where the data know it."""
    known = getattr(data, "majority_accuracy", None)
    return known(part) if known else None


def _examples(evaluator: Evaluator, part: str) -> int | None:
    """How many examples a part has, where the data have a task, and all of the part is evaluated."""
    parts = getattr(getattr(evaluator.data, "task", None), "parts", {})
    return len(parts[part]) if part in parts and is_whole(evaluator.training.limit(part)) else None
