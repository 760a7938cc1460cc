"""Hooks into a federated run, in Lightning's manner."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import pytorch_lightning as pl

from fedtune.errors import UsageError, one_of, warn
from fedtune.federated.messages import ClientReport
from fedtune.storage.history import History
from fedtune.storage.records import RoundRecord
from fedtune.storage.summary import MODES


@dataclass
class Run:
    """What callbacks see of a run.

    Args:
        config: the resolved configuration, nested dictionaries of plain values.
        data: the data module.
        max_rounds: rounds in all.
        run_dir: directory of the run, or None.
        print: prints a line, above the progress bar.
        history: the rounds so far, those before a resume included.
        summary: as in `summary.json`; complete in `on_fit_end`.
        baselines: "centralised" (round records) and "local" (a record a client), as far as they are done.
        should_stop: a callback that sets it ends the rounds after this one.
        logged: numbers that callbacks add to what the loggers get of this round.
        base: the names of frozen weights that the server moves all the same (FLoRA, FedEx-LoRA).
    """

    config: dict[str, Any]
    data: Any
    max_rounds: int
    run_dir: str | None = None
    print: Callable[[str], None] = print
    history: list[RoundRecord] = field(default_factory=History)
    summary: dict[str, Any] = field(default_factory=dict)
    baselines: dict[str, list[Any]] = field(default_factory=dict)
    should_stop: bool = False
    logged: dict[str, float] = field(default_factory=dict)
    base: frozenset[str] = frozenset()


class FederatedCallback:
    """Override what you need; each hook gets the run and the module. Setting `run.should_stop` ends after the round.

    What a callback must not forget when the run is interrupted it returns in `state_dict`, in plain values; a run that goes on
    hands it to `load_state_dict` before `on_fit_start`. Where a crash came between a round and what its callbacks did about it,
    `on_round_end` is called again for that round; `replayed = False` says that this callback sees to that itself.

    Where several processes do the run (`runtime`), hooks are called in each of them, `on_client_end` in the one where the
    client was trained; `everywhere = False` says that a callback is for rank 0 alone, as one that writes. `run.print` prints
    there alone.
    """

    replayed: ClassVar[bool] = True
    everywhere: ClassVar[bool] = True

    @property
    def state_key(self) -> str:
        """What a state is kept under: the name of the class, and what else tells callbacks of one class apart."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def state_dict(self) -> dict[str, Any]:
        """What the callback knows after a round: numbers, text, lists and dictionaries."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Know again what `state_dict` returned."""

    def on_fit_start(self, run: Run, module: pl.LightningModule) -> None:
        """Before the first round, or the first after a resume; `run.history` holds the rounds already done."""

    def on_round_start(self, run: Run, module: pl.LightningModule, number: int) -> None:
        """Before the first client of a round."""

    def on_client_end(self, run: Run, module: pl.LightningModule, report: ClientReport) -> None:
        """After a client has trained; the module holds that client's weights."""

    def on_round_end(self, run: Run, module: pl.LightningModule, record: RoundRecord) -> None:
        """After the record was written; the module holds the averaged weights."""

    def on_exception(self, run: Run, module: pl.LightningModule, error: BaseException) -> None:
        """When the run has to stop; the error goes on."""

    def on_fit_end(self, run: Run, module: pl.LightningModule) -> None:
        """After the last round and the baselines; `run.summary` is complete, the module holds the averaged weights."""


@final
class MonitorCheck(FederatedCallback):
    """Ends a run whose rounds don't log the metric to monitor; where that is the accuracy, which is the default, it says so."""

    def __init__(self) -> None:
        self._said = False

    def on_fit_start(self, run: Run, module: pl.LightningModule) -> None:
        """Nothing has been said yet."""
        self._said = False

    def on_round_end(self, run: Run, module: pl.LightningModule, record: RoundRecord) -> None:
        """Look at the metrics of the round, the first that was evaluated."""
        monitor = run.config["loop"]["monitor"]
        if not record.metrics or monitor in record.metrics:
            return
        if monitor != "accuracy":
            raise one_of("monitor", monitor, record.metrics)
        if not self._said:
            logged = f"{type(module).__name__} logs {', '.join(record.metrics)}"
            run.print(
                f"accuracy is monitored, but {logged}: no round is known as the best; monitor (--loop.monitor) may name one"
            )
        self._said = True


def watched(module: Any, monitor: str, mode: str) -> tuple[str, str]:
    """The metric of a run that says which round is the best, and "max" or "min": those that were asked for, or a module's own.

    The accuracy is the default; a module that logs none may say in its attribute `monitor` what stands in its place.
    """
    own = getattr(module, "monitor", None) if monitor == "accuracy" else None
    known = isinstance(own, tuple) and len(own) == 2 and isinstance(own[0], str) and own[1] in MODES
    return (own[0], own[1]) if known and own is not None else (monitor, mode)


@contextlib.contextmanager
def exceptions_reported(callbacks: Sequence[FederatedCallback], run: Run, module: pl.LightningModule) -> Iterator[None]:
    """Inside the block whatever is raised is reported to the callbacks, and goes on."""
    try:
        yield
    except BaseException as error:
        for callback in callbacks:
            try:
                callback.on_exception(run, module, error)
            except Exception as another:  # it must not hide the first one, nor keep it from the other callbacks
                said = f"{type(callback).__name__}.on_exception: {type(another).__name__}: {another}"
                warn(said)
        raise


def states_of(callbacks: Sequence[FederatedCallback]) -> dict[str, dict[str, Any]]:
    """What callbacks know, by the names of their classes.

    Raises:
        UsageError: a state that JSON does not keep.
    """
    found = {}
    for key, callback in _keyed(callbacks):
        state = callback.state_dict()
        try:
            same = json.loads(json.dumps(state)) == state
        except (TypeError, ValueError):
            same = False
        if not same:
            raise UsageError(f"callbacks, state of {key}", state, "numbers, text, lists and dictionaries with text as keys")
        if state:
            found[key] = state
    return found


def restore_states(callbacks: Sequence[FederatedCallback], states: Mapping[str, dict[str, Any]]) -> None:
    """Let callbacks know again what they knew."""
    for key, callback in _keyed(callbacks):
        if key in states:
            callback.load_state_dict(states[key])


def _keyed(callbacks: Sequence[FederatedCallback]) -> Iterator[tuple[str, FederatedCallback]]:
    """Callbacks by their keys, and by number where there are several of one."""
    seen: Counter[str] = Counter()
    for callback in callbacks:
        name = callback.state_key
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} {seen[name]}", callback
