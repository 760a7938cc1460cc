"""What an app is set up with: a module, data and a loop, as for `FederatedLoop.fit`, from a file as `fedtune run` takes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl

from fedtune import yaml_files
from fedtune.data.classification import FederatedDataModule
from fedtune.errors import UsageError, one_of
from fedtune.runs.building import build
from fedtune.runs.flags import resolve
from fedtune.runs.loop import FederatedLoop
from fedtune.storage.config import nested

SERVER, SITE = "server", "site"
# what an app's configuration may have beside flags of `fedtune run`, and what a site may say of itself
RUN_KEYS = {"config": "config.yaml", "run_dir": "", "deadline": 3600.0, "wait": 300.0}
NODE_KEYS = ("partition-id", "client", "name", "memory")
_ASIDE = ("num-partitions",)  # what others say of a site, and nobody needs here
_SECTIONS = ("data.", "model.", "loop.", "content.")


class Parts(NamedTuple):
    """A federation, seen from the server or from a site.

    Args:
        data: on the server anything with `num_clients`, and `label_names` where there are such.
    """

    module: pl.LightningModule
    data: Any
    loop: FederatedLoop


Setup = Callable[[dict[str, Any]], tuple[pl.LightningModule, Any, FederatedLoop]]


@dataclass(frozen=True)
class Named:
    """What the server knows of data that it does not have.

    Args:
        data: as a site would read them; here nothing of them is read.
    """

    num_clients: int
    label_names: tuple[str, ...]
    data: FederatedDataModule

    @property
    def config(self) -> dict[str, Any]:
        """Of the data."""
        return self.data.config

    @property
    def tokenizer(self) -> Any:
        """It belongs to the model, not to the data."""
        return self.data.tokenizer


def run_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of an app's configuration: those of `RUN_KEYS`, and flags (`loop.max_rounds`, `seed`).

    Raises:
        UsageError: another name, or a value of another type.
    """
    found: dict[str, Any] = dict(RUN_KEYS)
    for name, value in config.items():
        key = name.replace("-", "_")
        if key in RUN_KEYS:
            seconds = isinstance(RUN_KEYS[key], float)
            if (type(value) not in (int, float) or value <= 0) if seconds else not isinstance(value, str):
                raise UsageError(name, value, "a number of seconds, above 0" if seconds else "text")
            found[key] = value
        elif name.startswith(_SECTIONS) or name in ("seed", "logger", "place"):
            found[name] = value
        else:
            raise one_of(name, value, [*RUN_KEYS, "seed", "logger"], also=", or a flag of fedtune run, as loop.max_rounds")
    return found


def node_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a site says of itself: `NODE_KEYS`, and options of the data that are its own (`data.task_options.path`).

    Raises:
        UsageError: another name.
    """
    for name, value in config.items():
        if name not in (*NODE_KEYS, *_ASIDE) and not name.startswith("data."):
            raise one_of(name, value, NODE_KEYS, also=", or an option of its own data, as data.task_options.path")
    return dict(config)


def client_of(node: Mapping[str, Any]) -> int:
    """The number of the client that a site is.

    Raises:
        UsageError: it does not say.
    """
    said = {name: node[name] for name in ("client", "partition-id") if name in node}
    if len(set(said.values())) != 1 or type(number := next(iter(said.values()))) is not int or number < 0:
        came = said or "nothing"
        raise UsageError("node-config client", came, "the number of the client that the site is, from 0: client=0")
    return number


def from_file(folder: Path) -> Setup:
    """The set-up that the configuration file of an app describes.

    Args:
        folder: where the app's files are.
    """

    def setup(config: dict[str, Any]) -> Parts:
        values = run_values({name: value for name, value in config.items() if name not in (*NODE_KEYS, *_ASIDE)})
        file = folder / values["config"]
        content = yaml_files.read(str(file), "config", "a YAML or JSON file that can be read")
        if not isinstance(content, dict):
            raise UsageError("config", str(file), "a file with names and values")
        changes = {name: value for name, value in values.items() if "." in name or name in ("seed", "logger")}
        content = _merged(nested({str(name): value for name, value in content.items()}), nested(changes))
        kept = {name: content.pop(name, None) for name in ("run_dir", "runs_dir", "logger")}
        arguments = resolve(content, values["config"])
        where = {"run_dir": values["run_dir"] or kept["run_dir"], "logger": kept["logger"] or "none"}
        if values["place"] == SITE:
            return Parts(*build(arguments, whole=False))
        names = (content.get("content") or {}).get("label_names")
        if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
            allowed = "the names of the classes in their order, which the server must know without data: {label_names: [a, b]}"
            raise UsageError(f"{values['config']}: content", content.get("content"), allowed)
        module, data, loop = build(arguments, label_names=names, **where)
        return Parts(module, Named(data.num_clients, tuple(names), data), loop)

    return setup


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, where those of `other` come last."""
    found = dict(one)
    for name, value in other.items():
        before = found.get(name)
        found[name] = _merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return found


def of_site(setup: Setup, run: Mapping[str, Any], node: Mapping[str, Any]) -> Parts:
    """The set-up of a site. Its own data are one client, whatever the federation's are divided by."""
    own = {name: value for name, value in node_values(node).items() if name.startswith("data.")}
    if own:
        own = {"data.num_clients": 1, "data.split": "iid"} | own
    return Parts(*setup({**run, **node, **own, "place": SITE}))
