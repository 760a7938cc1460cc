"""A module and data, set up for a loop as for a `Trainer`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_lightning as pl

from fedtune.errors import UsageError
from fedtune.federated.client import Worker
from fedtune.federated.directions import Directions
from fedtune.federated.evaluation import Evaluator, attached, by_loader, step_of
from fedtune.federated.memory import ClientMemory
from fedtune.federated.messages import ClientReport, Position
from fedtune.federated.passes import steps_in
from fedtune.federated.ranks import ALONE, Ranks
from fedtune.federated.rebuilt import run_rebuilt
from fedtune.federated.remote import Remote
from fedtune.federated.stages import Stages
from fedtune.federated.state import RoundResult
from fedtune.federated.still import Still
from fedtune.federated.trainer import Line, ModuleTrainer, check_module
from fedtune.federated.training import Training
from fedtune.runs.callbacks import Run
from fedtune.runs.hardware import deterministic_algorithms, fabric_of, freed_memory_kept, resolve_precision, said_of
from fedtune.runs.loggers import loggers_of
from fedtune.runs.privately import training_of
from fedtune.runs.progress import Progress
from fedtune.runtimes.environment import place_of
from fedtune.storage.directory import RunDirectory
from fedtune.storage.records import RESERVED
from fedtune.tensors import counters, resting, sharing, snapshot, trainable, travelling


def given(data: Any, datamodule: Any) -> Any:
    """The one of the two that was given."""
    if (data is None) == (datamodule is None):
        came = "nothing" if data is None else "data and datamodule"
        raise UsageError("data", came, "one data module, as data or as datamodule")
    return datamodule if data is None else data


@contextlib.contextmanager
def prepared(
    loop: Any, module: pl.LightningModule, data: Any, stage: str, progress: Progress, ranks: Ranks = ALONE
) -> Iterator[Evaluator]:
    """Inside the block module and data are set up for a stage ("fit", "validate" or "test"), and the module is attached."""
    fabric = fabric_of(loop.accelerator, resolve_precision(loop.precision, loop.accelerator), place_of(loop.runtime))
    if stage == "fit" and (chosen := said_of(loop.precision, fabric)):
        progress.line(chosen)
    clip = loop.gradient_clip_val, loop.gradient_clip_algorithm
    limits = loop.limit_train_batches, loop.limit_val_batches, loop.limit_test_batches
    options = *clip, loop.accumulate_grad_batches, *limits, loop.options.fast_dropout
    training = Training(fabric, module, loop.seed, data, *options)
    if ranks.size > 1:
        ranks.on_device(fabric.device)
        training.transfer.on_batch = ranks.step
    trainer = training.trainer
    trainer.default_root_dir, trainer.progress_bar_callback = loop.run_dir or ".", Line(progress.line)
    trainer.limit_train_batches, trainer.limit_val_batches, trainer.limit_test_batches = limits
    trainer.fast_dev_run, trainer.callbacks = loop.fast_dev_run, list(loop.callbacks)
    trainer.loggers = [one for one in loggers_of(loop.logger) if not isinstance(one, str)]
    trainer.at(loop._position if stage != "fit" else Position())
    plan_trainer(loop, training, data, loop.max_rounds)
    stages = Stages(data, module)
    with attached(training), deterministic_algorithms(loop.deterministic), freed_memory_kept(), stages.reported():
        for part in (data, module):
            if hasattr(part, "prepare_data"):
                ranks.first_here(part.prepare_data)
        stages.begin(stage)
        module.configure_model()
        fabric.to_device(module)
        if fabric.device.type == "cuda" and hasattr(data, "keep_on"):
            data.keep_on(fabric.device)
        remote = data if isinstance(data, Remote) else None
        yield Evaluator(training, loop.evaluate_on, loop.options.evaluation, RESERVED, stages, ranks, remote)


def plan_trainer(loop: Any, training: Training, data: Any, rounds: int) -> None:
    """Tell the module's trainer how long a run of so many rounds is."""

    def steps() -> float:
        loaders = map(data.client_dataloader, range(data.num_clients))
        return rounds * max(steps_in(training, loader, loop.local_epochs) for loader in loaders)

    training.trainer.plan(rounds * loop.local_epochs, steps)


