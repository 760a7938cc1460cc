"""The command line: `fedtune run`, `sweep`, `report` and `describe`."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ActionConfigFile, Namespace

from fedtune.errors import RunError, UsageError

if TYPE_CHECKING:
    from fedtune.options import Parser

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit code 2: a value that cannot be used, or a run that had to stop; 130: interrupted; 1: a
    sweep with failed runs."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = _show_warning
    from fedtune.options import STOPPED, stop

    hint = ""
    try:
        parser = _parser()
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # after the import, which sets it
        options = parser.parse_args(arguments)
        command = options.subcommand
        kept = options[command].get("run_dir") or options[command].get("runs_dir")
        if kept:
            hint = f"; the same command goes on from the last complete round in {kept}"
        {"run": _run, "sweep": _sweep, "report": _report, "describe": _describe}[command](options[command])
    except (UsageError, RunError) as error:
        stop(STOPPED, " ".join(str(error).split()))
    except KeyboardInterrupt:
        stop(INTERRUPTED, f"interrupted{hint}")


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """One line for a warning of ours; other libraries' warnings are not for the user of a command."""
    if category is UserWarning and "fedtune" in (_[0] if _ else ""):
        print(f"fedtune: {message}", file=sys.stderr)


def _parser() -> Parser:
    from fedtune.datamodule import FederatedDataModule
    from fedtune.options import Parser, run_parser

    parser = Parser(
        prog="fedtune", description="Federated fine-tuning of language models on text classification.", allow_abbrev=False
    )
    commands = parser.add_subcommands(required=True)
    commands.add_subcommand("run", run_parser(), help="one federated run")

    sweep = Parser(
        description="A grid of runs from a sweep file as W&B reads it, too. It goes on where it was.", allow_abbrev=False
    )
    sweep.add_argument("file", type=str, help="YAML file: method, parameters (value, values, distribution; nested)")
    sweep.add_argument("--runs_dir", type=str, default="runs/sweep", help="directory of the runs")
    sweep.add_argument("--workers", type=int, default=1, help="processes; threads, and GPUs, are divided among them")
    sweep.add_argument("--only", type=str, action="append", default=[], help="take a part of the grid: key=value, repeatable")
    sweep.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="print the grid and an estimate of the time, run nothing"
    )
    sweep.add_argument("--wandb", action="store_true", help="mirror to W&B: as a W&B sweep with a key, else offline")
    commands.add_subcommand("sweep", sweep, help="a grid of runs")

    report = Parser(description="Tables, curves and one page from the records of many runs.", allow_abbrev=False)
    report.add_argument("runs_dir", type=str, help="directory with runs, at any depth")
    report.add_argument(
        "--out", type=str | None, default=None, help="where the report goes; the directory of the runs by default"
    )
    commands.add_subcommand("report", report, help="tables, curves and one page")

    describe = Parser(description="The client split, as a table and a picture.", allow_abbrev=False)
    describe.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the values below")
    describe.add_class_arguments(FederatedDataModule, "data", skip={"model"})
    describe.add_argument("--model.name", type=str, default="minilm", help="the model whose tokenizer counts the tokens")
    describe.add_argument("--picture", type=str, default="split.png", help="where the picture goes")
    commands.add_subcommand("describe", describe, help="the client split as a table and a picture")
    return parser


def _run(options: Namespace) -> None:
    from fedtune.options import fit, name_of, resolved

    arguments = resolved(options)
    run_dir = options.run_dir
    if run_dir is None and options.runs_dir is not None:
        run_dir = str(Path(options.runs_dir) / name_of(arguments))
    loop = fit(arguments, run_dir=run_dir, logger=options.logger)
    shown = ("accuracy", "macro_f1", "majority_accuracy", "local_accuracy", "centralised_accuracy")
    values = [f"{name} {loop.summary[name]:.3f}" for name in shown if loop.summary.get(name) is not None]
    print(f"test part: {'  '.join(values)}")
    if loop.run_dir:
        print(f"records, weights and curves: {Path(loop.run_dir).resolve()}")


def _sweep(options: Namespace) -> None:
    from fedtune import grid, runner, wandb_sweep

    sweep = grid.read(options.file, options.only)
    if options.dry_run:
        runner.plan(sweep, Path(options.runs_dir), options.workers)
    elif options.wandb and wandb_sweep.online():
        wandb_sweep.run(options.file, options.runs_dir, options.workers, options.only)
    else:
        logger = "wandb" if options.wandb else "none"
        failed = runner.run(sweep, Path(options.runs_dir), options.workers, logger)
        if failed:
            raise SystemExit(1)


def _report(options: Namespace) -> None:
    from fedtune.report import report

    report(Path(options.runs_dir), Path(options.out or options.runs_dir))


def _describe(options: Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from fedtune.datamodule import FederatedDataModule
    from fedtune.figures import plot_split
    from fedtune.options import flags

    with flags("data"):
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
