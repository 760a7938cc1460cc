"""A run damaged, an odd place, odd flags: an export that Transformers opens with the weights of the run, or one line."""

from __future__ import annotations

import collections
import contextlib
import copy
import hashlib
import importlib.util
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accidents import accident
from cases import FIRST, outcome, share
from conftest import data_maker, make_loop, make_task, save_tiny_bert
from safetensors.torch import load_file, save_file
from test_folders import damage

import fedtune
from fedtune.models.adapters import merge_
from fedtune.models.weights import quiet
from fedtune.storage import checkpoint
from fedtune.tensors import assign_, travelling

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place for a case: what a run says of its model is a path in it."""
    return tmp_path_factory.mktemp("export") / "case"


@pytest.fixture(scope="module")
def good(place: Path) -> dict[str, Any]:
    """Finished runs of three rounds, their model, and the weights after each round by the names of the network."""
    found = {}
    with quiet():
        save_tiny_bert(place / "model")
    kinds: dict[str, dict[str, Any]] = {"plain": {}, "frozen": {"freeze_embeddings": True, "freeze_layers": 1}}
    kinds |= {"adapted": {"lora": {"rank": 2}}} if importlib.util.find_spec("peft") is not None else {}
    for name, options in kinds.items():
        run, module = place.with_name(name), fedtune.build_classifier(str(place / "model"), 3, learning_rate=5e-3, **options)
        data = data_maker(str(place / "model"), make_task(6))()
        make_loop(max_rounds=3, run_dir=str(run), keep=2).fit(module, data)
        frozen = {f"network.{key}": tensor for key, tensor in module.network.state_dict().items()}
        rounds = {number: checkpoint.load(run / "checkpoints" / f"round-000{number}").weights for number in (2, 3)}
        found[name] = {number: frozen | weights for number, weights in rounds.items()}
        if name == "adapted":
            found[name] = {number: whole(module, weights) for number, weights in rounds.items()}
        save_file(rounds[2], run / "best.safetensors", metadata={"round": "2", "monitor": "accuracy", "value": "0.5"})
    shutil.copytree(place / "model", place.with_name("model"))
    shutil.copy(place.with_name("model") / "model.safetensors", place.with_name("elsewhere.safetensors"))
    return found


def whole(module: Any, weights: Weights) -> Weights:
    """What both kinds of export of a run with adapters have: the merged network, and the adapters by their names at peft."""
    module = copy.deepcopy(module)
    assign_(travelling(module), weights)
    adapters = {
        f"base_model.model.{name.removeprefix('network.').replace('.default', '')}": one for name, one in weights.items()
    }
    merge_(module.network)
    return adapters | {f"network.{key}": tensor for key, tensor in module.network.state_dict().items()}


DESTINATIONS: dict[str, Callable[[Path], Any]] = {
    "out": lambda path: None,
    "deep/er/out": lambda path: None,
    "empty": lambda path: path.mkdir(),
    "full": lambda path: (path.mkdir(), (path / "mine").write_text("mine")),
    "file": lambda path: path.write_text("mine"),
    "file/below": lambda path: path.parent.write_text("mine"),
    "link": lambda path: (path.with_name("target").mkdir(), path.symlink_to("target")),
    "link-to-full": lambda path: (path.with_name("t").mkdir(), (path.parent / "t" / "x").touch(), path.symlink_to("t")),
    "link-to-file": lambda path: (path.with_name("t").write_text("mine"), path.symlink_to("t")),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to("loop"),
    "loop/below": lambda path: path.parent.symlink_to("loop"),
    "fifo": lambda path: os.mkfifo(path),
    "fifo/below": lambda path: os.mkfifo(path.parent),
    "run": lambda path: None,
    "run/out": lambda path: None,
    "run/checkpoints/round-0009": lambda path: None,
    "run/start/round-0000": lambda path: None,
    "model": lambda path: None,
    "model/out": lambda path: None,
    "x" * 255: lambda path: None,
    "x" * 240: lambda path: None,
    "x" * 5000: lambda path: None,
    "/".join(["x" * 100] * 45): lambda path: None,
    "a\nb": lambda path: None,
    "a\x1b[31mb": lambda path: None,
    "\udcff": lambda path: None,
    "a\0b": lambda path: None,
    ".": lambda path: None,
    "..": lambda path: None,
    "out/..": lambda path: None,
    "out/../other": lambda path: None,
    " ": lambda path: None,
}
WHOLE = ("", "~", "~/out", "~nobody-here/out", "/", "/dev/null", "/proc/out", "/dev/full/out", "-", "out")
FLAGS = [
    *(["--which=best"], ["--which=best"], ["--which", "last"], ["--which="], ["--which"], ["--which=[last]"], ["--which=null"]),
    *(
        ["--label_names=[a, b, c]"],
        ["--label_names=a"],
        ["--label_names=null"],
        ["--label_names=[[]]"],
        ["--label_names=[a, a]"],
    ),
    *(["--label_names=['label 0', 'label 1', 'label 2']"], ["--label_names={}"], ["--which=best", "--which=last"], ["third"]),
    *(["--merge"], ["--merge"], ["--merge"], ["--merge=true"], ["--merge", "true"]),
    *(["--none"], ["--which=" + "x" * 5000], ["--which=\udcff"], ["--config=x"], ["--label_names+=x"], ["--folder=x"], [""]),
]


def tree(folder: Path) -> dict[str, str]:
    """What lies below a folder, but for empty folders."""
    found = {}
    for path, _, files in os.walk(folder):
        for name in files:
            file = Path(path, name)
            kind = (
                os.readlink(file)
                if file.is_symlink()
                else hashlib.sha256(file.read_bytes()).hexdigest()
                if file.is_file()
                else "?"
            )
            found[str(file.relative_to(folder))] = kind
    return found


def case(number: int, good: dict[str, Any], place: Path, patch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Do one; what there was, and "0", "2" or what is wrong."""
    rng = random.Random(f"export/{number}")
    shutil.rmtree(place, ignore_errors=True)
    (place / "home").mkdir(parents=True)
    patch.setenv("HOME", str(place / "home"))
    patch.chdir(place)
    victim, kind = place / "victim", rng.choice(sorted(good))
    victim.write_text("echo hello\n")
    shutil.copytree(place.with_name(kind), place / "run")
    shutil.copytree(place.with_name("model"), place / "model")
    shutil.copy(place.with_name("elsewhere.safetensors"), place)
    happened = [damage(rng, place / "run", victim)] if rng.random() < 0.5 else []
    happened += [f"model: {accident(rng, place / 'model', victim)}"] if rng.random() < 0.3 else []
    target, words = str(place / "out"), []
    if rng.random() < 0.5:
        target = rng.choice([*DESTINATIONS, *WHOLE])
        if target in DESTINATIONS:
            with contextlib.suppress(FileExistsError):
                DESTINATIONS[target](place / target)
            target = rng.choice([target, str(place / target)])
    if rng.random() < 0.5:
        words = [word for _ in range(rng.choice([1, 1, 2])) for word in rng.choice(FLAGS)]
    run = (
        rng.choice(["run", "none", "", "victim", "~", "run/checkpoints", "/dev/zero", "x" * 5000])
        if rng.random() < 0.1
        else "run"
    )
    what = f"{kind} {happened} {run[:40]!r} {target[:60]!r} {str(words)[:60]}"
    before = tree(place)
    found = outcome("export", run, target, *words)
    after = tree(place)
    folder = Path(os.path.expanduser(target)) if found == "0" else None
    new = sorted(name for name in after.keys() | before.keys() if before.get(name) != after.get(name))
    if folder is None:
        return what, found if not new else f"{found}, and left {new[:3]}"
    inside = os.path.relpath(folder.resolve(), place.resolve())
    if any(not name.startswith(f"{inside}/") and inside != "." for name in new):
        return what, f"wrote {new[:3]} beside {inside}"
    return what, wrong(folder.resolve(), good[kind], words) or found


