"""Runs of a sweep whose texts or model have changed since: they are put aside and done again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.errors import RunError, UsageError
from fedtune.runs.building import content_of_run
from fedtune.storage.config import dotted, read_config
from fedtune.storage.locks import is_locked
from fedtune.sweeps.cell import Cell

_CONTENT = ("task", "task_options", "folder", "tokenizer", "max_length", "limit")  # of the data: what their content depends on


def stale(cells: Sequence[Cell], folder: Path) -> dict[str, str]:
    """Directory name -> what differs, of the cells that have a directory with another content than they would have now.

    A content that cannot be read now says nothing about a run that has it.
    """
    now: dict[str, dict[str, Any] | None] = {}
    found = {}
    for cell in cells:
        before = _content(folder / cell.name / "config.yaml")
        if before is None:
            continue
        data, model = cell.arguments["data"], cell.arguments["model"]
        own = {name: model.get(name) for name in ("name", "init", "class_path")}
        key = json.dumps([{name: data[name] for name in _CONTENT}, own], sort_keys=True, default=str)
        if key not in now:
            try:
                now[key] = content_of_run(cell.arguments)
            except (UsageError, RunError):
                now[key] = None
        current = now[key]
        before = {name: before.get(name) for name in current or ()}
        if current is not None and current != before:
            old, new = dotted(before), dotted(current)
            differ = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            found[cell.name] = ", ".join(f"content.{name}: {old.get(name)} -> {new.get(name)}" for name in differ)
    return found


def put_aside(folder: Path, name: str) -> Path | None:
    """Rename a run's directory, so that a new one can take its place; None while somebody works in it."""
    if is_locked(folder / name):
        return None
    number = 1
    while (folder / f"{name}.stale-{number}").exists():
        number += 1
    place = folder / f"{name}.stale-{number}"
    os.rename(folder / name, place)
    return place


def _content(file: Path) -> dict[str, Any] | None:
    try:
        found = read_config(file).get("content")
        return {key: value for key, value in found.items() if key != "label_names"} if isinstance(found, dict) else None
    except RunError:  # the run itself says so
        return None
