"""The app of the server: `FederatedLoop` with clients at other sites."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import pytorch_lightning as pl
from flwr.app import Context as AppContext
from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from fedtune.errors import RunError, UsageError, shown
from fedtune.federated.adapters import adapters_of
from fedtune.federated.base import moving
from fedtune.federated.messages import Context, Failure, Position, Reply, Request
from fedtune.federated.parts import Runtime
from fedtune.federated.remote import Remote, Share
from fedtune.federated.sums import Value
from fedtune.flower.facts import facts_of
from fedtune.flower.memory import MemoryAtSites
from fedtune.flower.records import (
    ABOUT,
    Memory,
    arrays_of,
    evaluation_record,
    is_stopped,
    read_reply,
    read_share,
    request_record,
)
from fedtune.flower.setups import SERVER, Setup, from_file, run_values
from fedtune.flower.sites import PAUSE, Site, Sites
from fedtune.runs.loop import FederatedLoop
from fedtune.storage.config import config_of
from fedtune.storage.directory import RunDirectory
from fedtune.tensors import Groups, carried

_UNKNOWN = 2**24  # examples of a round, where not all sites have said how many they have


def server_app(setup: Setup | None = None) -> ServerApp:
    """The app of the server of a federation.

    Args:
        setup: as in `client_app`, where "place" is "server"; of its data only `num_clients` and `label_names` are looked at.
    """
    beside = Path(sys._getframe(1).f_globals.get("__file__", ".")).resolve().parent  # an app's files lie side by side
    app, made = ServerApp(), setup or from_file(beside)

    @app.main()
    def main(grid: Grid, context: AppContext) -> None:
        try:
            values = run_values(context.run_config)
            module, data, loop = made({**context.run_config, "place": SERVER})
            loop.fit(module, FlowerClients(grid, module, data, loop, values["deadline"], values["wait"]))
        except (UsageError, RunError) as error:
            sys.tracebacklimit = 0  # Flower logs what ends an app, and this is said in one line
            raise RunError(" ".join(str(error).split())) from None

    return app


@final
class FlowerClients(Remote):
    """Clients at the nodes of a SuperLink.

    Args:
        grid: Flower's.
        module: whose weights are evaluated, as they stand.
        data: has `num_clients`, and `label_names` where there are such.
        loop: what runs.
        deadline: seconds after which an answer counts as missing.
        wait: seconds until all sites must be there, or as many as `min_clients` of the loop.
    """

    def __init__(
        self, grid: Grid, module: pl.LightningModule, data: Any, loop: FederatedLoop, deadline: float, wait: float
    ) -> None:
        self.num_clients, self.memory = int(data.num_clients), MemoryAtSites()
        self.config = dict(config_of(data)) or {"num_clients": self.num_clients}
        self._module, self._loop, self._deadline, self._wait = module, loop, deadline, wait
        self._base = moving(loop._algorithm, adapters_of(module))
        self.label_names = getattr(data, "label_names", None)
        facts = facts_of(module, loop, data)
        self._sites = Sites(grid, self.num_clients, facts, self.label_names or (), lambda text: print(text, flush=True))
        self._notes: dict[str, Any] = {}
        self._last: list[Share | None] = []
        self._carrier = FlowerRuntime(self._sites, self.memory, deadline, loop.options.on_client_error == "drop")

    def begin(self, directory: RunDirectory) -> None:
        """Wait for the sites, and see that they belong to the run in the directory."""
        self._notes = directory.read_json("sites.json") or {"run": secrets.token_hex(8), "data": {}, "examples": {}}
        self._carrier.run = self._notes["run"]
        self._sites.check = self._check
        least = self._loop.options.min_clients or self.num_clients
        self._sites.wait(range(self.num_clients), self._wait)
        here, missing = self._sites.here(), ", ".join(map(str, self._sites.missing()[:8]))
        if len(here) < least:
            raise RunError(
                f"after {self._wait:g} s {len(here)} of {self.num_clients} sites are there, {least} are needed; "
                f"missing: client {missing}"
            )
        if missing:
            print(f"without client {missing}, who may come later", flush=True)
        if "max_weight" not in self._notes:
            self._notes["max_weight"] = self._most(here)
        directory.write_json("sites.json", self._notes)

    def _most(self, here: Sequence[Site]) -> int:
        """The most examples of a round, fixed for the run."""
        if not here[0].own:
            return here[0].max_weight
        everyone = len(here) == self.num_clients
        return sum(site.max_weight for site in here) if everyone else _UNKNOWN

    def _check(self, site: Site) -> None:
        """Whether a site has the data that it had when the run began, and those that other sites have, if they share them."""
        kinds = {one.own for one in self._sites.here()}
        if kinds and kinds != {site.own}:
            raise UsageError(site.name, "data of its own" if site.own else "a part of shared data", "what the others have")
        key = str(site.client) if site.own else "shared"
        before = self._notes["data"].setdefault(key, site.data)
        if before != site.data:
            raise UsageError(site.name, "other data", f"the data that {'it' if site.own else 'the other sites'} had before")
        self._notes["examples"][str(site.client)] = site.examples

    def max_weight(self) -> int:
        """As noted when the run began."""
        return int(self._notes["max_weight"])

    def runtime(self) -> Runtime:
        """Carries requests to the sites."""
        return self._carrier

    def evaluate(self, part: str) -> list[Share | None]:
        """What each site finds on its share."""
        trainer: Any = self._module.trainer
        position = Position(trainer.global_step, trainer.current_epoch)
        self._last = self._carrier.evaluate(part, {"weights": carried(self._module, self._base)}, position, self.num_clients)
        return self._last

    def own_accuracy(self) -> list[float | None]:
        """As the sites said when they were last asked."""
        shared = [None if one is None else one.metrics.get("accuracy") for one in self._last]
        own = [None if one is None else one.own_accuracy for one in self._last]
        return [one if mine is None else mine for mine, one in zip(own, shared, strict=True)]


@final
class FlowerRuntime(Runtime):
    """A message to the site of each client, and its answer as soon as it is there.

    Args:
        sites: which site is which client.
        memory: notes what clients have kept.
        deadline: seconds after which an answer counts as missing.
        drop: whether a client whose training had to stop is left out, instead of ending the run.
    """

    def __init__(self, sites: Sites, memory: MemoryAtSites, deadline: float, drop: bool) -> None:
        self._sites, self._memory, self._deadline, self._drop = sites, memory, deadline, drop
        self._round = 0
        self.run = ""

    def replies(self, requests: Sequence[Request], context: Context) -> Iterator[Reply | Failure]:
        """One a request, in the order in which they arrive."""
        self._round = context.round
        packed = {id(request.groups): request.groups for request in requests}  # most clients get the same
        arrays = {key: arrays_of(groups) for key, groups in packed.items()}
        contents: dict[int, RecordDict] = {}
        for request in requests:
            about = request_record(request, context, self._memory_of(request.client, context.round))
            contents[request.client] = RecordDict({ABOUT: about, **arrays[id(request.groups)]})
        for client, answer in self._answers(contents, MessageType.TRAIN):
            if isinstance(answer, str):
                yield Failure(client, answer)
                continue
            try:
                reply, kept = read_reply(answer)
                if reply.client != client:
                    raise RunError(f"it answers as client {reply.client}")
            except RunError as error:
                yield Failure(client, f"its answer does not count: {error}")
                continue
            if kept:
                self._memory.note(client, context.round)
            yield reply

    def evaluate(self, part: str, groups: Groups, position: Position, num_clients: int) -> list[Share | None]:
        """For each client what its site finds; None where it does not answer, and a line says why."""
        arrays, contents = arrays_of(groups), {}
        for client in range(num_clients):
            about = evaluation_record(part, position, client, num_clients, self._memory_of(client))
            contents[client] = RecordDict({ABOUT: about, **arrays})
        found: list[Share | None] = [None] * num_clients
        for client, answer in self._answers(contents, MessageType.EVALUATE):
            try:
                if isinstance(answer, str):
                    raise RunError(answer)
                found[client] = read_share(answer)
            except RunError as error:
                print(f"evaluation on the {part} part goes without client {client}: {error}", flush=True)
        return found

    def _memory_of(self, client: int, round: int = sys.maxsize) -> Memory:
        """What of a client's memory counts before a round; by default now."""
        return Memory(self.run, self._memory.last(client, round), self._memory.first(client))

    def _answers(self, contents: Mapping[int, RecordDict], kind: str) -> Iterator[tuple[int, RecordDict | str]]:
        """Client and answer, or why there is none, as they come."""
        self._sites.settle(list(contents))
        grid, waiting = self._sites.grid, dict[str, Site]()
        for client, content in contents.items():
            site = self._sites.of(client)
            if site is None:
                yield client, "its site is away"
                continue
            sent = list(grid.push_messages([Message(content, site.node, kind, ttl=self._deadline + 60)]))
            if sent and sent[0]:
                waiting[sent[0]] = site
            else:
                yield client, "the request could not be sent to its site"
        end = time.monotonic() + self._deadline
        while waiting and time.monotonic() < end:
            for answer in grid.pull_messages(list(waiting)):
                site = waiting.pop(answer.metadata.reply_to_message_id)
                yield site.client, self._opened(answer, site)
            self._sites.look()
            for number in [number for number, site in waiting.items() if self._sites.of(site.client) != site]:
                yield waiting.pop(number).client, "its site has gone"
            if waiting:
                time.sleep(PAUSE)
        for site in waiting.values():
            yield site.client, f"no answer within {self._deadline:g} s"

    def _opened(self, answer: Message, site: Site) -> RecordDict | str:
        """An answer, or why it is none.

        Raises:
            RunError: the site says that it cannot answer in any round, or that its training had to stop, which ends the run.
        """
        if answer.has_error():
            return f"its process ended: {shown(answer.error.reason)}"
        if not is_stopped(answer.content):
            return answer.content
        stopped = answer.content.config_records[ABOUT]
        why = shown(stopped["stopped"])[1:-1]
        if self._drop and not stopped.get("ends"):
            return why
        raise RunError(f"round {self._round}, client {site.client} at {site.name}: {why}")

    def add_up_(self, tensors: list[Tensor]) -> None:
        """Nothing: the server alone adds up."""

    def gather(self, values: list[Value]) -> list[Value]:
        """The values."""
        return values

    def discard(self, round: int, clients: Sequence[int]) -> None:
        """Nothing but a note: each request says what of its memory counts."""
        self._memory.discard(round, clients)
