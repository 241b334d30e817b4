"""Chromium without a window: what it makes of a page, in numbers and as a picture."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

MEASURE = """addEventListener('load', () => {
    const measure = element => {
        const box = element.getBoundingClientRect();
        return [element.tagName.toLowerCase(), element.id, box.width, box.height, element.naturalWidth || 0];
    };
    const boxes = [...document.querySelectorAll('svg, svg g[id], img, tr')].map(measure);
    document.body.dataset.boxes = JSON.stringify(boxes).replaceAll('"', "'");
});"""


class Box(NamedTuple):
    """An element as it was laid out, in pixels; `pixels` is the width of the image that was
    decoded."""

    tag: str
    id: str
    width: float
    height: float
    pixels: int


def laid_out(page: str, folder: Path) -> list[Box]:
    """The plots, their named groups, the images and the rows of tables of a page, as the browser
    sees them."""
    file = folder / "measured.html"
    file.write_text(page.replace("</body>", f"<script>{MEASURE}</script></body>"))
    seen = (
        _chromium(folder, "--window-size=1180,1000", "--dump-dom", file.as_uri())
        .decode()
        .partition('data-boxes="')[2]
        .partition('"')[0]
    )
    return [Box(*box) for box in json.loads(seen.replace("'", '"'))]


def photographed(page: str, folder: Path, height: int = 2000) -> Path:
    """A screenshot of a page, 1180 pixels wide."""
    file, picture = folder / "page.html", folder / "page.png"
    file.write_text(page)
    _chromium(folder, f"--window-size=1180,{height}", f"--screenshot={picture}", file.as_uri())
    return picture


def found_browser() -> str:
    """Chromium, which `scripts/test --full` must find (it sets WEIGHTPORT_BROWSER) and other runs
    may lack."""
    found = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None and "WEIGHTPORT_BROWSER" in os.environ:
        pytest.fail("no Chromium is installed; Debian's package is `chromium`")
    if found is None:
        pytest.skip("no Chromium is installed; Debian's package is `chromium`")
    return found


def _chromium(folder: Path, *arguments: str) -> bytes:
    flags = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
    )
    quiet = ("--disable-background-networking", "--disable-component-update", "--hide-scrollbars")
    command = [found_browser(), *flags, *quiet, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout
