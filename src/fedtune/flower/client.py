"""The app of a site: it answers with the same `Worker` as a run in one process, so with the same bits.

Flower starts a new process for each message. It reads module and data (tokens from their cache), answers, and ends; what
the client remembers stays in a folder of the site.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app import Context as AppContext
from flwr.clientapp import ClientApp

from fedtune.errors import ClientError, RunError, UsageError
from fedtune.federated.batches import examples_in, is_whole, limited, num_batches
from fedtune.federated.client import Worker
from fedtune.federated.cohorts import max_weight
from fedtune.federated.evaluation import Evaluator, evaluate
from fedtune.federated.memory import MemoryOnDisk
from fedtune.federated.messages import Position
from fedtune.federated.personal import personal_names
from fedtune.federated.remote import Share
from fedtune.flower.facts import digest_of_data, facts_of
from fedtune.flower.records import (
    ABOUT,
    EVALUATION,
    Memory,
    groups_of,
    read_request,
    reply_content,
    share_content,
    stopped_content,
    values_of,
)
from fedtune.flower.setups import Parts, Setup, beside_the_caller, client_of, from_file, of_site
from fedtune.randomness import seeded
from fedtune.runs.prepared import prepared, worker_of
from fedtune.runs.progress import Progress
from fedtune.tensors import assign_, snapshot, travelling

_RUN = re.compile("[0-9a-f]{16}", re.ASCII)


def client_app(setup: Setup | None = None) -> ClientApp:
    """The app of every site of a federation.

    Args:
        setup: makes module, data and loop of the app's configuration and, on a site, of the site's (`flwr run --run-config`,
            `flower-supernode --node-config`), where "place" is "site". Data of one client are the site's own; else they are
            those of all clients, of which the site is one. By default from the file `config.yaml` beside the caller's.
    """
    app, made = ClientApp(), setup or from_file(beside_the_caller())

    def answered(answer: Callable[[Message, AppContext, Parts], RecordDict], message: Message, context: AppContext) -> Message:
        content = _answered(answer, made, message, context)
        return Message(content, reply_to=message)

    @app.query()
    def about(message: Message, context: AppContext) -> Message:
        return answered(_about, message, context)

    @app.train()
    def train(message: Message, context: AppContext) -> Message:
        return answered(_train, message, context)

    @app.evaluate()
    def evaluation(message: Message, context: AppContext) -> Message:
        return answered(_evaluate, message, context)

    return app


def _answered(
    answer: Callable[[Message, AppContext, Parts], RecordDict], setup: Setup, message: Message, context: AppContext
) -> RecordDict:
    """An answer, or why there is none. What went wrong with its data, a site's own log alone says: it may quote them."""
    client = -1
    try:
        client = client_of(context.node_config)
        with _private("its data or its configuration cannot be used"):
            parts = of_site(setup, context.run_config, context.node_config)
        return answer(message, context, parts)
    except ClientError as error:
        reason = error.reason if error.__cause__ is None or isinstance(error.__cause__, RunError) else _kind(error.__cause__)
        print(f"fedtune: {error}", file=sys.stderr)
        return stopped_content(client, reason, ends=False)
    except (UsageError, RunError) as error:
        print(f"fedtune: {error}", file=sys.stderr)
        return stopped_content(client, str(error), ends=True)


@contextlib.contextmanager
def _private(what: str) -> Iterator[None]:
    """Inside the block an error is said here, and elsewhere only that there was one."""
    try:
        yield
    except Exception as error:
        print(f"fedtune: {type(error).__name__}: {error}", file=sys.stderr)
        if not isinstance(error, (UsageError, RunError)):
            traceback.print_exc()
        raise RunError(f"{what}, its log says why ({type(error).__name__})") from None


def _kind(error: BaseException) -> str:
    return f"{type(error).__name__} (its log says more)"


def _is_own(parts: Parts, num_clients: int) -> bool:
    """Whether a site has data of its own, and not a part of the federation's.

    Raises:
        UsageError: it has parts, but of another number of clients.
    """
    here = int(parts.data.num_clients)
    if here != num_clients and here != 1:
        raise UsageError("data.num_clients", here, f"{num_clients}, as the server has, or 1 for data of the site's own")
    return here == 1


