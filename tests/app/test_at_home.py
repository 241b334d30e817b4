"""The page of `weightport app` on one's own machine: the tabs that run models, folders, and what it
costs to start."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from PIL import Image

import weightport
from weightport.recipe import read_recipe

from ..support.page_server import Page, Served, chromium, served, space
from ..support.tiny_autoencoder import write_tiny_autoencoder

pytestmark = [pytest.mark.browser, pytest.mark.full]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, server: Served) -> Iterator[Page]:
    with Page.visit(browser, server.url) as page:
        yield page


@pytest.fixture(scope="module")
def repo(server: Served, sd1_keras: dict[str, Path]) -> str:
    """A whole narrow repository, named from where the server was started."""
    folder = server.temporary.parent / "my-model"
    weightport.convert(list(sd1_keras.values()), folder, image_size=64)
    return folder.name


def test_it_starts_in_five_seconds_of_cpu(browser: Any, tmp_path: Path) -> None:
    """The server's own time, from its start to a page that can be used."""
    with served(tmp_path / "server") as server, Page.visit(browser, server.url):
        spent = psutil.Process(server.process.pid).cpu_times()
        print(f"{spent.user + spent.system:.2f} s of CPU from the start to a usable page")
        assert spent.user + spent.system < 5


def test_it_is_for_this_machine_alone(server: Served, page: Page) -> None:
    answer = page.shown.request.get(server.url, headers={"Host": "attacker.example"})
    assert answer.status == 403
    listening = {one.laddr.ip for one in psutil.Process(server.process.pid).net_connections()}
    assert listening == {"127.0.0.1"}


def test_what_the_evidence_leaves_open_is_a_choice(
    page: Page, sd1_keras: dict[str, Path], tmp_path: Path
) -> None:
    decoder = sd1_keras["decoder"]
    page.upload(decoder)
    page.tab("Convert")
    assert page.shown.locator("#option-family").count() == 0
    page.tick("convert", decoder.name)
    page.click("convert-plan")
    choice = page.shown.locator("#option-family").first
    assert "--family" in choice.inner_text()
    assert "Stable Diffusion 2.x" in choice.inner_text()
    page.photograph("choices")
    page.fill("option-family", "sd2")
    page.shown.keyboard.press("Enter")
    page.choose("convert-where", "Folder on this machine")
    page.fill("convert-folder", str(tmp_path))
    page.fill("convert-name", "second")
    page.click("convert-run")
    assert "look at the plan of just these choices first" in page.text("convert-status")
    page.click("convert-plan")
    page.click("convert-run")
    assert str(tmp_path) in page.text("convert-result")
    assert (tmp_path / "second" / "vae" / "config.json").is_file()
    page.click("convert-run")
    assert "already exists" in page.text("convert-status"), "nothing is replaced"


def test_two_files_are_compared(page: Page, sd1_keras: dict[str, Path], repo: str) -> None:
    page.tab("Compare")
    page.fill("compare-a-elsewhere", f"{repo}/unet")
    page.upload(sd1_keras["unet"])
    page.tick("compare-b", sd1_keras["unet"].name)
    page.click("compare-run")
    assert "They are the same" in page.text("compare-result")
    assert "686 tensors are equal" in page.text("compare-result")
    page.photograph("compare")


def test_an_image_is_made_and_its_settings_are_taken_again(
    page: Page, repo: str, tmp_path: Path
) -> None:
    page.tab("Try it")
    page.fill("images-elsewhere", repo)
    page.fill("images-prompt", "a <b>red</b> fox")
    page.fill("images-scheduler", "euler")
    page.fill("images-steps", "2")
    page.fill("images-seed", "3")
    page.click("images-run")
    assert page.text("images-status") == "Done."
    assert "a <b>red</b> fox" in page.text("images-result")
    page.shown.wait_for_function(
        "() => document.querySelector('#images-result img').naturalWidth > 0"
    )
    page.photograph("images")
    png = page.download("#images-result .wp-download", tmp_path)
    made = read_recipe(png)
    assert (made.seed, made.steps, made.scheduler) == (3, 2, "euler")
    assert Image.open(png).size == (64, 64)
    page.fill("images-prompt", "another")
    page.upload(png)
    page.tick("settings", png.name)
    page.click("settings-run")
    assert page.shown.locator("#images-prompt textarea").input_value() == "a <b>red</b> fox"


