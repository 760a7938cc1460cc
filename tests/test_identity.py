"""A run is all of what its numbers depend on: started again it goes on with the same, or says by name what has changed."""

from __future__ import annotations

import enum
import hashlib
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import GivenLoaders, assert_equal, make_loop, weights_of, without_times
from safetensors.torch import load_file, save_file
from torch import nn

import fedtune
from fedtune.data.task import _numbered
from fedtune.testing import TinyData

Make = Callable[..., Any]


class Loaders(GivenLoaders):
    """The tiny clients; one of them is what is evaluated on."""

    def __init__(self) -> None:
        data = TinyData()
        super().__init__([data.client_dataloader(client) for client in range(4)], data.client_dataloader(2))

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


class Projected(pl.LightningModule):
    """A linear layer on a random projection that is drawn anew each time, and not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed, self.head = nn.Linear(5, 16), nn.Linear(16, 3)
        self.fixed.requires_grad_(False)
        self.tied = self.fixed
        with torch.no_grad():
            self.head.weight.zero_()

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.fixed(x)))

    def training_step(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.logits(batch[0]), batch[1])

    def validation_step(self, batch: Any) -> None:
        logits = self.logits(batch[0])
        self.log("accuracy", (logits.argmax(-1) == batch[1]).float().mean(), batch_size=len(batch[1]))
        self.log("loss_nats", nn.functional.cross_entropy(logits, batch[1]), batch_size=len(batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=0.5)


def fit(folder: Path, rounds: int = 4, module: Any = None, **options: Any) -> Any:
    loop = make_loop(max_rounds=rounds, run_dir=str(folder), **options)
    loop.fit(module or Projected(), Loaders())
    return loop


def summary_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in found.items() if name not in ("seconds", "peak_memory_bytes")}


# ---------------------------------------------------------------- what does not travel


def test_frozen_weights_of_no_file_are_kept_once_and_given_back(tmp_path: Path) -> None:
    module = Projected()
    first = fit(tmp_path, module=module)
    before = summary_of(tmp_path)
    for _ in range(2):  # finished runs, started again with another projection
        other = Projected()
        again = fit(tmp_path, module=other)
        assert torch.equal(other.fixed.weight, module.fixed.weight)
        assert summary_of(tmp_path) == before
        assert without_times(again.history) == without_times(first.history)
    longer, through = fit(tmp_path, rounds=6), fit(tmp_path / "through", rounds=6, module=clone(module))
    assert without_times(longer.history) == without_times(through.history)
    assert set(load_file(tmp_path / "start" / "resting.safetensors")) == {"fixed.weight", "fixed.bias"}
    assert not [file for file in (tmp_path / "checkpoints").rglob("weights.safetensors") if "fixed.weight" in load_file(file)]


def clone(module: Projected) -> Projected:
    """The projection of a module, and a head as at the start."""
    found = Projected()
    found.fixed.load_state_dict(module.fixed.state_dict())
    found.head.load_state_dict({name: tensor.clone() for name, tensor in START.items()})
    return found


START: dict[str, torch.Tensor] = {}


@pytest.fixture(autouse=True)
def _the_head_starts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    init = Projected.__init__
    START.update({"weight": torch.zeros(3, 16), "bias": torch.zeros(3)})

    def same(self: Projected) -> None:
        init(self)
        self.head.load_state_dict(START)

    monkeypatch.setattr(Projected, "__init__", same)


def test_a_module_with_other_frozen_parts_is_refused_by_name(tmp_path: Path) -> None:
    class Deeper(Projected):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2).requires_grad_(False)

    fit(tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["model"]["class"] = "Deeper"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(fedtune.UsageError, match=r"run_dir: .*'more.bias', 'more.weight'"):
        fit(tmp_path, module=Deeper())


def test_replaced_files_of_a_model_are_refused_by_name(tiny_bert: str, make_data: Make, tmp_path: Path) -> None:
    folder, run = tmp_path / "model", str(tmp_path / "run")
    shutil.copytree(tiny_bert, folder)

    def start(**changes: Any) -> Any:
        module = fedtune.BertClassifier(str(folder), 3, freeze_embeddings=True, **changes)
        return make_loop(run_dir=run).fit(module, make_data(model=str(folder)))

    start()
    kept = load_file(Path(run) / "start" / "resting.safetensors")
    assert not any("weight" in name for name in kept)  # the frozen embeddings are in the files
    start()
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.LayerNorm.bias"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(fedtune.UsageError, match=r"content.model.model.safetensors: '\w{16}' -> '\w{16}'"):
        start()


def test_frozen_weights_that_are_no_longer_those_of_the_files_are_refused_by_name(
    make_data: Make, make_module: Make, tmp_path: Path
) -> None:
    make_loop(run_dir=str(tmp_path)).fit(make_module(freeze_layers=1), make_data())
    changed = make_module(freeze_layers=1)
    with torch.no_grad():
        changed.network.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
    with pytest.raises(
        fedtune.UsageError, match=r"a module whose network.bert.encoder.layer.0.output.dense.weight is what the"
    ):
        make_loop(run_dir=str(tmp_path)).fit(changed, make_data())


def test_a_fresh_pooler_that_is_frozen_is_kept(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    def frozen(seed: int) -> Any:
        module = make_module()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module.network.bert.pooler.dense.reset_parameters()
        module.network.bert.pooler.requires_grad_(False)
        module._fresh |= {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}  # as a checkpoint without a pooler has it
        return module

    one, other = frozen(1), frozen(2)
    first = make_loop(run_dir=str(tmp_path)).fit(one, make_data())
    assert without_times(make_loop(run_dir=str(tmp_path)).fit(other, make_data())) == without_times(first)
    assert torch.equal(one.network.bert.pooler.dense.weight, other.network.bert.pooler.dense.weight)


class Counted(Projected):
    """Training changes a counter that does not travel, and what a step does depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed.load_state_dict({"weight": torch.linspace(-1, 1, 80).view(16, 5), "bias": torch.zeros(16)})
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch: Any) -> torch.Tensor:
        self.steps += 1
        return super().training_step(batch) / self.steps


