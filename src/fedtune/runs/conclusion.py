"""What is written of a run once its rounds are done: summary and curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.runs.baselines import Baselines
from fedtune.runs.callbacks import Run
from fedtune.runs.figures import plot_run
from fedtune.runs.hardware import peak_memory_bytes
from fedtune.storage.directory import RunDirectory, writing
from fedtune.storage.summary import summarise, with_known_baselines


def conclude(loop: Any, run: Run, directory: RunDirectory, test: Mapping[str, float], baselines: Baselines) -> None:
    """Sum up what is known by now; memory is that of the process that used most."""
    ranks, majority = baselines.evaluator.ranks, getattr(run.data, "majority_accuracy", None)
    found: dict[str, Any] = {**baselines.records, "majority_accuracy": majority("test") if majority else None}
    if "centralised" in found:
        found["centralised_test"] = baselines.centralised_test
    monitor, mode = run.config["loop"]["monitor"], run.config["loop"]["mode"]
    known = summarise(run.history, loop.evaluate_on, test, found, monitor, mode)
    run.summary.update(with_known_baselines(known, directory.read_json("summary.json")))
    run.summary["peak_memory_bytes"] = max(ranks.gather([peak_memory_bytes(baselines.evaluator.training.fabric.device)]))
    if loop.plan is not None:
        run.summary.update(loop.plan.figures(len(run.history)), privacy=loop.plan.sentence(len(run.history)))
    run.summary.update(ranks.from_first(lambda: dict(run.summary)))
    if directory.path is not None:
        with writing(directory.path / "curves.png"):
            plot_run(directory.path, run.history, baselines.records, loop.evaluate_on, monitor)
    directory.write_json("summary.json", run.summary)
