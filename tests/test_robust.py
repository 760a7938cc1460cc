"""Robust rules: against plain references and ByzFL, in what they promise, and in what a run says when they cannot work."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import shutil
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, final

import numpy as np
import pytest
import torch
from conftest import make_loop
from hypothesis import given, settings
from hypothesis import strategies as st
from test_algorithms import TinyLoaders

import fedtune
from fedtune.algorithms.fedavg import fedavg
from fedtune.algorithms.robust import (
    CentredClipping,
    ClippedMean,
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    NearestMean,
    TrimmedMean,
)
from fedtune.federated import spool
from fedtune.federated.messages import ClientReport, Context, Failure, Reply, Request
from fedtune.federated.parts import Aggregator, Runtime
from fedtune.federated.pieces import Pieces
from fedtune.federated.round import RoundOptions, run_round
from fedtune.federated.rows import Rows
from fedtune.federated.state import RoundResult, ServerState
from fedtune.testing import TinyModule

Array = np.ndarray[Any, Any]
STAIRS = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
RULES: dict[str, Callable[[int], Any]] = {
    "median": Median,
    "trimmed mean": TrimmedMean,
    "geometric median": GeometricMedian,
    "Krum": Krum,
    "Multi-Krum": MultiKrum,
    "centred clipping": lambda f: CentredClipping(f, tau=3.0, steps=2),
    "nearest mean": NearestMean,
    "mixed trimmed mean": lambda f: TrimmedMean(f, mix=True),
    "mixed Krum": lambda f: Krum(f, mix=True),
}
BOUNDED = [name for name in RULES if name not in ("centred clipping", "nearest mean")]  # whom everyone moves a little


@final
class Scripted(Runtime):
    """Clients that answer with the given groups, or fail."""

    def __init__(self, answers: dict[int, Any]) -> None:
        self._answers = answers

    def replies(self, requests: Sequence[Request], context: Context) -> Iterator[Reply | Failure]:
        for request in requests:
            answer = self._answers[request.client]
            yield Failure(request.client, answer) if isinstance(answer, str) else reply(request.client, answer)

    def add_up_(self, tensors: list[torch.Tensor]) -> None: ...

    def gather(self, values: list[Any]) -> list[Any]:
        return values

    def discard(self, round: int, clients: Sequence[int]) -> None: ...


def reply(client: int, groups: dict[str, Any], weight: int = 1) -> Reply:
    report = ClientReport(client, weight, 1, 0, 1.0, 0.1)
    return Reply(client, weight, groups, report, 0, {name: Pieces(group) for name, group in groups.items()})


def updates(rows: Array, dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """Rows as updates of two tensors, where they have two columns."""
    tensors = [torch.from_numpy(np.array(row)).to(dtype) for row in rows]
    return [{"update": {"b": one[:1].clone(), "w": one[1:].clone()}} for one in tensors]


def aggregate(rule: Any, replies: Iterator[Reply], cohort: int, runtime: Runtime | None = None) -> Array:
    found = rule(replies, ServerState(0, {}), Context(0, 1, cohort, tuple(range(cohort)), cohort), runtime or Scripted({}))
    return torch.cat([found["update"]["b"], found["update"]["w"]]).numpy()


def made(rule: Any, rows: Array, order: Sequence[int] | None = None, dtype: torch.dtype = torch.float64) -> Array:
    """What a rule makes of rows that arrive in some order."""
    all_updates = updates(rows, dtype)
    return aggregate(rule, (reply(i, all_updates[i]) for i in (range(len(rows)) if order is None else order)), len(rows))


def cloud(seed: int, n: int, d: int) -> Array:
    """(n, d) rows around a mean that is not zero."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=d) + rng.normal(size=(n, d)) * rng.uniform(0.5, 2, (n, 1))