def test_counters_start_alike_for_every_client_and_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"baselines": ["centralised", "local"], "local_epochs": 2}
    whole = fit(tmp_path / "whole", module=Counted(), **options)
    fit(tmp_path / "cut", rounds=2, module=Counted(), **options)
    cut = fit(tmp_path / "cut", module=Counted(), **options)
    assert without_times(whole.history) == without_times(cut.history)
    assert summary_of(tmp_path / "whole") == summary_of(tmp_path / "cut")
    # a centralised run that was interrupted goes on with its counter, as ordinary training does
    (folder,) = (tmp_path / "whole" / "baselines").glob("centralised-*")
    shutil.rmtree(folder / "checkpoints" / "round-0004")
    assert without_times(fit(tmp_path / "whole", module=Counted(), **options).baseline_runs["centralised"]) == without_times(
        whole.baseline_runs["centralised"]
    )
    monkeypatch.setattr("fedtune.runs.loop.cohort", lambda *_: [3, 1, 0, 2])
    one, other = Counted(), Counted()
    make_loop(max_rounds=2).fit(one, Loaders())
    monkeypatch.setattr("fedtune.runs.loop.cohort", lambda *_: [0, 1, 2, 3])
    make_loop(max_rounds=2).fit(other, Loaders())
    assert_equal(weights_of(one), weights_of(other))


# ---------------------------------------------------------------- callbacks


class Patient(fedtune.FederatedCallback):
    """Stops the run after so many rounds, counted over all starts, and writes down what it was asked."""

    def __init__(self, patience: int) -> None:
        self.patience, self.count, self.seen = patience, 0, list[int]()

    def on_round_end(self, run: Any, module: Any, record: Any) -> None:
        self.count += 1
        self.seen.append(record.round)
        run.should_stop |= self.count >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_a_callback_that_stops_stops_again_and_its_state_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = fit(tmp_path / "a", rounds=9, callbacks=[Patient(3)])
    before = summary_of(tmp_path / "a")
    again = fit(tmp_path / "a", rounds=9, callbacks=[Patient(3)], progress=True)
    assert "stopped by a callback after round 3; a larger max_rounds goes on" in capsys.readouterr().out
    assert (len(first.history), len(again.history)) == (3, 3)
    assert summary_of(tmp_path / "a") == before
    fit(tmp_path / "b", rounds=2, callbacks=[Patient(4), Patient(99)])  # interrupted after two rounds
    resumed = Patient(4)
    assert len(fit(tmp_path / "b", rounds=9, callbacks=[resumed, Patient(99)]).history) == 4
    assert (resumed.seen, resumed.count) == ([3, 4], 4)
    further = fit(tmp_path / "b", rounds=12, callbacks=[Patient(99)])  # a larger number of rounds is asked for, and given
    assert len(further.history) == 12


