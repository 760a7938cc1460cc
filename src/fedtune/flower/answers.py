"""What a site answers: with the same `Worker` as a run in one process, so with the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from flwr.app import ConfigRecord, RecordDict

from fedtune.errors import ClientError, RunError, UsageError
from fedtune.federated.adapted import adapted
from fedtune.federated.adapters import Adapters
from fedtune.federated.base import moving
from fedtune.federated.batches import examples_in, is_whole, limited, num_batches
from fedtune.federated.client import Worker
from fedtune.federated.cohorts import max_weight
from fedtune.federated.evaluation import Evaluator, evaluate
from fedtune.federated.memory import MemoryInRam, MemoryOnDisk
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
from fedtune.flower.setups import Parts, Setup, client_of, of_site
from fedtune.randomness import seeded
from fedtune.runs.prepared import prepared, worker_of
from fedtune.runs.progress import Progress
from fedtune.tensors import assign_, carried, restore_counters, snapshot, travelling

_RUN = re.compile("[0-9a-f]{16}", re.ASCII)


@final
class Answers:
    """A site, as long as its process lives: module and data are read for the first message.

    Args:
        setup: makes them.
        run: the app's configuration.
        node: what the site says of itself.
    """

    def __init__(self, setup: Setup, run: Mapping[str, Any], node: Mapping[str, Any]) -> None:
        self._setup, self._run, self._node = setup, run, node
        self._parts: Parts | None = None
        self._ready: tuple[Evaluator, Worker, Adapters] | None = None
        self._open = contextlib.ExitStack()

    def answer(self, kind: str, content: RecordDict) -> RecordDict:
        """An answer, or why there is none. What went wrong with its data, the site's own log alone says: it may quote them.

        Args:
            kind: of the message: "query", "train" or "evaluate".
        """
        client = -1
        try:
            client = client_of(self._node)
            return {"query": self._about, "train": self._train, "evaluate": self._evaluate}[kind](content, client)
        except ClientError as error:
            cause = error.__cause__
            ours = cause is None or isinstance(cause, RunError)
            print(f"fedtune: {error}", file=sys.stderr)
            return stopped_content(client, error.reason if ours else f"{type(cause).__name__} (its log says more)", ends=False)
        except (UsageError, RunError) as error:
            print(f"fedtune: {error}", file=sys.stderr)
            return stopped_content(client, str(error), ends=True)
        except Exception as error:
            traceback.print_exc()
            return stopped_content(client, f"{type(error).__name__} (its log says more)", ends=False)

    def close(self) -> None:
        """Let go of module and data."""
        self._open.close()

    def _made(self) -> Parts:
        if self._parts is None:
            with _private("its data or its configuration cannot be used"):
                self._parts = of_site(self._setup, self._run, self._node)
        return self._parts

    def _about(self, content: RecordDict, client: int) -> RecordDict:
        """Who the site is, and what must be the same everywhere, as digests."""
        module, data, loop = self._made()
        with _private("its data cannot be used"):
            if hasattr(data, "setup"):
                data.setup("fit")
            if hasattr(module, "check_data"):
                module.check_data(data)  # type: ignore[operator]  # torch says that an attribute may be a tensor
            most, indices = max_weight(data, loop.local_epochs), getattr(data, "client_indices", None)
        own = int(data.num_clients) == 1
        if not own and client >= int(data.num_clients):
            raise UsageError("node-config client", client, f"a number below {data.num_clients}, the number of clients")
        values = {
            "client": client,
            "name": str(self._node.get("name", "")),
            "own": own,
            "examples": -1 if indices is None else len(indices[0 if own else client]),
            "max_weight": most,
            "num_clients": int(data.num_clients),
            "data": digest_of_data(data),
            "facts": json.dumps(facts_of(module, loop, data)),
        }
        return RecordDict({ABOUT: ConfigRecord(values)})

    def _train(self, content: RecordDict, client: int) -> RecordDict:
        request, context, memory = read_request(content)
        _, worker, adapters = self._worker(request.client, context.num_clients, memory)
        reply = worker.answer(request, replace(context, adapters=adapters))
        restore_counters(worker.training.module, worker.counters)
        newest = worker.memory.completed(request.round, [client]) or {}
        return reply_content(reply, request.round, newest.get(client) == request.round)

    def _evaluate(self, content: RecordDict, client: int) -> RecordDict:
        values = values_of(content, EVALUATION)
        memory = Memory(values["run"], values["newest"], values["oldest"])
        evaluator, worker, _ = self._worker(values["client"], values["num_clients"], memory)
        sent = groups_of(content)["weights"]
        here = carried(evaluator.training.module, sent)
        assign_(here, here | sent)
        evaluator.training.trainer.at(Position(values["steps"], values["epochs"]))
        share = _share(evaluator, client, values["part"])
        own = worker.memory.load(client, memory.newest + 1).get("personal")
        if own is not None:
            assign_({name: here[name] for name in own}, own)
            share = share._replace(own_accuracy=_share(evaluator, client, values["part"]).metrics.get("accuracy"))
        return share_content(client, share)

    def _worker(self, client: int, num_clients: int, memory: Memory) -> tuple[Evaluator, Worker, Adapters]:
        """This process as a client, with its memory as far as it counts, and the adapters of its module.

        Raises:
            UsageError: the site is another client.
            RunError: what the client should remember is not there.
        """
        if (here := client_of(self._node)) != client:
            raise UsageError("node-config client", here, f"{client}, which the server asks for")
        if self._ready is None:
            module, data, loop = self._made()
            held = _Own(data) if _is_own(data, num_clients) else data
            evaluator = self._open.enter_context(prepared(loop, module, held, "fit", Progress(False)))
            algorithm = loop._algorithm
            adapters = self._open.enter_context(adapted(module, algorithm, num_clients, loop.seed))
            module.on_fit_start()
            worker = worker_of(loop, evaluator.training, held, MemoryInRam(), base=moving(algorithm, adapters))
            tensors = travelling(module)
            names = personal_names(algorithm.personal, tensors)
            worker.personal.update(snapshot({name: tensors[name] for name in names}))
            self._ready = evaluator, worker, adapters
        evaluator, worker, adapters = self._ready
        return evaluator, replace(worker, memory=_memory(self._node, memory, client)), adapters


def _memory(node: Mapping[str, Any], memory: Memory, client: int) -> MemoryOnDisk:
    """What the client remembers of a run: of rounds that do not count nothing."""
    if not _RUN.fullmatch(memory.run):
        raise RunError("the name of the run is none")
    home = os.environ.get("FLWR_HOME") or "~/.flwr"
    folder = Path(str(node.get("memory") or f"{home}/fedtune")).expanduser() / memory.run / str(client)
    kept = MemoryOnDisk(folder, 1)
    kept.expect({client: memory.newest} if memory.newest else {})
    kept.rewind(memory.newest)
    if memory.oldest:
        kept.prune(memory.oldest, [client])
    return kept


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


def _is_own(data: Any, num_clients: int) -> bool:
    """Whether a site has data of its own, and not a part of the federation's.

    Raises:
        UsageError: it has parts, but of another number of clients.
    """
    here = int(data.num_clients)
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
