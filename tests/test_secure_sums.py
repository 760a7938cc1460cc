"""Secure sums: the same bits as plain ones, whoever drops out when, and a server that holds nothing but masked numbers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GivenLoaders, assert_equal, data_maker, make_loop, make_task, module_maker, weights_of, without_times
from test_torchrun import ranks

import fedtune
from fedtune.errors import RunError, UsageError
from fedtune.federated.messages import Context
from fedtune.federated.pieces import Pieces
from fedtune.federated.sums import ExactSum, Sum, grid_bits
from fedtune.runs.arguments import _check_remote
from fedtune.runs.flags import resolve
from fedtune.tensors import Tensors, sha256
from fedtune.testing import TinyData, TinyModule

pytest.importorskip("cryptography")
pytest.importorskip("Crypto")

from fedtune.secure.client import OWN, PAIR, Client, Secrets, own_mask, pair_masks
from fedtune.secure.keys import add_masks, agreed_key, opened, private_key, public_key, sealed
from fedtune.secure.parts import SECURE_SUMS, PairwiseMasks, secure_of
from fedtune.secure.round import STAGES, Session, check_range
from fedtune.secure.server import Server
from fedtune.secure.sharing import secret_of, shares_of

Make = Callable[..., Any]
EIGHT = {"num_clients": 8, "batch_size": 4}
MASKS = {"name": "PairwiseMasks", "threshold": 0.6}
SIZES = {"a.weight": (37, 5), "b.weight": (11,), "c": ()}
LIMIT, MOST = 8.0, 5_000


def session(size: int, seed: int = 0, round: int = 1, threshold: float = 0.6, leaves: dict[int, str] | None = None) -> Session:
    """The protocol after stage 1; some clients leave before they send keys or shares."""
    context = Context(seed, round, 100, tuple(range(10, 10 + size)), MOST)
    leaving = leaves or {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "_leaves", lambda _, client: leaving[client])
        return Session(PairwiseMasks(threshold), context, dict.fromkeys(leaving, "Drop"))


def updates(clients: Iterable[int]) -> dict[int, Tensors]:
    found = {}
    for client in clients:
        generator = torch.Generator().manual_seed(client)
        found[client] = {
            name: torch.randn(shape, generator=generator).mul(10.0 ** (client % 4 - 3)).clamp(-8, 8)
            for name, shape in SIZES.items()
        }
    return found


def added(sums: Sum, clients: Sequence[int], weights: dict[int, int]) -> Sum:
    for client, update in updates(clients).items():
        groups = {"update": Pieces(update), "control": Pieces({"c": update["c"] * 3})}
        sums.add(groups, weights[client], client=client)
    return sums


def silent(found: Session, clients: Iterable[int]) -> None:
    """Some clients give no shares in stage 4."""
    found._vanishes = set(clients).__contains__  # type: ignore[method-assign, assignment]


CASES: dict[str, dict[str, Any]] = {  # size; client -> before which stage it drops out
    "three clients": {"size": 3},
    "eight clients": {"size": 8},
    "before keys": {"size": 5, "lost": {11: "keys", 13: "keys"}},
    "before shares": {"size": 5, "lost": {10: "shares", 14: "shares"}},
    "before masked numbers": {"size": 5, "lost": {12: "masked", 14: "masked"}},
    "before unmasking": {"size": 5, "lost": {10: "unmasking", 11: "unmasking"}},
    "at every stage": {"size": 12, "lost": {10: "keys", 12: "shares", 16: "masked", 21: "unmasking"}},
    "as many as may": {"size": 10, "lost": {10: "keys", 13: "shares", 15: "masked", 19: "masked"}},
}


def played(size: int, lost: dict[int, str] | None = None, weighting: str = "examples", **more: Any) -> tuple[Session, Sum, Sum]:
    """A session with the sum of its masked numbers, and the plain sum of those who sent some."""
    lost = lost or {}
    found = session(size, leaves={client: stage for client, stage in lost.items() if stage in STAGES[:2]}, **more)
    senders = [client for client in range(10, 10 + size) if lost.get(client, "unmasking") == "unmasking"]
    weights = {client: 1 if weighting == "uniform" else 17 * client + 3 for client in senders}
    masked = added(found.sums(lambda group: LIMIT if group == "update" else 64.0, MOST), senders, weights)
    silent(found, [client for client, stage in lost.items() if stage == "unmasking"])
    return found, masked, added(ExactSum(lambda group: LIMIT if group == "update" else 64.0, MOST), senders, weights)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("name", CASES)
def test_the_unmasked_sum_has_the_bits_of_the_plain_one(name: str, weighting: str) -> None:
    case = CASES[name]
    found, masked, plain = played(**case, weighting=weighting)
    for one, other in zip(masked.mean().items(), plain.mean().items(), strict=True):
        assert one[0] == other[0]
        assert_equal(one[1], other[1])
    counted = {stage: list(case.get("lost", {}).values()).count(stage) for stage in STAGES}
    assert {stage: found.lost[stage] for stage in STAGES} == counted


def test_any_numbers_come_back_modulo_two_to_the_64() -> None:
    rng, found = np.random.default_rng(0), session(6)
    vectors = {client: rng.integers(-(2**63), 2**63 - 1, 70_001, endpoint=True) for client in range(10, 16)}
    for client, vector in vectors.items():
        found.send(client, vector.copy())
    expected = [sum(int(vector[place]) for vector in vectors.values()) % 2**64 for place in (0, 1, 65_535, 65_536, 70_000)]
    total = found.unmasked(None, 70_001)
    assert [int(total[place]) % 2**64 for place in (0, 1, 65_535, 65_536, 70_000)] == expected
    assert np.array_equal(total, sum(vectors.values()))


BELOW: dict[str, tuple[dict[int, str], str]] = {
    "keys": (dict.fromkeys((10, 11, 12), "keys"), "2 clients are left in stage 0, keys"),
    "shares": ({10: "keys", 11: "shares", 12: "shares"}, "2 clients are left in stage 1, shares of secrets"),
    "masked": (dict.fromkeys((12, 13, 14), "masked"), "2 clients are left in stage 2, masked numbers"),
    "unmasking": ({10: "masked", 11: "unmasking", 12: "unmasking"}, "2 clients are left in stage 4, unmasking"),
}


@pytest.mark.parametrize("stage", BELOW)
def test_below_the_threshold_a_round_fails_in_one_line_and_nothing_is_revealed(stage: str) -> None:
    lost, says = BELOW[stage]
    sessions: list[tuple[Session, np.ndarray]] = []

    def play() -> None:
        found, masked, _ = played(5, lost)
        assert found.server.total is not None
        sessions.append((found, found.server.total.copy()))
        masked.mean()

    with pytest.raises(RunError, match=rf"round 1: {says}, secure sums need 3; .*nothing of any client was revealed") as caught:
        play()
    assert "\n" not in str(caught.value)
    assert len(sessions) == (stage in ("masked", "unmasking"))
    for found, before in sessions:
        assert np.array_equal(before, found.server.total)  # as masked as it was
        assert (found.server.asked is None) == (stage == "masked")
        handed_out = sum(bool(client._revealed) for client in found.clients.values())
        assert handed_out == (2 if stage == "unmasking" else 0)  # fewer than t shares of any secret


def chi_square(numbers: np.ndarray) -> float:
    """Of the bytes against the uniform distribution: 255 in the mean, standard deviation 22.6."""
    counts = np.bincount(numbers.view(np.uint8), minlength=256)
    return float(np.sum((counts - counts.mean()) ** 2) / counts.mean())


def test_what_the_server_holds_before_unmasking_is_uniform_and_what_it_has_after_is_not() -> None:
    size, clients, found = 50_000, range(10, 14), session(4)
    bits = grid_bits(LIMIT, MOST)
    vectors = {
        client: (np.random.default_rng(client).normal(scale=1e-3, size=size) * 2.0**bits).astype(np.int64) for client in clients
    }
    taken = []
    for client, vector in vectors.items():
        sent = vector.copy()
        found.send(client, sent)
        taken.append(sent)
    views = [*taken, found.server.total.copy(), taken[0] - taken[1], taken[0] + taken[1] + taken[2]]
    for view in views:
        assert abs(chi_square(view) - 255) < 6 * 22.6
    for vector in (*vectors.values(), found.unmasked(None, size)):  # the same test says so of what is not masked
        assert chi_square(vector) > 1e5


def test_without_its_own_mask_a_late_message_would_be_uncovered() -> None:
    """What own masks are for: who is taken for dropped out, and whose pairwise masks are recovered, may still have sent."""
    found = session(5)
    client = found.clients[12]
    late = np.arange(1_000)
    sent = late.copy()
    client.mask(sent)
    add_masks(sent, [(key, -sign) for key, sign in pair_masks(12, client._secrets.pair, client._peers())])
    assert abs(chi_square(sent) - 255) < 6 * 22.6
    add_masks(sent, [(own_mask(client._secrets.own), -1)])
    assert np.array_equal(sent, late)


def test_masks_are_fresh_in_every_round_and_the_same_when_a_round_is_done_again() -> None:
    def sent(seed: int, round: int) -> np.ndarray:
        numbers = np.zeros(100, np.int64)
        session(3, seed, round).clients[11].mask(numbers)
        return numbers

    assert np.array_equal(sent(0, 1), sent(0, 1))
    others = [sent(0, 1), sent(0, 2), sent(1, 1)]
    for one, other in itertools.combinations(others, 2):
        assert not np.any(one == other)


# ---------------------------------------------------------------- secrets and shares


@pytest.mark.parametrize("name", CASES)
def test_the_server_asks_for_one_kind_of_secret_of_each_client(name: str) -> None:
    found, masked, _ = played(**CASES[name])
    masked.mean()
    asked = found.server.asked
    assert asked is not None
    assert not set(asked.survivors) & set(asked.dropped)
    assert {*asked.survivors, *asked.dropped} == found.server.sealed.keys()
    kinds: dict[int, set[str]] = {}
    for client in found.clients.values():
        for peer, kind in client._revealed.items():
            kinds.setdefault(peer, set()).add(kind)
    assert all(kinds[client] == {OWN} for client in asked.survivors)
    assert all(kinds[client] == {PAIR} for client in asked.dropped)


def test_a_client_refuses_a_second_kind_of_request() -> None:
    found = session(5)
    client = found.clients[10]
    first = client.reveal([10, 11, 12, 13], [14])
    assert client.reveal([10, 11, 12, 13], [14]) == first  # the same again says nothing new
    with pytest.raises(
        RunError, match="pairwise masks and of the own mask of client 13, which together would uncover"
    ) as caught:
        client.reveal([10, 11, 12], [13, 14])
    assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="own mask and of the pairwise masks of client 14"):
        client.reveal([10, 11, 12, 13, 14], [])
    with pytest.raises(RunError, match="of client 12, which together would uncover what it sent; refused"):
        found.clients[11].reveal([11, 12, 13], [12])
    with pytest.raises(RunError, match="client 12: 2 clients sent masked numbers, the threshold is 3"):
        found.clients[12].reveal([10, 11], [])
    with pytest.raises(RunError, match="a share of client 99, who shared nothing"):
        found.clients[13].reveal([10, 11, 99], [])


def test_a_client_looks_at_keys_and_shares_that_it_gets() -> None:
    found = session(3)
    keys = found.server.keys
    fresh = Client(10, found.clients[10]._secrets, 2)
    with pytest.raises(RunError, match="some are alike, or others in place of mine"):
        fresh.share(keys | {12: keys[11]})
    with pytest.raises(RunError, match="1 clients advertised keys, the threshold is 2"):
        fresh.share({10: keys[10]})
    fresh.share(keys)
    shares = found.server.shares_for(10)
    with pytest.raises(RunError, match="a sealed share cannot be opened"):
        fresh.receive({11: shares[12], 12: shares[11]})
    with pytest.raises(RunError, match="a sealed share cannot be opened"):
        fresh.receive({11: shares[11][:-1] + bytes([shares[11][-1] ^ 1])})


def test_sealed_shares_and_agreed_keys_are_for_two_alone() -> None:
    one, other, third = (private_key(bytes([number]) * 16) for number in range(3))
    key = agreed_key(one, public_key(other), "test")
    assert key == agreed_key(other, public_key(one), "test")
    assert key != agreed_key(third, public_key(one), "test")
    assert key != agreed_key(one, public_key(other), "another purpose")
    assert opened(key, sealed(key, b"share")) == b"share"
    assert sealed(key, b"share") != sealed(key, b"share")


def test_a_secret_is_made_of_any_t_shares_and_of_no_fewer() -> None:
    rng = np.random.default_rng(0)
    guessed = []
    for _ in range(40):
        secret = rng.bytes(16)
        shares = shares_of(secret, 3, 6)
        assert sorted(shares) == [1, 2, 3, 4, 5, 6]
        for places in itertools.combinations(shares, 3):
            assert secret_of({place: shares[place] for place in places}) == secret
        for places in itertools.combinations(shares, 2):
            assert secret_of({place: shares[place] for place in places}) != secret
    for _ in range(600):  # two shares each, as the guesses of two pairs of one secret depend on each other
        secret = rng.bytes(16)
        shares = shares_of(secret, 3, 3)
        guess = secret_of({place: shares[place] for place in (1, 3)})
        guessed.append(np.frombuffer(guess, np.uint8) ^ np.frombuffer(secret, np.uint8))
    assert abs(chi_square(np.concatenate(guessed)) - 255) < 6 * 22.6  # what is off is uniform: t - 1 shares say nothing
    same = [np.frombuffer(shares_of(bytes(16), 3, 3)[place], np.uint8) for _ in range(700) for place in (1, 2)]
    assert abs(chi_square(np.concatenate(same)) - 255) < 6 * 22.6  # and so is each share, of whatever secret


def test_a_secret_that_does_not_fit_its_key_is_noticed() -> None:
    found, _, _ = played(5, {14: "masked"})
    asked = found.server.ask()
    answers = {client: found.clients[client].reveal(asked.survivors, asked.dropped) for client in asked.survivors}
    answers[10] = answers[10] | {14: bytes(16)}
    with pytest.raises(RunError, match="round 1: the shares of client 14 do not make up its secret"):
        found.server.unmasked(answers)


def test_a_server_takes_numbers_once_and_of_those_alone_who_shared_secrets() -> None:
    server = Server(1, "round 4")
    with pytest.raises(RunError, match="round 4: client 3 sent masked numbers twice, or without having shared secrets"):
        server.take_masked(3, np.zeros(4, np.int64))
    server.take_shares(3, {})
    server.take_shares(4, {})
    server.take_masked(3, np.zeros(4, np.int64))
    with pytest.raises(RunError, match="twice"):
        server.take_masked(3, np.zeros(4, np.int64))
    with pytest.raises(RunError, match="client 4 sent 5 masked numbers, others 4"):
        server.take_masked(4, np.zeros(5, np.int64))
    with pytest.raises(RunError, match="before the server asked"):
        server.unmasked({3: {}})


# ---------------------------------------------------------------- range


def test_numbers_that_could_wrap_around_are_not_sent() -> None:
    check_range(np.array([1 - 2**41, 2**41 - 1]), 2, 2**23, "client 1")
    for numbers in ([2**41], [-(2**41)], [0, -(2**63)]):
        with pytest.raises(RunError, match=r"client 1: numbers up to \d+ of weight 2, and 8388608 in all, could wrap around"):
            check_range(np.array(numbers), 2, 2**23, "client 1")
    check_range(np.array([], np.int64), 0, 2**62, "client 1")


def test_a_sum_at_the_limit_has_the_bits_of_the_plain_one_and_one_beyond_is_refused() -> None:
    most = 2**20
    found = session(4)
    masked, plain = found.sums(lambda group: LIMIT, most), ExactSum(lambda group: LIMIT, most)
    for client in range(10, 14):
        update = {"w": torch.tensor([LIMIT, -LIMIT, LIMIT / 3])}
        for sums in (masked, plain):
            sums.add({"update": Pieces({"w": update["w"].clone()})}, most // 4, client=client)
    assert_equal(masked.mean()["update"], plain.mean()["update"])
    beyond = session(3).sums(lambda group: LIMIT, most)
    with pytest.raises(RunError, match=r"client 10: .* could wrap around at 2\^63"):
        beyond.add({"update": Pieces({"w": torch.tensor([2 * LIMIT])})}, 5, client=10)


def test_a_session_makes_one_sum_of_one_kind_of_message() -> None:
    found, _, _ = played(3)
    with pytest.raises(RunError, match="round 1: secure sums are made once a round"):
        found.sums(lambda group: LIMIT, MOST)
    sums = session(3).sums(lambda group: LIMIT, MOST)
    update = {"update": Pieces({"w": torch.ones(3)})}
    with pytest.raises(RunError, match="needs the number of its client"):
        sums.add(update, 1)
    sums.add(update, 1, client=10)
    with pytest.raises(RunError, match="client 11 adds other tensors"):
        sums.add({"update": Pieces({"v": torch.ones(3)})}, 1, client=11)
    with pytest.raises(RunError, match="round 1: it has 2 clients, secure sums need 3 or more"):
        session(2)


# ---------------------------------------------------------------- runs


def run(make_data: Make, make_module: Make, rounds: int = 2, **options: Any) -> tuple[fedtune.FederatedLoop, Tensors]:
    module = make_module(**options.pop("module", {}))
    loop = make_loop(max_rounds=rounds, **options)
    loop.fit(module, make_data(**EIGHT))
    return loop, weights_of(module)


UNIFORM = {"aggregator": {"weighting": "uniform"}}
PLAIN_SGD = {"optimizer": "sgd", "learning_rate": 0.05}
RUNS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "cohorts, weights alike": {"clients_per_round": 5, "algorithm": UNIFORM},
    "adam at the server, messages down": {"algorithm": {"name": "fedadam", "down": ["Quantise"]}},
    "scaffold": {"algorithm": "scaffold", "module": PLAIN_SGD},
    "qfedavg": {"algorithm": "qfedavg", "module": PLAIN_SGD},
    "heads of their own": {"algorithm": "fedper"},
    "scalars": {"algorithm": {"name": "fedkseed", "seeds": 8}, "module": PLAIN_SGD},
    "adapters": {"algorithm": "fedit", "module": {"lora": {"rank": 2}}},
    "drop-outs": {"faults": [{"name": "Drop", "rate": 0.2}, {"name": "Raise", "clients": [6]}], "seed": 4, "rounds": 4},
    "privacy": {"algorithm": UNIFORM, "privacy": {"name": "Gaussian", "noise": 1.0, "clip": 0.1}, "clients_per_round": 6},
    "privacy of examples": {"privacy": {"name": "ExampleGaussian", "noise": 1.0, "delta": 0.01}},
    "bands": {"algorithm": UNIFORM, "privacy": {"name": "Banded", "noise": 1.0, "clip": 0.1, "bands": 1}},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_secure_sums_ends_with_the_bits_of_a_plain_one(name: str, make_data: Make, make_module: Make) -> None:
    options = RUNS[name]
    plain, expected = run(make_data, make_module, **options)
    secure, found = run(make_data, make_module, secure_sums=MASKS | {"vanish": 0.1}, **options)
    assert_equal(found, expected)
    for one, other in zip(secure.history, plain.history, strict=True):
        assert one.metrics == other.metrics
        assert one.clients == [_times_of(mine, theirs) for mine, theirs in zip(other.clients, one.clients, strict=True)]
        assert one.update_cosine is None  # nobody sees two updates
    varying = name == "privacy"  # Poisson cohorts
    assert ("a round's clients, 6 in the mean, 60% must" in secure.summary["secure_sums"]) == varying
    assert "secure_sums" not in plain.summary


def _times_of(report: Any, other: Any) -> Any:
    return dataclasses.replace(report, seconds=other.seconds)


def test_clients_of_a_run_drop_out_at_every_stage(make_data: Make, make_module: Make) -> None:
    lost: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    options = {"faults": [{"name": "Drop", "rate": 0.2}], "secure_sums": MASKS | {"vanish": 0.1}}
    loop, _ = run(make_data, make_module, rounds=6, check_val_every_n_rounds=6, **options)
    for record in loop.history:
        dropped = sum(record.diagnostics[f"secure_lost_before_{stage}"] for stage in STAGES[:3])
        assert dropped == len(record.failures) == len(record.injected.get("Drop", []))
        for stage in STAGES:
            lost[stage] += record.diagnostics[f"secure_lost_before_{stage}"]
    assert all(lost.values())


def test_a_run_stops_below_the_threshold_and_keeps_its_rounds(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    faults = [{"name": "Drop", "clients": [0, 1, 2, 3]}]
    with pytest.raises(RunError, match=r"round 1: \d clients are left in stage \d, .*, secure sums need 5; no mask"):
        run(make_data, make_module, faults=faults, secure_sums=MASKS, run_dir=str(tmp_path / "run"))
    with pytest.raises(RunError, match=r"round 1: \d clients are left in stage 4, unmasking"):
        run(make_data, make_module, secure_sums=MASKS | {"vanish": 0.9})


def test_a_run_is_resumed_bit_for_bit(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    options = {"faults": [{"name": "Drop", "rate": 0.2}], "secure_sums": MASKS | {"vanish": 0.1}, "seed": 4}
    whole, weights = run(make_data, make_module, 4, **options)
    folder = str(tmp_path / "run")
    run(make_data, make_module, 2, run_dir=folder, **options)
    again, others = run(make_data, make_module, 4, run_dir=folder, **options)
    assert_equal(weights, others)
    assert without_times(whole.history) == without_times(again.history)
    assert "secure_sums" in (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(UsageError, match=r"loop\.secure_sums"):
        run(make_data, make_module, 5, run_dir=folder, **(options | {"secure_sums": MASKS}))


def test_a_record_has_the_bytes_of_every_stage(make_data: Make, make_module: Make, capsys: pytest.CaptureFixture[str]) -> None:
    plain, weights = run(make_data, make_module, 1)
    loop, _ = run(make_data, make_module, 1, secure_sums="PairwiseMasks", progress=True)
    size, numbers = 8, sum(tensor.numel() for tensor in weights.values())
    share = 12 + 8 + 2 * 16 + 16  # nonce, who and for whom, two shares, tag
    sent = {
        "keys_bytes_up": size * 64,
        "keys_bytes_down": size * size * (64 + 4),
        "shares_bytes_up": size * (size - 1) * (share + 4),
        "shares_bytes_down": size * (size - 1) * (share + 4),
        "masked_bytes_up": size * 8 * (numbers + 1),
        "unmasking_bytes_up": size * size * (16 + 4),
        "unmasking_bytes_down": size * size * 4,
    }
    (record,) = loop.history
    known = {name.removeprefix("secure_"): value for name, value in record.diagnostics.items() if "bytes" in name}
    assert known == sent
    up = sum(value for name, value in sent.items() if name.endswith("up"))
    assert record.bytes_up == up
    assert record.bytes_down == plain.history[0].bytes_down + sum(sent.values()) - up
    assert record.diagnostics["secure_threshold"] == math.ceil(0.67 * 8)
    said = capsys.readouterr().out
    for words in ("secure sums, simulated: of 8 clients a round 6 must stay", "up to 5 clients", "whoever knows"):
        assert words in said


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "median": ({"algorithm": {"aggregator": "Median"}}, "aggregator: got 'Median'; allowed: Mean, with secure_sums"),
    "krum": ({"algorithm": {"aggregator": "Krum"}}, "aggregator: got 'Krum'; allowed: Mean, with secure_sums"),
    "clipped": ({"algorithm": {"aggregator": "ClippedMean"}}, "ClippedMean looks at each client's update"),
    "stacking": ({"algorithm": "flora"}, "aggregator: got 'Stacking'; allowed: Mean, with secure_sums"),
    "quantised": ({"algorithm": {"up": ["Quantise"]}}, r"up: got \['Quantise'\]; allowed: none, with secure_sums"),
    "liars": (
        {"faults": [{"name": "SignFlip", "clients": [0]}]},
        "faults: got 'SignFlip'; allowed: faults of clients that are",
    ),
    "two clients": ({"clients_per_round": 2}, "clients_per_round: got 2; allowed: 3 or more, with secure_sums"),
    "adaptive": (
        {"algorithm": UNIFORM, "privacy": {"name": "AdaptiveGaussian", "noise": 0.5, "count_noise": 1.0}},
        "privacy: got 'AdaptiveGaussian'; allowed: another, with secure_sums",
    ),
    "half": ({"secure_sums": {"threshold": 0.5}}, "secure_sums.threshold: got 0.5; allowed: a share above 0.5"),
    "vanish": ({"secure_sums": {"vanish": 1.5}}, "secure_sums.vanish: got 1.5; allowed: a probability"),
    "parameter": ({"secure_sums": {"limbs": 2}}, "secure_sums.limbs: got 2; allowed: threshold, vanish of PairwiseMasks"),
    "name": ({"secure_sums": {"name": "PairwiseMask"}}, r"secure_sums: got 'PairwiseMask'; allowed: PairwiseMasks \(nearest\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_more_than_a_sum_is_refused_in_one_line(name: str, make_data: Make, make_module: Make) -> None:
    changes, says = REFUSED[name]
    with pytest.raises(UsageError, match=says) as caught:
        run(make_data, make_module, **(changes | {"secure_sums": MASKS | changes.get("secure_sums", {})}))
    assert "\n" not in str(caught.value)


def test_buffers_that_travel_are_refused() -> None:
    data = TinyData()
    loaders = GivenLoaders([data.client_dataloader(client) for client in range(4)], data.client_dataloader(2))
    with pytest.raises(UsageError, match=r"with secure_sums .* as they are averaged apart"):
        make_loop(secure_sums="PairwiseMasks").fit(TinyModule(), loaders)


def test_clients_at_other_sites_are_refused() -> None:
    with pytest.raises(UsageError, match="allowed: none with clients at other sites: they are a simulation"):
        _check_remote(make_loop(secure_sums="PairwiseMasks"))


def test_secure_sums_are_a_part_found_by_name_and_a_flag_with_values() -> None:
    assert set(SECURE_SUMS) == {"PairwiseMasks"} == set(fedtune.SECURE_SUMS)
    assert secure_of("PairwiseMasks") == PairwiseMasks()
    assert secure_of(None) is None
    with pytest.raises(UsageError, match="secure_sums: got True; allowed: a name"):
        secure_of(True)
    given = {"name": "PairwiseMasks", "threshold": "8e-1"}
    assert resolve({"loop": {"secure_sums": given}})["loop"]["secure_sums"] == {**given, "threshold": 0.8, "vanish": 0.0}
    assert resolve({})["loop"]["secure_sums"] is None
    assert [PairwiseMasks(0.6).least(size) for size in (3, 5, 8, 10)] == [2, 3, 5, 6]
    assert PairwiseMasks(1.0).least(7) == 7


def test_missing_packages_are_named(make_data: Make, make_module: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"secure_sums: got 'no package cryptography'; allowed: after: pip install"):
        run(make_data, make_module, secure_sums=MASKS)


def secure_run(folder: Path, model: str) -> tuple[str, list[Any]]:
    """Weights and records of a run, of one rank or of all."""
    module, data = module_maker(model)(), data_maker(model, make_task())(**EIGHT)
    options: dict[str, Any] = {"faults": [{"name": "Drop", "rate": 0.2}], "seed": 4}
    loop = make_loop(run_dir=str(folder), max_rounds=3, secure_sums=MASKS | {"vanish": 0.1}, **options)
    loop.fit(module, data)
    return sha256(weights_of(module)), without_times(loop.history)


def test_two_processes_have_the_bits_of_one(tmp_path: Path, tiny_bert: str) -> None:
    alone = secure_run(tmp_path / "one", tiny_bert)
    assert ranks(2, secure_run, tmp_path / "two", tiny_bert) == [alone, alone]


def test_secrets_differ_among_clients() -> None:
    drawn = [Secrets.drawn(np.random.default_rng(number)) for number in range(3)]
    assert len({secret for one in drawn for secret in (one.channel, one.pair, one.own)}) == 9
    assert {len(one.own) for one in drawn} == {16}
