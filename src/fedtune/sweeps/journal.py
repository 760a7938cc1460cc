"""What a Bayesian sweep has proposed: one line a cell, in the sweep's folder. How the runs went is in their directories."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fedtune.errors import RunError
from fedtune.files import read_lines

_NAME = re.compile("[0-9a-f]{8}")


def proposals(file: Path) -> list[dict[str, Any]]:
    """The lines of a journal: `number` (1, 2 and so on), `run` (the directory) and `at` (parameter -> where on its axis).

    Raises:
        RunError: a line is none of these, or the file cannot be read.
    """
    lines = read_lines(file)
    for number, line in enumerate(lines, start=1):
        run, at = line.get("run"), line.get("at")
        if line.get("number") != number or not isinstance(run, str) or not _NAME.fullmatch(run) or not isinstance(at, dict):
            raise RunError(f"{file}, line {number}: not proposal {number} of a sweep")
    return lines


def directories(file: Path | None) -> list[str]:
    """The directories of the runs in a journal; none without a journal."""
    return [] if file is None else [line["run"] for line in proposals(file)]
