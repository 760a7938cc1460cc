"""What a federation over Flower does, with a post office in one process in the place of Flower's (tests/test_flower.py has it)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedtune[flower]'")

from conftest import GivenLoaders, make_loop, make_task, module_maker, without_times
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from test_flower import config_of, weights_sha, write_csv

import fedtune
from fedtune.algorithms.specification import algorithm_of
from fedtune.errors import RunError, UsageError
from fedtune.federated.messages import ClientReport, Context, Position, Reply, Request
from fedtune.federated.remote import Share
from fedtune.flower import records, sites
from fedtune.flower.answers import Answers
from fedtune.flower.server import FlowerClients
from fedtune.flower.setups import Parts, Setup, node_values, run_values
from fedtune.runs.flags import fit, resolve
from fedtune.tensors import travelling


class Post(Grid):
    """Carries messages to sites of this process, each made anew for each message, as Flower does.

    Args:
        setup: of all sites.
        nodes: node -> what it says of itself.
        keep: whether sites stay from message to message.
    """

    def __init__(self, setup: Setup, nodes: dict[int, dict[str, Any]], keep: bool = False) -> None:
        self._setup, self.nodes, self._keep = setup, dict(nodes), keep
        self._stay: dict[int, Answers] = {}
        self._answers: dict[str, Message] = {}
        self.sent: list[Message] = []  # in both directions
        self.lost: Callable[[Message], bool] = lambda message: False  # whether a request gets no answer
        self.changed: Callable[[Message, RecordDict], RecordDict | Error] = lambda message, content: content

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *given: Any, **more: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return [NodeInfo(node_id=node).node_id for node in self.nodes]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbers = []
        for message in messages:
            number = f"{len(self.sent)}"
            message.metadata.__dict__["_message_id"] = number
            self.sent.append(message)
            numbers.append(number)
            node, kind = message.metadata.dst_node_id, message.metadata.message_type
            if node not in self.nodes or self.lost(message):
                continue
            here = self._stay.get(node) or Answers(self._setup, {}, self.nodes[node])
            found = self.changed(message, here.answer(kind, message.content))
            if self._keep:
                self._stay[node] = here
            else:
                here.close()
            self._answers[number] = Message(found, reply_to=message)
            self.sent.append(self._answers[number])
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._answers.pop(number) for number in list(message_ids) if number in self._answers]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


NODES = {number + 70: {"partition-id": number} for number in range(3)}


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "PAUSE", 0.01)
    monkeypatch.setattr(sites, "_LOOK", 0.0)
    monkeypatch.setattr("fedtune.flower.server.PAUSE", 0.01)
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def setup(make_data: Any, make_module: Any) -> Callable[..., Setup]:
    """Makes set-ups of three clients, or with other options of the loop and of the module."""

    def chosen(module: dict[str, Any] | None = None, **loop: Any) -> Setup:
        return lambda config: Parts(make_module(**(module or {})), make_data(split="by_author"), make_loop(**loop))

    return chosen


def federated(setup: Setup, post: Post, deadline: float = 60.0, wait: float = 0.5, **loop: Any) -> Any:
    """The loop after a run whose clients are at sites, and its module."""
    module, data, found = setup({"place": "server"})
    found = dataclasses.replace(found, **loop)
    names = SimpleNamespace(num_clients=data.num_clients, label_names=data.label_names)
    found.fit(module, FlowerClients(post, module, names, found, deadline, wait))
    return found, module


def in_one_process(setup: Setup, **loop: Any) -> Any:
    module, data, found = setup({})
    found = dataclasses.replace(found, **loop)
    found.fit(module, data)
    return found, module


def assert_same(one: Any, other: Any) -> None:
    for name, tensor in travelling(one).items():
        assert torch.equal(tensor, travelling(other)[name]), name


SGD = {"optimizer": "sgd"}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("algorithm", "module"),
    [
        ("fedavg", {}),
        ({"name": "scaffold", "server": ["Control", "Adam"]}, SGD),
        ({"name": "fedprox", "up": ["Quantise"]}, {}),
        ({"name": "fedavg", "aggregator": "Median"}, {}),
        ("fedper", {}),
        ("ditto", {}),
    ],
    ids=["fedavg", "scaffold", "quantised", "median", "fedper", "ditto"],
)
def test_sites_come_to_the_bits_of_one_process(setup: Any, algorithm: Any, module: Any, keep: bool, tmp_path: Path) -> None:
    chosen = setup(module, algorithm=algorithm, max_rounds=3)
    nodes = {node: own | {"memory": str(tmp_path / str(node))} for node, own in NODES.items()}
    loop, weights = federated(chosen, Post(chosen, nodes, keep))
    alone, expected = in_one_process(chosen)
    assert_same(weights, expected)
    for one, other in zip(without_times(loop.history), without_times(alone.history), strict=True):
        for name in ("bytes_up", "bytes_down", "train_loss_nats", "update_cosine", "num_tokens", "diagnostics"):
            assert one[name] == other[name], name
        assert one["accuracy"] == pytest.approx(other["accuracy"])
        assert one["loss_nats"] == pytest.approx(other["loss_nats"], rel=1e-5)
    if algorithm in ("fedper", "ditto"):
        assert len(loop.history[-1].own_accuracy) == 3
        assert loop.history[-1].own_accuracy != loop.history[-1].client_accuracy