class _Own:
    """A site's own data, as those of the client that it is."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def client_dataloader(self, client: int) -> Any:
        """Its training batches."""
        return self._data.client_dataloader(0)


def _about(message: Message, context: AppContext, parts: Parts) -> RecordDict:
    """Who the site is, and what must be the same everywhere, as digests."""
    module, data, loop = parts
    with _private("its data cannot be used"):
        if hasattr(data, "setup"):
            data.setup("fit")
        if hasattr(module, "check_data"):
            module.check_data(data)
        most, indices = max_weight(data, loop.local_epochs), getattr(data, "client_indices", None)
    own, client = int(data.num_clients) == 1, client_of(context.node_config)
    if not own and client >= int(data.num_clients):
        raise UsageError("node-config client", client, f"a number below {data.num_clients}, the number of clients")
    values = {
        "client": client,
        "name": str(context.node_config.get("name", "")),
        "own": own,
        "examples": -1 if indices is None else len(indices[0 if own else client]),
        "max_weight": most,
        "num_clients": int(data.num_clients),
        "data": digest_of_data(data),
        "facts": json.dumps(facts_of(module, loop, getattr(data, "label_names", None))),
    }
    return RecordDict({ABOUT: ConfigRecord(values)})


def _train(message: Message, context: AppContext, parts: Parts) -> RecordDict:
    request, where, memory = read_request(message.content)
    with _client(context, parts, request.client, where.num_clients, memory) as (_, worker):
        reply = worker.answer(request, where)
        newest = worker.memory.completed(request.round, [request.client]) or {}
        return reply_content(reply, request.round, newest.get(request.client) == request.round)


def _evaluate(message: Message, context: AppContext, parts: Parts) -> RecordDict:
    values = values_of(message.content, EVALUATION)
    client, memory = values["client"], Memory(values["run"], values["newest"])
    with _client(context, parts, client, values["num_clients"], memory) as (evaluator, worker):
        here = travelling(evaluator.training.module)
        assign_(here, here | groups_of(message.content)["weights"])
        evaluator.training.trainer.at(Position(values["steps"], values["epochs"]))
        share = _share(evaluator, client, values["part"])
        own = worker.memory.load(client, memory.newest + 1).get("personal")
        if own is not None:
            assign_({name: here[name] for name in own}, own)
            share = share._replace(own_accuracy=_share(evaluator, client, values["part"]).metrics.get("accuracy"))
        return share_content(client, share)


def _share(evaluator: Evaluator, client: int, part: str) -> Share:
    """What the module does on the client's share of a part; of no example where there is none."""
    training, data = evaluator.training, evaluator.data
    own = isinstance(data, _Own)
    name = {"validation": "val_dataloader", "test": "test_dataloader"}[part]
    loader = getattr(data, name if own else f"client_{name}", None)
    if loader is None:
        raise UsageError("data", type(data).__name__, f"a data module with {name if own else f'client_{name}'}")
    batches = loader() if own else loader(client)
    limit = training.limit(part)
    most = None if is_whole(limit) else num_batches(batches, limit, f"the {part} part")
    examples = sum(map(examples_in, limited(batches, most)))
    if not examples:
        return Share(0, {})
    with seeded(training.seed, "evaluate"):
        return Share(examples, evaluate(training, batches, part, evaluator.reserved).metrics)


@contextlib.contextmanager
def _client(
    context: AppContext, parts: Parts, client: int, num_clients: int, memory: Memory
) -> Iterator[tuple[Evaluator, Worker]]:
    """Inside the block this process is a client, with its memory as far as it counts.

    Raises:
        UsageError: the site is another client.
        RunError: what the client should remember is not there.
    """
    module, data, loop = parts
    here = client_of(context.node_config)
    if here != client:
        raise UsageError("node-config client", here, f"{client}, which the server asks for")
    kept = _memory(context, memory, client)
    held = _Own(data) if _is_own(parts, num_clients) else data
    with prepared(loop, module, held, "fit", Progress(False)) as evaluator:
        module.on_fit_start()
        worker = worker_of(loop, evaluator.training, held, kept)
        tensors = travelling(module)
        names = personal_names(loop._algorithm.personal, tensors)
        worker.personal.update(snapshot({name: tensors[name] for name in names}))
        yield evaluator, worker


def _memory(context: AppContext, memory: Memory, client: int) -> MemoryOnDisk:
    """What the client remembers of a run: of rounds that do not count nothing."""
    if not _RUN.fullmatch(memory.run):
        raise RunError("the name of the run is none")
    home = os.environ.get("FLWR_HOME") or "~/.flwr"
    folder = Path(str(context.node_config.get("memory") or f"{home}/fedtune")).expanduser() / memory.run / str(client)
    kept = MemoryOnDisk(folder, 1)
    kept.expect({client: memory.newest} if memory.newest else {})
    kept.rewind(memory.newest)
    if memory.oldest:
        kept.prune(memory.oldest, [client])
    return kept