def test_a_round_whose_callbacks_a_crash_has_left_out_is_shown_to_them_again(tmp_path: Path) -> None:
    class Fails(Patient):
        def on_round_end(self, run: Any, module: Any, record: Any) -> None:
            if record.round == 3:
                raise KeyboardInterrupt
            super().on_round_end(run, module, record)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, rounds=5, callbacks=[Fails(99)])
    patient = Patient(99)
    fit(tmp_path, rounds=5, callbacks=[patient])
    assert patient.seen == [3, 4, 5]
    (tmp_path / "callbacks.jsonl").unlink()
    patient = Patient(99)
    with pytest.warns(UserWarning, match=r"callbacks\.jsonl is missing: callbacks begin after round 5"):
        fit(tmp_path, rounds=6, callbacks=[patient])
    assert patient.seen == [5, 6]
    patient = Patient(99)
    fit(tmp_path, rounds=6, callbacks=[patient])
    assert (patient.seen, patient.count) == ([], 2)


def test_a_state_that_json_does_not_keep_is_refused(tmp_path: Path) -> None:
    class Strange(fedtune.FederatedCallback):
        def state_dict(self) -> dict[str, Any]:
            return {"seen": (1, 2)}  # a tuple comes back as a list

    with pytest.raises(fedtune.UsageError, match=r"callbacks, state of .*Strange: got .*; allowed: numbers, text, lists"):
        fit(tmp_path, callbacks=[Strange()])


# ---------------------------------------------------------------- configuration


class Given(Projected):
    """A module with a hyperparameter of any type."""

    def __init__(self, f: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


LONG = torch.arange(5000)


@pytest.mark.filterwarnings("ignore:Attribute 'f' is an instance of `nn.Module`")
@pytest.mark.parametrize(
    ("before", "now"),
    [
        (1, 1.0),
        (True, 1),
        ([1, 2], [1, 2.0]),
        (None, "None"),
        (torch.tensor([1.0]), torch.tensor([2.0])),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)),
        (torch.tensor([1.0]), torch.tensor([[1.0]])),
        (LONG, torch.where(LONG == 2500, 7, LONG)),
        (LONG.numpy(), LONG.numpy()[::-1]),
        ({"w": [LONG]}, {"w": [LONG + 1]}),
        (nn.ReLU(), nn.GELU()),
        ({"a", "b"}, {"a", "c"}),
    ],
)
def test_hyperparameters_are_compared_by_type_and_value(tmp_path: Path, before: Any, now: Any) -> None:
    fit(tmp_path, rounds=1, module=Given(before))
    with pytest.raises(fedtune.UsageError, match=r"which differs in model\.f") as caught:
        fit(tmp_path, rounds=1, module=Given(now))
    assert len(str(caught.value)) < 700
    fit(tmp_path, rounds=1, module=Given(before))


class Word(str, enum.Enum):  # noqa: UP042 - as older code has them
    ONE = "one"


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, 1e-05, 1, True, "1e-5", "2020-01-01", (1, 2), {"b", "a"}, Word.ONE, np.float32(0.1), Path("x")],
)
def test_the_same_hyperparameters_are_equal_after_they_were_written(tmp_path: Path, value: Any) -> None:
    fit(tmp_path, rounds=1, module=Given(value))
    fit(tmp_path, rounds=1, module=Given(value))


def test_classes_of_one_name_are_two_and_the_number_of_clients_counts(tmp_path: Path) -> None:
    class Fewer(Loaders):
        def __init__(self) -> None:
            super().__init__()
            self.num_clients = 3

    Fewer.__name__ = "Loaders"
    fit(tmp_path, rounds=1)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["model"] == {"class": "Projected", "from": __name__}
    assert config["data"] == {"class": "Loaders", "from": __name__, "num_clients": 4}
    with pytest.raises(fedtune.UsageError, match=r"data\.num_clients: 4 -> 3$"):
        make_loop(max_rounds=1, run_dir=str(tmp_path)).fit(Projected(), Fewer())
    other = type("Projected", (Projected,), {"__module__": "another"})
    with pytest.raises(fedtune.UsageError, match=rf"model\.from: '{__name__}' -> 'another'$"):
        fit(tmp_path, rounds=1, module=other())
    for part, name in (("model", "from"), ("data", "from"), ("data", "num_clients")):  # as earlier versions wrote it
        del config[part][name]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert len(fit(tmp_path, rounds=2).history) == 2


# ---------------------------------------------------------------- files


