"""One file of a finished run, or of a folder of runs, damaged: right results or one line; never a hang or a loss."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FIRST, SLOWEST, share
from conftest import Noted, make_loop, weights_of, without_times
from test_lightning import Data, Net, Three

from fedtune.errors import RunError, UsageError
from fedtune.reports.report import FILES, report

pytestmark = pytest.mark.usefixtures("pictures")
OTHERS = [
    "",
    "[]",
    "5",
    "null",
    "{}",
    "true",
    '"text"',
    "{",
    "a: [1",
    "- 1\n",
    "\x00",
    '{"a": {"b": 1}}',
    "[" * 50_000,
    "a: &a [*a]",
]
OTHERS += [
    "1" * 6000,
    '{"round": "1"}',
    "x: !!python/object:os.system {}",
    "\ufeff{}",
    "NaN",
    '{"state": "finished"}',
    '{"error": 3}',
]


class Frozen(Net):
    """A linear classifier with something that does not travel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(2), requires_grad=False)


class WithTest(Three):
    """Three clients, pooled data and a test part."""

    def train_dataloader(self) -> Any:
        return Data().train_dataloader()

    def test_dataloader(self) -> Any:
        return Data().val_dataloader()


def resume(folder: Path, rounds: int = 4) -> tuple[Any, ...]:
    """What a run comes down to: weights, records, baselines, what a callback knows."""
    noted, module = Noted(), Frozen()
    names = ("centralised", "local")
    loop = make_loop(max_rounds=rounds, run_dir=str(folder), baselines=names, callbacks=[noted], algorithm="fedavgm")
    loop.fit(module, WithTest())
    local = [{key: value for key, value in one.items() if key != "seconds"} for one in loop.baseline_runs["local"]]
    weights = {name: value.tolist() for name, value in weights_of(module).items()}
    return weights, without_times(loop.history), without_times(loop.baseline_runs["centralised"]), local, noted.count