def wrong(folder: Path, rounds: dict[int, Weights], words: list[str]) -> str:
    """What is not as the run has it; nothing where all is."""
    adapters = (folder / "adapter_config.json").exists()
    with quiet():
        network = transformers.AutoModelForSequenceClassification.from_pretrained("model" if adapters else folder, num_labels=3)
        own = transformers.AutoTokenizer.from_pretrained(folder)("word1 word9", max_length=8, truncation=True)["input_ids"]
        theirs = transformers.AutoTokenizer.from_pretrained("model")("word1 word9", max_length=8, truncation=True)["input_ids"]
    said = re.search(r"after round (\d+), the (last|best) one", (folder / "README.md").read_text())
    if said is None or (said[2] == "last" and said[1] != "3"):
        return f"a card that says {said and said[0]!r}"
    expected = rounds.get(int(said[1]))
    if expected is None:
        return f"round {said[1]}"
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    if adapters:
        from peft import PeftModel

        PeftModel.from_pretrained(network, folder)
        state = load_file(folder / "adapter_model.safetensors")
    expected = {name: tensor for name, tensor in expected.items() if name.startswith("base_model.") == adapters}
    if adapters and "--merge" in words:
        return "adapters in place of a merged model"
    if state.keys() != expected.keys() or not all(torch.equal(state[name], expected[name]) for name in state):
        return "other weights than those of the run"
    if not adapters and network.config.id2label != {number: f"label {number}" for number in range(3)}:
        return f"labels {network.config.id2label}"
    return "" if own == theirs else "another tokenizer"


