"""The flags of a run: every flag is a constructor argument; from them come a data module, a module and a loop."""

from __future__ import annotations

import contextlib
import functools
import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jsonargparse import Namespace

from fedtune.algorithms import ALGORITHMS
from fedtune.algorithms.specification import algorithm_of, specification_of
from fedtune.data.classification import FederatedDataModule
from fedtune.data.registry import TASKS
from fedtune.data.splits import DEFAULTS, SPLITS, WHOLE
from fedtune.errors import UsageError, one_of
from fedtune.models import CausalLM, TextClassifier
from fedtune.models.adapter_files import content_of_model
from fedtune.models.adapters import lora_of
from fedtune.models.pretrained import MODELS
from fedtune.runs.arguments import check_data
from fedtune.runs.kinds import build_model, check_model, kind_of, more_options
from fedtune.runs.loggers import LOGGERS
from fedtune.runs.loop import FederatedLoop
from fedtune.runs.options import RunOptions
from fedtune.runs.parser import ConfigFile, Parser, check_plain
from fedtune.runs.renamed import in_configuration
from fedtune.runtimes.faulty import faults_of, plain_faults
from fedtune.runtimes.processes import ranks_of
from fedtune.storage.config import KEPT, fingerprint, settled, without

SECTIONS = ("data", "model", "loop")
_FLAGS = {
    "data.model": "model.name",
    "model.model": "model.name",
    "loop.run_dir": "run_dir",
    "loop.logger": "logger",
    "loop.num_clients": "data.num_clients",
}


def add_run_arguments(run: Parser) -> None:
    """Give a parser the arguments of `fedtune run`."""
    run.add_argument("--config", action=ConfigFile, help="YAML or JSON file with any of the values below")
    add_data_arguments(run)
    run.add_class_arguments(TextClassifier, "model", skip={"num_labels", "label_names", "lora"})
    run.add_argument(
        "--model.lora",
        type=dict[str, Any] | None,
        default=None,
        help="low-rank adapters: a dictionary of rank, alpha, targets, rslora, dropout, adapter (a directory to begin with); "
        "{} for all defaults. They are flags, too: --model.lora.rank 8 --model.lora.targets '[query, value]'",
    )
    for name, option in more_options().items():
        kind = typing.get_type_hints(CausalLM.__init__)[name]
        run.add_argument(f"--model.{name}", type=kind, default=option.default, help="of a CausalLM alone")
    run.add_class_arguments(FederatedLoop, "loop", skip={"run_dir", "logger", "callbacks", "algorithm"})
    run.add_argument(
        "--loop.algorithm",
        type=dict[str, Any] | str,
        default="fedavg",
        help=f"one of {', '.join(ALGORITHMS)}; its parameters and parts are flags, too: --loop.algorithm.beta 0.5, "
        "--loop.algorithm.aggregator.weighting uniform, --loop.algorithm.up+=Quantise",
    )
    run.deep += ("loop.algorithm", "model.lora")
    run.add_argument("--seed", type=int | None, default=None, help="sets data.seed, model.seed and loop.seed")
    run.add_argument("--run_dir", type=str | None, default=None, help="directory of the run; nothing is written without it")
    run.add_argument(
        "--runs_dir",
        type=str | None,
        default=None,
        help="directory of many runs: without --run_dir, the run's own is in it, named by the hash of its configuration",
    )
    run.add_argument("--logger", type=str, default="none", help=f"one of {', '.join(LOGGERS)}")
    for name in ("versions", "content"):
        run.add_argument(f"--{name}", type=dict | None, default=None, help="ignored: a run's config.yaml has it")


def add_data_arguments(found: Parser) -> None:
    """Give a parser the arguments of the data module. Task and split are names there: no value is imported."""
    found.add_class_arguments(FederatedDataModule, "data", skip={"model", "task", "split", "task_options"})
    found.add_argument("--data.task", type=str, default="authors", help=f"one of {', '.join(TASKS)}")
    found.add_argument("--data.split", type=str, default="iid", help=f"one of {', '.join(SPLITS)}")
    found.add_argument(
        "--data.task_options",
        type=dict | None,
        default=None,
        help="more arguments of the task's builder, as a dictionary; they are flags, too: --data.task_options.path my.csv",
    )
    found.deep += ("data.task_options",)


