"""The parity report: its pieces, and the page in a real browser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from weightport.parity.layers import Fault, Layer, first_fault, watched
from weightport.parity.measure import BLOCK, Error, measure, tolerance
from weightport.parity.report import describe, html, write_report
from weightport.parity.result import Check, File, Images, Parity
from weightport.parity.weights import Weights, WrongTensor
from weightport.reports.page import data_uri

from ..support.browser import laid_out, photographed

GOOD = Error(max_abs=4e-6, relative_l2=1.5e-6, cosine=0.999999999, psnr=133.0)
BAD = Error(max_abs=4e-1, relative_l2=1.5e-1, cosine=0.9, psnr=20.0)
BLOCKS = (
    "conv_in",
    "down_blocks.0.resnets.0",
    "down_blocks.0.attentions.0",
    "mid_block.resnets.0",
    "conv_out",
)


def _layers(errors: list[float]) -> tuple[Layer, ...]:
    return tuple(
        Layer(block, block, error, error) for block, error in zip(BLOCKS, errors, strict=True)
    )


def _parity(wrong: bool = False) -> Parity:
    layers = _layers(
        [1e-7, 4e-7, 2e-1, 3e-1, 1.5e-1] if wrong else [1e-7, 4e-7, 8e-7, 9e-7, 1.5e-6]
    )
    fault = (
        Fault(BLOCKS[2], BLOCKS[2], "down_blocks.{i}.attentions.{j} = <row>", 2e-1, 4e-7)
        if wrong
        else None
    )
    weights = (
        Weights(685, {}, (WrongTensor("<source>", ("key",), "row", 1.0),))
        if wrong
        else Weights(686, {}, ())
    )
    unet = Check(
        name="unet",
        component="unet",
        against="kerascv",
        source="<unet>.weights.h5",
        weights=weights,
        tolerance=3e-6,
        matched=BAD if wrong else GOOD,
        as_diffusers=Error(1e-3, 1.5e-4, 0.99999, 91.0),
        layers=layers,
        diffusers_layers=_layers([1e-7, 4e-7, 1e-4, 1.2e-4, 1.5e-4]),
        fault=fault,
    )
    blue = np.full((16, 16, 3), (37, 99, 235), np.uint8)
    images = Images(
        5, "keras-cv 0.9.0", 3e-5, GOOD, GOOD, 0.0002, 1, {"KerasCV": blue, "ours": blue}
    )
    process = {"versions": {"python": "3.11"}, "seconds": {"unet": 2.0}, "peak_rss": 2_000_000_000}
    return Parity(
        "repo",
        "sd1",
        "float32",
        (unet,),
        images,
        {"cores": 2, "kerascv": process},
        (File("file", "a" * 64),),
    )


def test_measure_of_more_than_a_block() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, BLOCK // 2 + 1))
    error = measure([a[:1], a[1:]], [b[:1], b[1:]])
    assert error.max_abs == np.abs(a - b).max()
    assert error.relative_l2 == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b))
    assert error.cosine == pytest.approx(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    assert error.psnr == pytest.approx(10 * np.log10(np.ptp(b) ** 2 / np.square(a - b).mean()))


def test_measure() -> None:
    a = np.array([1.0, 2.0, 2.0], np.float32)
    assert measure([a], [a]) == Error(0.0, 0.0, 1.0, None)
    error = measure([a[:1], a[1:]], [np.array([1.0]), np.array([2.0, 5.0])])
    assert error.max_abs == 3
    assert error.relative_l2 == pytest.approx(3 / 30**0.5)
    assert error.cosine == pytest.approx(15 / (3 * 30**0.5))
    assert error.psnr == pytest.approx(20 * np.log10(4 / (3 / 3**0.5)))
    assert measure([np.array([np.nan])], [np.array([1.0])]).relative_l2 == np.inf
    with pytest.raises(ValueError, match="shapes"):
        measure([a], [a[None]])


def test_tolerances_follow_what_is_computed() -> None:
    assert tolerance("unet", "float32", []) == tolerance("text_encoder", "float32", []) == 3e-6
    assert tolerance("decoder", "float32", []) == tolerance("image_encoder", "float32", []) == 5e-6
    assert tolerance("unet", "float64", []) == 1e-12
    assert tolerance("unet", "float32", ["F16"]) == 5e-3


def test_the_first_leap_is_the_fault_and_growth_is_none() -> None:
    rows = {BLOCKS[2]: "row"}
    assert first_fault(_layers([1e-7, 2e-6, 1e-3, 1e-1, 1e-2]), 3e-6, rows) == Fault(
        *BLOCKS[2:3] * 2, "row", 1e-3, 2e-6
    )
    assert first_fault(_layers([1e-7, 1e-6, 5e-6, 1.4e-5, 3e-5]), 3e-6, rows) is None
    nan = first_fault(_layers([1e-7, 1e-6, float("nan"), 1e-5, 1e-5]), 3e-6, rows)
    assert nan
    assert nan.module == BLOCKS[2]


def test_modules_are_found_through_the_tables() -> None:
    from weightport.mappings.families import families
    from weightport.mappings.library import load_table

    component = families()["sd1"].components["unet"]
    for table, conv, block in (
        ("kerascv_unet", "res_block.2.exit_flow.padded_conv2d.conv2d", "res_block.2"),
        ("ldm_unet", "input_blocks.4.0.out_layers.3", "input_blocks.4.0"),
    ):
        loaded = load_table(table)
        paths, rows = watched(loaded.links(component.manifest(), component.config), loaded.prefix)
        assert paths[conv] == "down_blocks.1.resnets.0.conv2"
        assert paths[block] == "down_blocks.1.resnets.0"
        assert rows["down_blocks.1.resnets.0.conv2"].startswith("down_blocks.{i}.resnets.{j} = ")


def test_lines_for_people() -> None:
    good, bad = "\n".join(describe(_parity())), "\n".join(describe(_parity(wrong=True)))
    assert "gives all 686 tensors of the source back, bit for bit" in good
    assert good.endswith("\npassed")
    assert "FAIL: wrong weights" in bad
    assert "wrong weight: key is not <source> (max abs 1.0e+00); row: row" in bad
    assert f"first wrong: {BLOCKS[2]}, relative L2 2.0e-01 after 4.0e-07 before it" in bad
    assert bad.endswith("\nFAILED")


def test_the_json_is_plain(tmp_path: Path) -> None:
    write_report(_parity(wrong=True), tmp_path)
    report = json.loads((tmp_path / "parity.json").read_text())
    assert report["passed"] is False
    assert report["checks"][0]["fault"]["module"] == BLOCKS[2]
    assert report["images"]["pictures"] == {}


def test_the_page_is_self_contained_and_escapes_names() -> None:
    page = html(_parity(wrong=True))
    assert "<unet>" not in page
    assert "&lt;unet&gt;.weights.h5" in page
    for attribute in ("src", "href", "url("):
        assert all(
            part[1:].startswith(("data:", "#")) for part in page.split(f"{attribute}=")[1:]
        ), attribute
    assert html(_parity()) == html(_parity())  # nothing but the result is in it


COLOURS = {
    "image, and the first line": (37, 99, 235),
    "second line": (217, 119, 6),
    "marked block": (253, 234, 234),
}


@pytest.mark.browser
def test_a_browser_shows_plots_and_images(tmp_path: Path) -> None:
    """The browser says how large plots and images came out; its screenshot has their colours."""
    image = pytest.importorskip("PIL.Image")
    boxes = laid_out(html(_parity(wrong=True)), tmp_path)
    (plot,) = (box for box in boxes if box.tag == "svg")
    assert plot.width > 600
    assert plot.height > 150
    assert len([box for box in boxes if box.tag == "g" and box.id.startswith("line2d")]) > 10
    pictures = [box for box in boxes if box.tag == "img"]
    assert [box.pixels for box in pictures] == [16, 16]
    assert all(box.width == box.height == 256 for box in pictures)

    picture = photographed(html(_parity(wrong=True)), tmp_path)
    pixels = np.asarray(image.open(picture).convert("RGB")).reshape(-1, 3)
    counts = {name: int((pixels == colour).all(axis=1).sum()) for name, colour in COLOURS.items()}
    assert counts["image, and the first line"] > 2 * 250 * 250
    assert counts["second line"] > 300
    assert counts["marked block"] > 1000


def test_images_are_png() -> None:
    from base64 import b64decode
    from io import BytesIO

    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    uri = data_uri(pixels)
    assert uri.startswith("data:image/png;base64,")
    assert np.array_equal(np.asarray(image.open(BytesIO(b64decode(uri.partition(",")[2])))), pixels)