@pytest.mark.filterwarnings("ignore")
def test_an_export_has_the_weights_of_the_run_or_leaves_nothing(
    good: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: collections.Counter[str] = collections.Counter()
    for number in range(FIRST, FIRST + share(0.04)):
        what, kind = case(number, good, place, monkeypatch)
        found[kind] += 1
        if kind not in ("0", "2"):
            print(number, what.encode("utf-8", "replace").decode(), "=>", kind.encode("utf-8", "replace").decode())
    print(found)
    assert set(found) <= {"0", "2"}, found
    assert found["0"] > 0
    assert found["2"] > 0


ITS_OWN = ("links/tables.md",)  # what a report replaces
REPORT = [
    *(
        ["--out=out"],
        ["--out", "deep/er/out"],
        ["--out="],
        ["--out"],
        ["--out=null"],
        ["--out=~"],
        ["--out=~nobody-here"],
        ["--out=."],
    ),
    *(
        ["--out=" + "x" * 5000],
        ["--out=a\0b"],
        ["--out=\udcff"],
        ["--out=a\nb"],
        ["--out=[]"],
        ["--out=/dev/null"],
        ["--out=/proc/x"],
    ),
    *(
        ["--out=victim"],
        ["--out=victim/x"],
        ["--out=loop"],
        ["--out=loop/x"],
        ["--out=fifo"],
        ["--out=dangling"],
        ["--out=runs/a"],
    ),
    *(["--out=runs/a/rounds.jsonl"], ["--out=one", "--out=two"], ["--None"], ["--config=x"], ["more"], ["--runs_dir=x"]),
    *(["--out=taken"], ["--out=links"], ["--ou=x"], ["-o", "x"], ["--out=1e5"], ["--out={a: 1}"], ["--out=$HOME"], ["--"]),
]
FOLDERS = [
    "runs",
    "runs",
    "runs",
    "runs",
    "runs/a",
    "",
    "none",
    "victim",
    "~",
    "~nobody-here",
    "/dev/zero",
    "fifo",
    "loop",
    "dangling",
]
FOLDERS += ["x" * 5000, "a\0b", "\udcff", "home", ".", "runs/a/checkpoints", "runs/a/rounds.jsonl", "links", "[runs]", "null"]


@pytest.mark.filterwarnings("ignore")
def test_a_report_with_odd_flags_is_written_where_it_was_asked_for_or_refused(
    good: dict[str, Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: collections.Counter[str] = collections.Counter()
    monkeypatch.setattr("fedtune.reports.report.plot_grid", lambda rounds, path, also: [path] * path.write_text("x"))
    for number in range(FIRST, FIRST + share(0.02)):
        what, kind = report_case(random.Random(f"report/{number}"), place, monkeypatch)
        found[kind] += 1
        if kind not in ("0", "2"):
            print(number, what.encode("utf-8", "replace").decode(), "=>", kind.encode("utf-8", "replace").decode())
    print(found)
    assert set(found) <= {"0", "2"}, found
    assert found["2"] > 0


def report_case(rng: random.Random, place: Path, patch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Do one; the words, and "0", "2" or what is wrong."""
    shutil.rmtree(place, ignore_errors=True)
    (place / "home").mkdir(parents=True)
    patch.setenv("HOME", str(place / "home"))
    patch.chdir(place)
    shutil.copytree(place.with_name("plain"), place / "runs" / "a")
    shutil.copytree(place.with_name("frozen"), place / "runs" / "b")
    (place / "victim").write_text("mine")
    (place / "loop").symlink_to("loop")
    (place / "dangling").symlink_to("nowhere")
    os.mkfifo(place / "fifo")
    for name in ("taken", "links"):
        (place / name).mkdir()
    (place / "taken" / "report.html").mkdir()
    (place / "links" / "tables.md").symlink_to("../victim")
    before = tree(place)
    words = [rng.choice(FOLDERS), *(word for _ in range(rng.choice([0, 1, 1, 1, 2])) for word in rng.choice(REPORT))]
    kind = outcome("report", *words)
    after = tree(place)
    changed = sorted(name for name in before if after.get(name) != before[name] and not name.startswith(ITS_OWN))
    new = sorted({os.path.dirname(name) for name in after.keys() - before.keys()})
    if changed:
        kind = f"{kind}, and changed {changed[:3]}"
    elif kind == "0" and len(new) > 1:
        kind = f"written to {new[:3]}"
    elif kind == "0" and {"tables.md", "report.html"} - {os.path.basename(name) for name in after}:
        kind = "no report"
    return str(words)[:200], kind
