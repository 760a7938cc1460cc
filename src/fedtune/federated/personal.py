"""What stays with each client: a part of the model, chosen by the names of its tensors, or a model of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np

from fedtune.errors import UsageError
from fedtune.federated.batches import is_whole
from fedtune.federated.evaluation import Evaluator
from fedtune.federated.memory import ClientMemory
from fedtune.federated.ranks import ALONE
from fedtune.tensors import Tensors, assign_, travelling

PRESETS = {
    "head": ("*classifier*", "*lm_head*", "*.score.*", "*qa_outputs*", "head.*", "*.head.*"),
    "embeddings": ("*embed*", "*.wte.*", "*.wpe.*"),
    "adapters": ("*lora_*", "*adapter*"),
    "norms": ("*norm*", "*.bn*", "bn*", "*.ln_*"),
}


def personal_names(patterns: Iterable[str], names: Iterable[str]) -> frozenset[str]:
    """Those of the names that any of the patterns means.

    Args:
        patterns: as of a shell ("network.classifier.*"), or names of `PRESETS`.
        names: of the tensors that would travel.

    Raises:
        UsageError: a pattern means none of them, or all are meant, so that nothing is left to be shared.
    """
    names, found = list(names), set[str]()
    for pattern in patterns:
        meant = {name for name in names if any(fnmatchcase(name, one) for one in PRESETS.get(pattern, (pattern,)))}
        if not meant:
            some = ", ".join(names[:: max(1, len(names) // 3)][:4])
            allowed = f"{', '.join(PRESETS)}, or a pattern of names as {some}"
            raise UsageError("algorithm.personal", pattern, allowed)
        found |= meant
    if found and len(found) == len(names):
        raise UsageError("algorithm.personal", list(patterns), "a part of the tensors: these are all, nothing would be shared")
    return frozenset(found)


def own_accuracy(
    evaluator: Evaluator, memory: ClientMemory, weights: Tensors, round: int, shared: Sequence[float | None]
) -> list[float | None]:
    """The accuracy of each client's own model after a round: the server's weights, but for what is the client's own.

    Args:
        evaluator: of the module, which afterwards holds the server's weights.
        memory: what clients remember, of which "personal" is their own.
        weights: the server's.
        shared: the accuracy of these for each client, which is that of a client that has nothing of its own yet.
    """
    here, found, ranks = travelling(evaluator.training.module), dict[int, float | None](), evaluator.ranks
    alone = replace(evaluator, ranks=ALONE)
    memory.settle()
    ranks.gather([])  # now all have written what their clients remember
    for client in ranks.mine(range(evaluator.data.num_clients)):
        own = memory.after(client, round).get("personal")
        if own is not None:
            assign_({name: here[name] for name in own}, own)
            with ranks.watched():
                value = _accuracy_of(alone, client)
            assign_({name: here[name] for name in own}, weights)
            found[client] = value
    known = dict(ranks.gather(list(found.items())))
    return [known.get(client, accuracy) for client, accuracy in enumerate(shared)]


def _accuracy_of(evaluator: Evaluator, client: int) -> float | None:
    """The accuracy of the module for one client, as in `Evaluator.measure`; where that is not known, that on the whole part."""
    if evaluator.evaluation == "clients":
        return evaluator.evaluate_clients([client])[0].get("accuracy")
    before = evaluator.training.trainer.callback_metrics
    metrics, correct_N = evaluator.evaluate(evaluator.part)
    evaluator.training.trainer.callback_metrics = before
    of_client = getattr(evaluator.data, "client_accuracy", None)
    if of_client is None or correct_N is None or not is_whole(evaluator.training.limit(evaluator.part)):
        return metrics.get("accuracy")
    found: float | None = of_client(evaluator.part, correct_N)[client]
    return found


def over_clients(name: str, accuracies: Sequence[float | None]) -> dict[str, float]:
    """What accuracies come down to: mean, mean of the worst tenth of the clients (one at least), standard deviation.

    >>> over_clients("own", [0.5, None, 1.0])
    {'own_mean': 0.75, 'own_worst_decile': 0.5, 'own_spread': 0.25}
    """
    known = np.sort([one for one in accuracies if one is not None])
    if not len(known):
        return {}
    worst = known[: max(1, len(known) // 10)]
    return {
        f"{name}_mean": float(known.mean()),
        f"{name}_worst_decile": float(worst.mean()),
        f"{name}_spread": float(known.std()),
    }
