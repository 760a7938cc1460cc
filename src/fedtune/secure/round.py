"""A round with secure sums: clients and server of the protocol around `run_round`.

before the round     stages 0 and 1: keys and shares; of clients that drop out, each leaves before a stage that is drawn
while it lasts       stage 2: the whole numbers that a client would add to the sum are masked, and added by the server
at its end           stage 4: shares of the survivors, masks of the sum, and what is left is the plain sum, to the bit
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import final

import numpy as np
import torch
from torch import Tensor

from fedtune.errors import RunError, UsageError
from fedtune.federated.messages import Context
from fedtune.federated.parts import Algorithm, Runtime
from fedtune.federated.pieces import Pieces
from fedtune.federated.round import RoundOptions, run_round
from fedtune.federated.state import RoundResult, ServerState
from fedtune.federated.sums import ExactSum, Key, Workers
from fedtune.randomness import stream
from fedtune.secure.client import Client, Secrets
from fedtune.secure.parts import FEWEST, PairwiseMasks
from fedtune.secure.server import Server
from fedtune.tensors import Groups

STAGES = ("keys", "shares", "masked", "unmasking")
NUMBER = 4  # bytes of a client's number in a message
_DROPS = "Drop"  # the fault whose clients may leave before they have sent keys or shares
Layout = dict[Key, tuple[torch.Size, str]]  # shapes and kinds of devices; numbers travel in the order of the keys


def secure_round(
    part: PairwiseMasks,
    state: ServerState,
    algorithm: Algorithm,
    context: Context,
    runtime: Runtime,
    options: RoundOptions,
) -> RoundResult:
    """`run_round` with a sum of masked messages; how updates agree is not found, as nobody sees two of them.

    Raises:
        UsageError: buffers travel, which are averaged apart.
        RunError: as `run_round`, or too few clients stayed to the end.
    """
    if averaged := options.buffers - options.personal:
        allowed = f"a module without such, with secure_sums ({min(averaged)}: of a batch norm?), as they are averaged apart"
        raise UsageError("module", f"{len(averaged)} buffers", allowed)
    session = Session(part, context, runtime.injected(context))
    context = replace(context, sums=session.sums)
    return session.noted(run_round(state, algorithm, context, runtime, replace(options, agreement=False)))


@final
class Session:
    """One round of the protocol.

    Args:
        part: as the configuration has it.
        context: of the round.
        injected: the clients that fail on purpose, and how.

    Raises:
        RunError: the round has too few clients, or too few are left once keys or shares are exchanged.
    """

    def __init__(self, part: PairwiseMasks, context: Context, injected: Mapping[int, str]) -> None:
        self._part, self._context, where = part, context, f"round {context.round}"
        if len(context.cohort) < FEWEST:
            raise RunError(f"{where}: it has {len(context.cohort)} clients, secure sums need {FEWEST} or more")
        self.threshold = part.least(len(context.cohort))
        self.server, self.clients = Server(self.threshold, where), dict[int, Client]()
        self.bytes_up, self.bytes_down, self.lost = Counter[str](), Counter[str](), Counter[str]()
        self._summed = False
        leaves = {client: self._leaves(client) for client, fault in injected.items() if fault == _DROPS}
        self._begin([client for client in context.cohort if leaves.get(client) != STAGES[0]], leaves)

    def _begin(self, clients: list[int], leaves: Mapping[int, str]) -> None:
        """Stages 0 and 1."""
        for number in clients:
            rng = stream(self._context.seed, "secure sums", self._context.round, number)
            self.clients[number] = client = Client(number, Secrets.drawn(rng), self.threshold)
            self.server.take_keys(number, client.advertise())
        keys = self.server.all_keys()
        for own in keys.values():
            self._count("keys", [own], [NUMBER * len(keys), *keys.values()])
        staying = [number for number in clients if leaves.get(number) != STAGES[1]]
        for number in staying:
            self.server.take_shares(number, self.clients[number].share(keys))
        for number in staying:
            shares = self.server.shares_for(number)
            self.clients[number].receive(shares)
            sent = self.server.sealed[number].values()
            self._count("shares", [*sent, NUMBER * len(sent)], [*shares.values(), NUMBER * len(shares)])
        self.lost.update(keys=len(self._context.cohort) - len(clients), shares=len(clients) - len(staying))

    def sums(self, limit: Callable[[str], float], max_weight: int) -> MaskedSum:
        """The sum of the round, which takes the place of `ExactSum`.

        Raises:
            RunError: it was made before: masks hide one vector alone.
        """
        if self._summed:
            raise RunError(f"round {self._context.round}: secure sums are made once a round, and this is the second one")
        self._summed = True
        return MaskedSum(self, limit, max_weight)

    def send(self, client: int, numbers: np.ndarray) -> None:
        """Stage 2: a client's numbers, which are masked in place, on their way to the server."""
        self.clients[client].mask(numbers)
        self.server.take_masked(client, numbers)

    def unmasked(self, workers: Workers | None, size: int) -> np.ndarray:
        """Stage 4: (size,) the sum, of the clients of all workers."""
        server = self.server
        if workers is not None:
            total = np.zeros(size, np.int64) if server.total is None else server.total
            workers.add_up_([torch.from_numpy(total)])
            server.total, server.senders = total, sorted(workers.gather(server.senders))
        asked = server.ask()
        for _ in asked.survivors:
            self._count("masked", [8 * size], [])
        answering = [client for client in asked.survivors if not self._vanishes(client)]
        answers = {client: self.clients[client].reveal(asked.survivors, asked.dropped) for client in answering}
        named = NUMBER * (len(asked.survivors) + len(asked.dropped))
        for shares in answers.values():
            self._count("unmasking", [named, *shares.values()], [named])
        self.lost.update(masked=len(asked.dropped), unmasking=len(asked.survivors) - len(answering))
        return server.unmasked(answers)

    def noted(self, result: RoundResult) -> RoundResult:
        """The result with what was sent: bytes of all clients together, a number for each stage; and who dropped out where."""
        found = {f"secure_{name}_bytes_up": float(self.bytes_up[name]) for name in STAGES}
        found |= {f"secure_{name}_bytes_down": float(self.bytes_down[name]) for name in STAGES if self.bytes_down[name]}
        found |= {f"secure_lost_before_{name}": float(self.lost[name]) for name in STAGES}
        return replace(
            result,
            bytes_up=self.bytes_up.total(),
            bytes_down=result.bytes_down + self.bytes_down.total(),
            diagnostics=result.diagnostics | {"secure_threshold": float(self.threshold)} | found,
        )

    def _count(self, stage: str, up: list[bytes | int], down: list[bytes | int]) -> None:
        """Messages of one client, or numbers of bytes."""
        for counter, parts in ((self.bytes_up, up), (self.bytes_down, down)):
            counter[stage] += sum(one if isinstance(one, int) else len(one) for one in parts)

    def _leaves(self, client: int) -> str:
        """Before which of the first three stages a client drops out."""
        return STAGES[stream(self._context.seed, "secure sums/stage", self._context.round, client).integers(3)]

    def _vanishes(self, client: int) -> bool:
        drawn = stream(self._context.seed, "secure sums/vanish", self._context.round, client).random()
        return bool(drawn < self._part.vanish)


