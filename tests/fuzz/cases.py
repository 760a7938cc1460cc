"""What all of the fuzz suite uses: how many cases a test tries, and the rule that a command keeps.

FEDTUNE_FUZZ is the number of cases of the whole suite, FEDTUNE_FUZZ_SEED the number of the first one in each test.
"""

from __future__ import annotations

import collections
import contextlib
import io
import os
import random
import re
import signal
import traceback
from collections.abc import Callable
from typing import Any

from fedtune import cli

TOTAL = int(os.environ.get("FEDTUNE_FUZZ", "250"))
FIRST = int(os.environ.get("FEDTUNE_FUZZ_SEED", "0"))
SLOWEST, LONGEST = 20.0, 700  # seconds; characters of the line


def share(part: float) -> int:
    """The number of cases of a test that has this part of the whole suite."""
    return max(5, round(TOTAL * part))  # fewer may all be refused


class Hang(BaseException):
    pass


def _hang(*_: Any) -> None:
    raise Hang


def outcome(*words: str) -> str:
    """What a command did: "0", "2", or what it should not have done."""
    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, SLOWEST)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(words)
        code: Any = 0
    except SystemExit as stop:
        code = stop.code or 0
    except Hang:
        return "hang"
    except BaseException as error:
        return "traceback: " + traceback.format_exception_only(error)[-1][:200] + _place(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    said = err.getvalue()
    if code == 2 and not (said.startswith("fedtune: ") and said.count("\n") == 1 and len(said) <= LONGEST):
        return f"wrong line: {said[:300]!r}"
    if code == 2 and re.search(r"<class '|Traceback|NoneType", said):
        return f"unclear line: {said[:300]!r}"
    return str(code) if code in (0, 2) else f"exit code {code}"


def _place(error: BaseException) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f" at {last.filename.rpartition('/')[2]}:{last.lineno}"


def tried(many: int, words: Callable[[random.Random], list[str]], seed: int) -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for number in range(FIRST, FIRST + many):
        given_words = words(random.Random(f"{seed}/{number}"))
        kind = outcome(*given_words)
        found[kind] += 1
        if kind not in ("0", "2"):
            print(number, [word[:200] for word in given_words], kind)
    print(found)
    return found


def assert_good(found: collections.Counter[str]) -> None:
    assert set(found) <= {"0", "2"}, found
    assert found["2"] > 0
