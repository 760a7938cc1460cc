"""The command line: `fedtune run`, `sweep`, `report`, `describe`, `export` and `help`."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from fedtune.errors import Elsewhere, FedtuneWarning, RenamedWarning, RunError, UsageError, at_least
from fedtune.files import printable
from fedtune.runtimes.environment import has_others
from fedtune.version import __version__

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from fedtune.runs.parser import Parser

STOPPED, INTERRUPTED = 2, 130
_LONGEST = 600  # characters of a line


def stop(code: int, text: str, error: BaseException | None = None) -> NoReturn:
    """End the command with one line; of several processes of a run one says it."""
    if isinstance(error, Elsewhere):
        code = error.code
    before: str | None = ""
    if has_others():
        from fedtune.runtimes.processes import voice

        before = voice(error or RunError(text), code)
    if before is not None:
        print(f"fedtune: {before}{printable(text, _LONGEST)}", file=sys.stderr)
    raise SystemExit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit code 2: a value that cannot be used, or a run that had to stop; 130: interrupted; 1: a
    sweep with failed runs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if has_others():  # torch's own lines, some with C++ frames, when another process is gone; read when torch is imported
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.showwarning = _show_warning
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["help"]:
        given = [*given[1:2], "--help"]
    name = given[0] if given and given[0] in _COMMANDS else _choose(given)
    hint = ""
    try:
        options = _options(name, given)
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # after the import, which sets it
        kept = options.get("run_dir") or options.get("runs_dir")
        if kept:
            hint = f"; the same command goes on from the last complete round in {kept}"
        _COMMANDS[name].act(options)
    except (UsageError, RunError) as error:
        stop(STOPPED, " ".join(str(error).split()), error)
    except KeyboardInterrupt as error:
        stop(INTERRUPTED, f"interrupted{hint}", error)


def _options(name: str, given: list[str]) -> Namespace:
    """The values of a command's flags; modules of one's own are imported."""
    from fedtune.runs.own import import_modules
    from fedtune.runs.parser import Refusal
    from fedtune.runs.words import listed

    try:
        options = parser(name).parse_args(given[1:])
    except Refusal as refusal:
        if not has_others(and_follows=True):  # the command line is the same on all ranks
            print(f"fedtune: {refusal.text}", file=sys.stderr)
        raise
    options["words"] = given
    import_modules(listed(options["import"]), "--import")
    return options


def _choose(given: Sequence[str]) -> NoReturn:
    """Say what commands there are; what they are made of is imported when one is chosen."""
    lines = "\n".join(f"  {name:9} {command.what}" for name, command in _COMMANDS.items())
    if given and given[0] in ("-V", "--version"):
        print(f"fedtune {__version__}")
        raise SystemExit(0)
    if given and given[0] not in ("-h", "--help"):
        near = difflib.get_close_matches(given[0], _COMMANDS, n=1) or list(_COMMANDS)
        stop(STOPPED, f"{given[0]}: no such command; nearest: {', '.join(near)}")
    usage = "usage: fedtune COMMAND [--help]\n       fedtune --version"
    text = f"{usage}\n\nFederated fine-tuning of language models on text classification.\n\n{lines}"
    print(text, file=sys.stdout if given else sys.stderr)
    raise SystemExit(0 if given else STOPPED)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """One line for a warning of ours; other libraries' warnings are not for the user of a command."""
    if issubclass(category, (FedtuneWarning, RenamedWarning)) and not has_others(and_follows=True):
        print(f"fedtune: {message}", file=sys.stderr)


def parser(name: str) -> Parser:
    """The parser of a command."""
    from fedtune.runs.flags import add_import_argument
    from fedtune.runs.parser import Parser

    command = _COMMANDS[name]
    found = Parser(prog=f"fedtune {name}", description=command.description, allow_abbrev=False)
    command.fill(found)
    if name not in ("run", "describe"):  # those have it among the arguments of a run
        add_import_argument(found)
    return found


def _fill_run(found: Parser) -> None:
    from fedtune.runs.flags import add_run_arguments

    add_run_arguments(found)
    found.add_argument(
        "--workers", type=int, default=1, help="processes on this machine that share the clients of a round, and the threads"
    )


def _fill_sweep(found: Parser) -> None:
    what = "YAML file: method, parameters (value, values, distribution; nested); or fedtune:NAME, one that comes with fedtune"
    found.add_argument("file", type=str, help=what)
    found.add_argument("--runs_dir", type=str, default="runs/sweep", help="directory of the runs")
    found.add_argument("--workers", type=int, default=1, help="processes; threads, and GPUs, are divided among them")
    found.add_argument(
        "--only",
        type=str,
        action="append",
        default=[],
        help="take a part of the grid: key=value; again: another key, or one more value",
    )
    found.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="print the grid and an estimate of the time, run nothing"
    )
    found.add_argument("--wandb", action="store_true", help="mirror to W&B: as a W&B sweep with a key, else offline")


def _fill_report(found: Parser) -> None:
    found.add_argument("runs_dir", type=str, help="directory with runs, at any depth; or a tables.csv, to print it")
    found.add_argument(
        "--out", type=str | None, default=None, help="where the report goes; the directory of the runs by default"
    )


def _fill_describe(found: Parser) -> None:
    from fedtune.runs.flags import add_run_arguments

    add_run_arguments(found)  # those of a run, whose data are shown; of the model its name alone matters
    found.of_data = True
    found.add_argument("--picture", type=str | None, default=None, help="draw it, too, into this file (png, svg, pdf)")
    found.add_argument(
        "--features", action="store_true", help="also how fast the classifier would begin to learn: a forward and backward pass"
    )