def attacked(honest: Array, f: int, attack: str) -> Array:
    mean, deviation = honest.mean(0), honest.std(0, ddof=1)
    lie = {"sign flip": -mean, "ALIE": mean + 1.5 * deviation, "IPM": -2 * mean, "far": np.full_like(mean, 1e30)}[attack]
    return np.concatenate([honest, np.tile(lie, (f, 1))])


# ---------------------------------------------------------------- plain references, fp64


def squared_distances(rows: Array) -> Array:
    return ((rows[:, None] - rows[None]) ** 2).sum(2)


def krum_scores(rows: Array, f: int, fewer: int = 2) -> list[float]:
    scores = []
    for i in range(len(rows)):
        others = [float(((rows[i] - rows[j]) ** 2).sum()) for j in range(len(rows)) if j != i]
        scores.append(sum(sorted(others)[: len(rows) - f - fewer]))
    return scores


def plain_multi_krum(rows: Array, f: int, m: int) -> Array:
    return np.asarray(rows[np.argsort(krum_scores(rows, f), kind="stable")[:m]].mean(0))


def plain_trimmed(rows: Array, f: int) -> Array:
    return np.asarray(np.sort(rows, 0)[f : len(rows) - f].mean(0))


def plain_clipping(rows: Array, tau: float, steps: int, start: Array) -> Array:
    centre = start
    for _ in range(steps):
        away = rows - centre
        lengths = np.linalg.norm(away, axis=1)
        centre = centre + (away * (tau / np.maximum(tau, lengths))[:, None]).mean(0)
    return centre


def plain_mixed(rows: Array, f: int) -> Array:
    nearest = squared_distances(rows).argsort(1, kind="stable")[:, : len(rows) - f]
    return np.stack([rows[chosen].mean(0) for chosen in nearest])


PLAIN: dict[str, Callable[[Array, int], Array]] = {
    "median": lambda rows, f: np.median(rows, 0),
    "trimmed mean": plain_trimmed,
    "Krum": lambda rows, f: plain_multi_krum(rows, f, 1),
    "Multi-Krum": lambda rows, f: plain_multi_krum(rows, f, len(rows) - f),
    "centred clipping": lambda rows, f: plain_clipping(rows, 3.0, 2, np.zeros(rows.shape[1])),
    "nearest mean": lambda rows, f: plain_mixed(rows, f).mean(0),
    "mixed trimmed mean": lambda rows, f: plain_trimmed(plain_mixed(rows, f), f),
    "mixed Krum": lambda rows, f: plain_multi_krum(plain_mixed(rows, f), f, 1),
}
SIZES = [(5, 1, 3), (8, 2, 40), (13, 5, 7), (20, 4, 200), (30, 13, 11)]


@pytest.mark.parametrize(("n", "f", "d"), SIZES)
@pytest.mark.parametrize("name", PLAIN)
def test_a_rule_is_its_plain_reference(name: str, n: int, f: int, d: int) -> None:
    for seed, attack in enumerate(["sign flip", "ALIE", "IPM", None]):
        rows = cloud(seed, n, d) if attack is None else attacked(cloud(seed, n - f, d), f, attack)
        np.testing.assert_allclose(made(RULES[name](f), rows), PLAIN[name](rows, f), rtol=1e-12, atol=1e-13)


def test_rules_on_three_rows() -> None:
    def combined(rule: Any) -> list[float]:  # Krum's quorum apart
        with spool.Spool(Scripted({}), 3) as kept:
            for client, one in enumerate(updates(STAIRS)):
                kept.add(client, one["update"])
            kept.complete()
            return rule.combine(Rows(kept)).tolist()

    assert combined(TrimmedMean(1)) == [4, 5, 6]
    assert combined(Krum(1)) == [1, 2, 3]  # all scores are the same: the lowest number
    assert combined(MultiKrum(1)) == [2.5, 3.5, 4.5]
    assert combined(Median()) == [4, 5, 6]
    assert combined(GeometricMedian()) == pytest.approx([4, 5, 6])


