"""What a notebook may be; nbmake runs them (setup.cfg)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import fedtune

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_small_shows_its_outputs_and_defines_nothing(path: Path) -> None:
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    source = "\n".join("".join(cell["source"]) for cell in cells)
    assert path.stat().st_size < 300_000
    assert "\ndef " not in f"\n{source}"
    assert "class " not in source
    assert "lambda" not in source
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    said = json.dumps([output for output in outputs if "image/png" not in output.get("data", {})])
    assert not [word for word in ("/tmp/", "site-packages", str(Path.home()), str(path.parent)) if word in said]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_public_names_alone(path: Path) -> None:
    """What `import fedtune` offers, and the two modules that are documented as such."""
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    source = "\n".join("".join(cell["source"]) for cell in cells)
    assert set(re.findall(r"^(?:from|import) (fedtune[\w.]*)", source, flags=re.M)) <= {
        "fedtune",
        "fedtune.algorithms",
        "fedtune.testing",
    }
    assert set(re.findall(r"\bfedtune\.(\w+)", source)) <= {*fedtune.__all__, "algorithms", "testing"}
    assert not re.findall(r"\._\w+", source)