@contextlib.contextmanager
def bounded(seconds: int = round(SLOWEST)) -> Iterator[None]:
    """Inside the block too long a time is an error."""

    def late(*_: Any) -> None:
        raise AssertionError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def flipped(rng: random.Random, content: bytes) -> bytes:
    found = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 5, 50]) if found else 0):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def bind(path: Path) -> None:
    """A socket in place of a file; its whole path may be too long for one."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


def swapped(rng: random.Random, path: Path) -> None:
    """A file with the content of one of its neighbours."""
    near = sorted(one for one in path.parent.iterdir() if one.is_file())
    path.write_bytes(rng.choice(near).read_bytes())


WAYS: dict[str, Callable[[random.Random, Path, Path], Any]] = {
    "truncate": lambda rng, path, _: path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size + 1)]),
    "flip": lambda rng, path, _: path.write_bytes(flipped(rng, path.read_bytes())),
    "replace": lambda rng, path, _: path.write_text(rng.choice(OTHERS)),
    "append": lambda rng, path, _: path.write_bytes(path.read_bytes() + rng.choice(OTHERS).encode() + b"\n"),
    "swap": lambda rng, path, _: swapped(rng, path),
    "delete": lambda rng, path, _: gone(path),
    "directory": lambda rng, path, _: (gone(path), path.mkdir()),
    "link": lambda rng, path, victim: (gone(path), path.symlink_to(victim)),
    "dangling": lambda rng, path, victim: (gone(path), path.symlink_to(victim.with_name("new"))),
    "loop": lambda rng, path, _: (gone(path), path.symlink_to(path.name)),
    "fifo": lambda rng, path, _: (gone(path), os.mkfifo(path)),
    "socket": lambda rng, path, _: (gone(path), bind(path)),
    "device": lambda rng, path, _: (
        gone(path),
        path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/full", "/dev/tty"])),
    ),
    "unreadable": lambda rng, path, _: path.chmod(0),
}
FOLDERS = ("delete", "link", "dangling", "loop", "fifo", "socket", "unreadable")  # ways for a folder
ADDED = (".lock", ".lock.owner", "wandb_id", "status.json", "log.txt", "curves.svg", "tables.csv", "tables.md", "report.html")
NEW = ("replace", "directory", "link", "dangling", "loop", "fifo", "socket", "device")  # ways for a name that is not there yet


def damage(rng: random.Random, folder: Path, victim: Path) -> str:
    """Damage one file or folder; say which and how."""
    below = sorted(folder.rglob("*"))
    path = rng.choice([*below, *below, *(folder / name for name in ADDED)])
    ways = FOLDERS if path.is_dir() else tuple(WAYS) if path.exists() else NEW
    way = rng.choice(ways)
    if way == "append" and path.name == "rounds.jsonl" and rng.random() < 0.5:
        path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[-1])
    else:
        WAYS[way](rng, path, victim)
    return f"{way} {path.relative_to(folder)}"


def records(folder: Path) -> dict[str, bytes]:
    """Every rounds.jsonl that can be read."""
    found = {}
    for file in folder.rglob("rounds.jsonl"):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(file.lstat().st_mode):
                found[str(file)] = file.read_bytes()
    return found


def lost(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """The files that lack a whole, good line that they had; one that a run has without a checkpoint is done again."""
    gone = []
    for name, content in before.items():
        if "baselines" in name:
            continue  # these are made again
        had, has = parsed(content), parsed(after.get(name, b""))
        records = [one for one in had if type(one.get("round")) is int and one["round"] != 4]
        if not all(any(same(one, other) for other in has) for one in records):
            gone.append(name)
    return gone


def parsed(content: bytes) -> list[dict[str, Any]]:
    found = []
    for line in content.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            one = json.loads(line)
            found += [one] if isinstance(one, dict) else []
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.get("round") == other.get("round") and one.get("train_loss_nats") == other.get("train_loss_nats")


def resumed(number: int, folder: Path) -> Any:
    """A finished run, and one that goes on: in the first the baselines are read, in the second they are of another length."""
    return resume(folder, 3 + number % 2)


def reported(number: int, folder: Path) -> Any:
    """A report; one run is damaged, so the others make one, or a file of the report itself cannot be written."""
    try:
        report(folder, folder)
    except (UsageError, RunError) as error:
        if not any(name in str(error) for name in FILES):
            raise AssertionError(f"no report: {error}") from error
        raise


def case(
    number: int,
    good: Path,
    place: Path,
    act: Callable[[int, Path], Any],
    expected: Any = None,
    harm: Callable[[random.Random, Path, Path], str] = damage,
) -> tuple[str, str | None]:
    """Do one; what was damaged, and what is wrong with the outcome."""
    rng = random.Random(number)
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    victim, folder = place / "victim", place / "here"
    victim.write_text("echo hello\n")
    shutil.copytree(good, folder)
    what = harm(rng, folder, victim)
    before = records(folder)
    try:
        with bounded(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = act(number, folder)
        if any("callbacks.jsonl is missing" in str(one.message) for one in caught):
            found = (*found[:-1], expected[number % 2][-1])  # that they know nothing was said
        wrong = None if expected is None or found == expected[number % 2] else "other results, in silence"
    except (UsageError, RunError) as error:
        wrong = None if "\n" not in str(error) and len(str(error)) < 1500 else f"not one line: {str(error)[:300]!r}"
    except BaseException as error:  # whatever it is, it is wrong
        if isinstance(error, KeyboardInterrupt):
            raise
        wrong = f"{type(error).__name__}: {str(error)[:300]}"
    if victim.read_text() != "echo hello\n" or victim.with_name("new").exists():
        wrong = f"written through a link; {wrong}"
    if lost(before, records(folder)):
        wrong = f"records lost; {wrong}"
    return what, wrong


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    resume(folder, 3)
    return folder


def undamaged(run: Path, place: Path) -> list[Any]:
    """What `resumed` ends with."""
    found = []
    for number in range(2):
        shutil.copytree(run, place / f"good-{number}")
        found.append(resumed(number, place / f"good-{number}"))
    return found


def three_runs(run: Path, folder: Path) -> Path:
    for name in ("a", "b", "c"):
        shutil.copytree(run, folder / name)
    (folder / "b" / "status.json").write_text(json.dumps({"state": "finished", "metrics": {"accuracy": 0.5}, "seconds": 1.0}))
    (folder / "d").mkdir()
    (folder / "d" / "status.json").write_text(json.dumps({"state": "failed", "error": "no room"}))
    return folder


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_run_goes_on_rightly_or_says_what_to_do(finished: Path, tmp_path: Path) -> None:
    expected = undamaged(finished, tmp_path)
    bad = {}
    for number in range(FIRST, FIRST + share(0.06)):
        what, wrong = case(number, finished, tmp_path / "case", resumed, expected)
        if wrong:
            bad[f"{number}: {what}"] = wrong
    assert not bad


@pytest.mark.filterwarnings("ignore")
def test_a_report_over_a_damaged_folder_leaves_out_what_it_names(finished: Path, tmp_path: Path) -> None:
    good = three_runs(finished, tmp_path / "good")
    bad = {}
    for number in range(FIRST, FIRST + share(0.02)):
        what, wrong = case(number, good, tmp_path / "case", reported)
        if wrong:
            bad[f"{number}: {what}"] = wrong
    assert not bad