def test_centred_clipping_starts_from_the_last_round(tmp_path: Any) -> None:
    rule, rows = CentredClipping(tau=0.5, steps=3), cloud(0, 7, 5)
    state = ServerState(0, {"b": torch.zeros(1, dtype=torch.float64), "w": torch.zeros(4, dtype=torch.float64)})
    expected, position = np.zeros(5), np.zeros(5)
    for number in range(3):
        state = played(rule, rows + number, state).state
        expected = plain_clipping(rows + number, 0.5, 3, expected)
        position = position + expected
        np.testing.assert_allclose(torch.cat([state.weights["b"], state.weights["w"]]), position, rtol=1e-12)


# ---------------------------------------------------------------- ByzFL


@pytest.fixture(scope="module")
def byzfl() -> Iterator[Any]:
    """Its rules and attacks alone: the whole package imports torchvision, which a CPU build of torch may not fit."""
    found = importlib.util.find_spec("byzfl")
    if found is None:
        pytest.skip("not installed: pip install --no-deps byzfl==0.0.11")
    package = types.ModuleType("byzfl")
    package.__path__ = list(found.submodule_search_locations or ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "byzfl", package)
        yield importlib.import_module("byzfl.aggregators")


@pytest.mark.parametrize(("n", "f", "d"), SIZES)
@pytest.mark.parametrize("attack", ["sign flip", "ALIE", "IPM", None])
def test_rules_are_those_of_byzfl(byzfl: Any, attack: str | None, n: int, f: int, d: int) -> None:
    """Its Krum takes one neighbour more than the paper's: with f + 1 there, that is the paper's with f."""
    rows = cloud(3, n, d) if attack is None else attacked(cloud(3, n - f, d), f, attack)
    for rule, theirs in (
        (Median(), byzfl.Median()),
        (TrimmedMean(f), byzfl.TrMean(f)),
        (Krum(f), byzfl.Krum(f + 1)),
        (MultiKrum(f, chosen=n - f - 1), byzfl.MultiKrum(f + 1)),
        (CentredClipping(tau=2.0, steps=4), byzfl.CenteredClipping(L=4, tau=2.0)),
        (GeometricMedian(), byzfl.GeometricMedian(nu=1e-6, T=3000)),
    ):
        np.testing.assert_allclose(made(rule, rows), theirs(rows), rtol=1e-6, atol=1e-7, err_msg=type(rule).__name__)
    mixed = byzfl.NNM(f)(rows)
    np.testing.assert_allclose(made(TrimmedMean(f, mix=True), rows), byzfl.TrMean(f)(mixed), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(made(NearestMean(f), rows), mixed.mean(0), rtol=1e-9, atol=1e-12)


def test_krum_sums_one_distance_less_than_byzfl(byzfl: Any) -> None:
    differing = 0
    for seed in range(30):
        rows = cloud(seed, 9, 4)
        paper, more = (int(np.argmin(krum_scores(rows, 3, fewer))) for fewer in (2, 1))
        np.testing.assert_array_equal(made(Krum(3), rows), rows[paper])
        np.testing.assert_array_equal(byzfl.Krum(3)(rows), rows[more])
        differing += paper != more
    assert differing > 3


# ---------------------------------------------------------------- the geometric median


def objective(rows: Array, point: Array) -> float:
    return float(np.linalg.norm(rows - point, axis=1).sum())


def assert_is_geometric_median(rows: Array, point: Array) -> None:
    """The pull of the other points is zero, or, at a data point, no more than that point's own weight."""
    away = rows - point
    lengths = np.linalg.norm(away, axis=1)
    at = lengths < 1e-5
    pull = np.linalg.norm((away[~at] / lengths[~at, None]).sum(0))
    assert pull <= at.sum() + 1e-5


@pytest.mark.parametrize(("n", "f", "d"), [*SIZES, (41, 20, 3)])
@pytest.mark.parametrize("attack", ["sign flip", "ALIE", "IPM", "far", None])
def test_the_geometric_median_is_the_least_sum_of_distances(attack: str | None, n: int, f: int, d: int) -> None:
    rows = cloud(4, n, d) if attack is None else attacked(cloud(4, n - f, d), f, attack)
    assert_is_geometric_median(rows, made(GeometricMedian(), rows))


def test_the_geometric_median_can_be_one_of_the_points() -> None:
    """Where Weiszfeld's own steps divide by zero, or stay at a point that is not it."""
    cross = np.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    np.testing.assert_allclose(made(GeometricMedian(), cross), [0, 0], atol=1e-9)
    most = np.concatenate([np.tile(cloud(0, 1, 6), (6, 1)), 5 + cloud(1, 5, 6)])  # six of eleven are the same
    np.testing.assert_allclose(made(GeometricMedian(), most), most[0], atol=2e-6)
    start = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [-3.0, 0.0], [0.1, -3.0], [0.5, 0.5], [0.6, 0.5]])
    assert_is_geometric_median(start, made(GeometricMedian(), start))
    line = np.array([[0.0], [1.0], [2.0], [10.0], [11.0]])
    np.testing.assert_allclose(made(GeometricMedian(), line), [2.0], atol=1e-5)


