"""The page of `weightport app` in a real browser: what a person without a terminal does with it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..support.page_server import Page, Served, chromium, served

pytestmark = pytest.mark.browser

UNET = "model.unet.weights.h5"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A page for this machine alone."""
    with served(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, server: Served) -> Iterator[Page]:
    """A visit."""
    with Page.visit(browser, server.url) as page:
        yield page


def test_a_unet_is_uploaded_looked_at_converted_and_downloaded(
    page: Page, server: Served, sd1_keras: dict[str, Path], sd1_repo: Path, tmp_path: Path
) -> None:
    page.upload(sd1_keras["unet"])
    page.tab("Inspect")
    page.tick("inspect", UNET)
    page.click("inspect-run")
    evidence = page.text("inspect-result")
    assert "686 of the 686 tensors of the KerasCV diffusion model v1 are there" in evidence
    assert "unet/ (UNet2DConditionModel) by the table kerascv_unet" in evidence
    page.tab("Convert")
    page.tick("convert", UNET)
    page.fill("convert-base", str(sd1_repo))
    page.click("convert-run")
    assert "look at the plan of just these choices first" in page.text("convert-status")
    page.click("convert-plan")
    plan = page.text("convert-evidence")
    assert "unet 686 tensors from model.unet.weights.h5" in plan
    assert "Nothing is written yet" in plan
    page.click("convert-run")
    page.text("convert-result")
    archive = page.download(".wp-download", tmp_path)
    assert page.other_hosts == []
    assert {path.name for path in server.kept} == {UNET, "converted.zip"}
    page.close()
    assert server.folders == [], "a visit leaves nothing"
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path)
    report = json.loads((tmp_path / "converted" / "conversion.json").read_text())
    assert [source["part"] for source in report["sources"]]
    loaded_strictly(tmp_path / "converted" / "unet", sd1_repo / "unet")


def loaded_strictly(folder: Path, expected: Path) -> None:
    """diffusers loads a component without a key too many or too few, as it does the expected one."""
    import torch
    from diffusers import UNet2DConditionModel

    unet, said = UNet2DConditionModel.from_pretrained(folder, output_loading_info=True)
    assert not any(said[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    other = UNet2DConditionModel.from_pretrained(expected).state_dict()
    state = unet.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
