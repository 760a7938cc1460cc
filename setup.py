"""What setup.cfg cannot say: long description and addresses, which depend on the repository that CITATION.cff names."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|mailto:|#)([^)\s]+)\)")


def repository(citation: str) -> str | None:
    """The address of the repository that a CITATION.cff names, or None."""
    found = re.search(r"^repository-code:\s*[\"']?(https?://[^\"'\s]+)", citation, flags=re.M)
    return found[1].rstrip("/") if found else None


def described(readme: str, url: str | None, version: str) -> str:
    """README.md for a page with no files beside it: links lead into the repository, at the tag of the version. Without an
    address a link is its text, and a picture is left out."""

    def absolute(link: re.Match[str]) -> str:
        picture, text, target = link.groups()
        if url is None:
            return "" if picture else text
        return f"{picture}[{text}]({url}/{'raw' if picture else 'blob'}/v{version}/{target})"

    return _LINK.sub(absolute, readme)


def addresses(url: str | None) -> dict[str, str]:
    """The project's addresses, by what they are."""
    names = {"Source": "", "Documentation": "/tree/main/docs", "Changelog": "/blob/main/CHANGELOG.md", "Issues": "/issues"}
    return {} if url is None else {name: url + path for name, path in names.items()}


if __name__ == "__main__":
    place = repository((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (version,) = re.findall(r'__version__ = "(.+)"', (ROOT / "src" / "fedtune" / "version.py").read_text(encoding="utf-8"))
    setup(
        long_description=described((ROOT / "README.md").read_text(encoding="utf-8"), place, version),
        long_description_content_type="text/markdown",
        project_urls=addresses(place),
    )
