"""The registry `TASKS`: a name and the function that builds the task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fedtune.data.author_instructions import author_instructions
from fedtune.data.authors import authors
from fedtune.data.hilmkil import agnews, imdb, spooky_author, yelp
from fedtune.data.instructions import InstructionTask
from fedtune.data.task import TextTask
from fedtune.errors import UsageError, one_of

TASKS: dict[str, Callable[..., TextTask | InstructionTask]] = {
    "authors": authors,
    "author_instructions": author_instructions,
    "imdb": imdb,
    "yelp": yelp,
    "agnews": agnews,
    "spooky_author": spooky_author,
    "csv": TextTask.from_csv,
    "hub": TextTask.from_hub,
    "instructions": InstructionTask.from_file,
    "instructions_hub": InstructionTask.from_hub,
}
_TASK = (TextTask, InstructionTask)


def load_task(task: str | TextTask | InstructionTask, options: Mapping[str, Any] | None = None) -> TextTask | InstructionTask:
    """The task itself, or the one that `TASKS` builds under that name with `options` as keyword arguments.

    Raises:
        UsageError: no such task, an option it does not know or lacks, and all that the builder refuses.
    """
    if options is not None and not (isinstance(options, Mapping) and all(isinstance(name, str) for name in options)):
        raise UsageError("task_options", options, "a dictionary of names and values")
    if isinstance(task, _TASK):
        if options:
            raise UsageError(
                "task_options", dict(options), f"no options (nor a folder), as the task {task.name} is there already"
            )
        return task
    if not isinstance(task, str) or task not in TASKS:
        raise one_of("task", task, TASKS)
    parameters = inspect.signature(TASKS[task])
    known = list(parameters.parameters)
    try:
        parameters.bind(**(options or {}))
    except TypeError as error:
        unknown = next((name for name in options or {} if name not in known), "")
        names = one_of("", unknown, known).allowed or "none"  # the nearest first
        raise UsageError("task_options", dict(options or {}), f"the arguments of task {task!r}: {names} ({error})") from error
    try:
        found = TASKS[task](**(options or {}))
    except UsageError as error:
        if error.argument in parameters.parameters and error.argument != "folder":
            raise UsageError(f"task_options.{error.argument}", error.came, error.allowed) from error
        raise
    if not isinstance(found, _TASK):
        raise UsageError(
            "task",
            task,
            f"a name whose builder returns a TextTask or an InstructionTask (it returned a {type(found).__name__})",
        )
    return found