def test_the_geometric_median_costs_no_more_than_that_of_byzfl_or_scipy(byzfl: Any) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(10):
        rows = cloud(seed, 11, 5)
        ours = objective(rows, made(GeometricMedian(), rows))
        theirs = objective(rows, byzfl.GeometricMedian(nu=1e-6, T=2000)(rows))
        found = optimize.minimize(lambda point, rows=rows: objective(rows, point), rows.mean(0), tol=1e-12)
        assert ours <= min(theirs, found.fun) * (1 + 1e-9)
        assert objective(rows, byzfl.GeometricMedian()(rows)) > ours  # three steps are not enough


# ---------------------------------------------------------------- what attackers reach

HONEST = np.random.default_rng(0).normal(0.1, 1.0, (16, 1000))
TABLE = {  # attack -> distances from the honest mean: median, trimmed, geometric, Krum, Multi-Krum, NNM + trimmed
    "sign flip": (8.508, 5.692, 7.890, 17.25, 5.609, 4.771),
    "ALIE": (11.378, 12.045, 7.886, 29.51, 0, 0),
    "IPM": (9.451, 7.284, 7.891, 25.87, 7.603, 6.816),
    "far": (11.378, 12.877, 7.885, 29.51, 0, 0),
}


@pytest.mark.parametrize("attack", TABLE)
def test_attackers_reach_what_a_reference_says(attack: str) -> None:
    rules = (Median(), TrimmedMean(4), GeometricMedian(), Krum(4), MultiKrum(4), TrimmedMean(4, mix=True))
    for rule, expected in zip(rules, TABLE[attack], strict=True):
        distance = np.linalg.norm(made(rule, attacked(HONEST, 4, attack)) - HONEST.mean(0))
        assert distance == pytest.approx(expected, abs=0.006), rule


@given(st.integers(0, 10**6), st.integers(0, 4), st.integers(0, 3), st.integers(1, 9), st.sampled_from([1e6, 1e30]))
@settings(deadline=None, max_examples=60)
def test_f_far_rows_leave_a_rule_among_the_honest(seed: int, f: int, more: int, d: int, far: float) -> None:
    honest = cloud(seed, f + 3 + more, d)
    lies = far * np.random.default_rng(seed).choice([-1.0, 1.0], (f, d))
    rows = np.concatenate([honest, lies])[np.random.default_rng(seed).permutation(len(honest) + f)]
    centre = honest.mean(0)
    radius = float(np.linalg.norm(honest - centre, axis=1).max())
    for name in BOUNDED:
        found = made(RULES[name](f), rows)
        reach = len(rows) * radius if name == "geometric median" else math.sqrt(d) * radius
        assert np.linalg.norm(found - centre) <= reach * (1 + 1e-9), name
        if name in ("median", "trimmed mean"):
            assert np.all((found >= honest.min(0)) & (found <= honest.max(0)))
    np.testing.assert_array_equal(made(Krum(f), rows), rows[int(np.argmin(krum_scores(rows, f)))])


