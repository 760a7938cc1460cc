"""Question: does a run, or a sweep, that is killed at any moment end with the bits of one that was left alone?

Real processes are killed at moments drawn uniformly over their length (kill -9, some SIGTERM and SIGINT) and started again with
the same command until they end; a start after a kill may be killed, too. Runs with baselines, runs whose clients remember, runs
of three processes (`--workers 3`), and sweeps with two workers take turns; of a sweep the runner, a worker, or all its
processes are killed, of a run of three processes one of them, or the command that has started them. Then every file is compared
with that of an undisturbed one (times, logs and versions aside), and there must be no other file.
Run it from the project's folder: .venv/bin/python benchmarks/kills.py
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import yaml
from machine import about, write

import fedtune
from fedtune.federated.client import Client, ClientUpdate
from fedtune.tensors import Groups

PROCESSES = multiprocessing.get_context("forkserver")  # children are forked from a server that has done the imports
IMPORTS = ["fedtune.cli", "fedtune.runs.loop", "fedtune.sweeps.runner", "fedtune.data.classification", "fedtune.models"]
IMPORTS += ["transformers.models.bert.modeling_bert", "matplotlib.pyplot", "machine"]
SIGNALS = {signal.SIGKILL: 0.7, signal.SIGTERM: 0.15, signal.SIGINT: 0.15}
AGAIN = 0.8  # share of the starts after a kill that are killed, too
LONGEST = 60.0  # seconds of a start
ASIDE = re.compile(r"(.*/)?(\.lock|\.lock\.owner|log\.txt|curves\.png)")  # may be there, and say nothing of the result
FREE = {"seconds", "seconds_train", "seconds_evaluate", "seconds_aggregate", "peak_memory_bytes", "versions"}


@dataclass(frozen=True)
class Remembering(ClientUpdate):
    """Local training, and a step that grows with the rounds that the client remembers."""

    def __call__(self, client: Client) -> Groups:
        client.train()
        update = client.update()
        rounds = client.memory.setdefault("rounds", {"done": torch.zeros(1000)})["done"]
        for tensor in update.values():
            tensor.add_(1e-3 * rounds.mean())
        rounds.add_(1)
        return {"update": update}


def command_line(arguments: list[str], log: Path, server: str) -> None:
    """What a child does: the command, its workers forked from the same server."""
    from fedtune.cli import main

    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115 - it is the child's output to its end
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)  # that of its own processes, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["FEDTUNE_CACHE"] = str(log.parent / "cache")
    torch.set_num_threads(1)
    fedtune.ALGORITHM_PARTS["Remembering"] = Remembering
    forkserver._forkserver._forkserver_address = server  # type: ignore[attr-defined]
    forkserver.ensure_running = lambda: None
    forkserver._forkserver.ensure_running = lambda: None  # type: ignore[attr-defined]
    main(arguments)


@dataclass
class Kind:
    """A command, and what came of it.

    Args:
        arguments: of the command that works in a folder.
        victims: the processes that a kill takes, of a process and the folder in which it works.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    victims: Callable[[random.Random, int, Path], list[int]]
    seconds: float = 0.0
    expected: dict[str, Any] = field(default_factory=dict)
    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    cases: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def files(folder: Path) -> dict[str, Any]:
    """What lies in a folder, by name, without times; of JSON what it says, of others their bytes."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_file() and not ASIDE.fullmatch(name):
            found[name] = without_times(name, path.read_bytes(), str(folder))
    return found


def without_times(name: str, content: bytes, folder: str) -> Any:
    content = content.replace(folder.encode(), b"FOLDER")
    if name.endswith("callbacks.jsonl"):  # a start after a kill says nothing of rounds that nobody will ask for
        return timeless(json.loads(content.splitlines()[-1]))
    if name.endswith(".jsonl"):
        return [timeless(json.loads(line)) for line in content.splitlines()]
    if name.endswith(".json"):
        return timeless(json.loads(content))
    return timeless(yaml.safe_load(content)) if name.endswith(".yaml") else content


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: timeless(one) for key, one in value.items() if key not in FREE}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def differences(found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """The first files that are missing, too many or other ones."""
    bad = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    bad += [f"{name} is left" for name in sorted(found.keys() - expected.keys())]
    bad += [f"{name} differs" for name in sorted(found.keys() & expected.keys()) if found[name] != expected[name]]
    return "; ".join(bad[:4]) + (f"; {len(bad)} in all" if len(bad) > 4 else "") if bad else None


def start(kind: Kind, place: Path) -> multiprocessing.process.BaseProcess:
    server = forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]
    process = PROCESSES.Process(target=command_line, args=(kind.arguments(place / "here"), place / "log", server))
    process.start()
    return process


# Ctrl-C while Python clears a weak reference: Python says so and goes on, and so does the run
SWALLOWED = re.compile(r"Exception ignored in: .*?\nKeyboardInterrupt: *\n", re.DOTALL)


def case(kind: Kind, rng: random.Random, place: Path) -> None:
    """One command, killed once or more and started again until it ends."""
    began, killed, code = time.monotonic(), 0, None
    for number in range(20):
        process = start(kind, place)
        if number == 0 or (killed < 6 and rng.random() < AGAIN):
            process.join(rng.random() * kind.seconds)
            killed += kill(kind, rng, process, place / "here")
        process.join(LONGEST)
        code = process.exitcode
        if code in (0, None):
            break
    said = (place / "log").read_text()
    wrong = None
    if code != 0:
        wrong = "does not end" if code is None else f"ends with exit code {code}"
        process.kill()
    elif "Traceback" in SWALLOWED.sub("", said) or "DAMAGED" in said:
        wrong = "a traceback, or a damaged file"
    wrong = wrong or differences(files(place / "here"), kind.expected)
    kind.cases.append(time.monotonic() - began)
    if wrong:
        kind.wrong.append(wrong)
        print(f"{kind.name}: {wrong} ({place})\n{said[-1500:]}")
    else:
        shutil.rmtree(place)


def kill(kind: Kind, rng: random.Random, process: multiprocessing.process.BaseProcess, folder: Path) -> bool:
    """Kill what a kind says, if the command has not ended yet."""
    if not process.is_alive() or process.pid is None:
        return False
    (sent,) = rng.choices(list(SIGNALS), list(SIGNALS.values()))
    victims = kind.victims(rng, process.pid, folder)
    for victim in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, sent if victim == process.pid else signal.SIGKILL)
    kind.kills[sent.name if process.pid in victims else "SIGKILL of a worker"] += 1
    return True


def starter_or_rank(rng: random.Random, starter: int, folder: Path) -> list[int]:
    """One of the processes of a run, or the command that has started them."""
    children = Path(f"/proc/{starter}/task/{starter}/children")
    ranks = [int(one) for one in children.read_text().split()] if children.exists() else []
    return [rng.choice(ranks)] if ranks and rng.random() < 0.8 else [starter]


def runner_or_workers(rng: random.Random, runner: int, folder: Path) -> list[int]:
    """The runner of a sweep, one of its workers, or all; workers are processes of our server that have a lock in the folder."""
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    workers = []
    for owner in folder.glob("*/.lock.owner"):
        known = re.match(r"process (\d+) ", owner.read_text())
        with contextlib.suppress(OSError):
            parent = Path(f"/proc/{known.group(1)}/stat").read_text().rpartition(")")[2].split()[1] if known else ""
            workers += [int(known.group(1))] if known and int(parent) == server and int(known.group(1)) != runner else []
    choice = rng.choice(["runner", "worker", "all"])
    if choice == "worker" and workers:
        return [rng.choice(workers)]
    return [runner, *workers] if choice == "all" else [runner]


def kinds(model: str, data: str, sweep: Path) -> Iterator[Kind]:
    """What is killed."""
    values = {"data.task": "csv", "data.task_options": json.dumps({"path": data}), "data.max_length": 16, "data.batch_size": 8}
    values |= {"loop.max_rounds": 3, "loop.local_epochs": 1, "loop.precision": "32-true", "model.name": model}

    def run(**more: Any) -> Callable[[Path], list[str]]:
        flags = values | {"data.num_clients": 4} | {key.replace("__", "."): value for key, value in more.items()}
        return lambda folder: ["run", *(f"--{name}={value}" for name, value in flags.items()), f"--run_dir={folder}"]

    def only(rng: random.Random, process: int, folder: Path) -> list[int]:
        return [process]

    yield Kind("a run with baselines", run(), only)
    remembering = {"loop__algorithm__client": json.dumps({"name": "Remembering"}), "loop__clients_per_round": 3}
    yield Kind("a run with memory of clients", run(loop__baselines="[]", loop__max_rounds=5, **remembering), only)
    yield Kind("a run of three processes", run(workers=3, loop__clients_per_round=3, loop__algorithm="ditto"), starter_or_rank)
    parameters: dict[str, Any] = {name: {"value": value} for name, value in values.items()}
    parameters |= {"data.task_options": {"value": {"path": data}}, "data.num_clients": {"value": 3}}
    parameters["loop.algorithm"] = {"values": ["fedavg", "fedavgm"]}  # they share a baseline
    parameters["loop.baselines"] = {"value": ["centralised"]}
    sweep.write_text(yaml.safe_dump({"method": "grid", "parameters": parameters}))
    yield Kind(
        "a sweep with two workers",
        lambda folder: ["sweep", str(sweep), "--workers=2", f"--runs_dir={folder}"],
        runner_or_workers,
    )


def save_model(folder: Path) -> str:
    """A folder in hub format: one layer, hidden size 16."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(40))]
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)
    transformers.BertModel(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return str(folder)


def save_data(file: Path) -> str:
    rows = (f"{' '.join(f'word{(i * j) % 37}' for j in range(1, 9))} {i},{'abc'[i % 3]}\n" for i in range(72))
    file.write_text("text,label\n" + "".join(rows))
    return str(file)


def undisturbed(kind: Kind, place: Path) -> None:
    """How long the command takes, and what it ends with: twice, as the first start tokenises."""
    for name in ("first", "second"):
        folder, began = place / name, time.monotonic()
        folder.mkdir(parents=True)
        process = start(kind, folder)
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"{kind.name}: {(folder / 'log').read_text()}")
        kind.seconds = time.monotonic() - began
        wrong = differences(files(folder / "here"), kind.expected) if kind.expected else None
        if wrong:
            raise SystemExit(f"{kind.name}: undisturbed, two differ: {wrong}")
        kind.expected = files(folder / "here")
    print(f"{kind.name}: {kind.seconds:.2f} s undisturbed, {len(kind.expected)} files", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many in all")
    parser.add_argument("--only", help="a part of the name of a kind: no others")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="kills", help="of the file of results; - writes none")
    given = parser.parse_args()
    PROCESSES.set_forkserver_preload(IMPORTS)
    rng, began = random.Random(given.seed), time.monotonic()
    with tempfile.TemporaryDirectory(dir=Path.cwd(), ignore_cleanup_errors=True) as name:
        place = Path(name)
        known = list(kinds(save_model(place / "model"), save_data(place / "data.csv"), place / "sweep.yaml"))
        known = [kind for kind in known if given.only is None or given.only in kind.name]
        for number, kind in enumerate(known):
            undisturbed(kind, place / f"calm-{number}")
        number = 0
        while sum(sum(kind.kills.values()) for kind in known) < given.kills:
            folder = place / f"case-{number}"
            folder.mkdir()
            case(known[number % len(known)], rng, folder)
            number += 1
    raw = {}
    print(f"{'':32}{'cases':>6}{'kills':>6}{'wrong':>6}{'s each':>8}")
    for kind in known:
        seconds = statistics.mean(kind.cases)
        print(f"{kind.name:32}{len(kind.cases):6}{sum(kind.kills.values()):6}{len(kind.wrong):6}{seconds:8.2f}")
        raw[kind.name] = {"cases": len(kind.cases), "kills": dict(kind.kills), "wrong": kind.wrong, "seconds a case": seconds}
    if given.name != "-":
        write(given.name, about() | {"seconds": time.monotonic() - began, "raw": raw})
    raise SystemExit(any(kind.wrong for kind in known))


if __name__ == "__main__":
    main()
