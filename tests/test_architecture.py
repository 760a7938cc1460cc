"""What docs/architecture.md says of a round, counted by following one."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import make_loop

import fedtune

Make = Callable[..., Any]
SOURCE = Path(fedtune.__file__).parent
TEXT = (SOURCE.parent.parent / "docs" / "architecture.md").read_text()


class Tracer(fedtune.FederatedCallback):
    """The functions of fedtune that the second round enters, by file."""

    def __init__(self) -> None:
        self.entered: dict[str, set[str]] = defaultdict(set)

    def on_round_start(self, run: Any, module: Any, number: int) -> None:
        if number == 2:
            sys.setprofile(self._enter)

    def on_round_end(self, run: Any, module: Any, record: Any) -> None:
        sys.setprofile(None)

    def _enter(self, frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(SOURCE)) and not code.co_name.startswith("<"):
            self.entered[str(Path(code.co_filename).relative_to(SOURCE).with_suffix(""))].add(code.co_qualname)


def listed(title: str) -> set[str]:
    """The files that the page names in a row of its table of a round."""
    (row,) = re.findall(rf"^\| {re.escape(title)} \|(.*)\|$", TEXT, flags=re.M)
    return set(re.findall(r"`([\w/]+)`", row))


def test_a_round_enters_the_files_that_the_page_names_and_no_others(make_data: Make, make_module: Make, tmp_path: Path) -> None:
    tracer = Tracer()
    make_loop(max_rounds=2, run_dir=str(tmp_path), callbacks=[tracer]).fit(make_module(), make_data())
    entered = {name for name in tracer.entered if name.split("/")[0] not in ("models", "data")}
    rows = [listed(title) for title in ("the way of an update", "what helps on it", "evaluated, recorded, kept, shown")]
    assert set().union(*rows) == entered
    assert sum(map(len, rows)) == len(entered)
    counted = sum(len(tracer.entered[name]) for name in entered)
    (files, functions) = map(int, re.findall(r"(\d+) files and (\d+) functions", TEXT)[0])
    assert files == len(entered)
    assert functions == counted
