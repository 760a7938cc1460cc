"""What a finished run comes down to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from fedtune.storage.records import RoundRecord

SHARES = (90, 95, 99)  # per cent of the centralised baseline
MODES: dict[str, Callable[..., Any]] = {"max": max, "min": min}


def rounds_to(history: Sequence[RoundRecord], accuracy: float) -> int | None:
    """The first round whose accuracy reaches a target, or None."""
    return next((record.round for record in history if record.metrics.get("accuracy", -1.0) >= accuracy), None)


def best_round(history: Sequence[RoundRecord], monitor: str, mode: str) -> RoundRecord | None:
    """The first of the rounds that are the best by a metric; None where no round has it as a finite number.

    Args:
        mode: whether it should be "max" or "min".
    """
    known = [record for record in history if math.isfinite(record.metrics.get(monitor, math.nan))]
    best: RoundRecord | None = MODES[mode](known, key=lambda record: record.metrics[monitor], default=None)
    return best


def last_evaluated(history: Sequence[RoundRecord]) -> RoundRecord | None:
    """The last round with metrics, as not every round need be evaluated; None where none has any."""
    return next((record for record in reversed(history) if record.metrics), None)


def mean_of(locals_: Sequence[Mapping[str, Any]], part: str, metric: str) -> float | None:
    """Mean of a metric of the local baseline over the clients for which it is known, or None where it is for none.

    >>> mean_of([{"test": {"accuracy": 0.5}}, {"test": {"accuracy": None}}], "test", "accuracy")
    0.5
    """
    values: list[float] = [value for record in locals_ if _is_known(value := (record.get(part) or {}).get(metric))]
    return sum(values) / len(values) if values else None


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Least, mean and greatest of the values that are known; None where there is none.

    >>> spread([0.5, None, 1.0])
    {'min': 0.5, 'mean': 0.75, 'max': 1.0}
    """
    known = [value for value in values if value is not None]
    if not known:
        return {"min": None, "mean": None, "max": None}
    return {"min": min(known), "mean": sum(known) / len(known), "max": max(known)}


def summarise(
    history: Sequence[RoundRecord],
    evaluated_on: str,
    test: Mapping[str, float],
    baselines: Mapping[str, Any],
    monitor: str = "accuracy",
    mode: str = "max",
) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        history: the federated rounds.
        evaluated_on: the part they were evaluated on.
        test: metrics of the final weights on the test part.
        baselines: "majority_accuracy", "centralised" (rounds), "centralised_test" (metrics), "local" (records), where known.
        monitor, mode: the metric of the best round, and whether it is the "max" or the "min".

    Returns:
        the metrics on the test part, each as `test_NAME` (but `NAME` where it begins with that, or the module also logs a
        `test_NAME`) and, where no other entry has that name, as NAME; accuracies as fractions, `loss_nats`, `seconds` of all
        rounds, `bytes_up` and `bytes_down` in all; null where not known.
    """
    best, last = best_round(history, monitor, mode), last_evaluated(history)
    reached = None if best is None else best.metrics[monitor]
    compared = _compared(monitor)
    pooled = [record.accuracy for record in baselines.get("centralised", ()) if "accuracy" in record.metrics]
    known_of_run: dict[str, Any] = {
        "majority_accuracy": baselines.get("majority_accuracy"),
        **{f"centralised_{name}": baselines.get("centralised_test", {}).get(name) for name in compared},
        **{f"local_{name}": mean_of(baselines.get("local", ()), "test", name) for name in compared},
        "local_clients": len(baselines["local"]) if baselines.get("local") else None,
        **{f"client_accuracy_{name}": value for name, value in spread(last.client_accuracy if last else ()).items()},
        "rounds": history[-1].round if history else 0,
        "evaluated_on": evaluated_on,
        "monitor": monitor,
        "mode": mode,
        "best_round": best.round if best else None,
        f"best_{monitor}": reached,
        f"best_{evaluated_on}_{monitor}": reached,
        **{f"rounds_to_{share}pct": rounds_to(history, share / 100 * pooled[-1]) if pooled else None for share in SHARES},
        "seconds": sum(record.seconds for record in history),
        "bytes_up": sum(record.bytes_up for record in history),
        "bytes_down": sum(record.bytes_down for record in history),
    }
    tested = {f"test_{name}": value for name, value in test.items() if not name.startswith("test_")}
    return {**tested, **test, **known_of_run}


def with_known_baselines(summary: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """A summary that has what an earlier one knew of those baselines that were not done this time.

    `baseline_rounds_centralised` and `baseline_rounds_local` say of how many rounds each is, and `baseline_rounds` of how many
    the newest; it differs from `rounds` where the run has gone on since.
    """
    found: dict[str, Any] = {}
    earlier = {key for names in _names_of(str(before.get("monitor"))).values() for key in names}
    for baseline, names in _names_of(summary["monitor"]).items():
        if any(summary[name] is not None for name in names):
            found[f"baseline_rounds_{baseline}"] = summary["rounds"]
            continue
        kept = {name: before[name] for name in names if name in earlier and _is_known(before.get(name))}
        rounds = before.get(f"baseline_rounds_{baseline}", before.get("baseline_rounds"))
        found |= kept | {f"baseline_rounds_{baseline}": rounds if kept and _is_known(rounds) else None}
    known = [found[f"baseline_rounds_{baseline}"] for baseline in _names_of("accuracy")]
    return summary | found | {"baseline_rounds": max((one for one in known if one is not None), default=None)}


def _compared(monitor: str) -> list[str]:
    """The metrics that are known of baselines."""
    return list(dict.fromkeys(("accuracy", "macro_f1", monitor, *(["loss_nats"] if monitor == "exact_match" else []))))


def _names_of(monitor: str) -> dict[str, list[str]]:
    """The entries of a summary that belong to each baseline."""
    compared, shares = _compared(monitor), [f"rounds_to_{share}pct" for share in SHARES]
    return {
        "centralised": [f"centralised_{name}" for name in compared] + shares,
        "local": [f"local_{name}" for name in compared] + ["local_clients"],
    }


def _is_known(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
