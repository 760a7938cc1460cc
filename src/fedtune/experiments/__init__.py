"""The files that come with the package, by a name like `fedtune:paper`: sweeps, and configurations of a run."""

from __future__ import annotations

import re
from pathlib import Path

from fedtune.errors import one_of

PREFIX = "fedtune:"
_FOLDER = Path(__file__).parent


def located(file: str, argument: str) -> str:
    """The path of a file that comes with the package; any other path as it is.

    Args:
        file: a path, or `fedtune:NAME`.
        argument: what takes it: "--config" takes configurations of a run, anything else takes sweeps.

    Raises:
        UsageError: there is no file of that name and kind; the names are listed.

    >>> located("mine.yaml", "--config"), Path(located("fedtune:paper", "sweep file")).name
    ('mine.yaml', 'paper.yaml')
    """
    name = str(file)
    if not name.startswith(PREFIX):
        return name
    known = shipped(sweeps=argument != "--config")
    if name not in known:
        raise one_of(argument, name, known)
    return str(known[name])


def shipped(sweeps: bool) -> dict[str, Path]:
    """Name -> path, of the sweeps that come with the package, or of its configurations of a run."""
    files = {
        f"{PREFIX}{path.relative_to(_FOLDER).with_suffix('').as_posix()}": path for path in sorted(_FOLDER.rglob("*.yaml"))
    }
    return {name: path for name, path in files.items() if sweeps == bool(re.search("^method:", path.read_text("utf-8"), re.M))}