def test_far_rows_do_not_blur_the_distances_of_the_others() -> None:
    honest = cloud(0, 12, 50)
    for f in (1, 4, 5):
        rows = attacked(honest, f, "far")
        np.testing.assert_array_equal(made(Krum(f), rows), PLAIN["Krum"](rows, f))
        np.testing.assert_allclose(made(MultiKrum(f, chosen=3), rows), plain_multi_krum(rows, f, 3), rtol=1e-12)


def test_distances_are_those_of_fp64() -> None:
    """Whole weights, whose differences are below fp32's grid of their squares."""
    rng = np.random.default_rng(0)
    rows = (1000 * rng.normal(size=400) + 1e-3 * rng.normal(size=(9, 400))).astype(np.float32)
    exact = squared_distances(rows.astype(np.float64))
    with spool.Spool(Scripted({}), 9) as kept:
        for client, one in enumerate(updates(rows, torch.float32)):
            kept.add(client, one["update"])
        kept.complete()
        np.testing.assert_allclose(Rows(kept).squared_distances(), exact, rtol=1e-9, atol=1e-12)
    gram = rows @ rows.T
    assert np.abs(gram.diagonal()[:, None] + gram.diagonal() - 2 * gram - exact).max() > exact.max()  # as noisy as it can be


# ---------------------------------------------------------------- properties


@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(1, 12), st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None, max_examples=40)
def test_the_order_of_arrival_changes_no_bit(seed: int, f: int, d: int, dtype: torch.dtype) -> None:
    rows = cloud(seed, 2 * f + 4, d)
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    for make in RULES.values():
        np.testing.assert_array_equal(made(make(f), rows, order, dtype), made(make(f), rows, dtype=dtype))


@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(2, 12))
@settings(deadline=None, max_examples=40)
def test_the_numbers_of_clients_matter_to_ties_alone(seed: int, f: int, d: int) -> None:
    rows = cloud(seed, 2 * f + 4, d)
    others = rows[np.random.default_rng(seed).permutation(len(rows))]
    for name, make in RULES.items():
        if name != "mixed Krum":  # updates with the same neighbours become the same, and two such sets the same far apart
            np.testing.assert_allclose(made(make(f), others), made(make(f), rows), rtol=1e-7, atol=1e-7, err_msg=name)


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 12), st.sampled_from([0.0, 1e-3, 1.0, 1e3]))
@settings(deadline=None, max_examples=40)
def test_equal_rows_come_back(seed: int, n: int, d: int, scale: float) -> None:
    row = (scale * cloud(seed, 1, d)).astype(np.float32)
    for name, make in RULES.items():
        rule = replace(make(0), tau=1e9) if name == "centred clipping" else make(0)
        if rule.least <= n:
            found = made(rule, np.tile(row, (n, 1)), dtype=torch.float32).astype(np.float32)
            np.testing.assert_array_equal(found, row[0], err_msg=name)


def test_a_tie_goes_to_the_lowest_number() -> None:
    corners = np.array(list(itertools.product([-1.0, 1.0], repeat=3)))  # every corner of a cube sees the same distances
    for order in (range(8), range(7, -1, -1)):
        np.testing.assert_array_equal(made(Krum(1), corners, list(order)), corners[0])
        np.testing.assert_array_equal(made(MultiKrum(1, chosen=3), corners, list(order)), corners[:3].mean(0))


def test_a_row_is_no_neighbour_of_its_own_but_its_double_is() -> None:
    rows = np.array([[0.0], [0.0], [5.0], [5.1], [5.3], [9.0]])
    np.testing.assert_array_equal(made(Krum(1), rows), rows[int(np.argmin(krum_scores(rows, 1)))])
    assert krum_scores(rows, 1)[0] == pytest.approx(0 + 25 + 5.1**2)