@final
class MaskedSum:
    """Weighted sums, as of `ExactSum`, whose server sees masked numbers: a client's whole numbers and its weight, one vector.

    Sums modulo 2^64 are the sums where these are below 2^63. With q the whole numbers of a client that weighs n, max|q n| / n
    times the largest total weight must be: each client sees to that before it sends anything.

    Args:
        session: of the round.
        limit, max_weight: as of `ExactSum`.
    """

    def __init__(self, session: Session, limit: Callable[[str], float], max_weight: int) -> None:
        self._session, self._limit, self._max_weight = session, limit, max_weight
        self._layout: Layout = {}

    def add(self, groups: Mapping[str, Pieces], weight: int, factor: float = 1.0, client: int | None = None) -> None:
        """Take in one client's contribution.

        Raises:
            RunError: it has no client, other tensors than others have, or numbers that could make the sum wrap around.
        """
        if client is None:
            raise RunError("a contribution to secure sums needs the number of its client")
        own = ExactSum(self._limit, self._max_weight)
        own.add(groups, weight, factor)
        whole = own.numbers()
        layout = {key: (tensor.shape, tensor.device.type) for key, tensor in whole.items()}
        self._layout = self._layout or layout
        if layout != self._layout:
            raise RunError(f"client {client} adds other tensors to secure sums than the others")
        numbers = np.concatenate([*(whole[key].cpu().numpy().ravel() for key in sorted(layout)), np.array([weight])])
        check_range(numbers[:-1], weight, self._max_weight, f"client {client}")
        self._session.send(client, numbers)

    def mean(self, workers: Workers | None = None, over: float | None = None) -> Groups:
        """The mean, as of `ExactSum`.

        Raises:
            RunError: too few clients stayed to the end.
        """
        layouts = [self._layout] if workers is None else workers.gather([self._layout])
        layout = next((one for one in layouts if one), {})
        sizes = [layout[key][0].numel() for key in sorted(layout)]
        found = self._session.unmasked(workers, sum(sizes) + 1)
        sums, parts = ExactSum(self._limit, self._max_weight), np.split(found[:-1], np.cumsum(sizes)[:-1])
        whole = {key: _tensor(part, *layout[key]) for key, part in zip(sorted(layout), parts, strict=True)}
        sums.take({key: whole[key] for key in layout}, int(found[-1]))
        return sums.mean(over=over)


def check_range(numbers: np.ndarray, weight: int, max_weight: int, who: str) -> None:
    """Raise `RunError` where a sum of such numbers, of clients that weigh `max_weight` together, could be 2^63 or more.

    Args:
        numbers: (d,) q n, a client's whole numbers times its weight n.
    """
    most = max(-int(numbers.min(initial=0)), int(numbers.max(initial=0)))
    if most * max_weight >= 2**63 * max(weight, 1):
        raise RunError(f"{who}: numbers up to {most} of weight {weight}, and {max_weight} in all, could wrap around at 2^63")


def _tensor(numbers: np.ndarray, shape: torch.Size, device: str) -> Tensor:
    return torch.from_numpy(numbers).view(shape).to(device)
