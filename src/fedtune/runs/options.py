"""`RunOptions`: how a run is done and kept, beside what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.errors import at_least, one_of
from fedtune.runs.own import import_modules

EVALUATIONS = ("pooled", "clients")
ON_ERROR = ("stop", "drop")


@dataclass(frozen=True)
class RunOptions:
    """Details of a run that most experiments leave as they are.

    Args:
        keep: checkpoints that stay.
        progress: a line a round and a progress bar.
        baseline_dir: where baselines are kept, so that runs that differ only in the split share the centralised one; by
            default within `run_dir`.
        agreement: record how the clients' updates agree (their mean cosine, drift per layer), for a copy of the weights and
            some 0.5 % of the time; False records lengths only.
        fast_dropout: on a CPU, dropout masks of the same distribution at less than half the cost
            (`fedtune.federated.dropout`); False takes torch's own.
        evaluation: "pooled" (metrics over all examples), or "clients" as in the code of Hilmkil et al. 2021: the test part
            divided like the training part, mean of batches within a client, then mean over clients.
        min_clients: a round goes on without clients whose replies do not count (an update that is not finite), as long as so
            many do. By default each must; with `faults`, or errors that drop clients, one.
        on_client_error: what an error in a client's training does: "stop" the run, or "drop" the client from the round, whose
            record names it with the error.
        local_clients: how many clients, drawn with the run's seed, train alone for the baseline "local".
        imports: modules that register what the run uses (`fedtune.TASKS["mine"] = ...`), by name. They are imported here, and
            by whoever opens the run again, since its configuration names them.

    Raises:
        UsageError: a value outside of what is allowed.
    """

    keep: int = 2
    progress: bool = True
    baseline_dir: str | None = None
    agreement: bool = True
    fast_dropout: bool = True
    evaluation: str = "pooled"
    min_clients: int | None = None
    local_clients: int = 16
    on_client_error: str = "stop"
    imports: Sequence[str] = ()

    def __post_init__(self) -> None:
        at_least("options.keep", self.keep, 1)
        at_least("options.local_clients", self.local_clients, 1)
        if self.evaluation not in EVALUATIONS:
            raise one_of("options.evaluation", self.evaluation, EVALUATIONS)
        if self.on_client_error not in ON_ERROR:
            raise one_of("options.on_client_error", self.on_client_error, ON_ERROR)
        if self.min_clients is not None:
            at_least("options.min_clients", self.min_clients, 1)
        import_modules(self.imports, "options.imports")
