"""How a run of W&B is opened: what it is called, where its files are, and whether W&B can be reached."""

from __future__ import annotations

import http.client
import os
import re
import shlex
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.errors import UsageError, one_of, warn
from fedtune.files import content, regular, said, write_text

FINISH_SECONDS = 60.0  # that the end of a run waits for W&B, unless WANDB_FINISH_TIMEOUT says otherwise
_INIT_SECONDS = 20.0  # the same of its start, and WANDB_INIT_TIMEOUT
_ANSWER_SECONDS = 5.0  # that a server has to answer at all
_GATEWAY = (407, 502, 503, 504)  # what a proxy says of a server that it does not reach
_LOG_MODEL: dict[str, bool | str] = {
    "": False,
    "false": False,
    "0": False,
    "true": True,
    "1": True,
    "end": True,
    "all": "all",
    "checkpoint": "all",
}
_PLAIN = ("LocalTraining", "Mean")  # the parts of federated averaging
_TAGGED = (("model", "name"), ("data", "task"), ("data", "split"))
_HASH = re.compile(r"[0-9a-f]{8}")  # the name of a directory that is the hash of its run's configuration
_START = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-(.+)")  # the name of a folder of W&B's: one start of a run


def import_wandb(argument: str) -> Any:
    """The package wandb. Raises `UsageError` about `argument` when it is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise UsageError(argument, "wandb", "after: pip install wandb (it is not installed)") from error
    return wandb


def log_model() -> bool | str:
    """Which checkpoints W&B gets as artifacts, as WANDB_LOG_MODEL says: none (False), the last one (True), or "all".

    Raises:
        UsageError: another value.
    """
    given = os.environ.get("WANDB_LOG_MODEL", "")
    if given.lower() not in _LOG_MODEL:
        raise one_of("WANDB_LOG_MODEL", given, [name for name in _LOG_MODEL if name])
    return _LOG_MODEL[given.lower()]


def is_online(wandb: Any) -> bool:
    """Whether runs go to W&B: its mode decides it (WANDB_MODE, or `wandb offline`), or that there is a key."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return mode in ("online", "run")
    settings = wandb.setup().settings
    return settings.mode in (None, "online", "run") and _has_key(settings)


def _has_key(settings: Any) -> bool:
    """Whether there is a key; W&B's own question would go to its server, and its older one is deprecated."""
    from requests.utils import get_netrc_auth

    known = os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.api_key
    return bool(known or get_netrc_auth(settings.base_url))


def out_of_reach(wandb: Any) -> str | None:
    """Why W&B's server does not answer; None where it does. It takes seconds at most, where W&B itself tries for a minute."""
    url = str(os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url)
    host, found = urllib.parse.urlsplit(url).hostname or url, list[str | None]()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_ANSWER_SECONDS).close()
            found.append(None)
        except urllib.error.HTTPError as error:  # it answers, unless that is what a proxy says of it
            found.append(f"{host}: {error}" if error.code in _GATEWAY else None)
        except ssl.SSLError:
            found.append(None)  # W&B may know its certificate
        except OSError as error:
            cause = getattr(error, "reason", error)
            certificate = isinstance(cause, ssl.SSLError)
            found.append(None if certificate else f"{host}: {getattr(cause, 'strerror', None) or said(error)}")
        except (ValueError, http.client.HTTPException) as error:  # no address, no answer of a server
            found.append(f"{host}: {said(error)}")

    thread = threading.Thread(target=ask, daemon=True)  # the question for the address of a name knows no time limit
    thread.start()
    thread.join(_ANSWER_SECONDS)
    return found[0] if found else f"{host}: no answer in {_ANSWER_SECONDS:.0f} s"


def opened(wandb: Any, config: Mapping[str, Any], run_dir: str | None, given: Mapping[str, Any]) -> Any:
    """The W&B run. Where W&B is wanted and cannot be reached, one with offline files, and a warning says so.

    Args:
        given: arguments of `wandb.init` that come before ours, as a `WandbLogger` has them.
    """
    wanted = str(given.get("mode") or os.environ.get("WANDB_MODE") or ("online" if is_online(wandb) else "offline"))
    if wanted not in ("online", "run", "shared"):
        return _init(wandb, config, run_dir, given, wanted)
    why = out_of_reach(wandb)
    if why is None:
        try:
            return _init(wandb, config, run_dir, given, wanted)
        except Exception as error:
            why = f"{type(error).__name__}: {said(error)}"
        wandb.teardown()  # it holds on to the run
    warn(f"W&B could not be started ({why}): nothing is sent, the run is written into offline files")
    return _init(wandb, config, run_dir, given, "offline")


