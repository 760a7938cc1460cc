"""One round, whatever the algorithm and wherever its clients are."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedtune.errors import RunError
from fedtune.federated.agreement import RunningAgreement
from fedtune.federated.messages import ClientReport, Context, Failure, Position, Reply, Request, bytes_of, decoded, encoded
from fedtune.federated.parts import Algorithm, Runtime
from fedtune.federated.pieces import Pieces, moved
from fedtune.federated.state import RoundResult, ServerState
from fedtune.federated.sums import ExactSum, grid_bits
from fedtune.tensors import Groups, Tensors, distance, mapped, without

HONEST_LIMIT = 1024.0  # of the updates whose mean is compared with the aggregate
BUFFER_LIMIT = 2.0**32  # the running variance of a batch norm may change by much more than a weight does


@dataclass(frozen=True)
class RoundOptions:
    """How a round is done, beside the algorithm.

    Args:
        local_epochs: by which schedules over epochs advance.
        buffers: the names of buffers among the server's weights.
        personal: the names of what stays with each client; the server keeps its first values, and sends none.
        agreement: whether the cosines and the drift of the clients' updates are found.
        min_clients: as many replies must count; None for all of the cohort.
        on_reply: called with each report, as replies come in.
    """

    local_epochs: int = 1
    buffers: frozenset[str] = frozenset()
    personal: frozenset[str] = frozenset()
    agreement: bool = True
    min_clients: int | None = None
    on_reply: Callable[[ClientReport], None] = lambda report: None


def run_round(
    state: ServerState, algorithm: Algorithm, context: Context, runtime: Runtime, options: RoundOptions = RoundOptions()
) -> RoundResult:
    """One round: the cohort trains, its replies are checked and aggregated, the server makes its step.

    Raises:
        RunError: too few replies count, a client's training had to stop, or nothing is left to average.
    """
    began = time.perf_counter()
    sent = encoded(_sent(state, algorithm, options), algorithm.down, context)
    requests = [Request(context.round, client, state.position, context.cohort, sent) for client in context.cohort]
    inbox = _Inbox(state, algorithm, context, runtime, options)
    groups = algorithm.aggregator(inbox.replies(requests), state, context, runtime)
    if "update" not in groups:
        raise RunError(f"round {context.round}: {type(algorithm.aggregator).__name__} returned no update, but {sorted(groups)}")
    mean = Pieces(groups["update"])
    agreement, diagnostics = inbox.agreement.result(mean, runtime), inbox.distance(mean)
    answered = tuple(sorted(report.client for report in runtime.gather(inbox.reports)))
    here = replace(context, answered=answered, weights=_sent(state, algorithm, options)["weights"])
    groups, memory = _stepped(groups, state, algorithm, here)
    if options.buffers - options.personal:
        groups |= inbox.buffers.mean(runtime)
    reports = sorted(runtime.gather(inbox.reports), key=lambda report: report.client)
    after = ServerState(
        round=context.round,
        weights=_weights(state.weights, groups, mean),
        position=Position(
            state.position.steps + max(report.num_steps for report in reports), state.position.epochs + options.local_epochs
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
        bytes_down=bytes_of(sent) * len(context.cohort),
        injected=runtime.injected(context),
        diagnostics=diagnostics | _lengths(memory),
    )


class _Inbox:
    """Takes replies, checks and counts them, and hands on those that count."""

    def __init__(
        self, state: ServerState, algorithm: Algorithm, context: Context, runtime: Runtime, options: RoundOptions
    ) -> None:
        self._state, self._algorithm, self._context, self._runtime, self._options = state, algorithm, context, runtime, options
        self.agreement = RunningAgreement(len(context.cohort), options.agreement)
        self.buffers = _Buffers(context.max_weight)
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
        groups = decoded(reply.groups, self._algorithm.up, context.of(reply.client))
        wrong = self._misshapen(groups) or self._overweight(reply)
        if wrong:
            return Failure(reply.client, wrong)
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
        if self._lying and reply.client not in self._lying and not _beyond("update", pieces["update"], HONEST_LIMIT):
            self._honest.add({"update": Pieces(groups["update"])}, weight)
        reply = replace(reply, groups=groups, report=report, pieces=pieces)
        self.reports.append(report)
        self._options.on_reply(report)
        return reply

    def _misshapen(self, groups: Groups) -> str | None:
        """What is wrong with the names and shapes of an update, if anything."""
        others = self._options.buffers | self._options.personal
        expected = {name: tensor.shape for name, tensor in without(self._state.weights, others).items()}
        found = {name: tensor.shape for name, tensor in groups.get("update", {}).items()}
        different = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
        if not different:
            return None
        name = different[0]
        came, wanted = (tuple(shapes[name]) if name in shapes else "nothing" for shapes in (found, expected))
        return f"its update has {came} for {name}, where {wanted} belongs"

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
        least, why = max(
            (self._options.min_clients or 1, "min_clients is"), (aggregator.least, f"{type(aggregator).__name__} needs")
        )
        if answered < least:
            reasons = "; ".join(f"client {failure.client}: {failure.reason}" for failure in self.failures[:3])
            raise RunError(
                f"round {self._context.round}: the replies of {answered} of {len(self._context.cohort)} clients count, "
                f"{why} {least}" + (f" ({reasons})" if reasons else "")
            )


class _Buffers:
    """Exact sums of buffers, of values up to 2^32 and very small ones: on a coarse grid, what is left on a finer one, …

    The last step is below 2^-126, the least normal number of fp32.
    """

    def __init__(self, max_weight: int) -> None:
        self._limits = [BUFFER_LIMIT]
        while self._step(-1, max_weight) > 2.0**-126:
            self._limits.append(self._step(-1, max_weight))
        self._steps = [self._step(place, max_weight) for place in range(len(self._limits))]
        self._sums = ExactSum(lambda group: self._limits[int(group)], max_weight)

    def _step(self, place: int, max_weight: int) -> float:
        return 2.0 ** -grid_bits(self._limits[place], max_weight)

    def add(self, buffers: Tensors, weight: int) -> None:
        """Take in one client's."""
        left = {name: tensor.double() for name, tensor in buffers.items()}
        groups: dict[str, Pieces] = {}
        for place, step in enumerate(self._steps):
            on_grid = {name: tensor.div(step).round_().mul_(step) for name, tensor in left.items()}
            left = {name: tensor - on_grid[name] for name, tensor in left.items()}
            groups[str(place)] = Pieces(on_grid)
        self._sums.add(groups, weight)

    def mean(self, runtime: Runtime) -> Groups:
        """Their mean."""
        found = self._sums.mean(runtime)
        first, *rest = (found[str(place)] for place in range(len(self._steps)))
        return {"buffers": {name: sum((one[name] for one in rest), start=tensor) for name, tensor in first.items()}}