def test_the_summary_keeps_what_it_knew_of_baselines(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    def run(**options: Any) -> dict[str, Any]:
        make_loop(run_dir=str(tmp_path), **options).fit(make_module(), make_data())
        return summary_of(tmp_path)

    first = run(baselines=["centralised", "local"])
    assert first["baseline_rounds"] == 2
    assert run() == first
    longer = run(max_rounds=3)
    assert (longer["rounds"], longer["baseline_rounds"]) == (3, 2)
    assert longer["centralised_accuracy"] == first["centralised_accuracy"]
    assert run(max_rounds=3, baselines=["centralised"])["baseline_rounds"] == 3


def test_the_summary_knows_each_baseline_for_itself(tmp_path: Path) -> None:
    class Named(Projected):
        """Logs what looks like baselines, and is none."""

        def validation_step(self, batch: Any) -> None:
            super().validation_step(batch)
            for name in ("local_x", "centralised_x", "local_accuracy", "rounds_to_1pct", "rounds", "test_accuracy"):
                self.log(name, 7.25)

        test_step = validation_step

    def run(**options: Any) -> dict[str, Any]:
        fit(tmp_path, module=Named(), **{"rounds": 2, **options})
        return summary_of(tmp_path)

    both = run(baselines=["centralised", "local"])
    assert (both["local_x"], both["test_local_accuracy"], both["test_rounds"], both["test_accuracy"]) == (7.25,) * 4
    assert both["local_accuracy"] <= 1
    assert both["rounds"] == 2
    assert run(baselines=["centralised"]) == both
    assert run(baselines=["local"]) == both
    assert run() == both
    longer = run(rounds=3, baselines=["centralised"])
    names = ("baseline_rounds", "baseline_rounds_centralised", "baseline_rounds_local")
    assert [longer[name] for name in names] == [3, 3, 2]
    assert longer["local_accuracy"] == both["local_accuracy"]
    again = run(rounds=3)
    assert [again[name] for name in names] == [3, 3, 2]


def test_a_local_baseline_without_a_finite_metric_is_read_again(tmp_path: Path) -> None:
    class Unknown(Projected):
        def validation_step(self, batch: Any) -> None:
            self.log("accuracy", math.nan)

        test_step = validation_step

    for _ in range(2):
        summary = fit(tmp_path, rounds=1, module=Unknown(), baselines=["local"]).summary
        assert (summary["local_accuracy"], summary["local_clients"], summary["baseline_rounds_local"]) == (None, 4, 1)


def test_a_run_that_stops_before_its_first_round_has_a_summary(tmp_path: Path) -> None:
    class Stops(fedtune.FederatedCallback):
        def on_fit_start(self, run: Any, module: Any) -> None:
            run.should_stop = True

    found = fit(tmp_path, callbacks=[Stops()]).summary
    assert [found[name] for name in ("rounds", "best_round", "best_accuracy", "client_accuracy_mean")] == [0, None, None, None]
    assert (found["seconds"], found["bytes_up"]) == (0, 0)
    assert 0 <= found["test_accuracy"] <= 1
    assert len(fit(tmp_path).history) == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines[1].update(round=7), "line 2: the record of round 7, where round 2 belongs"),
        (lambda lines: lines[1].update(round=True), "line 2"),
        (lambda lines: lines[1].pop("num_steps"), "line 2: no record of a round"),
        (lambda lines: lines.pop(0), "line 1: the record of round 2, where round 1 belongs"),
        (lambda lines: lines.insert(1, lines[0]), "line 2: the record of round 1, where round 2 belongs"),
        (lambda lines: lines.pop(), "lacks rounds up to 3; it has 2"),
        (lambda lines: lines.insert(0, 5), "line 1: no record, which is a JSON object, but 5"),
    ],
)
def test_records_are_checked_and_not_counted(tmp_path: Path, change: Any, said: str) -> None:
    fit(tmp_path, rounds=3)
    file = tmp_path / "rounds.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    change(lines)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = file.read_bytes()
    with pytest.raises(fedtune.RunError, match=r"rounds\.jsonl") as caught:
        fit(tmp_path, rounds=4)
    assert said in str(caught.value)
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", ["double", "missing", "relabelled", "no record", "text", "no part"])
def test_a_local_baseline_is_made_anew_from_its_first_wrong_record(tmp_path: Path, damage: str) -> None:
    expected = fit(tmp_path, baselines=["local"]).baseline_runs["local"]
    (file,) = (tmp_path / "baselines").glob("local-*/local.jsonl")
    lines = file.read_text().splitlines()
    wrong = {
        "double": [*lines[:2], lines[1], *lines[2:]],
        "missing": [lines[0], *lines[2:]],
        "relabelled": [*lines[:2], json.dumps(json.loads(lines[2]) | {"client": 0}), lines[3]],
        "no record": [*lines[:3], "[]"],
        "text": [*lines[:2], json.dumps(json.loads(lines[2]) | {"test": {"accuracy": "high"}}), lines[3]],
        "no part": [*lines[:3], json.dumps({name: value for name, value in json.loads(lines[3]).items() if name != "test"})],
    }
    file.write_text("".join(line + "\n" for line in wrong[damage]))
    with pytest.warns(UserWarning, match=r"local.jsonl, line \d is damaged; from there on it is made anew"):
        found = fit(tmp_path, baselines=["local"]).baseline_runs["local"]
    strip = [
        [{key: value for key, value in one.items() if key != "seconds"} for one in records] for records in (found, expected)
    ]
    assert strip[0] == strip[1]


