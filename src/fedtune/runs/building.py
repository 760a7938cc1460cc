"""From the values of flags to a data module, a module and a loop, and to a run."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl

from fedtune.data.classification import FederatedDataModule
from fedtune.data.registry import TASKS
from fedtune.data.splits import SPLITS
from fedtune.errors import UsageError, one_of
from fedtune.models.adapter_files import content_of_model
from fedtune.models.pretrained import MODELS
from fedtune.runs.arguments import check_data
from fedtune.runs.kinds import build_model, check_model, kind_of
from fedtune.runs.loop import FederatedLoop
from fedtune.runs.options import RunOptions
from fedtune.runs.own import build_own, check_own
from fedtune.runtimes.processes import ranks_of
from fedtune.storage.config import AS_GIVEN

_FLAGS = {
    "data.model": "model.name",
    "model.model": "model.name",
    "loop.run_dir": "run_dir",
    "loop.logger": "logger",
    "loop.num_clients": "data.num_clients",
    "loop.options.imports": "import",
}


@contextlib.contextmanager
def flags(part: str) -> Iterator[None]:
    """Name the flag, and not only the argument, in errors about the values of one part of the configuration."""
    try:
        yield
    except UsageError as error:
        raise error.renamed(lambda name: f"--{_FLAGS.get(f'{part}.{name}', f'{part}.{name}')}") from error


def content_of_run(arguments: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What names the content that a run depends on, as `config.yaml` has it: of its texts, and of its pretrained model; nobody
    knows what a module of one's own reads.

    Raises:
        UsageError: they cannot be read.
    """
    model = arguments["model"]
    with flags("data"):
        data = FederatedDataModule(**arguments["data"], model=model["name"])
        task = data.digest
    with flags("model"):
        return {"task": task} | ({} if "class_path" in model else {"model": content_of_model(model)})


def check(arguments: Mapping[str, Mapping[str, Any]]) -> None:
    """Check what a run would check before it reads texts or weights.

    Raises:
        UsageError: a value that cannot be used, under the name of its flag.
    """
    data, model = arguments["data"], arguments["model"]
    with flags("loop"):
        loop = FederatedLoop(**{**arguments["loop"], "options": RunOptions(**arguments["loop"]["options"])})
    with flags("data"):
        made = FederatedDataModule(**data, model=model["name"])
        if data["task"] not in TASKS:
            raise one_of("task", data["task"], TASKS)
        if data["split"] not in SPLITS:
            raise one_of("split", data["split"], SPLITS)
        known = inspect.signature(TASKS[data["task"]]).parameters
        for option in data["task_options"] or {}:
            if option not in known:
                raise one_of("task_options", option, [*known] or ["nothing"])
    with flags("loop"):
        check_data(loop, made)
    with flags("model"):
        check_module(model, kind_of(data["task"]), model["name"] not in MODELS)  # one of those may have to be fetched first


def build(
    arguments: Mapping[str, Mapping[str, Any]], label_names: Sequence[str] | None = None, whole: bool = True, **where: Any
) -> tuple[Any, FederatedDataModule, FederatedLoop]:
    """Module, data module and loop; what is cheap is checked first, as reading and tokenising texts can take minutes.

    Args:
        arguments: as from `resolved`.
        label_names: of the classes; where they are given, nothing of the data is read.
        whole: whether the data are those of the whole federation, so that they must suit the loop.
        where: `run_dir`, `logger` and `callbacks` of the loop.

    Raises:
        UsageError: a value that cannot be used, under the name of its flag.
    """
    model = dict(arguments["model"])
    with flags("loop"):
        options = RunOptions(**arguments["loop"]["options"])
        loop = FederatedLoop(**{**arguments["loop"], "options": options}, **where)
    with flags("data"):
        data = FederatedDataModule(**arguments["data"], model=model["name"])
    if whole and label_names is None:
        with flags("loop"):
            check_data(loop, data)
    with flags("model"):
        check_module(model, kind_of(arguments["data"]["task"]))  # first what is cheap: reading and tokenising can take minutes
    ranks = ranks_of(loop.runtime)
    with flags("data"):
        if ranks.size > 1:
            ranks.first_here(data.setup)  # the others find the tokens in the cache
        if model.get("init") == "random" and arguments["data"]["tokenizer"] is not None:
            model["vocab_size"] = model["vocab_size"] or len(data.tokenizer)
        if label_names is None:
            data.tokenizer, data.num_labels  # noqa: B018 - reading them checks them
            label_names = data.label_names
    with flags("model"):
        return module_of(model, kind_of(arguments["data"]["task"]) or data.kind, label_names), data, loop


def check_module(model: Mapping[str, Any], kind: str | None, files: bool = True) -> None:
    """Check of a module all that can be checked before data are read.

    Args:
        model: its arguments, as from `resolved`.
        kind: of the task, where that is known.
        files: whether the model's files may be looked at.

    Raises:
        UsageError: as `module_of`.
    """
    if "class_path" in model:
        check_own(model["class_path"], model["init_args"])
    elif kind is not None:
        options = dict(model)
        check_model(kind, options.pop("name"), options, files)


def module_of(model: Mapping[str, Any], kind: str, label_names: Sequence[str]) -> pl.LightningModule:
    """The module of a run.

    Args:
        model: its arguments, as from `resolved`.
        kind: of the data.
        label_names: of their classes, if there are any.

    Raises:
        UsageError: a value that cannot be used, or the wrong kind of model.
    """
    if "class_path" not in model:
        options = dict(model)
        return build_model(kind, options.pop("name"), options, label_names)
    module = build_own(model, label_names)
    setattr(module, AS_GIVEN, dict(model))  # what the run's config.yaml has of it
    return module


def fit(arguments: Mapping[str, Mapping[str, Any]], **where: Any) -> FederatedLoop:
    """Build data module, module and loop, and run.

    Args:
        arguments, where: as in `build`.

    Raises:
        UsageError: a value that cannot be used, under the name of its flag.
        RunError: the run had to stop.
    """
    module, data, loop = build(arguments, **where)
    with flags("data"):
        data.setup()
        if hasattr(module, "check_data"):
            module.check_data(data)
    with flags("loop"):
        loop.fit(module, data)
    return loop
