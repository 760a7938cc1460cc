"""Commands as functions: a sweep and a report from Python, as `fedtune sweep` and `fedtune report` do them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.errors import at_least
from fedtune.runs.own import import_modules


def sweep(
    file: str | Path | Mapping[str, Any],
    runs_dir: str | Path = "runs/sweep",
    workers: int = 1,
    only: Sequence[str] = (),
    dry_run: bool = False,
    wandb: bool = False,
    imports: Sequence[str] = (),
) -> int:
    """Run what is not finished yet of a sweep, as `fedtune sweep`; `fedtune.read_runs(runs_dir)` has the results.

    Args:
        file: a sweep file, its content as a dictionary, or a sweep that comes with fedtune: "fedtune:paper".
        runs_dir: the directory of the runs.
        workers: processes; threads, and GPUs, are divided among them.
        only: a part of the grid: "key=value" each.
        dry_run: print the grid and an estimate of the time, run nothing.
        wandb: mirror to W&B: as a W&B sweep with a key, else offline.
        imports: modules of one's own that register what the runs use. The runs are processes of their own: they know what such
            a module registers, and not what a notebook does.

    Returns:
        the number of runs that failed.

    Raises:
        UsageError: the file cannot be read, or says what no sweep can be made of.
        RunError: W&B refused the sweep, or what was proposed cannot be read.
    """
    from fedtune.sweeps import grid, runner, wandb_agents
    from fedtune.sweeps.files import said_of

    at_least("workers", workers, 1)
    import_modules(imports, "imports")
    folder = Path(runs_dir)
    if wandb and not dry_run and wandb_agents.online():
        return wandb_agents.run(file, str(runs_dir), workers, only, imports)
    found = grid.read(file, only, imports)
    if dry_run:
        grid.check_cells(found, said_of(file))
        runner.plan(found, folder, found.at_a_time(workers))
        return 0
    return runner.run(found, folder, found.at_a_time(workers), "wandb" if wandb else "none")


def report(runs_dir: str | Path, out: str | Path | None = None) -> Path | None:
    """Write tables, curves and one page about the runs below a directory, as `fedtune report`.

    Args:
        runs_dir: runs in it are found at any depth; or a tables.csv of theirs, which becomes Markdown tables.
        out: where the report goes; by default `runs_dir`, or "report" below it where that is a run itself.

    Returns:
        the directory of the report: tables.md, tables.csv, curves.png, curves.svg, report.html, and bytes.png where clients
        send differently many; None where the tables of a tables.csv were printed.

    Raises:
        UsageError: there is no run that can be read, or `out` cannot be written.
    """
    from fedtune.reports.report import report as written

    return written(Path(runs_dir), None if out is None else Path(out))
