"""Where what takes long to make is kept between runs: tokenised texts, converted models."""

from __future__ import annotations

import os
from pathlib import Path

from fedtune.errors import RunError
from fedtune.files import said


def cache_folder() -> Path:
    """FEDTUNE_CACHE, else `fedtune` in XDG_CACHE_HOME, else in ~/.cache. An empty variable is none, ~ is the home directory.

    Raises:
        RunError: nobody knows where that is.
    """
    own, general = os.environ.get("FEDTUNE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(own).expanduser() if own else Path(general or "~/.cache").expanduser() / "fedtune"
    except RuntimeError as error:
        raise RunError(f"there is no home directory ({said(error)}); FEDTUNE_CACHE names a folder") from error
