"""The page of `weightport app`, served by a process of its own, and a browser to see it with."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from .browser import found_browser

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "space"
SCREENSHOTS = ROOT / "docs" / "app"


@dataclass
class Served:
    """A running server.

    Attributes:
        url: of the page.
        temporary: where it keeps what visitors bring.
    """

    url: str
    temporary: Path
    process: subprocess.Popen[str]

    @property
    def folders(self) -> list[Path]:
        """The folders of the visits."""
        return sorted(self.temporary.glob("weightport-app-*/sessions/*"))

    @property
    def kept(self) -> list[Path]:
        """Every file that it keeps of visitors."""
        return [path for path in self.temporary.rglob("*") if path.is_file()]


@contextlib.contextmanager
def served(folder: Path, **environment: str) -> Iterator[Served]:
    """The page for this machine alone, as `weightport app` serves it."""
    port = _free_port()
    command = ["-m", "weightport", "app", "--no-browser", "--port", str(port)]
    with _running(command, folder, port, environment) as server:
        yield server


@contextlib.contextmanager
def space(folder: Path, **environment: str) -> Iterator[Served]:
    """The page for strangers, as a Space serves it."""
    port = _free_port()
    there = {"SPACE_ID": "org/space", "GRADIO_SERVER_PORT": str(port)}
    with _running([str(SPACE / "app.py")], folder, port, there | environment) as server:
        yield server


@contextlib.contextmanager
def _running(
    command: Sequence[str], folder: Path, port: int, environment: Mapping[str, str]
) -> Iterator[Served]:
    temporary = folder / "temporary"
    temporary.mkdir(parents=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"TMPDIR": str(temporary), "HOME": str(folder), "PYTHONPATH": os.pathsep.join(paths)}
    process = subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **own, **environment},
        stdout=subprocess.PIPE,
        stderr=(folder / "errors").open("w"),
        text=True,
        cwd=folder,
    )
    try:
        said = next((line for line in process.stdout if "runs at http://" in line), None)
        assert said is not None, (folder / "errors").read_text()
        yield Served(f"http://127.0.0.1:{port}/", temporary, process)
    finally:
        process.terminate()
        process.wait(30)
        left = [str(path) for path in temporary.iterdir()]
        assert left == [], "what visitors brought goes with the server"


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser that Playwright drives."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, _launched(playwright.chromium) as browser:
        yield browser


@contextlib.contextmanager
def chromium_beside(browser: Any) -> Iterator[Any]:
    """A second browser, driven by the same Playwright."""
    with _launched(browser.browser_type) as other:
        yield other


@contextlib.contextmanager
def _launched(kind: Any) -> Iterator[Any]:
    browser = kind.launch(executable_path=found_browser(), args=["--no-sandbox", "--disable-gpu"])
    try:
        yield browser
    finally:
        browser.close()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


class Page:
    """One visit, as a person makes it: what is typed, clicked and read.

    Attributes:
        shown: Playwright's page.
        other_hosts: addresses that the page asked for elsewhere.
    """

    def __init__(self, page: Any, url: str) -> None:
        self.shown = page
        self.other_hosts: list[str] = []
        page.on("request", lambda request: self._note(request.url, url))
        page.goto(url)
        page.get_by_role("tab", name="Inspect").wait_for()

    def _note(self, asked: str, url: str) -> None:
        if not asked.startswith((url, "data:", "blob:")):
            self.other_hosts.append(asked)

    @classmethod
    @contextlib.contextmanager
    def visit(cls, browser: Any, url: str, width: int = 1200) -> Iterator[Self]:
        """A page in a window of its own."""
        context = browser.new_context(viewport={"width": width, "height": 900})
        try:
            yield cls(context.new_page(), url)
        finally:
            context.close()

    def close(self) -> None:
        """Leave, and wait until the server has noticed."""
        self.shown.goto("about:blank")
        time.sleep(1)

    def upload(self, *files: Path) -> None:
        """Give files to the page, and wait until it lists them all."""
        self.shown.set_input_files("#upload input[type=file]", [str(file) for file in files])
        shelf = self.shown.locator("#shelf")
        for file in files:
            shelf.get_by_text(file.name, exact=True).wait_for()

    def tab(self, name: str) -> None:
        """Go to a tab, which lies in a menu where the window is too narrow for all of them."""
        tab = self.shown.get_by_role("tab", name=name, exact=True)
        self.shown.get_by_role("tab").first.wait_for()
        if not tab.is_visible():
            self.shown.locator(".overflow-menu > button").click()
            tab = self.shown.locator(".overflow-dropdown").get_by_text(name, exact=True)
        tab.click()

    def tick(self, field: str, name: str) -> None:
        """Choose an upload."""
        self.shown.locator(f"#{field}-uploads").get_by_label(name, exact=True).check()

    def fill(self, element: str, text: str) -> None:
        """Type into a field."""
        self.shown.locator(f"#{element}").locator("input, textarea").first.fill(text)

    def choose(self, element: str, name: str) -> None:
        """Choose one of a few, or tick a box."""
        self.shown.locator(f"#{element}").get_by_label(name, exact=True).check()

    def click(self, element: str) -> None:
        """Press a button and wait until what it started has ended."""
        self.press(element)
        self.ended(element)

    def ended(self, element: str, seconds: int = 60) -> None:
        """Wait until what a button started has ended."""
        name = STATUS.get(element, f"{element.removesuffix('-run')}-status")
        status = self.shown.locator(f"#{name}")
        status.get_by_text(ENDED).first.wait_for(timeout=1000 * seconds)

    def press(self, element: str) -> None:
        """Press a button; what the last press said is forgotten."""
        self.shown.evaluate(FORGET)
        self.shown.click(f"#{element}")

    def text(self, element: str) -> str:
        """What a part of the page says."""
        return str(self.shown.locator(f"#{element}").inner_text())

    def photograph(self, name: str) -> None:
        """A picture for the documentation, where it is asked for."""
        if "WEIGHTPORT_SCREENSHOTS" in os.environ:
            SCREENSHOTS.mkdir(exist_ok=True)
            height = self.shown.evaluate("() => document.documentElement.scrollHeight")
            before = self.shown.viewport_size
            self.shown.set_viewport_size({"width": before["width"], "height": height})
            self.shown.wait_for_timeout(1000)  # until frames are drawn, too
            self.shown.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)
            self.shown.set_viewport_size(before)

    def download(self, link: str, folder: Path) -> Path:
        """Follow a link to a file."""
        with self.shown.expect_download() as started:
            self.shown.click(link)
        place = folder / started.value.suggested_filename
        started.value.save_as(place)
        return place


STATUS = {"convert-plan": "convert-planned"}  # of a button, where it is not its tab's
ENDED = re.compile(r"^(Done\.|Error:)")
FORGET = "() => document.querySelectorAll('.wp-status').forEach(one => one.replaceChildren())"