def _fill_export(found: Parser) -> None:
    found.add_argument("run", type=str, help="directory of a run, with config.yaml and checkpoints")
    found.add_argument("folder", type=str, help="where the model goes: a directory that is empty, or not there yet")
    found.add_argument(
        "--which", type=str, default="last", help="last, or best: the round by the run's monitor, where its weights are kept"
    )
    found.add_argument(
        "--label_names", type=list[str] | None, default=None, help="names of the classes, where the run does not know them"
    )
    found.add_argument(
        "--merge", action="store_true", help="of a run with low-rank adapters: the whole model, they being added to its weights"
    )
    found.add_argument(
        "--client", type=int | None, default=None, help="whose model is meant, where clients have models of their own"
    )


def _run(options: Namespace) -> None:
    from fedtune.runs.building import fit, flags
    from fedtune.runs.flags import name_of, resolved
    from fedtune.runs.launcher import launch
    from fedtune.runtimes.processes import ranks_of
    from fedtune.sweeps.worker import recorded

    arguments = resolved(options)
    at_least("--workers", options.workers, 1)
    if options.workers > 1 and not has_others():
        return launch(options.words, options.workers, options.loop.runtime)
    with flags("loop"):
        ranks = ranks_of(options.loop.runtime)
    if options.workers not in (1, ranks.size):
        raise UsageError("--workers", options.workers, f"nothing, or {ranks.size}, which is how many were started")
    named = options.run_dir is None and options.runs_dir is not None
    run_dir = str(Path(options.runs_dir) / name_of(arguments)) if named else options.run_dir
    if named and ranks.leads:
        loop = recorded(arguments, Path(run_dir), logger=options.logger)
    else:
        loop = fit(arguments, run_dir=run_dir, logger=options.logger)
    if not ranks.leads:
        return None
    shown = ["accuracy", "macro_f1", "majority_accuracy", "local_accuracy", "centralised_accuracy"]
    if loop.summary.get("accuracy") is None:
        shown = ["loss_nats", "perplexity", "token_accuracy", "exact_match", "local_loss_nats", "centralised_loss_nats"]
    known = [name for name in shown if loop.summary.get(name) is not None]
    known = known or [name for name in loop.summary if name.startswith("test_")]  # of a module of one's own
    values = [f"{name} {loop.summary[name]:.3f}" for name in known if isinstance(loop.summary[name], float)]
    print(f"test part: {'  '.join(values)}")
    if loop.run_dir:
        print(f"records, weights and curves: {Path(loop.run_dir).resolve()}")
    return None


def _sweep(options: Namespace) -> None:
    from fedtune.commands import sweep
    from fedtune.runs.words import listed

    with _flagged("workers"):
        names = ("file", "runs_dir", "workers", "only", "dry_run", "wandb")
        failed = sweep(**{name: options[name] for name in names}, imports=listed(options["import"]))
    if failed:
        raise SystemExit(1)


def _report(options: Namespace) -> None:
    from fedtune.commands import report

    report(options.runs_dir, options.out)


def _describe(options: Namespace) -> None:
    from fedtune.data.classification import FederatedDataModule
    from fedtune.runs.building import flags
    from fedtune.runs.flags import imports_of
    from fedtune.runs.holders import show
    from fedtune.runs.own import import_modules

    import_modules(imports_of(options), "--import")
    given = options.data.as_dict() | ({} if options.seed is None else {"seed": options.seed})
    with flags("data"):
        data = FederatedDataModule(**given, model=options.model.name)
        data.setup()
    show(data, options.picture)
    if options.features:
        from fedtune.runs.building import build
        from fedtune.runs.flags import resolved
        from fedtune.runs.speeds import show_speed

        module, data, _ = build(resolved(options), whole=False)
        show_speed(module, data)


def _export(options: Namespace) -> None:
    from fedtune.runs.export import export

    with _flagged("which", "label_names", "merge", "client"):
        folder = export(options.run, options.folder, options.which, options.label_names, options.merge, options.client)
    if (folder / "adapter_config.json").exists():
        print(f"adapters and head: {folder.resolve()}; its README.md says how peft opens them (--merge writes a whole model)")
    else:
        tags = ("text-classification", "text-generation")
        tag = tags["pipeline_tag: text-generation" in (folder / "README.md").read_text()]
        print(f"model: {folder.resolve()}; transformers.pipeline('{tag}', model=...) opens it")


@contextlib.contextmanager
def _flagged(*names: str) -> Iterator[None]:
    """Name the flag in errors about arguments of a function that are flags of its command."""
    try:
        yield
    except UsageError as error:
        if error.argument not in names:
            raise
        raise error.renamed(lambda name: f"--{name}") from error


class _Command(NamedTuple):
    what: str
    description: str
    fill: Callable[[Parser], None]
    act: Callable[[Namespace], None]


_COMMANDS = {
    "run": _Command(
        "one federated run",
        "One federated run, beside its baselines. An interrupted run goes on where it stopped.",
        _fill_run,
        _run,
    ),
    "sweep": _Command(
        "a grid of runs",
        "A grid of runs from a sweep file as W&B reads it, too. It goes on where it was.",
        _fill_sweep,
        _sweep,
    ),
    "report": _Command(
        "tables, curves and one page", "Tables, curves and one page from the records of many runs.", _fill_report, _report
    ),
    "describe": _Command(
        "who holds what: the split", "The client split, as a table; with --picture also drawn.", _fill_describe, _describe
    ),
    "export": _Command(
        "a run's model for Transformers",
        "The model of a run as a folder that Transformers opens: weights, tokenizer, names of the classes. Of a run with "
        "low-rank adapters these and the head, as a folder that peft opens.",
        _fill_export,
        _export,
    ),
}


if __name__ == "__main__":
    main()