def _init(wandb: Any, config: Mapping[str, Any], run_dir: str | None, given: Mapping[str, Any], mode: str) -> Any:
    told = {key: os.environ.get(f"WANDB_{key.upper()}") for key in ("name", "project", "job_type", "dir", "notes")}
    ours: dict[str, Any] = {
        "name": name_of(config, run_dir),
        "job_type": "federated",
        "dir": run_dir,
        "id": os.environ.get("WANDB_RUN_ID") or run_id(run_dir),
        "resume": "allow",
        "reinit": "finish_previous",
        "tags": os.environ["WANDB_TAGS"].split(",") if os.environ.get("WANDB_TAGS") else _tags(config),
    }
    if not os.environ.get("WANDB_SWEEP_ID"):  # W&B has the project of its sweep
        ours["project"] = "fedtune"
    ours |= {key: value for key, value in told.items() if value and (key in ours or key == "notes")}
    ours |= {key: value for key, value in given.items() if value is not None}
    ours |= {"mode": mode, "config": {**(given.get("config") or {}), **config}}
    return wandb.init(**(ours | {"settings": _settings(wandb, mode, config, given)}))


def _settings(wandb: Any, mode: str, config: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """W&B's settings for a start and an end that come even where W&B cannot be reached, as far as this version knows them.

    Offline it says nothing at the end where our progress does: one line of that says how the files are sent.
    """
    known = getattr(wandb.Settings, "model_fields", {})
    wanted: dict[str, Any] = {"finish_timeout": FINISH_SECONDS, "init_timeout": _INIT_SECONDS}
    if mode in ("offline", "dryrun") and config["loop"]["options"]["progress"]:
        wanted["quiet"] = True
    wanted = {name: value for name, value in wanted.items() if f"WANDB_{name.upper()}" not in os.environ}
    wanted["finish_timeout_raises"] = True
    own = given.get("settings") or {}
    own = dict(own) if isinstance(own, Mapping) else own.model_dump(exclude_unset=True)
    return wandb.Settings(**({name: value for name, value in wanted.items() if name in known} | own))


def name_of(config: Mapping[str, Any], run_dir: str | None) -> str:
    """What the run is called: as its directory is, or, where that is a hash or there is none, by what it is.

    >>> config = {"model": {"name": "minilm"}, "data": {"task": "imdb", "split": "iid", "num_clients": 8}}
    >>> config["loop"] = {"seed": 1, "algorithm": {"client": {"name": "Proximal"}, "aggregator": {"name": "Mean"}}}
    >>> name_of(config, "runs/first/"), name_of(config, "runs/0f3a9b1c")
    ('first', 'minilm, imdb, iid, 8 clients, Proximal, seed 1 (0f3a9b1c)')
    """
    folder = Path(run_dir).absolute().name if run_dir else ""
    if folder and not _HASH.fullmatch(folder):
        return folder[:128]
    model, data, loop = config["model"], config["data"], config["loop"]
    parts = [model.get("name", model.get("from")), data.get("task", data.get("from")), data.get("split")]
    parts += [f"{data['num_clients']} clients"] if "num_clients" in data else []
    parts += [_parts_of(loop["algorithm"]), f"seed {loop['seed']}"]
    text = ", ".join(Path(str(part)).name or str(part) for part in parts if part)
    return f"{text} ({folder})" if folder else text


def _parts_of(algorithm: Mapping[str, Any]) -> str:
    """The parts in which an algorithm, in plain values, is not federated averaging."""
    groups = (part if isinstance(part, list) else [part] for part in algorithm.values())
    names = [part["name"] for group in groups for part in group if isinstance(part, Mapping) and "name" in part]
    return " + ".join(name for name in names if name not in _PLAIN) or "fedavg"


def _tags(config: Mapping[str, Any]) -> list[str]:
    return [str(config[part][key])[:64] for part, key in _TAGGED if key in config.get(part, {})]


def sync_command(files: str) -> str:
    """The command that sends a run: the folders of all its starts, of which an interrupted run has several.

    Args:
        files: of the newest start, as W&B's run has them in `dir`.
    """
    newest = Path(files).parent
    start = _START.fullmatch(newest.name)
    if start is None or sum(_is_of(one, start[1]) for one in newest.parent.iterdir()) < 2:
        return f"wandb sync {shlex.quote(str(newest))}"
    return f"wandb sync {shlex.quote(str(newest.parent))}/*run-????????_??????-{start[1]}"


def _is_of(folder: Path, run: str) -> bool:
    start = _START.fullmatch(folder.name)
    return start is not None and start[1] == run


def run_id(run_dir: str | None) -> str | None:
    """The W&B run that a run directory belongs to; drawn at its first start. An agent of a W&B sweep gives its own."""
    if run_dir is None or os.environ.get("WANDB_SWEEP_ID"):
        return None
    file = Path(run_dir) / "wandb_id"
    try:
        regular(file, follow=False)  # what a link leads to is nobody's business
        known = content(file).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        known = ""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", known):
        if known:
            warn(f"{file} is damaged; the run is mirrored as a new one")
        known = uuid.uuid4().hex[:12]
        write_text(file, known)
    return known
