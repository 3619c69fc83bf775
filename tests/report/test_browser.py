"""The report in a browser: flipping, sorting, colours and phone width. Skipped where there is no Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qncd.report.folders import open_folders
from qncd.report.page import render
from qncd.report.sections import Report

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
# Acts as a reader does, and leaves what it saw in the page.
ACT = """
<pre id="seen"></pre>
<script>
const seen = {errors: []};
addEventListener("error", (event) => seen.errors.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => seen.errors.push(event.violatedDirective));
const sheet = document.querySelector("[data-sheet]"), tiles = sheet.querySelector(".tiles");
const view = () => Number(sheet.querySelector("img:not([hidden])").dataset.view);
const press = (key) => tiles.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
seen.views = [view()];
for (const key of [" ", " ", "ArrowRight", "ArrowRight", " ", " ", "ArrowLeft", "ArrowLeft", "ArrowLeft"]) {
  press(key);
  seen.views.push(view());
}
sheet.querySelectorAll("input")[2].click();
seen.views.push(view());
tiles.querySelector("img:not([hidden])").click();
seen.views.push(view());
press(" ");
seen.now = sheet.querySelector(".now").textContent;
seen.caption = sheet.querySelector(".decibels").textContent;
seen.shown = [...sheet.querySelectorAll(".tile")].map((tile) => tile.querySelectorAll("img:not([hidden])").length);
seen.loaded = [...document.images].every((image) => image.hidden || image.naturalWidth > 0);
const table = document.querySelectorAll("#layers table")[0], heads = [...table.tHead.rows[0].cells];
const column = (index) => [...table.tBodies[0].rows].map((row) => row.cells[index].textContent);
const own = heads.findIndex((head) => head.textContent.startsWith("own error"));
seen.sorted = [0, 1].map(() => {
  heads[own].querySelector("button").click();
  return [heads[own].getAttribute("aria-sort"), column(own)];
});
heads[0].querySelector("button").click();
seen.names = column(0);
seen.sorts = heads.filter((head) => head.hasAttribute("aria-sort")).length;
const ground = () => getComputedStyle(document.body).backgroundColor;
seen.grounds = [...document.querySelectorAll("[data-theme-value]")].map((button) => { button.click(); return ground(); });
seen.ink = getComputedStyle(document.querySelector(".plot svg text")).fill;
seen.width = [document.documentElement.scrollWidth, innerWidth];
document.getElementById("seen").textContent = JSON.stringify(seen);
</script>
"""


@pytest.fixture(scope="module")
def seen(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script saw in a window as wide as a phone."""
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    folder = tmp_path_factory.mktemp("browser")
    page = render(Report(*open_folders([folders["good"], folders["poor"], folders["bench"], folders["model"]])), "")
    (folder / "report.html").write_text(page.replace("</body>", f"{ACT}</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", "--window-size=500,900"]
    command = [CHROMIUM, *flags, "--dump-dom", (folder / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return found


def test_flipping(seen: dict[str, Any]) -> None:
    """Space goes between full precision and what was seen last, arrows through all views and round the end."""
    assert seen["errors"] == [] and seen["loaded"]
    assert seen["views"] == [0, 1, 0, 1, 2, 0, 2, 1, 0, 4, 2, 0]
    assert seen["now"] == "poor: W4A6 linear" and seen["caption"].endswith(" dB")
    assert set(seen["shown"]) == {1}


def test_sorting(seen: dict[str, Any]) -> None:
    (up, rising), (down, falling) = seen["sorted"]
    assert (up, down) == ("ascending", "descending")
    numbers = [float(text.split()[0]) for text in rising[:-1]]
    assert numbers == sorted(numbers) and numbers[0] < numbers[-1]
    assert falling[:-1] == rising[:-1][::-1] and rising[-1] == falling[-1] == "–"  # what is not known comes last
    assert seen["names"] == sorted(seen["names"]) and seen["sorts"] == 1


def test_colours_and_phone_width(seen: dict[str, Any]) -> None:
    system, light, dark = seen["grounds"]
    assert light == "rgb(255, 255, 255)" and dark == "rgb(21, 23, 27)" and system in (light, dark)
    assert seen["ink"] == "rgb(230, 231, 234)"  # of a plot's text in the dark
    assert seen["width"][0] <= seen["width"][1]