def _sent(state: ServerState, algorithm: Algorithm, options: RoundOptions) -> Groups:
    """What goes to every client of the round."""
    travel = without(state.weights, options.personal)
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


def _stepped(groups: Groups, state: ServerState, algorithm: Algorithm, context: Context) -> tuple[Groups, dict[str, Groups]]:
    """The aggregate after all server steps, and what they remember, in the types of the weights, fp32 at least."""
    aggregator = algorithm.aggregator
    memory = {type(aggregator).__name__: {group: groups[group] for group in aggregator.keeps}} if aggregator.keeps else {}
    groups = {group: tensors for group, tensors in groups.items() if group not in aggregator.keeps}
    for step in algorithm.server:
        name = type(step).__name__
        groups, kept = step(groups, state.memory.get(name, {}), context)
        memory[name] = kept

    def as_weights(name: str, tensor: Tensor) -> Tensor:
        if name not in state.weights:
            return tensor
        return tensor.to(torch.promote_types(state.weights[name].dtype, torch.float32))

    return groups, {name: mapped(kept, as_weights) for name, kept in memory.items()}


def _lengths(memory: dict[str, Groups]) -> dict[str, float]:
    """The Euclidean length of each group that server steps remember."""
    return {
        f"{name}_norm": math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
        for groups in memory.values()
        for name, tensors in groups.items()
    }


def _weights(weights: Tensors, groups: Groups, mean: Pieces) -> Tensors:
    """The server's next weights; `mean` may be the pieces of the update."""
    left = [name for name in groups if name not in ("update", "buffers")]
    if left:
        raise RunError(f"the algorithm has no server step for the groups {', '.join(left)}")
    new: Tensors = {}
    for group in groups.values():
        pieces = mean if mean.are(group) else Pieces(group)
        new |= moved({name: weights[name] for name in group}, pieces)
    return {name: new.get(name, tensor) for name, tensor in weights.items()}
