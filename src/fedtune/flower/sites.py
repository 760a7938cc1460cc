"""Which sites there are, and which client each is: they are asked once, when they come, and again when they come back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedtune.errors import RunError, UsageError, shown
from fedtune.flower.facts import NAMES
from fedtune.flower.records import ABOUT, SITE, is_stopped, values_of

PAUSE = 0.3  # seconds between two looks at the mail
_LOOK = 5.0  # seconds between two looks at who is there
_ANSWER = 120.0  # seconds that a new site may take to say who it is, before a round goes on without it


@dataclass(frozen=True)
class Site:
    """A site that has said who it is.

    Args:
        node: its number at the SuperLink.
        client: which client it is.
        name: its name, for messages.
        own: whether its data are its own.
        examples: for training; -1: it does not know.
        max_weight: the most examples of a round, of all clients, or of its own data alone.
        num_clients: that its data have.
        data: names the content of its data, and of all clients' where they are not its own.
    """

    node: int
    client: int
    name: str
    own: bool
    examples: int
    max_weight: int
    num_clients: int
    data: str


class Sites:
    """The sites of a federation.

    Args:
        grid: Flower's.
        num_clients: of the federation.
        facts: what must be the same at each of them.
        names: of the classes, for a message.
        say: prints a line.
    """

    def __init__(
        self, grid: Grid, num_clients: int, facts: dict[str, str], names: Sequence[str], say: Callable[[str], None]
    ) -> None:
        self.grid, self.num_clients, self._facts, self._names, self._say = grid, num_clients, facts, names, say
        self._sites: dict[int, Site] = {}  # by client
        self._asked: dict[str, int] = {}  # message -> node
        self._known: set[int] = set()
        self._online: set[int] = set()
        self._looked = -_LOOK
        self.check: Callable[[Site], None] = lambda site: None

    def of(self, client: int) -> Site | None:
        """The site of a client, as long as it is there."""
        found = self._sites.get(client)
        return found if found is not None and found.node in self._online else None

    def here(self) -> list[Site]:
        """Those that are there, by client."""
        return [site for site in map(self.of, range(self.num_clients)) if site is not None]

    def look(self) -> None:
        """See who is there, ask those who are new, and take their answers; a look costs little, so one in a while is made."""
        if time.monotonic() - self._looked >= _LOOK:
            self._looked = time.monotonic()
            self._online = set(self.grid.get_node_ids())
            self._known &= self._online  # one that comes back is asked again
            for node in sorted(self._online - self._known):
                self._known.add(node)
                question = Message(RecordDict(), node, MessageType.QUERY, ttl=2 * _ANSWER)
                self._asked |= dict.fromkeys(_sent(self.grid, question), node)
        self._asked = {message: node for message, node in self._asked.items() if node in self._online}
        if self._asked:
            for answer in self.grid.pull_messages(list(self._asked)):
                self._take(self._read(self._asked.pop(answer.metadata.reply_to_message_id), answer))

    def wait(self, clients: Collection[int], seconds: float, unanswered: bool = False) -> None:
        """Wait until the sites of these clients are there, but so long at most.

        Args:
            unanswered: give up as soon as no site is left that may still say who it is.
        """
        end = time.monotonic() + seconds
        self.look()
        while any(self.of(client) is None for client in clients) and time.monotonic() < end:
            if unanswered and not self._asked:
                return
            time.sleep(PAUSE)
            self.look()

    def settle(self, clients: Collection[int]) -> None:
        """Wait for those of the clients' sites that have come, but not yet said who they are."""
        self._looked = -_LOOK
        self.wait(clients, _ANSWER, unanswered=True)

    def missing(self) -> list[int]:
        """The clients without a site."""
        return [client for client in range(self.num_clients) if self.of(client) is None]

    def _take(self, site: Site) -> None:
        before = self._sites.get(site.client)
        if before is not None and before.node in self._online and before.node != site.node and not self._ended(before):
            raise UsageError(
                f"node-config client of {before.name} and {site.name}", site.client, "a number for each site of its own"
            )
        self.check(site)
        self._sites[site.client] = site
        count = "" if site.examples < 0 else f", {site.examples} examples"
        self._say(f"client {site.client} is at {site.name}{count}")

    def _ended(self, site: Site) -> bool:
        """Whether a site that has its client's number already has gone; the SuperLink may take a while to notice."""
        self._say(f"is {site.name} still there? another says that it is client {site.client}, too")
        for message in _sent(self.grid, Message(RecordDict(), site.node, MessageType.QUERY, ttl=_ANSWER)):
            end = time.monotonic() + _ANSWER
            while time.monotonic() < end and site.node in set(self.grid.get_node_ids()):
                if list(self.grid.pull_messages([message])):
                    return False
                time.sleep(PAUSE)
        return True

    def _read(self, node: int, answer: Message) -> Site:
        """What a site says of itself.

        Raises:
            UsageError: something is not as it must be everywhere; the site and what differs are named.
        """
        place = f"site {node}"
        if answer.has_error():
            raise RunError(f"{place} could not say who it is: {shown(answer.error.reason)}")
        if is_stopped(answer.content):
            stopped = answer.content.config_records[ABOUT]
            raise RunError(f"{place} (client {stopped.get('client')}): {stopped['stopped']}")
        values = values_of(answer.content, SITE)
        values["name"] = f"site {values['name'] or node}"
        facts = _facts(values.pop("facts"), values["name"])
        found = Site(node, **values)
        different = [name for name in self._facts if facts.get(name) != self._facts[name]]
        if different:
            names = f"; the server has {', '.join(self._names)}" if NAMES in different and self._names else ""
            raise UsageError(found.name, f"other {' and '.join(different)}", f"the same as the server's{names}")
        if not 0 <= found.client < self.num_clients:
            raise UsageError(f"node-config client of {found.name}", found.client, f"0 to {self.num_clients - 1}")
        if not found.own and found.num_clients != self.num_clients:
            raise UsageError(f"data.num_clients of {found.name}", found.num_clients, f"{self.num_clients}, as the server has")
        return found


def _facts(text: Any, place: str) -> dict[str, str]:
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    except ValueError:
        pass
    raise RunError(f"{place} says nothing of what it has")


def _sent(grid: Grid, message: Message) -> Iterable[str]:
    """The number of a message that is on its way; none where it could not be sent."""
    return [number for number in grid.push_messages([message]) if number]