def test_schedulers_are_compared_with_their_plot(page: Page, repo: str) -> None:
    page.tab("Schedulers")
    page.fill("schedulers-elsewhere", repo)
    page.fill("schedulers-prompts", "a red fox")
    page.fill("schedulers-names", "ddim, euler")
    page.fill("schedulers-steps", "2, 3")
    page.fill("schedulers-reference", "4")
    page.click("schedulers-run")
    assert page.text("schedulers-status") == "Done."
    assert "latent RMSE" in page.text("schedulers-result")
    report = page.shown.frame_locator("#schedulers-result iframe")
    report.locator("svg").first.wait_for()
    page.photograph("schedulers")


def test_parity_says_how_to_get_what_it_lacks(
    page: Page, repo: str, sd1_keras: dict[str, Path]
) -> None:
    page.tab("Parity")
    page.fill("parity-repo-elsewhere", repo)
    page.upload(sd1_keras["unet"])
    page.tick("parity", sd1_keras["unet"].name)
    page.click("parity-run")
    assert 'pip install "weightport[keras]"' in page.text("parity-status")


def test_parity_passes(page: Page, tmp_path: Path) -> None:
    """Of a model that is quick to run, beside diffusers, which is installed here."""
    write_tiny_autoencoder(tmp_path / "tiny")
    weightport.convert(tmp_path / "tiny", tmp_path / "converted")
    page.tab("Parity")
    page.fill("parity-repo-elsewhere", str(tmp_path / "converted"))
    page.fill("parity-elsewhere", str(tmp_path / "tiny"))
    page.press("parity-run")
    page.ended("parity-run", seconds=300)
    assert page.text("parity-status") == "Done."
    assert page.text("parity-result").count("pass") == 3  # each half, and all
    report = page.shown.frame_locator("#parity-result iframe")
    report.get_by_text("image_encoder").first.wait_for()
    page.photograph("parity")
    written = page.download("#parity-result .wp-download >> nth=1", tmp_path)
    assert json.loads(written.read_text())["passed"] is True


OTHERWISE = {"html", "convert-base", "convert-where", "convert-token", "parity-python"}
"""What a page for strangers says otherwise, or does not show: its limits stand in the heading."""


def test_a_space_has_the_same_page(server: Served, browser: Any, tmp_path: Path) -> None:
    """The same parts in the same places, that do the same; strangers are told of other limits, and
    asked for no path."""
    with space(tmp_path / "space") as strangers:
        mine, theirs = (
            browser.new_context().request.get(f"{one.url}config").json()
            for one in (server, strangers)
        )
    for part in ("layout", "dependencies", "title"):
        assert mine[part] == theirs[part]
    differing = set()
    for one, other in zip(mine["components"], theirs["components"], strict=True):
        assert (one["id"], one["type"]) == (other["id"], other["type"])
        if one != other and one["type"] != "state":  # which is each visit's own
            differing.add(one["props"].get("elem_id") or one["type"])
    assert {name for name in differing if not name.endswith("-elsewhere")} == OTHERWISE


def test_everything_is_deleted_on_demand(
    page: Page, server: Served, sd1_keras: dict[str, Path]
) -> None:
    page.upload(sd1_keras["decoder"])
    before = time.monotonic()
    page.shown.click("#clear")
    page.shown.get_by_text("You keep nothing here.").wait_for()
    assert time.monotonic() - before < 30
    assert not any(path.name == sd1_keras["decoder"].name for path in server.kept)