def worker_of(
    loop: Any,
    training: Training,
    data: Any,
    memory: ClientMemory,
    on_client_end: Callable[[ClientReport], None] | None = None,
    base: frozenset[str] = frozenset(),
) -> Worker:
    """Who is a loop's clients in this process."""
    algorithm, module = loop._algorithm, training.module
    return Worker(
        training,
        data,
        algorithm.client,
        memory,
        loop.local_epochs,
        counters=snapshot(counters(module)),
        still=Still(module, base),
        up=algorithm.up,
        down=algorithm.down,
        on_client_end=on_client_end,
        privately=training_of(loop.plan),
    )


def round_of(
    loop: Any, module: pl.LightningModule, directory: RunDirectory, ranks: Ranks, play: Callable[..., RoundResult]
) -> Callable[..., RoundResult]:
    """What does one round of a loop: `play`, as `run_round`; around it, where scalars travel and not weights, `run_rebuilt`."""
    seeds = loop._algorithm.client.seeds
    if not seeds:
        return play
    start, here = ranks.from_first(directory.start).weights, trainable(module)
    device = "cpu" if module.device.type == "mps" else module.device
    directions = Directions(loop.seed, {name: start[name].to(device) for name in here}, seeds)
    return functools.partial(run_rebuilt, directions=directions, play=play)


def evaluated(loop: Any, module: pl.LightningModule, data: Any, part: str) -> list[dict[str, float]]:
    """The metrics of a module, as it stands, on a part of the data; a dictionary for each loader.

    Raises:
        UsageError: the data have no such part, or the module no step for it.
    """
    place = place_of(loop.runtime)
    progress = Progress(loop.options.progress and (place is None or place.rank == 0))
    check_module(module, data)
    with prepared(loop, module, data, "test" if part == "test" else "validate", progress) as evaluator:
        if evaluator.loader(part) is None:
            raise UsageError("data", type(data).__name__, f"a data module with a {part} part")
        if step_of(module, part) is None:
            raise UsageError("module", type(module).__name__, f"a module with {part}_step")
        found = evaluator.metrics(part)
    progress.line(f"{part}: " + "  ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return by_loader(found)


def look_over(module: pl.LightningModule, evaluate_on: str, run: Run) -> None:
    """Say what of a module its owner may not expect.

    Raises:
        UsageError: tensors share memory, so that an update of one would change the other; means over clients of perplexities.
    """
    name, evaluation = type(module).__name__, run.config["loop"]["options"]["evaluation"]
    if evaluation == "clients" and getattr(run.data, "kind", None) == "instructions":
        raise UsageError("options.evaluation", evaluation, "pooled, with instructions: perplexity is of a mean over all tokens")
    if step_of(module, evaluate_on) is None:
        run.print(f"{name} has no validation_step: the rounds are not evaluated")
    evaluating = [path or name for path, part in module.named_modules() if not part.training]
    if evaluating:
        some = ", ".join(evaluating[:3])
        run.print(f"parts of the module are in evaluation mode, and trained so ({len(evaluating)}): {some}")
    same = sharing(travelling(module), resting(module))
    if same is not None:
        allowed = f"tensors with memory of their own ({' and '.join(dict.fromkeys(same))} share theirs)"
        raise UsageError("module", name, allowed)


def watch_the_end(trainer: ModuleTrainer, directory: RunDirectory, run: Run) -> None:
    """Note that a module asks how long the run is, and say where that was another number in an earlier start."""
    before = directory.read_json("horizon.json").get("max_rounds", run.max_rounds)
    if before != run.max_rounds and type(before) is int:
        run.print(
            f"the module asks how long the run is, and its first rounds were of a run of {before} rounds: "
            f"a run of {run.max_rounds} from the start gives other numbers"
        )

    def noted() -> None:
        trainer.on_horizon = lambda: None
        if "max_rounds" not in directory.read_json("horizon.json"):
            directory.write_json("horizon.json", {"max_rounds": run.max_rounds})

    trainer.on_horizon = noted
    if trainer.asked_for_the_end:  # in `setup`, for example
        noted()