def test_a_state_that_was_changed_or_lies_in_another_folder_does_not_count(tmp_path: Path) -> None:
    fit(tmp_path, rounds=3)
    newest = tmp_path / "checkpoints" / "round-0003"
    notes = json.loads((newest / "state.json").read_text())
    for name, value in itertools.chain(
        ((name, notes[name] + 1) for name in ("round", "examples", "steps", "epochs")),
        [("steps", str(notes["steps"])), ("epochs", None), ("sha256", {}), ("check", "0"), ("extra", 1)],
    ):
        (newest / "state.json").write_text(json.dumps(notes | {name: value}))
        with pytest.warns(UserWarning, match="DAMAGED CHECKPOINT.*state.json is not the one that was written"):
            assert fedtune.storage.checkpoint.latest(tmp_path / "checkpoints").round == 2
    (newest / "state.json").write_text(json.dumps(notes))
    newest.rename(newest.with_name("round-0009"))
    with pytest.warns(UserWarning, match="round-0009 holds the checkpoint of round 3"):
        assert fedtune.storage.checkpoint.latest(tmp_path / "checkpoints").round == 2


@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "more"])
def test_weights_that_do_not_fit_the_module_are_refused_by_name(tmp_path: Path, change: str) -> None:
    """Also where their hashes are right: a shape (1,) would be broadcast."""
    fit(tmp_path, rounds=2)
    folder = tmp_path / "checkpoints" / "round-0002"
    weights = load_file(folder / "weights.safetensors")
    if change == "shape":
        weights["head.bias"] = weights["head.bias"][:1].clone()
    elif change == "dtype":
        weights["head.bias"] = weights["head.bias"].double()
    elif change == "missing":
        del weights["head.bias"]
    else:
        weights["head.more"] = torch.zeros(1)
    save_file(weights, folder / "weights.safetensors")
    notes = json.loads((folder / "state.json").read_text())
    notes["sha256"]["weights"] = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    notes.pop("check")
    notes["check"] = hashlib.sha256(json.dumps(notes, sort_keys=True).encode()).hexdigest()
    (folder / "state.json").write_text(json.dumps(notes))
    with pytest.raises(fedtune.RunError, match=r"the weights of round 2 in .* do not fit the module: head\.(bias|more) is"):
        fit(tmp_path, rounds=3)


# ---------------------------------------------------------------- labels


def test_class_numbers_depend_on_the_values_alone() -> None:
    for values, names in (
        (["10", "9", "-1.5", "9"], ("-1.5", "9", "10")),
        (["b", "a", "C"], ("C", "a", "b")),
        ([True, False], ("False", "True")),
        ([2, 10, 1], ("1", "2", "10")),
        (["1", "x"], ("1", "x")),
    ):
        for order in itertools.permutations(values):
            numbers, found = _numbered(order, None, "label")
            assert found == names
            assert [names[number] for number in numbers] == [str(value) for value in order]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["1", "1.0"], "label: got '1 and 1.0'; allowed: one spelling for each value"),
        (["spam", "spam "], "label: got 'spam and spam '; allowed: one spelling"),
        (["a  b", "a b"], "one spelling"),
        (["1", "nan"], "label: got 'nan'; allowed: a column without missing values"),
        ([1.0, float("nan")], "label: got 'nan'"),
        (["NaN", "2"], "label: got 'nan'"),
    ],
)
def test_labels_that_a_reader_would_take_for_one_are_refused(values: list[Any], said: str) -> None:
    with pytest.raises(fedtune.UsageError) as caught:
        _numbered(values, None, "label")
    assert said in str(caught.value)
