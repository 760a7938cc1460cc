"""What `make docs` adds to the pages of this folder: reports of experiments, an API reference, files that pages link to.

On a code host a page links to `../experiments/lora/README.md`. In the site that report is a page, too, beside the folder's own,
so each link is rewritten from the file's place in the repository to its place in the site; MkDocs checks them.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import TYPE_CHECKING

from mkdocs.structure.files import File, Files

import fedtune

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")  # the target of a relative link, without its anchor
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", flags=re.S)
TITLES = {
    "runs": "Runs",
    "federated": "Algorithms, tasks and what else a run is made of",
    "data": "Data",
    "models": "Models",
    "reports": "Reports and sweeps",
}
FLOORS = {"algorithms": "federated", "runtimes": "federated", "sweeps": "reports", "commands": "reports"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reports, the pictures and files that pages link to, and the reference."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        if name.startswith("experiments/") or name.startswith("notebooks/"):
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, "reference.md", content=reference()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links, outside of code."""
    parts = CODE.split(markdown)
    parts[::2] = [LINK.sub(lambda found: rewritten(found[1], page.file.src_uri, files), part) for part in parts[::2]]
    return "".join(parts)


def rewritten(target: str, page: str, files: Files) -> str:
    """A link of a page of the site, from a link of the same page in the repository; a folder is its README."""
    here = page if page.startswith(("experiments/", "notebooks/")) else f"docs/{page}"
    in_site = normpath(f"{PurePosixPath(here).parent}/{target}").removeprefix("docs/")
    if files.get_file_from_path(in_site) is None and files.get_file_from_path(f"{in_site}/README.md") is not None:
        in_site += "/README.md"
    return relpath(in_site, PurePosixPath(page).parent)


def reference() -> str:
    """A page with everything that `import fedtune` offers, by the part of the package that has it."""
    groups = defaultdict(list)
    for name in sorted(fedtune.__all__):
        home = fedtune._HOME[name]
        floor = home.partition(".")[0]
        groups[FLOORS.get(floor, floor if floor in TITLES else "runs")].append(f"::: fedtune.{home}.{name}")
    sections = [f"## {TITLES[floor]}\n\n" + "\n\n".join(groups[floor]) for floor in TITLES]
    return "# API reference\n\nEverything that `import fedtune` offers.\n\n" + "\n\n".join(sections) + "\n"
