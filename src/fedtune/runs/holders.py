"""Who holds what: the client split as a table and a picture, as `fedtune describe` shows it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.table import Table

from fedtune.data.holdings import most_frequent
from fedtune.data.task import TASK_PARTS
from fedtune.errors import UsageError
from fedtune.files import printable, said
from fedtune.runs.displays import new_console
from fedtune.runs.figures import plot_split

_LONGEST, _NAME = 600, 60  # characters of a line, and of a name in a table


def show(data: Any, picture: str | None = None) -> None:
    """Print the split of a `FederatedDataModule`, a row a client, and draw it where that is wanted.

    Args:
        picture: the file; its suffix chooses the format. One that is there is replaced, and a line says so.

    Raises:
        UsageError: the picture cannot be written.
    """
    rows = data.describe()
    title = f"{printable(data.task.name, _NAME)}, split {data.hparams['split']}, {data.num_clients} clients"
    lines = [printable(data.left_out, _LONGEST)] * bool(data.left_out)
    table = Table(title=title)
    columns = [name for name in rows[0] if name not in ("labels", "authors")]
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    counted = [name for name in ("labels", "authors") if name in rows[0]]
    if len(counted) > 1 and all(row["authors"] == row["labels"] for row in rows):  # as in author identification
        counted.pop()
    for name in counted:
        table.add_column(f"{name} (most frequent)")
    for row in rows:
        plain = [f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for name in columns]
        table.add_row(*plain, *(most_frequent(row[name]) for name in counted))
    new_console(markup=False, emoji=False).print(table)  # names are as they are
    print(*lines, _sizes(data), f"source: {printable(data.task.source, _LONGEST)}", sep="\n")
    if picture is not None:
        _draw(rows, picture, title)


def _sizes(data: Any) -> str:
    """How many texts each part of a task has, and of those for training how many the clients have."""
    what, sizes = (
        "conversations" if data.kind == "instructions" else "texts",
        [len(data.task.parts[part]) for part in TASK_PARTS],
    )
    training, validation, test = (f"{size:,}" for size in sizes)
    held = sum(map(len, data.client_indices))
    taken = f" (the clients have {held:,} of them)" if held < sizes[0] else ""
    return f"{what}: {training} for training{taken}, {validation} for validation, {test} for the test"


def _draw(rows: Any, picture: str, title: str) -> None:
    """Write the picture, and say where it is.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        replaced = os.path.lexists(picture)
        plot_split(rows, picture, title)
    except Exception as error:  # whatever it is: each kind of picture has a library of its own
        raise UsageError("--picture", picture, f"a file that can be written as a picture ({said(error)})") from error
    print(f"picture: {printable(Path(picture).resolve())}{', in place of the file that was there' * replaced}")
