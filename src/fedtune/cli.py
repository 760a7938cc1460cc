"""The command line: `fedtune run` and `fedtune describe`. Every flag is a constructor argument."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from fedtune.errors import RunError, UsageError
from fedtune.tracking import LOGGERS

STOPPED, INTERRUPTED = 2, 130


class _Parser(ArgumentParser):
    """A parser whose every error is one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(message.split())
        unknown = re.match(r"[Uu]nrecognized arguments: (--\S+)", text)
        if unknown:
            came = unknown.group(1).split("=")[0]
            near = difflib.get_close_matches(came, [flag for action in self._actions for flag in action.option_strings], n=3)
            text = f"{came}: no such flag; nearest: {', '.join(near) or 'none, see --help'}"
        text = re.sub(r'^Parser key "([^"]+)":', r"--\1:", text)
        text = re.sub(r"Expected an? <class '(\w+)'>\.? Got value: (\S+)", r"got '\2'; allowed: \1", text)
        _stop(STOPPED, text)


def _stop(code: int, text: str) -> NoReturn:
    print(f"fedtune: {text}", file=sys.stderr)
    raise SystemExit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit code 2: a value that cannot be used, or a run that had to stop; 130: interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = _show_warning
    hint = ""
    try:
        parser = _parser()
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # after the import, which sets it
        options = parser.parse_args(arguments)
        command = options.subcommand
        if options[command].get("run_dir"):
            hint = f"; the same command goes on from the last complete round in {options[command].run_dir}"
        (_run if command == "run" else _describe)(options[command])
    except (UsageError, RunError) as error:
        _stop(STOPPED, " ".join(str(error).split()))
    except KeyboardInterrupt:
        _stop(INTERRUPTED, f"interrupted{hint}")


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """One line for a warning of ours; other libraries' warnings are not for the user of a command."""
    if category is UserWarning and "fedtune" in (_[0] if _ else ""):
        print(f"fedtune: {message}", file=sys.stderr)


def _parser() -> _Parser:
    from fedtune.datamodule import FederatedDataModule
    from fedtune.loop import FederatedLoop
    from fedtune.models import TextClassifier

    parser = _Parser(
        prog="fedtune", description="Federated fine-tuning of language models on text classification.", allow_abbrev=False
    )
    commands = parser.add_subcommands(required=True)

    run = _Parser(
        description="One federated run, beside its baselines. An interrupted run goes on where it stopped.", allow_abbrev=False
    )
    run.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the values below")
    run.add_class_arguments(FederatedDataModule, "data", skip={"model"})
    run.add_class_arguments(TextClassifier, "model", skip={"num_labels"})
    run.add_class_arguments(FederatedLoop, "loop", skip={"run_dir", "logger", "callbacks"})
    run.add_argument("--run_dir", type=str | None, default=None, help="directory of the run; nothing is written without it")
    run.add_argument("--logger", type=str, default="none", help=f"one of {', '.join(LOGGERS)}")
    for name in ("versions", "content"):
        run.add_argument(f"--{name}", type=dict | None, default=None, help="ignored: a run's config.yaml has it")
    commands.add_subcommand("run", run, help="one federated run")

    describe = _Parser(description="The client split, as a table and a picture.", allow_abbrev=False)
    describe.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the values below")
    describe.add_class_arguments(FederatedDataModule, "data", skip={"model"})
    describe.add_argument("--model.name", type=str, default="minilm", help="the model whose tokenizer counts the tokens")
    describe.add_argument("--picture", type=str, default="split.png", help="where the picture goes")
    commands.add_subcommand("describe", describe, help="the client split as a table and a picture")
    return parser


_FLAGS = {"data.model": "model.name", "model.model": "model.name", "loop.run_dir": "run_dir", "loop.logger": "logger"}


@contextlib.contextmanager
def _flags(part: str) -> Iterator[None]:
    """Name the flag, and not only the argument, in errors about the values of one part of the configuration."""
    try:
        yield
    except UsageError as error:
        name = f"{part}.{error.argument}"
        raise UsageError(f"--{_FLAGS.get(name, name)}", error.came, error.allowed) from error


def _run(options: Namespace) -> None:
    from fedtune.datamodule import FederatedDataModule
    from fedtune.loop import FederatedLoop
    from fedtune.models import build_classifier

    model = options.model.as_dict()
    with _flags("loop"):
        loop = FederatedLoop(**options.loop.as_dict(), run_dir=options.run_dir, logger=options.logger)
    with _flags("data"):
        data = FederatedDataModule(**options.data.as_dict(), model=model["name"])
        data.setup()
    with _flags("model"):
        if model["init"] == "random" and options.data.tokenizer is not None:
            model["vocab_size"] = model["vocab_size"] or len(data.tokenizer)
        module = build_classifier(model.pop("name"), data.num_labels, **model)
    if len(data.tokenizer) > module.network.config.vocab_size:
        allowed = f"one of at most {module.network.config.vocab_size} tokens, which {module.hparams['name']} knows"
        raise UsageError("--data.tokenizer", options.data.tokenizer, allowed)
    with _flags("loop"):
        loop.fit(module, data)
    shown = ("accuracy", "macro_f1", "majority_accuracy", "local_accuracy", "centralised_accuracy")
    values = [f"{name} {loop.summary[name]:.3f}" for name in shown if loop.summary.get(name) is not None]
    print(f"test part: {'  '.join(values)}")
    if loop.run_dir:
        print(f"records, weights and curves: {Path(loop.run_dir).resolve()}")


def _describe(options: Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from fedtune.datamodule import FederatedDataModule
    from fedtune.figures import plot_split

    with _flags("data"):
        data = FederatedDataModule(**options.data.as_dict(), model=options.model.name)
        rows = data.describe()
    title = f"{data.task.name}, split {data.hparams['split']}, {data.num_clients} clients"
    table = Table(title=title, caption=f"{len(data.task.texts)} texts in all; source: {data.task.source}")
    columns = [name for name in rows[0] if name not in ("labels", "authors")]
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    counted = ["labels"]
    if any(row.get("authors", row["labels"]) != row["labels"] for row in rows):  # in author identification they are the same
        counted.append("authors")
    for name in counted:
        table.add_column(f"{name} (most frequent)")
    for row in rows:
        plain = [f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for name in columns]
        table.add_row(*plain, *(_most_frequent(row[name]) for name in counted))
    Console().print(table)
    try:
        plot_split(rows, options.picture, title)
    except (OSError, ValueError) as error:
        raise UsageError("--picture", options.picture, f"a file that can be written as a picture ({error})") from error
    print(f"picture: {Path(options.picture).resolve()}")


def _most_frequent(counts: dict[str, int]) -> str:
    ranked = sorted(counts, key=lambda name: -counts[name])
    return f"{len(counts)}: " + ", ".join(f"{name} {counts[name]}" for name in ranked[:2])


if __name__ == "__main__":
    main()
