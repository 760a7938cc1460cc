"""One's own code by its name: modules that register tasks, splits, models and algorithms, and the class of a module."""

from __future__ import annotations

import importlib
import inspect
import keyword
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import pytorch_lightning as pl

from fedtune.errors import UsageError, one_of
from fedtune.files import said
from fedtune.randomness import seeded

_NAME = "a name as in Python's import statement, like my_module or my_package.tasks"
_FOLLOWS = ("name", "num_labels", "label_names")  # arguments that come from --model.name and the task, where they are not given


def import_modules(names: Sequence[str], argument: str) -> None:
    """Import modules, which may register what a run uses; one that is imported already stays as it is.

    They are searched as by `python -m`: in the working directory, and where Python finds its packages.

    Args:
        argument: what the error names.

    Raises:
        UsageError: no such module, or one that cannot be imported.
    """
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UsageError(argument, names, f"a list, each {_NAME}")
    for name in names:
        _imported(name, argument)


def check_own(class_path: str, given: Mapping[str, Any] | None) -> type[pl.LightningModule]:
    """The class of one's own module, and whether it takes such arguments.

    Args:
        class_path: `my_module.MyModule`.
        given: its arguments; of `name`, `num_labels` and `label_names` those that it has may be left out.

    Raises:
        UsageError: no such class, or none of a `LightningModule`; arguments that it does not have, or lacks.
    """
    place, _, name = class_path.rpartition(".")
    if not place:
        raise UsageError("class_path", class_path, "module and class, like my_module.MyModule")
    found = getattr(_imported(place, "class_path"), name, None)
    if found is None:
        classes = [key for key, value in vars(sys.modules[place]).items() if _is_module(value)]
        raise one_of("class_path", class_path, [f"{place}.{one}" for one in classes] or ["a class of a LightningModule"])
    if not _is_module(found):
        raise UsageError("class_path", class_path, "a class of a LightningModule")
    parameters, options = inspect.signature(found).parameters, dict(given or {})
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        for option in options:
            if option not in parameters:
                raise one_of(f"init_args.{option}", options[option], list(parameters) or ["nothing"])
    for option, one in parameters.items():
        needed = one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        if needed and option not in options and option not in _FOLLOWS:
            raise UsageError("init_args", options, f"values for all that {class_path} needs: {option} is missing")
    return found


def build_own(model: Mapping[str, Any], label_names: Sequence[str]) -> pl.LightningModule:
    """The module of one's own class; its fresh weights are drawn with the seed of the model.

    Args:
        model: `class_path`, `name` (whose tokens the data are), `seed`, and `init_args`, which a configuration leaves out where
            there are none.
        label_names: of the classes of the data, if there are any.

    Raises:
        UsageError: as `check_own`, and where the class itself refuses its arguments.
    """
    given = model.get("init_args")
    kind, options = check_own(model["class_path"], given), dict(given or {})
    known = inspect.signature(kind).parameters
    follows = {"name": model["name"], "num_labels": len(label_names), "label_names": list(label_names)}
    options = {name: value for name, value in follows.items() if name in known} | options
    try:
        with seeded(model["seed"], "model"):
            return kind(**options)
    except UsageError as error:
        raise UsageError(f"init_args.{error.argument}", error.came, error.allowed) from error
    except Exception as error:  # of code that is not ours; the line says where
        allowed = f"values by which {model['class_path']} can be built ({_of(error)})"
        raise UsageError("init_args", given, allowed) from error


def _imported(name: str, argument: str) -> ModuleType:
    parts = name.split(".")
    if name.endswith(".py") or not all(part.isidentifier() and not keyword.iskeyword(part) for part in parts):
        hint = f" (here: {name[:-3].replace('/', '.')})" if name.endswith(".py") and "/." not in name else ""
        raise UsageError(argument, name, _NAME + hint)
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise UsageError(argument, name, f"a module that can be imported ({_of(error)})") from error
        allowed = f"a module in {os.getcwd()}, or one that is installed ({error.msg})"
        raise UsageError(argument, name, allowed) from error
    except Exception as error:  # of code that is not ours; the line says where
        raise UsageError(argument, name, f"a module that can be imported ({_of(error)})") from error


def _is_module(found: Any) -> bool:
    return inspect.isclass(found) and issubclass(found, pl.LightningModule)


def _of(error: Exception) -> str:
    """An error of one's own code, and where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f", {os.path.basename(last.filename)}, line {last.lineno}" if not isinstance(error, SyntaxError) else ""
    return f"{type(error).__name__}: {said(error)}{where}"
