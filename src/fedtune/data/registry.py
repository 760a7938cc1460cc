"""The registry `TASKS`: a name and the function that builds the task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fedtune.data.authors import authors
from fedtune.data.hilmkil import agnews, imdb, spooky_author, yelp
from fedtune.data.task import TextTask
from fedtune.errors import UsageError, one_of

TASKS: dict[str, Callable[..., TextTask]] = {
    "authors": authors,
    "imdb": imdb,
    "yelp": yelp,
    "agnews": agnews,
    "spooky_author": spooky_author,
    "csv": TextTask.from_csv,
    "hub": TextTask.from_hub,
}


def load_task(task: str | TextTask, options: Mapping[str, Any] | None = None) -> TextTask:
    """The task itself, or the one that `TASKS` builds under that name with `options` as keyword arguments.

    Raises:
        UsageError: no such task, an option it does not know or lacks, and all that the builder refuses.
    """
    if isinstance(task, TextTask):
        return task
    if task not in TASKS:
        raise one_of("task", task, TASKS)
    parameters = inspect.signature(TASKS[task])
    try:
        parameters.bind(**(options or {}))
    except TypeError as error:
        allowed = f"the arguments of task {task!r}: {', '.join(parameters.parameters) or 'none'} ({error})"
        raise UsageError("task_options", dict(options or {}), allowed) from error
    try:
        return TASKS[task](**(options or {}))
    except UsageError as error:
        if error.argument in parameters.parameters and error.argument != "folder":
            raise UsageError(f"task_options.{error.argument}", error.came, error.allowed) from error
        raise
