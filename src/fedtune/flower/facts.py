"""What must be the same at all sites and at the server, as digests: nobody has to show what he has."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fedtune.algorithms.specification import specification_of
from fedtune.data.token_cache import digest_of
from fedtune.runs.loop import FederatedLoop
from fedtune.storage.config import config_of, dotted
from fedtune.storage.plain import plain
from fedtune.tensors import digest, resting
from fedtune.version import __version__

NAMES = "names of the classes"
_LOOP = (  # of a loop's arguments, those that a client goes by
    "local_epochs",
    "seed",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "accumulate_grad_batches",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "precision",
    "evaluate_on",
)


def facts_of(module: Any, loop: FederatedLoop, data: Any) -> dict[str, str]:
    """What must agree, each by its name; of the data those facts that are known without them, where they are known."""
    names, tokenizer = getattr(data, "label_names", None), getattr(data, "tokenizer", None)
    named = {} if tokenizer is None else {"tokenizer": _digest(digest_of(tokenizer))}
    options = {name: getattr(loop, name) for name in _LOOP} | {"fast_dropout": loop.options.fast_dropout}
    return {
        "version of fedtune": __version__,
        NAMES: _digest(None if names is None else list(names)),
        "configuration of the model": _digest(config_of(module)),
        "files of the model": _digest(dict(getattr(module, "content", {}))),
        "frozen weights": digest(resting(module)),
        "options of the loop": _digest(plain(options)),
        "algorithm": _digest(specification_of(loop._algorithm, strict=False)),
    } | named


def digest_of_data(data: Any) -> str:
    """What names the content of the data, and how they are divided."""
    config = {key: value for key, value in dotted(config_of(data)).items() if not key.startswith(("folder", "task_options"))}
    return _digest([getattr(data, "digest", None), config])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()[:16]
