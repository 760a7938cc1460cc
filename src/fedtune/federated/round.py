"""One round, whatever the algorithm and wherever its clients are."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from fedtune.errors import RunError, shown
from fedtune.federated.agreement import RunningAgreement
from fedtune.federated.base import bytes_needed, counted, moving
from fedtune.federated.feedback import MEMORY, changes, held, holders
from fedtune.federated.messages import ClientReport, Context, Failure, Position, Reply, Request, bytes_of, decoded, encoded
from fedtune.federated.parts import Algorithm, Runtime
from fedtune.federated.pieces import Pieces
from fedtune.federated.stacks import Stacks
from fedtune.federated.state import RoundResult, ServerState
from fedtune.federated.steps import lengths, moved_weights, stepped
from fedtune.federated.sums import BUFFER_LIMIT, BufferSum, ExactSum
from fedtune.tensors import Groups, Tensors, distance, without

HONEST_LIMIT = 1024.0  # of the updates whose mean is compared with the aggregate


@dataclass(frozen=True)
class RoundOptions:
    """How a round is done, beside the algorithm.

    Args:
        local_epochs: by which schedules over epochs advance.
        buffers: the names of buffers among the server's weights.
        personal: the names of what stays with each client; the server keeps its first values, and sends none.
        agreement: whether the cosines and the drift of the clients' updates are found, and the error of adapters.
        min_clients: as many replies must count, 0 where a round may be without any; None for all of the cohort.
        on_reply: called with each report, as replies come in.
        resting: of adapters, those factors that are frozen.
    """

    local_epochs: int = 1
    buffers: frozenset[str] = frozenset()
    personal: frozenset[str] = frozenset()
    agreement: bool = True
    min_clients: int | None = None
    on_reply: Callable[[ClientReport], None] = lambda report: None
    resting: Tensors = field(default_factory=dict, repr=False)


def run_round(
    state: ServerState, algorithm: Algorithm, context: Context, runtime: Runtime, options: RoundOptions = RoundOptions()
) -> RoundResult:
    """One round: the cohort trains, its replies are checked and aggregated, the server makes its step.

    Raises:
        RunError: too few replies count, a client's training had to stop, or nothing is left to average.
    """
    began = time.perf_counter()
    sent = _sent(state, algorithm, context, options)
    context = replace(context, weights=sent["weights"])
    requests, kept = _requests(state, algorithm, context, sent)
    with _stacks(state, context, runtime, options) as stacks:
        inbox = _Inbox(state, algorithm, context, runtime, options, stacks)
        groups = algorithm.aggregator(inbox.replies(requests), state, context, runtime)
        if "update" not in groups:
            name = type(algorithm.aggregator).__name__
            raise RunError(f"round {context.round}: {name} returned no update, but {sorted(groups)}")
        error = None if stacks is None else stacks.error(groups)
    mean = Pieces(groups["update"])
    agreement, diagnostics = inbox.agreement.result(mean, runtime), inbox.distance(mean)
    diagnostics |= {} if error is None else {"adapter_error": error}
    answered = tuple(sorted(report.client for report in runtime.gather(inbox.reports)))
    here = replace(context, answered=answered)
    groups, memory = stepped(groups, state, algorithm, here)
    diagnostics |= lengths(memory)
    if base := moving(algorithm, context.adapters):
        memory |= counted(state, here, groups)
    if kept:
        memory |= held(kept, answered)
    if options.buffers - options.personal:
        groups |= inbox.buffers.mean(runtime)
    reports = sorted(runtime.gather(inbox.reports), key=lambda report: report.client)
    after = ServerState(
        round=context.round,
        weights=moved_weights(state.weights, groups, mean, context),
        position=Position(
            state.position.steps + max((report.num_steps for report in reports), default=0),
            state.position.epochs + options.local_epochs,
        ),
        examples=state.examples + sum(report.num_examples for report in reports),
        memory=memory,
    )
    return RoundResult(
        after,
        reports,
        agreement,
        failures=inbox.failures,
        seconds_aggregate=time.perf_counter() - began - inbox.seconds,
        bytes_up=sum(runtime.gather([inbox.bytes_up])),
        bytes_down=sum(map(_bytes_down, requests)) + bytes_needed(state, context, base),
        injected=runtime.injected(context),
        diagnostics=diagnostics,
    )


class _Inbox:
    """Takes replies, checks and counts them, and hands on those that count."""

    def __init__(
        self,
        state: ServerState,
        algorithm: Algorithm,
        context: Context,
        runtime: Runtime,
        options: RoundOptions,
        stacks: Stacks | None,
    ) -> None:
        self._state, self._algorithm, self._context, self._runtime, self._options = state, algorithm, context, runtime, options
        self.agreement = RunningAgreement(len(context.cohort), options.agreement)
        self.buffers, self._stacks = BufferSum(context.max_weight), stacks
        self._lying = runtime.lying(context)
        self._honest = ExactSum(lambda _: HONEST_LIMIT, context.max_weight)
        self.reports: list[ClientReport] = []
        self.failures: list[Failure] = []
        self.bytes_up, self.seconds = 0, 0.0

    def replies(self, requests: list[Request]) -> Iterator[Reply]:
        """The replies that count, decoded."""
        incoming = self._runtime.replies(requests, self._context)
        while (reply := self._next(incoming)) is not None:
            checked = self._checked(reply)
            if isinstance(checked, Failure):
                self._failed(checked)
                continue
            yield checked
            checked.pieces["update"].finish()  # an aggregator may have looked at the tensors only
        began = time.perf_counter()
        if self._stacks is not None:
            self._stacks.complete()
        self.failures = sorted(self._runtime.gather(self.failures), key=lambda failure: failure.client)
        self.seconds += time.perf_counter() - began  # in which other workers train
        self._runtime.discard(self._context.round, [failure.client for failure in self.failures])
        self._quorum(len(self._runtime.gather(self.reports)))

    def _next(self, incoming: Iterator[Reply | Failure]) -> Reply | Failure | None:
        began = time.perf_counter()
        found = next(incoming, None)
        self.seconds += time.perf_counter() - began
        return found

    def _checked(self, reply: Reply | Failure) -> Reply | Failure:
        if isinstance(reply, Failure):
            return reply
        self.bytes_up += reply.bytes_up
        context, aggregator = self._context, self._algorithm.aggregator
        try:
            groups = decoded(reply.groups, self._algorithm.up, context.of(reply.client))
        except Exception as error:  # of whatever kind: a client may have sent anything
            return Failure(reply.client, f"its message cannot be decoded: {type(error).__name__} {shown(str(error))}")
        wrong = self._misshapen(groups, reply.client) or self._overweight(reply)
        if wrong:
            return Failure(reply.client, wrong)
        groups["update"] = context.adapters.widened(groups["update"], context.adapters.rank_of(reply.client))
        pieces = {name: reply.pieces[name] if name in reply.pieces else Pieces(group) for name, group in groups.items()}
        for name, group in pieces.items():
            wrong = wrong or _beyond(name, group, BUFFER_LIMIT if name == "buffers" else aggregator.limit(name))
        if wrong:
            return Failure(reply.client, wrong)
        report = replace(reply.report, update_norm=pieces["update"].length)
        weight = aggregator.weight(reply)
        if "buffers" in pieces:  # they are averaged here, whatever the algorithm
            self.buffers.add(groups.pop("buffers"), weight)
            del pieces["buffers"]
        self.agreement.add(reply.client, pieces["update"], weight)
        if self._stacks is not None:
            self._stacks.add(reply.client, groups["update"], weight)
        if self._lying and reply.client not in self._lying and not _beyond("update", pieces["update"], HONEST_LIMIT):
            self._honest.add({"update": Pieces(groups["update"])}, weight)
        reply = replace(reply, groups=groups, report=report, pieces=pieces)
        self.reports.append(report)
        self._options.on_reply(report)
        return reply

    def _misshapen(self, groups: Groups, client: int) -> str | None:
        """What is wrong with the names and shapes of groups and tensors, if anything."""
        part, trains = self._algorithm.client, self._algorithm.client.trains
        sent = {name: tensor for name, tensor in self._context.of(client).weights.items() if trains(name, self._context.round)}
        averaged = self._options.buffers - self._options.personal
        wanted = dict.fromkeys(part.alike, sent)
        wanted |= {"buffers": {name: self._state.weights[name] for name in averaged}} if averaged else {}
        for group, like in wanted.items():
            expected, found = (
                {name: tuple(tensor.shape) for name, tensor in those.items()} for those in (like, groups.get(group, {}))
            )
            for name in {**expected, **found}:
                if expected.get(name) != found.get(name):
                    came, belongs = found.get(name, "nothing"), expected.get(name, "nothing")
                    return f"its {group} has {came} for {name}, where {belongs} belongs"
                if group in part.alike and not groups[group][name].is_floating_point():
                    return f"its {group} has whole numbers for {name}"
        makes = {*part.makes, *wanted}
        if groups.keys() != makes:
            return f"it has the groups {shown(sorted(groups))}, where {shown(sorted(makes))} belong"
        several = [name for group in part.numbers for name, tensor in groups[group].items() if tensor.ndim]
        return f"it has several numbers for {several[0]}, where one belongs" if several else None

    def _overweight(self, reply: Reply) -> str | None:
        if 0 <= reply.weight <= self._context.max_weight:
            return None
        return f"it says that it has {reply.weight} examples, where all clients together have {self._context.max_weight}"

    def distance(self, aggregate: Pieces) -> dict[str, float]:
        """How far the aggregate is from the mean of the honest clients, where others lie on purpose."""
        if not self._lying or not any(self._runtime.gather([self._honest.any])):
            return {}
        honest = self._honest.mean(self._runtime)["update"]
        return {"distance_from_honest_mean": distance(honest, aggregate.tensors)}

    def _failed(self, failure: Failure) -> None:
        self.failures.append(failure)
        if self._options.min_clients is None:
            raise RunError(f"round {self._context.round}, client {failure.client}: {failure.reason}")

    def _quorum(self, answered: int) -> None:
        aggregator = self._algorithm.aggregator
        fewest = 1 if self._options.min_clients is None else self._options.min_clients
        least, why = max((fewest, "min_clients is"), (aggregator.least, f"{type(aggregator).__name__} needs"))
        if answered < least:
            reasons = "; ".join(f"client {failure.client}: {failure.reason}" for failure in self.failures[:3])
            raise RunError(
                f"round {self._context.round}: the replies of {answered} of {len(self._context.cohort)} clients count, "
                f"{why} {least}" + (f" ({reasons})" if reasons else "")
            )


@contextlib.contextmanager
def _stacks(state: ServerState, context: Context, runtime: Runtime, options: RoundOptions) -> Iterator[Stacks | None]:
    """For the error of adapters: what keeps the factors of those that the server has."""
    known = without(state.weights, options.personal) | options.resting
    layers = tuple(layer for layer in context.adapters.layers if options.agreement and {layer.a, layer.b} <= known.keys())
    if not layers:
        yield None
        return
    with Stacks(replace(context.adapters, layers=layers), known, runtime, len(context.cohort)) as found:
        yield found


def _requests(state: ServerState, algorithm: Algorithm, context: Context, groups: Groups) -> tuple[list[Request], Groups]:
    """One for each client of the round, and what the server remembers of them; what goes to those of one rank is the same."""
    adapters, kept = context.adapters, Groups()
    if base := {name: state.weights[name] for name in moving(algorithm, adapters)}:
        groups = groups | {"base": base}
    if any(stage.feedback for stage in algorithm.down):
        before = state.memory.get(MEMORY, {})
        small, whole, kept = changes(groups, before, algorithm.down, context)
        sent = {client: small if client in holders(before) else whole for client in context.cohort}
    else:
        ranks = {client: adapters.rank_of(client) for client in context.cohort}
        of_rank = {
            rank: encoded(groups | {"weights": adapters.narrowed(groups["weights"], rank)}, algorithm.down, context)
            for rank in dict.fromkeys(ranks.values())
        }
        sent = {client: of_rank[rank] for client, rank in ranks.items()}
    return [Request(context.round, client, state.position, context.cohort, sent[client]) for client in context.cohort], kept


def _sent(state: ServerState, algorithm: Algorithm, context: Context, options: RoundOptions) -> Groups:
    """What goes to every client of the round, but for weights that nobody trains."""
    travel = without(state.weights, options.personal | moving(algorithm, context.adapters))
    sent = {"weights": without(travel, options.buffers)}
    if buffers := {name: tensor for name, tensor in travel.items() if name in options.buffers}:
        sent["buffers"] = buffers
    for step in algorithm.server:
        memory = state.memory.get(type(step).__name__, {})
        sent |= {group: memory[group] for group in step.sends if group in memory}
    return sent


def _beyond(group: str, pieces: Pieces, limit: float) -> str | None:
    """What is wrong with the values of a group, if anything."""
    for name, square in pieces.squares.items():
        if not math.isfinite(square):
            cure = (
                "a buffer that moves from or to infinity cannot be averaged"
                if group == "buffers"
                else "lower the learning rate"
            )
            return f"its {group} is not finite (in {name}); {cure}"
        if square > limit**2:  # else no element can be beyond the limit
            most = float(pieces.tensors[name].detach().abs().max())
            if most > limit:
                return f"its {group} goes up to {most:.3g} (in {name}), the limit is {limit:g}; lower the learning rate"
    return None


def _bytes_down(request: Request) -> int:
    """Bytes of a request, but for weights that nobody trains."""
    return bytes_of({name: group for name, group in request.groups.items() if name != "base"})
