"""The report as one HTML file, with everything in it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from qncd import __version__
from qncd.io.files import write_text
from qncd.report.sections import SECTIONS, Report, Section

LARGEST = 5_000_000  # bytes that a report should stay under
log = logging.getLogger("qncd")


def render(report: Report, command: str, sections: Sequence[Section] = SECTIONS) -> str:
    """The page.

    Args:
        command: that makes it again.
        sections: in their order; those with nothing to show are left out.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qncd.report", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    found = {section: content for section in sections if (content := section.content(report)) is not None}
    bodies = [
        (section, Markup(environment.get_template(f"{section.key}.html").render(**content))) for section, content in found.items()
    ]
    page = environment.get_template("page.html")
    return page.render(
        bodies=bodies, title=f"Report: {', '.join(report.labels)}", command=command, version=__version__, **_assets()
    )


def _assets() -> dict[str, Markup]:
    """Style and script, which stand in the page as they are."""
    folder = Path(__file__).with_name("templates")
    return {name: Markup((folder / file).read_text(encoding="utf-8")) for name, file in (("css", "page.css"), ("js", "page.js"))}


def write_report(report: Report, path: Path, command: str) -> None:
    """Write the page, whole or not at all; a line says where it is larger than it should be."""
    page = render(report, command)
    size = len(page.encode())
    write_text(path, page)
    if size > LARGEST:
        log.warning("%s: %.1f MB, larger than %.0f MB: name fewer runs", path, size / 1e6, LARGEST / 1e6)
    log.info("%s: %.1f MB", path, size / 1e6)
