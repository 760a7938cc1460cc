"""What a federation over Flower does, with a post office in one process in the place of Flower's, which test_flower.py has."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="flwr is not installed: pip install 'fedtune[flower]'")

from conftest import make_loop, make_task, without_times
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.app import Context as AppContext
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from test_flower import config_of, weights_sha, write_csv

import fedtune
from fedtune.errors import RunError, UsageError
from fedtune.federated.messages import ClientReport, Context, Position, Reply, Request
from fedtune.federated.remote import Share
from fedtune.flower import records, sites
from fedtune.flower.answers import Answers
from fedtune.flower.client import client_app
from fedtune.flower.server import FlowerClients
from fedtune.flower.setups import Parts, Setup, node_values, run_values
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


def nodes_in(folder: Path) -> dict[int, dict[str, Any]]:
    """Three sites with a folder each for what they remember."""
    return {node: own | {"memory": str(folder / str(node))} for node, own in NODES.items()}


def is_training(message: Message, round: int, client: int) -> bool:
    if message.metadata.message_type != "train":
        return False
    about = message.content.config_records[records.ABOUT]
    return (about["round"], about["client"]) == (round, client)


SGD = {"optimizer": "sgd"}
LORA = {"lora": {"rank": 4}}


@pytest.mark.parametrize(
    ("algorithm", "module", "keep"),
    [
        ("fedavg", {}, False),
        ({"name": "scaffold", "server": ["Control", "Adam"]}, SGD, False),
        ({"name": "scaffold", "server": ["Control", "Adam"]}, SGD, True),
        ({"name": "fedprox", "up": ["Quantise"]}, {}, True),
        ({"name": "scaffold", "up": ["TopK", "HalfPrecision"], "down": [{"name": "PowerSGD", "rank": 1}]}, SGD, True),
        ({"name": "fedavg", "aggregator": "Median"}, {}, True),
        ("fedper", {}, False),
        ("fedper", {}, True),
        ("ditto", {}, True),
        ({"name": "flora", "ranks": [2, 4, 3]}, LORA, True),
        ("flora", LORA, True),
        ("flexlora", LORA, True),
        ("fedex_lora", LORA, False),
        ("ffa_lora", LORA, True),
        ("fedsa_lora", LORA, True),
    ],
    ids=[
        *("fedavg", "scaffold", "scaffold-keep", "quantised", "channels", "median", "fedper", "fedper-keep", "ditto"),
        *("flora-ranks", "flora", "flexlora", "fedex_lora", "ffa_lora", "fedsa_lora"),
    ],
)
def test_sites_come_to_the_bits_of_one_process(setup: Any, algorithm: Any, module: Any, keep: bool, tmp_path: Path) -> None:
    if module is LORA:
        pytest.importorskip("peft")
    chosen = setup(module, algorithm=algorithm, max_rounds=3)
    loop, weights = federated(chosen, Post(chosen, nodes_in(tmp_path), keep))
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


SCAFFOLD: dict[str, Any] = {"algorithm": "scaffold", "max_rounds": 3, "on_client_error": "drop", "min_clients": 2}


def test_a_reply_that_does_not_count_is_forgotten_at_the_site(setup: Any, tmp_path: Path) -> None:
    chosen = setup(SGD, **SCAFFOLD)
    unheard, refused = Post(chosen, nodes_in(tmp_path / "a")), Post(chosen, nodes_in(tmp_path / "b"))
    unheard.lost = lambda message: is_training(message, 2, 1)
    refused.changed = lambda message, content: Error(0, "broken") if is_training(message, 2, 1) else content
    one, weights = federated(chosen, unheard, deadline=0.5)
    other, others = federated(chosen, refused)
    assert one.history[1].failures[0].reason == "no answer within 0.5 s"
    assert other.history[1].failures[0].reason == "its process ended: 'broken'"
    assert_same(weights, others)
    (folder,) = (tmp_path / "b" / "71").iterdir()
    assert [file.name for file in sorted((folder / "1" / "000001").iterdir())] == ["0003.safetensors"]


def test_a_site_that_goes_is_left_out_and_one_that_comes_is_used(setup: Any, tmp_path: Path) -> None:
    chosen = setup(SGD, **(SCAFFOLD | {"max_rounds": 4}))
    post = Post(chosen, nodes_in(tmp_path))

    def going(message: Message) -> bool:
        gone = is_training(message, 2, 1)
        if gone:
            del post.nodes[71]
        if is_training(message, 3, 2):
            post.nodes[99] = nodes_in(tmp_path)[71]  # a new number, the same memory
        return gone

    post.lost = going
    loop, _ = federated(chosen, post)
    failures = [{failure.client: failure.reason for failure in record.failures} for record in loop.history]
    assert failures == [{}, {1: "its site has gone"}, {1: "its site is away"}, {}]
    assert loop.history[1].client_accuracy[1] is None
    assert loop.history[3].client_accuracy[1] is not None


def test_a_run_goes_on_with_what_the_sites_remember(setup: Any, tmp_path: Path) -> None:
    chosen = setup(SGD, algorithm="scaffold", max_rounds=4)
    expected, _ = in_one_process(chosen, run_dir=str(tmp_path / "alone"))
    for rounds in (2, 2, 4):
        federated(chosen, Post(chosen, nodes_in(tmp_path)), run_dir=str(tmp_path / "run"), max_rounds=rounds)
    assert weights_sha(tmp_path / "run") == weights_sha(tmp_path / "alone")
    assert expected.history[-1].round == 4
    (folder,) = (tmp_path / "70").iterdir()
    for file in (folder / "0" / "000000").iterdir():
        file.unlink()
    with pytest.raises(RunError, match=r"client 0 at site 70: .*0004.safetensors is missing"):
        federated(chosen, Post(chosen, nodes_in(tmp_path)), run_dir=str(tmp_path / "run"), max_rounds=5)


def test_what_does_not_agree_is_said_in_one_line(setup: Any, make_data: Any, make_module: Any) -> None:
    good = setup()

    def other(config: dict[str, Any]) -> Parts:
        if config["place"] == "server" or config["partition-id"] != 1:
            return Parts(*good(config))
        return Parts(make_module(learning_rate=1.0), make_data(split="iid", task=make_task(labels=2)), make_loop(seed=1))

    with pytest.raises(UsageError, match=r"^site Rabat: .*names of the classes and configuration of the model and options of"):
        federated(other, Post(other, NODES | {71: {"client": 1, "partition-id": 1, "name": "Rabat"}}))

    def divided(config: dict[str, Any]) -> Parts:
        split = "iid" if config.get("client") == 1 else "by_author"
        return Parts(make_module(), make_data(split=split), make_loop())

    with pytest.raises(UsageError, match=r"^site 71: got 'other data'; allowed: the data that the other sites had before"):
        federated(divided, Post(divided, NODES | {71: {"client": 1}}))
    with pytest.raises(RunError, match=r"after 0.1 s 2 of 3 sites are there, 3 are needed; missing: client 2$"):
        federated(good, Post(good, {70: {"client": 0}, 71: {"client": 1}}), wait=0.1)
    with pytest.raises(UsageError, match="node-config client of site 70 and site 71: got 0; allowed: a number for each"):
        federated(good, Post(good, {70: {"client": 0}, 71: {"client": 0}}))
    with pytest.raises(RunError, match=r"site 70 \(client -1\): node-config client: got 'nothing'; allowed: the number"):
        federated(good, Post(good, {70: {}}))
    with pytest.raises(RunError, match=r"node-config client: got 7; allowed: a number below 3"):
        federated(good, Post(good, {70: {"client": 7}}))
    with pytest.raises(UsageError, match=r"baselines: got .*; allowed: none with clients at other sites"):
        federated(good, Post(good, NODES), baselines=("local",))
    with pytest.raises(
        UsageError, match=r"algorithm.client: got 'ZerothOrder'; allowed: one whose weights travel, with clients"
    ):
        federated(good, Post(good, NODES), algorithm="fedkseed")


def test_an_app_may_answer_in_the_process_of_the_message(setup: Any) -> None:
    app = client_app(setup())
    message = Message(RecordDict(), 70, "query")
    message.metadata.__dict__["_message_id"] = "1"
    context = AppContext(1, 70, {"client": 1, "idle": 0}, RecordDict(), {})
    about = app(message, context).content.config_records[records.ABOUT]
    assert (about["client"], about["num_clients"], about["own"]) == (1, 3, False)


def test_an_error_of_the_data_does_not_leave_the_site(setup: Any, make_module: Any, capfd: Any) -> None:
    good = setup()

    def broken(config: dict[str, Any]) -> Parts:
        if config["place"] == "site":
            raise UsageError("task_options.path", "a secret text", "another")
        return Parts(*good(config))

    with pytest.raises(
        RunError, match=r"its data or its configuration cannot be used, its log says why \(UsageError\)"
    ) as said:
        federated(broken, Post(broken, NODES))
    assert "secret" not in str(said.value)
    assert "a secret text" in capfd.readouterr().err


def test_an_error_in_training_is_named_without_what_it_says(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = setup(**{"max_rounds": 2, "on_client_error": "drop"})
    monkeypatch.setattr(fedtune.BertClassifier, "on_train_start", lambda self: {}["a secret text"], raising=False)
    with pytest.raises(RunError, match="the replies of 0 of 3 clients count") as said:
        federated(chosen, Post(chosen, NODES))
    assert "secret" not in str(said.value)
    assert "KeyError" in str(said.value)


def own_data(folder: Path, tiny_bert: str, **changes: Any) -> tuple[Setup, dict[int, dict[str, Any]], list[fedtune.TextTask]]:
    """A set-up from a file, and two sites with a CSV file each."""
    from fedtune.flower.setups import from_file
    from fedtune.yaml_files import dump

    tasks = [make_task(texts_per_author=20 + 8 * site, authors=3, seed=site) for site in range(2)]
    nodes = {}
    for site, task in enumerate(tasks):
        file = write_csv(folder / f"site{site}.csv", task)
        nodes[50 + site] = {"client": site, "data.task_options.path": str(file), "memory": str(folder / f"memory{site}")}
    config = config_of(Path("nowhere.csv"), tiny_bert, **changes)
    config["data"]["split"] = "iid"
    (folder / "config.yaml").write_text(dump(config))
    return from_file(folder), nodes, tasks


def test_sites_with_data_of_their_own(tmp_path: Path, tiny_bert: str) -> None:
    chosen, nodes, _ = own_data(tmp_path, tiny_bert, max_rounds=2)
    module, named, loop = chosen({"place": "server"})
    loop = dataclasses.replace(loop, run_dir=str(tmp_path / "run"), options=fedtune.RunOptions(progress=False))
    loop.fit(module, FlowerClients(Post(chosen, nodes), module, named, loop, 60.0, 1.0))
    sizes = [fedtune.TextTask.from_csv(tmp_path / f"site{site}.csv").parts["train"].size for site in range(2)]
    assert [report.num_examples for report in loop.history[0].clients] == sizes
    assert json.loads((tmp_path / "run" / "sites.json").read_text())["max_weight"] == sum(sizes)
    assert None not in loop.history[0].client_accuracy
    write_csv(tmp_path / "site1.csv", make_task(authors=3, seed=9))
    loop = dataclasses.replace(loop, max_rounds=3)
    with pytest.raises(UsageError, match="site 51: got 'other data'; allowed: the data that it had before"):
        loop.fit(module, FlowerClients(Post(chosen, nodes), module, named, loop, 60.0, 1.0))


def test_an_app_s_configuration_has_no_other_names(tmp_path: Path, tiny_bert: str) -> None:
    assert run_values({"run-dir": "here", "loop.max_rounds": 3, "wait": 5})["run_dir"] == "here"
    for config in ({"run-dirr": "x"}, {"deadline": 0.0}, {"wait": "long"}, {"run-dir": 3}):
        with pytest.raises(UsageError):
            run_values(config)
    with pytest.raises(UsageError, match="memory"):
        node_values({"memoy": "x"})
    chosen, _, _ = own_data(tmp_path, tiny_bert)
    (tmp_path / "config.yaml").write_text("data: {num_clients: 2}\n")
    with pytest.raises(UsageError, match=r"config.yaml: content: got None; allowed: the names of the classes"):
        chosen({"place": "server"})


ALLOWED = {
    "query": ({}, records.SITE),
    "train": (records.REQUEST, records.REPLY),
    "evaluate": (records.EVALUATION, records.SHARE),
}
GROUPS = {"weights", "buffers", "update", "control"}


def test_no_text_no_label_and_no_memory_crosses(tmp_path: Path, tiny_bert: str) -> None:
    chosen, nodes, tasks = own_data(tmp_path, tiny_bert, max_rounds=2, algorithm="scaffold")
    module, named, loop = chosen({"place": "server", "model.optimizer": "sgd"})
    loop = dataclasses.replace(loop, options=fedtune.RunOptions(progress=False))
    post = Post(lambda config: chosen({**config, "model.optimizer": "sgd"}), nodes)
    loop.fit(module, FlowerClients(post, module, named, loop, 60.0, 1.0))
    assert len(post.sent) == 2 * (2 + 2 * 2 * 2 + 2)  # there and back: who is there, two rounds of two kinds, the test part
    names = {name for name, _ in module.named_parameters()}
    # a first change of a control variate, which is sent, is from zero; later ones are not what the client remembers
    kept = [file.read_bytes() for file in tmp_path.glob("memory*/*/*/*/0002.safetensors")]
    assert kept
    words = [text.encode() for task in tasks for text in task.texts if len(text.split()) > 4]
    words += [name.encode() for task in tasks for name in task.label_names + task.author_names]
    for message in post.sent:
        asks = not message.metadata.reply_to_message_id
        allowed = ALLOWED[message.metadata.message_type][0 if asks else 1]
        about = message.content.config_records.get(records.ABOUT, ConfigRecord())
        assert about.keys() == allowed.keys()
        assert set(message.content.keys()) <= {records.ABOUT, *(f"group/{group}" for group in GROUPS)}
        data = [json.dumps(dict(about)).encode()]
        for record in message.content.array_records.values():
            assert {name.partition("/")[2] for name in record} <= names
            data += [array.data for array in record.values()]
        sent = b" ".join(data)
        assert not [word for word in words if word in sent]
        own = {name for one in kept for name in [one[-64:]]}  # the last numbers of each client's memory
        assert not [one for one in own if one in sent]


def a_reply(**changes: Any) -> Reply:
    report = ClientReport(1, 8, 2, 80, 0.1 + 0.2, 1.5, 0.0, {"more": 0.1}, {"lr": 1e-4})
    groups = {"update": {"a.b": torch.ones(2, 3)}}
    return dataclasses.replace(Reply(1, 8, groups, report, 24), **changes)


def test_what_travels_comes_back_as_it_was() -> None:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool)
    tensors = {f"layer.{kind}": torch.randn(3, 4).mul(3).to(kind) for kind in kinds}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "turned": torch.randn(4, 3).T}
    groups = {"update": tensors, "control": {"full/odd": torch.ones(2)}}
    reply, kept = records.read_reply(records.reply_content(a_reply(groups=groups), 3, kept=True))
    assert kept
    assert reply.report == a_reply().report
    assert reply.groups.keys() == groups.keys()
    for name, tensor in tensors.items():
        found = reply.groups["update"][name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
        found.add_(1) if found.dtype != torch.bool else None  # it is the reader's own
    context = Context(7, 3, 5, (0, 2, 4), 2**40)
    request = Request(3, 2, Position(10, 2), (0, 2, 4), {"weights": {"a": torch.ones(2)}})
    memory = records.Memory("0" * 16, 2, 1)
    content = RecordDict({records.ABOUT: records.request_record(request, context, memory), **records.arrays_of(request.groups)})
    found_request, found_context, found_memory = records.read_request(content)
    assert (found_context, found_memory) == (context, memory)
    assert dataclasses.replace(found_request, groups={}) == dataclasses.replace(request, groups={})
    share = Share(5, {"accuracy": 0.1}, None)
    assert records.read_share(records.share_content(1, share)) == share
    with pytest.raises(RunError, match=r"complex64, which cannot travel"):
        records.arrays_of({"update": {"a": torch.ones(1, dtype=torch.complex64)}})


def broken(content: RecordDict, **changes: Any) -> RecordDict:
    content.config_records[records.ABOUT].update(changes)
    return content


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"weight": 1.5}, "another content"),
        ({"more": 1}, "another content"),
        ({"report": "{}"}, "its report cannot be read"),
        ({"report": "[1"}, "its report cannot be read"),
        ({"report": json.dumps(dataclasses.asdict(a_reply().report) | {"num_steps": -1})}, "its report cannot be read"),
        ({"report": json.dumps(dataclasses.asdict(a_reply().report) | {"train_loss_nats": math.nan})}, "cannot be read"),
        ({"report": json.dumps(dataclasses.asdict(a_reply().report) | {"client": 2})}, "its report is of client 2"),
    ],
)
def test_an_answer_that_is_none_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(RunError, match=why):
        records.read_reply(broken(records.reply_content(a_reply(), 1, kept=False), **changes))


def test_an_answer_that_is_none_is_a_failure_of_its_client(setup: Any) -> None:
    chosen = setup(max_rounds=1, min_clients=1)
    post = Post(chosen, NODES)

    def changed(message: Message, content: RecordDict) -> RecordDict:
        if is_training(message, 1, 0):
            return broken(content, client=1)
        if is_training(message, 1, 1):
            content.array_records["group/update"].popitem()
        if message.metadata.message_type == "evaluate" and message.metadata.dst_node_id == 72:
            return broken(content, examples=-1)
        return content

    post.changed = changed
    loop, _ = federated(chosen, post)
    reasons = [failure.reason for failure in loop.history[0].failures]
    assert reasons[0] == "its answer does not count: its report is of client 0"
    assert reasons[1].startswith("its update has nothing for network.")
    assert loop.history[0].client_accuracy[2] is None