def test_an_update_of_zeros_is_one_like_others() -> None:
    rows = np.concatenate([np.zeros((2, 4)), cloud(0, 5, 4)])
    for name, plain in PLAIN.items():
        np.testing.assert_allclose(made(RULES[name](1), rows), plain(rows, 1), rtol=1e-12, atol=1e-14)
    for make in RULES.values():
        assert not made(make(1), np.zeros((7, 4))).any()
    assert not aggregate(ClippedMean(1.0), (reply(i, one) for i, one in enumerate(updates(np.zeros((3, 4))))), 3).any()


@pytest.mark.parametrize("block", [1, 7, 23, 64])
def test_blocks_may_be_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = cloud(0, 7, 13)
    whole = {name: made(make(2), rows) for name, make in RULES.items()}
    monkeypatch.setattr(spool, "_BLOCK", block)
    for name, make in RULES.items():
        np.testing.assert_allclose(made(make(2), rows), whole[name], rtol=1e-12, atol=1e-14)


def test_an_fp32_update_is_as_good_as_its_fp64_values() -> None:
    rows = cloud(0, 9, 30).astype(np.float32)
    for make in RULES.values():
        np.testing.assert_allclose(made(make(2), rows, dtype=torch.float32), made(make(2), rows), rtol=1e-14, atol=1e-15)
    halves = made(Median(), rows, dtype=torch.bfloat16)
    np.testing.assert_allclose(halves, np.median(rows, 0), rtol=0.02, atol=0.02)


def test_clipped_means_are_means_of_updates_cut_to_a_length() -> None:
    rows = cloud(0, 6, 9)
    for most in (0.7, 1.0, 3.0, 100.0):
        cut = rows * np.minimum(1, most / np.linalg.norm(rows, axis=1))[:, None]
        found = aggregate(ClippedMean(most, "uniform"), (reply(i, one) for i, one in enumerate(updates(rows))), 6)
        np.testing.assert_allclose(found, cut.mean(0), rtol=1e-5)


# ---------------------------------------------------------------- two workers


