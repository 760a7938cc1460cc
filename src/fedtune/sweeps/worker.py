"""A run of a sweep, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import Elsewhere, RunError, UsageError
from fedtune.files import content, finite, opened, printable, read_lines, write_text
from fedtune.runs.building import fit
from fedtune.runs.callbacks import FederatedCallback
from fedtune.runtimes.environment import has_others
from fedtune.runtimes.processes import voice
from fedtune.storage import checks
from fedtune.storage.directory import writing
from fedtune.storage.locks import Busy, locked
from fedtune.storage.summary import last_evaluated
from fedtune.sweeps.hyperband import Stopping

if TYPE_CHECKING:
    from fedtune.runs.loop import FederatedLoop

Arguments = Mapping[str, Mapping[str, Any]]


def status(folder: Path) -> dict[str, Any]:
    """How the last start of a run ended: `state` ("finished" or "failed"), `seconds`, `metrics` or `error`; else nothing. One
    that was stopped early is finished, and `stopped` says why.

    A file that says neither, as a run writes it, says nothing: the run is started, and ends at once where it was done.
    """
    try:
        found = json.loads(content(folder / "status.json"))
        if not isinstance(found, dict) or found.get("state") not in ("finished", "failed"):
            return {}
        if found["state"] == "finished":
            checks.checked(found, {"seconds": checks.not_negative, "metrics": checks.measured_by_name})
            metrics = found["metrics"].items()
            found["metrics"] = {name: value for name, value in metrics if value is not None and math.isfinite(value)}
        return found
    except (OSError, ValueError, RecursionError):
        return {}


class _Reporter(FederatedCallback):
    """Tells the runner how far the run is."""

    everywhere = False

    def __init__(self, line: Connection) -> None:
        self._line = line

    def on_fit_start(self, run: Any, module: Any) -> None:
        self._send(run)

    def on_round_end(self, run: Any, module: Any, record: Any) -> None:
        self._send(run)

    def _send(self, run: Any) -> None:
        done = len(run.history)
        left = ", ".join(["last evaluation", *["baselines"] * bool(run.config["loop"]["baselines"])])
        self._line.send(f"round {done}/{run.max_rounds}" if done < run.max_rounds else left)


def work(arguments: Arguments, folder: Path, setting: Mapping[str, Any], line: Connection) -> None:
    """One run, from its directory's lock to its status.

    Args:
        setting: `environment`, `threads`, `logger` and `callbacks`; `point`, what a process of several is told of the others.
        line: to the runner. "left: ..." says that another process has the run.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the runner, which ends this process
    threading.Thread(target=_end_with_the_runner, args=(line,), daemon=True).start()
    os.environ.update(setting["environment"] | setting["point"])
    import torch

    torch.set_num_threads(setting["threads"])
    if has_others(and_follows=True):
        return _follow(arguments, folder, setting)
    try:
        with locked(folder):
            if status(folder).get("state") != "finished":
                with _logged(folder):
                    _run(arguments, folder, setting, line)
    except Busy as error:
        line.send(f"left: {error}")
    except (UsageError, OSError) as error:
        line.send(f"failed: {printable(error)}")


@contextlib.contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """What is printed from now on goes into the run's log."""
    with opened(folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT, "ab") as log:
        for stream in (1, 2):  # the streams themselves: handlers of other libraries hold on to them
            os.dup2(log.fileno(), stream)
        yield


def _follow(arguments: Arguments, folder: Path, setting: Mapping[str, Any]) -> None:
    """What another process than the first of a run does: its clients. The first one has the lock, and says how it ended."""
    folder.mkdir(parents=True, exist_ok=True)
    with _logged(folder):
        try:
            fit(arguments, run_dir=str(folder), logger=setting["logger"], callbacks=setting["callbacks"])
        except Elsewhere:
            pass
        except Exception as error:
            voice(error, 1)  # tells the others
            traceback.print_exc()


def _run(arguments: Arguments, folder: Path, setting: Mapping[str, Any], line: Connection) -> None:
    try:
        recorded(arguments, folder, logger=setting["logger"], callbacks=[_Reporter(line), *setting["callbacks"]])
    except Exception as error:
        if has_others():
            voice(error, 1)
        traceback.print_exc()
        if status(folder).get("state") != "failed":  # it could not be written
            line.send(f"failed: {printable(error)}")


def recorded(arguments: Arguments, folder: Path, **where: Any) -> FederatedLoop:
    """Run, and keep in status.json how it ended: "finished" with `metrics`, or "failed" with `error`; and its `seconds`.
    The metrics are those of the last evaluated round.

    A finished run that a refused command did not take up is still finished.

    Raises:
        UsageError, RunError: as `options.fit`.
    """
    with locked(folder):
        earlier, config = status(folder), _bytes(folder / "config.yaml")
        with writing(folder / "status.json"):
            (folder / "status.json").unlink(missing_ok=True)
        before, began = 0.0, time.perf_counter()
        ended: dict[str, Any] = {}
        try:
            before = sum(checks.not_negative("seconds", one.get("seconds", 0)) for one in _records(folder))
            loop = fit(arguments, run_dir=str(folder), **where)
            last = last_evaluated(loop.history)
            ended = {"state": "finished", "metrics": last.metrics if last else {}}
            reasons = [one.reason for one in loop.callbacks if isinstance(one, Stopping) and one.reason is not None]
            ended |= {"stopped": reasons[0]} if reasons else {}
            return loop
        except Exception as error:
            kind = "" if isinstance(error, (UsageError, RunError)) else f"{type(error).__name__}: "
            ended = {"state": "failed", "error": kind + printable(error)}
            if (
                isinstance(error, UsageError)
                and earlier.get("state") == "finished"
                and _bytes(folder / "config.yaml") == config
            ):
                ended = earlier
            raise
        finally:
            if ended:  # an interrupted run has no status
                ended = {"seconds": before + time.perf_counter() - began} | ended
                with writing(folder / "status.json"):
                    text = json.dumps(finite(ended), indent=1, ensure_ascii=False, allow_nan=False)
                    write_text(folder / "status.json", text + "\n")


def _bytes(file: Path) -> bytes | None:
    """What a file has; None where it is not there, or cannot be read."""
    try:
        return content(file)
    except (OSError, RunError):
        return None


def _records(folder: Path) -> list[dict[str, Any]]:
    """The rounds of earlier starts; what is wrong with them the run itself says."""
    try:
        return read_lines(folder / "rounds.jsonl")
    except RunError:
        return []


def _end_with_the_runner(line: Connection) -> None:
    try:
        line.recv()
    except (EOFError, OSError):
        os._exit(1)
