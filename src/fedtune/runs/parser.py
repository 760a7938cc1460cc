"""Flags whose every error is one line."""

from __future__ import annotations

import difflib
import re
import sys
from typing import NoReturn

from jsonargparse import ArgumentParser


class Parser(ArgumentParser):
    """A parser whose every error is one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the message, as one line."""
        text = " ".join(message.split())
        unknown = re.match(r"[Uu]nrecognized arguments: (--\S+)", text)
        if unknown:
            came = unknown.group(1).split("=")[0]
            near = difflib.get_close_matches(came, [flag for action in self._actions for flag in action.option_strings], n=3)
            text = f"{came}: no such flag; nearest: {', '.join(near) or 'none, see --help'}"
        text = re.sub(r'^Parser key "([^"]+)":', r"--\1:", text)
        text = re.sub(r"Expected an? <class '(\w+)'>\.? Got value: (\S+)", r"got '\2'; allowed: \1", text)
        print(f"fedtune: {text}", file=sys.stderr)
        raise SystemExit(2)
