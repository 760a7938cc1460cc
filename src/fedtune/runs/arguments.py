"""What the arguments of `FederatedLoop` may be."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from fedtune.errors import UsageError, at_least, one_of, shown, whole
from fedtune.federated.parts import Aggregator
from fedtune.federated.remote import Remote
from fedtune.privacy.checks import check_examples, check_privacy
from fedtune.privacy.mechanisms import Mechanism, plain_privacy
from fedtune.runs.baselines import BASELINES
from fedtune.runs.callbacks import FederatedCallback
from fedtune.runs.options import RunOptions
from fedtune.runtimes.environment import place_of
from fedtune.runtimes.faulty import check_clients, plain_faults
from fedtune.secure.parts import check_secure, plain_secure
from fedtune.storage.summary import MODES

EVALUATED_ON = ("validation", "test")
CLIPPED = ("norm", "value")


def check_arguments(loop: Any) -> None:
    """Raise `UsageError` for a value outside of what is allowed."""
    if isinstance(loop.options, Mapping):
        loop.options = RunOptions(**loop.options)
    if not isinstance(loop.options, RunOptions):
        raise UsageError("options", loop.options, "a RunOptions, or a dictionary of its values")
    if isinstance(loop.run_dir, os.PathLike):
        loop.run_dir = os.fspath(loop.run_dir)
    if loop.run_dir is not None and not (isinstance(loop.run_dir, str) and loop.run_dir):
        raise UsageError("run_dir", loop.run_dir, "the path of a directory, or None")
    loop.run_dir = loop.run_dir and os.path.expanduser(loop.run_dir)
    if not isinstance(loop.baselines, (str, list, tuple, set, frozenset)):
        raise UsageError("baselines", loop.baselines, f"a list of {', '.join(BASELINES)}; an empty one for none")
    for name in ("max_rounds", "local_epochs", "accumulate_grad_batches", "check_val_every_n_rounds"):
        whole(name, getattr(loop, name), 1)
    whole("seed", loop.seed, 0)
    place_of(loop.runtime)
    if loop.clients_per_round is not None:
        whole("clients_per_round", loop.clients_per_round, 1)
    if loop.gradient_clip_val is not None:
        at_least("gradient_clip_val", loop.gradient_clip_val, 0)
    for part in ("train", "val", "test"):
        limit = getattr(loop, f"limit_{part}_batches")
        counted = isinstance(limit, int) and not isinstance(limit, bool)
        if not (counted and limit >= 1) and not (isinstance(limit, float) and 0 < limit <= 1):
            raise UsageError(
                f"limit_{part}_batches", limit, "a number of batches, 1 or more, or a share: above 0.0, at most 1.0"
            )
    if not isinstance(loop.fast_dev_run, bool):
        whole("fast_dev_run", loop.fast_dev_run, 0)
    if loop.deterministic not in (True, False, "warn", None):
        raise UsageError("deterministic", loop.deterministic, "true, false, warn")
    for name, values, allowed in (
        ("gradient_clip_algorithm", [loop.gradient_clip_algorithm or CLIPPED[0]], CLIPPED),
        ("evaluate_on", [loop.evaluate_on], EVALUATED_ON),
        ("mode", [loop.mode], MODES),
        ("baselines", [loop.baselines] if isinstance(loop.baselines, str) else loop.baselines, BASELINES),
    ):
        for value in values:
            if not isinstance(value, str) or value not in allowed:
                raise one_of(name, value, allowed)


def check_data(loop: Any, data: Any) -> None:
    """Raise `UsageError` for data that lack what a run needs, in number of clients, too."""
    if isinstance(data, Remote):
        _check_remote(loop)
    needed = ["client_dataloader", "num_clients", "val_dataloader"]
    needed += ["client_test_dataloader"] if loop.options.evaluation == "clients" else []
    needed += ["train_dataloader"] if "centralised" in loop.baselines else []
    missing = [] if isinstance(data, Remote) else [name for name in needed if not hasattr(data, name)]
    if missing:
        raise UsageError("data", type(data).__name__, f"a data module that has {', '.join(missing)}")
    if loop.options.evaluation == "clients" and loop.evaluate_on != "test":
        raise UsageError("evaluate_on", loop.evaluate_on, "test, with evaluation by clients")
    if loop.clients_per_round is not None and loop.clients_per_round > data.num_clients:
        raise UsageError("clients_per_round", loop.clients_per_round, f"at most num_clients, {data.num_clients}")
    faults, algorithm, mechanism = loop._faults, loop._algorithm, loop._privacy
    check_clients(faults, data.num_clients)
    knowing = [type(fault).__name__ for fault in faults if fault.knows]
    if algorithm.client.ranks and knowing:
        raise UsageError("faults", knowing[0], "with clients of different ranks, one that needs no mean of their updates")
    if isinstance(mechanism, Mechanism):
        check_privacy(mechanism, algorithm, data.num_clients, loop.clients_per_round, loop.options.min_clients)
    elif mechanism is not None:
        check_examples(algorithm, loop.accumulate_grad_batches)
    if loop._secure is not None:
        lies = [type(fault).__name__ for fault in faults if fault.lies]
        everyone = loop.clients_per_round is None
        check_secure(algorithm, mechanism, loop.clients_per_round or data.num_clients, lies, everyone)
    _check_cohort(loop, algorithm.aggregator, data.num_clients)


def _check_remote(loop: Any) -> None:
    """What needs data, or a client's module, cannot be where neither is."""
    where = "with clients at other sites"
    for name, came, allowed in (
        ("baselines", list(loop.baselines), f"none {where}, as they need the data: baselines: []"),
        ("faults", plain_faults(loop._faults, strict=False), f"none {where}"),
        ("privacy", plain_privacy(loop._privacy, strict=False), f"none {where}"),
        ("secure_sums", plain_secure(loop._secure, strict=False), f"none {where}: they are a simulation"),
        ("options.evaluation", loop.options.evaluation, f"pooled, {where}"),
    ):
        if came and came != "pooled":
            raise UsageError(name, came, allowed)
    if loop._algorithm.client.seeds:
        name = type(loop._algorithm.client).__name__
        raise UsageError(
            "algorithm.client", name, f"one whose weights travel, {where}: a site keeps none that a run began with"
        )
    for one in loop.callbacks:
        if type(one).on_client_end is not FederatedCallback.on_client_end:
            raise UsageError("callbacks", type(one).__name__, f"without on_client_end {where}, where their modules are")


def _check_cohort(loop: Any, aggregator: Aggregator, num_clients: int) -> None:
    size, least, fewest = loop.clients_per_round or num_clients, aggregator.least, loop.options.min_clients
    allowed = f"{least} or more, which {shown(aggregator)} needs"
    if size < least:
        raise UsageError("num_clients" if loop.clients_per_round is None else "clients_per_round", size, allowed)
    if fewest is not None and fewest < least:
        raise UsageError("options.min_clients", fewest, allowed)
    if fewest is not None and fewest > size:
        raise UsageError("options.min_clients", fewest, f"at most the number of clients in a round, {size}")