def resolve(values: Mapping[str, Any], where: str = "the configuration") -> dict[str, dict[str, Any]]:
    """The arguments of a run from nested values, as in a configuration file.

    Args:
        where: what a line about them names: the file.

    Raises:
        UsageError: values that are none of a run.
        SystemExit: a value that a run does not have, or of a wrong type; said in one line.
    """
    parser = _run_parser()
    named = in_configuration(values, where)
    parser.check_content(named, where)
    parser.where = where
    found = parser.checked(parser.parse_object(named))
    parser.where = None
    return resolved(found)


@functools.cache
def _run_parser() -> Parser:
    parser = Parser(prog="fedtune run")
    add_run_arguments(parser)
    return parser


def resolved(options: Namespace) -> dict[str, dict[str, Any]]:
    """The arguments of data module, module and loop, complete; `seed` handed on to each.

    A single client holds the same texts whatever the split, so its split is always "iid": such runs are one run. Parameters of
    splits that are not given are left out, so that a run keeps its name when there are new ones.
    """
    found = {part: dict(options[part].as_dict()) for part in SECTIONS}
    if options.seed is not None:
        for part in SECTIONS:
            found[part]["seed"] = options.seed
    with flags("model"):
        lora = lora_of(found["model"]["lora"])
        found["model"]["lora"] = None if lora is None else lora.plain()
    with flags("loop"):
        found["loop"]["algorithm"] = specification_of(algorithm_of(found["loop"]["algorithm"]))
        check_plain("algorithm", found["loop"]["algorithm"])
        found["loop"]["faults"] = plain_faults(faults_of(found["loop"]["faults"]))
    if found["data"]["num_clients"] == 1 and found["data"]["split"] in WHOLE:
        found["data"] |= {"split": "iid", **DEFAULTS}
    found["data"] = {key: value for key, value in found["data"].items() if value is not None or key not in DEFAULTS}
    return found


def name_of(arguments: Mapping[str, Mapping[str, Any]]) -> str:
    """The name of a run in a directory of runs: eight hexadecimal digits of its complete configuration."""
    return fingerprint(settled(without(arguments, KEPT)))


@contextlib.contextmanager
def flags(part: str) -> Iterator[None]:
    """Name the flag, and not only the argument, in errors about the values of one part of the configuration."""
    try:
        yield
    except UsageError as error:
        name = f"{part}.{error.argument}"
        raise UsageError(f"--{_FLAGS.get(name, name)}", error.came, error.allowed) from error


def content_of_run(arguments: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What names the content that a run depends on, as `config.yaml` has it: of its texts, and of its pretrained model.

    Raises:
        UsageError: they cannot be read.
    """
    model = arguments["model"]
    with flags("data"):
        data = FederatedDataModule(**arguments["data"], model=model["name"])
        task = data.digest
    with flags("model"):
        return {"task": task, "model": content_of_model(model)}


def check(arguments: Mapping[str, Mapping[str, Any]]) -> None:
    """Check what a run would check before it reads texts or weights.

    Raises:
        UsageError: a value that cannot be used, under the name of its flag.
    """
    data, model = arguments["data"], dict(arguments["model"])
    name = model.pop("name")
    with flags("loop"):
        loop = FederatedLoop(**{**arguments["loop"], "options": RunOptions(**arguments["loop"]["options"])})
    with flags("data"):
        made = FederatedDataModule(**data, model=name)
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
        kind = kind_of(data["task"])
        if kind is not None:
            check_model(kind, name, model, files=name not in MODELS)  # a registered one may have to be fetched first


def build(
    arguments: Mapping[str, Mapping[str, Any]], label_names: Sequence[str] | None = None, whole: bool = True, **where: Any
) -> tuple[TextClassifier | CausalLM, FederatedDataModule, FederatedLoop]:
    """Data module, module and loop; what is cheap is checked first, as reading and tokenising texts can take minutes.

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
    name = model.pop("name")
    with flags("model"):
        kind = kind_of(arguments["data"]["task"])
        if kind is not None:
            check_model(kind, name, model)  # first what is cheap: reading and tokenising texts can take minutes
    ranks = ranks_of(loop.runtime)
    with flags("data"):
        if ranks.size > 1:
            ranks.first_here(data.setup)  # the others find the tokens in the cache
        if model["init"] == "random" and arguments["data"]["tokenizer"] is not None:
            model["vocab_size"] = model["vocab_size"] or len(data.tokenizer)
        if label_names is None:
            data.tokenizer, data.num_labels  # noqa: B018 - reading them checks them
            label_names = data.label_names
    with flags("model"):
        return build_model(kind or data.kind, name, model, label_names), data, loop


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
        module.check_data(data)
    with flags("loop"):
        loop.fit(module, data)
    return loop
