"""How lines look that a run keeps beside its records."""

from __future__ import annotations

import json
from typing import Any

from fedtune.storage import checks


def _is_states(line: dict[str, Any]) -> bool:
    """Whether a line of callbacks.jsonl says what each callback knew, and when the run was stopped if it was."""
    try:
        states = json.loads(line["states"])
    except (KeyError, TypeError, ValueError):
        return False
    stopped = line.get("stopped_at")
    well = isinstance(states, dict) and all(isinstance(state, dict) for state in states.values())
    return well and (stopped is None or type(stopped) is int)


def _is_local(line: dict[str, Any]) -> bool:
    """Whether a line of local.jsonl says how a client alone has trained, and its metrics on a part."""
    form = dict.fromkeys(("client", "num_examples", "num_steps"), checks.count)
    try:
        checks.checked(line, {**form, "train_loss_nats": checks.finite, "seconds": checks.not_negative})
        parts = {name: value for name, value in line.items() if name not in (*form, "train_loss_nats", "seconds")}
        return len([checks.measured_by_name(name, value) for name, value in parts.items()]) > 0
    except ValueError:
        return False


FORMS = {"callbacks.jsonl": _is_states, "local.jsonl": _is_local}
