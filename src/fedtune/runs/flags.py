"""The flags of a run: every flag is a constructor argument."""

from __future__ import annotations

import functools
import typing
from collections.abc import Mapping
from typing import Any

from jsonargparse import Namespace

from fedtune.algorithms import ALGORITHMS
from fedtune.algorithms.specification import algorithm_of, specification_of
from fedtune.data.classification import FederatedDataModule
from fedtune.data.registry import TASKS
from fedtune.data.splits import DEFAULTS, SPLITS, WHOLE
from fedtune.errors import Refused, UsageError, shown
from fedtune.models import CausalLM, TextClassifier
from fedtune.models.adapters import lora_of
from fedtune.privacy.checks import privacy_with
from fedtune.privacy.mechanisms import PRIVACY, plain_privacy
from fedtune.runs.building import flags
from fedtune.runs.kinds import more_options
from fedtune.runs.loggers import LOGGERS
from fedtune.runs.loop import FederatedLoop
from fedtune.runs.own import import_modules
from fedtune.runs.parser import ConfigFile, Parser, Refusal, check_plain
from fedtune.runs.renamed import in_configuration
from fedtune.runs.words import IMPORT, listed
from fedtune.runtimes.faulty import faults_of, plain_faults
from fedtune.secure.parts import SECURE_SUMS, plain_secure, secure_of
from fedtune.storage.config import KEPT, fingerprint, settled, without

SECTIONS = ("data", "model", "loop")
_OF_LOOP = {  # parts with values of their own: what is said of them
    "privacy": f"differential privacy of clients or of examples: one of {', '.join(PRIVACY)}; its parameters are flags, too: "
    "--loop.privacy Gaussian --loop.privacy.noise 1.0 --loop.privacy.delta 1e-5",
    "secure_sums": f"the server has masked messages and their sum alone, simulated: one of {', '.join(SECURE_SUMS)}; its "
    "parameters are flags, too: --loop.secure_sums PairwiseMasks --loop.secure_sums.threshold 0.67",
}
_OF_OWN = ("class_path", "init_args", "name", "seed")  # arguments of a module of one's own


def add_run_arguments(run: Parser) -> None:
    """Give a parser the arguments of `fedtune run`."""
    run.add_argument("--config", action=ConfigFile, help="YAML or JSON file with any of the values below")
    add_import_argument(run)
    add_data_arguments(run)
    _add_model_arguments(run)
    run.add_class_arguments(
        FederatedLoop, "loop", skip={"run_dir", "logger", "callbacks", "algorithm", "privacy", "secure_sums"}
    )
    run.add_argument(
        "--loop.algorithm",
        type=dict[str, Any] | str,
        default="fedavg",
        help=f"one of {', '.join(ALGORITHMS)}; its parameters and parts are flags, too: --loop.algorithm.beta 0.5, "
        "--loop.algorithm.aggregator.weighting uniform, --loop.algorithm.up+=Quantise",
    )
    for name, what in _OF_LOOP.items():
        run.add_argument(f"--loop.{name}", type=dict[str, Any] | str | None, default=None, help=what)
    run.deep += ("loop.algorithm", *(f"loop.{name}" for name in _OF_LOOP), "model.lora", "model.init_args")
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


def _add_model_arguments(run: Parser) -> None:
    """Those of a classifier, of a causal language model, and of a class of one's own."""
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
    run.add_argument(
        "--model.class_path",
        type=str | None,
        default=None,
        help="the class of one's own LightningModule, my_module.MyModule; of the other flags --model.name (whose tokens it "
        "reads) and --model.seed are left",
    )
    run.add_argument(
        "--model.init_args",
        type=dict[str, Any] | None,
        default=None,
        help="what that class is built with; they are flags, too: --model.init_args.width 64",
    )


def add_import_argument(found: Parser) -> None:
    """Give a parser the flag that names modules of one's own."""
    what = "a module of one's own that registers tasks, splits, models or algorithms; repeatable"
    found.add_argument(IMPORT, type=list[str] | str | None, default=None, help=what)


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
    """
    parser = _run_parser()
    named = in_configuration(values, where)
    try:
        parser.check_content(named, where)
        parser.where = where
        found = parser.checked(parser.parse_object(named))
    except Refusal as refusal:
        raise Refused(refusal.text, where) from refusal
    finally:
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
    found["loop"]["options"]["imports"] = imports_of(options)
    import_modules(found["loop"]["options"]["imports"], IMPORT)
    with flags("model"):
        found["model"] = _model(found["model"])
    with flags("loop"):
        algorithm = algorithm_of(found["loop"]["algorithm"])
        found["loop"]["algorithm"] = specification_of(algorithm)
        check_plain("algorithm", found["loop"]["algorithm"])
        found["loop"]["faults"] = plain_faults(faults_of(found["loop"]["faults"]))
        found["loop"]["privacy"] = plain_privacy(privacy_with(found["loop"]["privacy"], algorithm))
        found["loop"]["secure_sums"] = plain_secure(secure_of(found["loop"]["secure_sums"]))
    if found["data"]["num_clients"] == 1 and found["data"]["split"] in WHOLE:
        found["data"] |= {"split": "iid", **DEFAULTS}
    found["data"] = {key: value for key, value in found["data"].items() if value is not None or key not in DEFAULTS}
    return found


def imports_of(options: Namespace) -> list[str]:
    """The modules of one's own that a run imports, each once."""
    return list(dict.fromkeys([*options.loop.options.imports, *listed(options["import"])]))


def _model(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the module: of a class of one's own, or those of ours.

    Raises:
        UsageError: a flag of ours for a class of one's own.
    """
    if options["class_path"] is None:
        if options["init_args"] is not None:
            raise UsageError("init_args", options["init_args"], "nothing without class_path")
        lora = lora_of(options["lora"])
        ours = {name: value for name, value in options.items() if name not in ("class_path", "init_args")}
        return ours | {"lora": None if lora is None else lora.plain()}
    plain = _run_parser().get_defaults()["model"].as_dict()
    for name, value in options.items():
        if name not in _OF_OWN and value != plain[name]:
            allowed = f"{shown(plain[name])}, beside class_path; what one's own class is built with is in init_args"
            raise UsageError(name, value, allowed)
    return {name: options[name] for name in _OF_OWN}


def name_of(arguments: Mapping[str, Mapping[str, Any]]) -> str:
    """The name of a run in a directory of runs: eight hexadecimal digits of its complete configuration."""
    return fingerprint(settled(without(arguments, KEPT)))
