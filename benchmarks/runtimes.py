"""Question: one configuration by one process, by two ranks of torchrun, by Flower with two sites: are the weights the same, and
what does each take?

`experiments/flower/config.yaml` (MiniLM on the embedded authors, two clients), one thread a process, the ways one after the
other. Seconds: of the whole command, and of a round, from the run's records, the first left out. Memory: the most that any
process held, and all of them together (what they share counted once), looked at ten times a second.
Run it from the project's folder: .venv/bin/python benchmarks/runtimes.py
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from machine import about, write

HERE = Path(__file__).resolve().parent.parent
APP = HERE / "experiments" / "flower"
sys.path.insert(0, str(HERE / "tests"))
from federation import BIN, Federation, federation  # noqa: E402 - the tests' folder is no package

sys.modules["federation"].PATIENCE = 900  # type: ignore[attr-defined]  # seconds, also on a busy machine
LOOK = 0.1  # seconds
MARK = "FEDTUNE_BENCHMARK"  # in the environment of all processes that belong to a way


class Memory:
    """What processes with a mark in their environment hold."""

    def __init__(self, mark: str) -> None:
        self._mark, self._known = mark, dict[int, bool]()
        self.largest, self.together, self.processes = 0.0, 0.0, 0

    def look(self) -> None:
        private = shared = count = 0
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if one.pid not in self._known:
                    self._known[one.pid] = one.environ().get(MARK) == self._mark
                if self._known[one.pid]:
                    found = one.memory_info()
                    private, shared, count = private + found.rss - found.shared, max(shared, found.shared), count + 1
                    self.largest = max(self.largest, found.rss / 1e6)
        self.together, self.processes = max(self.together, (private + shared) / 1e6), max(self.processes, count)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(LOOK):
                self.look()

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def started(*command: str) -> Callable[[Path], None]:
    """A way that is one command."""

    def way(run_dir: Path) -> None:
        flags = ["--config", str(APP / "config.yaml"), "--run_dir", str(run_dir), "--loop.options.progress", "false"]
        subprocess.run([*command, "run", *flags], check=True, capture_output=True)

    return way


def by_flower(sites: Federation, app: Path) -> Callable[[Path], None]:
    """A way: the sites are there already, as they are in a federation."""

    def way(run_dir: Path) -> None:
        said = sites.run(app, f'run-dir="{run_dir}"')
        if not (run_dir / "summary.json").exists():
            raise SystemExit(said)

    return way


def measured(way: Callable[[Path], None], run_dir: Path, memory: Memory) -> dict[str, Any]:
    start = time.perf_counter()
    with memory.watching():
        way(run_dir)
    seconds = time.perf_counter() - start
    records = [json.loads(line) for line in (run_dir / "rounds.jsonl").read_text().splitlines()]
    parts = ("train", "aggregate", "evaluate")
    newest = max((run_dir / "checkpoints").iterdir())
    return {
        "weights": json.loads((newest / "state.json").read_text())["sha256"]["weights"],
        "seconds": seconds,
        **{f"seconds_{part}": statistics.median(record[f"seconds_{part}"] for record in records[1:]) for part in parts},
        "memory_of_largest_mb": memory.largest,
        "memory_mb": memory.together,
        "processes": memory.processes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--name", default="runtimes", help="of the file of results; - writes none")
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    raw: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ[MARK] = "flower"
        app = Path(shutil.copytree(APP, folder / "app"))
        with federation(folder / "flower") as sites:
            sites.link()
            sites.node(0)
            sites.node(1)
            torchrun = [str(BIN / "torchrun"), "--nproc-per-node", "2", "-m", "fedtune"]
            ways = {
                "one process": started(sys.executable, "-m", "fedtune"),
                "torchrun, two ranks": started(*torchrun),
                "Flower, two sites": by_flower(sites, app),
            }
            for repeat in range(given.repeats + 1):  # the first one tokenises and compiles, and is not counted
                for name, way in ways.items():
                    os.environ[MARK] = "flower" if "Flower" in name else name
                    found = measured(way, folder / f"{name}-{repeat}", Memory(os.environ[MARK]))
                    if repeat:
                        raw.setdefault(name, []).append(found)
                        print(f"{name:20} {found['seconds']:6.1f} s {found['memory_mb']:6.0f} MB", flush=True)
    _table(raw)
    same = len({one["weights"] for found in raw.values() for one in found}) == 1
    print("the same weights" if same else "DIFFERENT weights")
    if given.name != "-":
        write(given.name, about() | {"settings": {"repeats": given.repeats}, "same bits": same, "raw": raw})
    raise SystemExit(not same)


def _table(raw: dict[str, list[dict[str, Any]]]) -> None:
    columns = [name for name in next(iter(raw.values()))[0] if name != "weights"]
    print(f"{'':20}", *(f"{name.removeprefix('seconds_'):>20}" for name in columns), "weights")
    for name, found in raw.items():
        middle = [statistics.median(one[column] for one in found) for column in columns]
        print(f"{name:20}", *(f"{one:20.1f}" for one in middle), found[0]["weights"][:8])


if __name__ == "__main__":
    main()
