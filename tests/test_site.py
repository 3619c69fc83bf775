"""The documentation site: it is built without a warning, its links lead somewhere, and it has every page and public name."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from script_runs import ROOT
from sphinx.cmd.build import build_main

import qncd

PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += [page for suffix in ("md", "rst", "ipynb") for page in sorted((ROOT / "docs").rglob(f"*.{suffix}"))]


class Anchors(HTMLParser):
    """Of one page: what its links and pictures name, and what can be linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.names: set[str] = {""}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.targets += [value for key in ("href", "src") if (value := found.get(key))]
        self.names |= {value for key in ("id", "name") if (value := found.get(key))}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    arguments = ["-q", "-W", "--keep-going", "-b", "html", "-c", str(ROOT / "docs"), "-d", str(folder / "doctrees")]
    assert build_main([*arguments, str(ROOT), str(folder / "html")]) == 0
    return folder / "html"


@pytest.mark.slow
def test_every_page_is_there_and_every_link_leads_somewhere(site: Path) -> None:
    pages = {}
    for file in site.rglob("*.html"):
        pages[file] = Anchors()
        pages[file].feed(file.read_text(encoding="utf-8"))
    assert {page.relative_to(ROOT).with_suffix(".html") for page in PAGES} <= {file.relative_to(site) for file in pages}
    broken, links = [], 0
    for file, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            links += 1
            reached = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            known = pages.get(reached)
            if not reached.is_file() or (known is not None and unquote(parts.fragment) not in known.names):
                broken.append(f"{file.relative_to(site)}: {target}")
    assert not broken and links > 1000


@pytest.mark.slow
def test_the_reference_has_every_public_name(site: Path) -> None:
    text = (site / "docs" / "reference.html").read_text(encoding="utf-8")
    missing = [name for name in qncd.__all__ if name != "__version__" and f'id="qncd.{name}"' not in text]
    assert not missing
    assert "Quantize the denoiser of a diffusers pipeline, or a bare denoiser, in place." in text
