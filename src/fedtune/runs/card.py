"""The card of an exported model: what it is, how adapters are opened, and the run's numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.files import content
from fedtune.runs.client_models import whose
from fedtune.storage.records import read_rounds

_OPENED = """```python
from peft import PeftModel
from transformers import {kind}

base = {kind}.from_pretrained({base!r}{names})
model = PeftModel.from_pretrained(base, ".")  # this folder
```"""


def card(
    run: Path,
    config: Mapping[str, Any],
    names: Sequence[str],
    number: int,
    which: str,
    base: str | None,
    client: int | None = None,
) -> str:
    """The text of README.md.

    Args:
        names: of the classes; none of a causal language model.
        number, which: the round of the weights, and which one that is: "last" or "best".
        base: the folder or hub id of the model that adapters belong to; None where the whole model is written.
        client: whose model it is; None where it is the server's.
    """
    data, loop, versions = (config.get(part) or {} for part in ("data", "loop", "versions"))
    lines = [
        f"Trained by fedtune {versions.get('fedtune')} from `{config['model']['name']}` on the task `{data.get('task')}`, "
        f"divided among {data.get('num_clients')} clients (split `{data.get('split')}`). "
        f"The weights are those after round {number}, the {which} one.",
        (f"Classes: {', '.join(names)}. " if names else "") + f"Texts were cut at {data.get('max_length')} tokens.",
    ]
    lines += [] if client is None else [whose(run, config, number, client)]
    kind = "SequenceClassification" if names else "CausalLM"
    if base is not None:
        lines += [f"These are low-rank adapters{' and the head' * bool(names)}; they belong to a model, which is opened first:"]
        named = f", id2label={dict(enumerate(names))!r}" if names else ""
        lines += [_OPENED.format(base=base, names=named, kind=f"AutoModelFor{kind}")]
    if data.get("mask") is False:
        lines.append("It was trained without an attention mask: in the run's own evaluation padding was attended to.")
    record, summary = read_rounds(run / "rounds.jsonl", number)[-1], summary_of(run)
    final = summary if summary.get("rounds") == number else {}  # its test metrics are of the last round
    rows = [("metric", f"{loop.get('evaluate_on')} part", "test part"), ("---", "---", "---")]
    rows += [(name, _shown(value), _shown(final.get(name))) for name, value in record.metrics.items()]
    lines.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    tag = "text-classification" if names else "text-generation"
    head = f"---\nlibrary_name: {'transformers' if base is None else 'peft'}\npipeline_tag: {tag}\n---\n"
    return head + f"\n# {data.get('task')}: a run of fedtune\n\n" + "\n\n".join(lines) + "\n"


def summary_of(run: Path) -> dict[str, Any]:
    """What summary.json of a run has; nothing for a run that goes on."""
    try:
        found = json.loads(content(run / "summary.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else ""