@final
class OneOfTwo(Runtime):
    """A worker, in a thread, of two that wait for each other."""

    def __init__(self, number: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self._number, self._shared, self._barrier = number, shared, barrier

    def replies(self, requests: Sequence[Request], context: Context) -> Iterator[Reply | Failure]:
        return iter(())

    def add_up_(self, tensors: list[torch.Tensor]) -> None:
        for tensor, *parts in zip(tensors, *self.gather([[tensor.clone() for tensor in tensors]]), strict=True):
            tensor.copy_(sum(parts))

    def gather(self, values: list[Any]) -> list[Any]:
        self._shared[self._number] = values
        self._barrier.wait(60)
        found = [*self._shared[0], *self._shared[1]]
        self._barrier.wait(60)
        return found

    def discard(self, round: int, clients: Sequence[int]) -> None: ...


@pytest.mark.parametrize("mine", [[0, 3, 4, 6], [], [2], list(range(7))])
def test_two_workers_make_the_bits_of_one(mine: list[int]) -> None:
    rows = cloud(0, 7, 13)
    parts, all_updates = (mine, [one for one in range(7) if one not in mine]), updates(rows)
    for make in RULES.values():
        barrier, shared, found = threading.Barrier(2), [None, None], [np.empty(0)] * 2

        def work(number: int, rule: Aggregator, shared: list[Any], barrier: threading.Barrier, found: list[Array]) -> None:
            replies = (reply(client, all_updates[client]) for client in parts[number])
            found[number] = aggregate(rule, replies, 7, OneOfTwo(number, shared, barrier))

        threads = [threading.Thread(target=work, args=(number, make(2), shared, barrier, found)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in found:
            np.testing.assert_array_equal(result, made(make(2), rows))


# ---------------------------------------------------------------- in a round


def played(rule: Any, rows: Array, state: ServerState, lost: dict[int, str] | None = None, **options: Any) -> RoundResult:
    """A round in which clients send rows, and some fail."""
    answers: dict[int, Any] = dict(enumerate(updates(rows, state.weights["w"].dtype))) | (lost or {})
    if "running" in state.weights:
        for client, answer in answers.items():
            answer["buffers"] = {"running": torch.tensor([float(client)])}
    context = Context(0, state.round + 1, len(rows), tuple(range(len(rows))), len(rows))
    algorithm = replace(fedavg(), aggregator=rule)
    return run_round(state, algorithm, context, Scripted(answers), RoundOptions(**({"min_clients": 1} | options)))


def fresh(d: int, dtype: torch.dtype = torch.float32, **more: torch.Tensor) -> ServerState:
    return ServerState(0, {"b": torch.zeros(1, dtype=dtype), "w": torch.zeros(d - 1, dtype=dtype)} | more)


def test_updates_that_are_not_finite_are_taken_out_first_and_named() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        rows = np.concatenate([HONEST, np.full((4, 1000), bad)])
        result = played(GeometricMedian(), rows, fresh(1000, torch.float64))
        assert [failure.client for failure in result.failures] == [16, 17, 18, 19]
        assert {failure.reason.split(" (")[0] for failure in result.failures} == {"its update is not finite"}
        found = torch.cat([result.state.weights["b"], result.state.weights["w"]]).numpy()
        assert np.linalg.norm(found - HONEST.mean(0)) == pytest.approx(0.148, abs=0.001)
        result = played(Krum(4), rows, fresh(1000, torch.float64))
        assert [failure.client for failure in result.failures] == [16, 17, 18, 19]
        assert torch.equal(result.state.weights["w"], torch.from_numpy(HONEST[:, 1:])[np.argmin(krum_scores(HONEST, 4))])


@pytest.mark.parametrize(
    ("rule", "least"),
    [
        (Krum(1), 5),
        (MultiKrum(1), 5),
        (MultiKrum(1, chosen=6), 7),
        (TrimmedMean(2), 5),
        (NearestMean(2), 5),
        (Median(2, mix=True), 5),
        (Krum(1, mix=True), 5),
    ],
)
def test_a_round_with_too_few_replies_stops_in_one_line(rule: Any, least: int) -> None:
    rows = cloud(0, least, 6)
    assert played(rule, rows, fresh(6)).state.round == 1
    with pytest.raises(fedtune.RunError) as caught:
        played(rule, rows, fresh(6), lost={1: "dropped"})
    assert str(caught.value) == (
        f"round 1: the replies of {least - 1} of {least} clients count, {type(rule).__name__} needs {least} (client 1: dropped)"
    )


def test_one_client_is_the_answer() -> None:
    row = cloud(0, 1, 6).astype(np.float32)
    for rule in (Median(), TrimmedMean(0), GeometricMedian(), NearestMean(0), CentredClipping(tau=100.0)):
        weights = played(rule, row, fresh(6)).state.weights
        np.testing.assert_array_equal(torch.cat([weights["b"], weights["w"]]), row[0])


def test_examples_that_a_client_claims_do_not_count() -> None:
    rows = updates(cloud(0, 7, 6))
    for make in RULES.values():
        loud = aggregate(make(1), (reply(i, one, 10**6 if i == 2 else 1) for i, one in enumerate(rows)), 7)
        np.testing.assert_array_equal(loud, aggregate(make(1), (reply(i, one) for i, one in enumerate(rows)), 7))


def test_types_of_weights_are_kept_and_buffers_are_averaged_beside() -> None:
    rows = cloud(0, 7, 6)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
        state = fresh(6, dtype, running=torch.tensor([10.0]))
        for name, make in RULES.items():
            weights = played(make(1), rows, state, buffers=frozenset(["running"])).state.weights
            assert weights["w"].dtype == dtype
            assert weights["running"].item() == 13.0
            np.testing.assert_allclose(weights["w"], made(make(1), rows)[1:], rtol=tolerance, atol=tolerance, err_msg=name)


def test_a_disk_without_room_is_said_before_the_first_update_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100))
    with pytest.raises(fedtune.RunError, match=r"the updates of 3 clients take .* GB side by side; .* \(TMPDIR names another"):
        made(Median(), cloud(0, 3, 6))
    made(Median(), cloud(0, 3, 4))  # 96 bytes


# ---------------------------------------------------------------- at the start of a run


def start(rule: Any, **options: Any) -> None:
    algorithm = replace(fedavg(), aggregator=rule)
    make_loop(max_rounds=1, algorithm=algorithm, evaluate_on="test", **options).fit(TinyModule(), TinyLoaders())


@pytest.mark.parametrize(
    ("rule", "options", "said"),
    [
        (
            Krum(1),
            {},
            "num_clients: got 4; allowed: 5 or more, which Krum(num_malicious=1, mix=False) needs",
        ),
        (
            TrimmedMean(1),
            {"clients_per_round": 2},
            "clients_per_round: got 2; allowed: 3 or more, which TrimmedMean(num_malicious=1, mix=False) needs",
        ),
        (
            MultiKrum(0, chosen=4),
            {"clients_per_round": 3},
            "clients_per_round: got 3; allowed: 4 or more, which MultiKrum(num_malicious=0, mix=False, chosen=4) needs",
        ),
        (
            Median(1, mix=True),
            {"min_clients": 2},
            "options.min_clients: got 2; allowed: 3 or more, which Median(num_malicious=1, mix=True) needs",
        ),
        (
            Median(),
            {"min_clients": 4, "clients_per_round": 3},
            "options.min_clients: got 4; allowed: at most the number of clients in a round, 3",
        ),
    ],
)
def test_a_cohort_that_is_too_small_is_refused_at_the_start(rule: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(fedtune.UsageError) as caught:
        start(rule, **options)
    assert str(caught.value) == said


def test_a_cohort_that_is_just_large_enough_runs() -> None:
    start(TrimmedMean(1), clients_per_round=3, min_clients=3)
    start(Krum(0))


@pytest.mark.parametrize(("flag", "argument"), [("data.num_clients", []), ("loop.clients_per_round", ["--data.num_clients=9"])])
def test_the_command_line_names_the_flag_of_the_cohort(flag: str, argument: list[str], command: Any) -> None:
    krum = ["--loop.algorithm.aggregator=Krum", "--loop.algorithm.aggregator.num_malicious=2"]
    code, _, err = command("run", *argument, *krum, f"--{flag}=6", "--model.init=random")
    assert code == 2
    assert f"--{flag}: got 6; allowed: 7 or more, which Krum(num_malicious=2, mix=False) needs" in err


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Krum(-1), "num_malicious: got -1; allowed: 0 or more"),
        (lambda: MultiKrum(chosen=-1), "chosen: got -1; allowed: 0 or more"),
        (lambda: GeometricMedian(nu=0.0), "nu: got 0.0; allowed: a number above 0"),
        (lambda: GeometricMedian(tolerance=math.nan), "tolerance: got nan; allowed: a number above 0"),
        (lambda: GeometricMedian(max_steps=0), "max_steps: got 0; allowed: 1 or more"),
        (lambda: CentredClipping(tau=0.0), "tau: got 0.0; allowed: a number above 0"),
        (lambda: CentredClipping(steps=0), "steps: got 0; allowed: 1 or more"),
        (lambda: ClippedMean(math.inf), "most: got inf; allowed: a number above 0"),
        (lambda: ClippedMean(weighting="uniformly"), "weighting: got 'uniformly'; allowed: uniform (nearest), examples"),
    ],
)
def test_values_of_rules_that_cannot_be_are_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(fedtune.UsageError) as caught:
        make()
    assert str(caught.value) == said
