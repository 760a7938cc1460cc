"""What a file of results says about how it was made."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fedtune.storage.config import versions


def about() -> dict[str, Any]:
    """Command, date, machine and versions."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    capabilities = {name: value for name, value in torch.cpu.get_capabilities().items() if "bf16" in name or "amx" in name}
    machine = {"processor": _processor(), "threads": torch.get_num_threads(), "gpu": _gpu(), **capabilities}
    return {
        "command": command,
        "date": date.today().isoformat(),
        "machine": machine,
        "versions": versions() | {"git_changes": _changes()},
    }


def write(name: str, result: dict[str, Any]) -> None:
    """Write results/`name`.json."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def _processor() -> str:
    found = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    names = [line.partition(":")[2].strip() for line in found.splitlines() if line.startswith("Model name")]
    return names[0] if names else platform.processor()


def _changes() -> list[str]:
    """Files that differ from the commit, results aside."""
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!*/results/*"]
    found = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False).stdout
    return [line[3:] for line in found.splitlines()]


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
