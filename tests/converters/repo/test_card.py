"""The model card: what it says, that the Hub's library reads and writes it, and its snippets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

import weightport
from weightport.converters.repo.card import END, START, body, metadata, model_card, refresh

from ...support.command import assert_refused, run
from ...support.synthetic import write_controlnet

SHA = "ab" * 32


def report(**changes: Any) -> dict[str, Any]:
    """A small `conversion.json`."""
    source = {
        "part": "unet",
        "path": "u.h5",
        "format": "legacy HDF5 weights",
        "files": {"u.h5": SHA},
    }
    return {
        "weightport_version": "1.2.3",
        "family": "sd1",
        "sources": [source],
        "tables": {"kerascv_unet": SHA},
        "options": {"dtype": "F16"},
        "notes": ["a note"],
    } | changes


def parity(passed: bool = True) -> dict[str, Any]:
    """A small `parity.json`."""
    error = {"max_abs": 1e-5, "relative_l2": 2.6e-6, "cosine": 1.0, "psnr": None}
    check = {
        "name": "unet",
        "component": "unet",
        "against": "kerascv",
        "tolerance": 3e-6,
        "passed": passed,
    }
    checks = [check | {"matched": error, "as_diffusers": error | {"relative_l2": 1.5e-4}}]
    return {"passed": passed, "dtype": "float32", "files": {"unet": SHA}, "checks": checks}


def snippets(card: str) -> list[str]:
    """The Python code in a card."""
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_metadata_is_what_the_hub_writes() -> None:
    options = {"license": "creativeml-openrail-m", "base_model": "org/base"}
    made = report(options=options)
    card = model_card(made, "StableDiffusionPipeline")
    data = metadata(made, "StableDiffusionPipeline")
    assert data == {
        "base_model": "org/base",
        "library_name": "diffusers",
        "license": "creativeml-openrail-m",
        "pipeline_tag": "text-to-image",
        "tags": ["keras-cv", "stable-diffusion", "weightport"],
    }
    assert card.startswith(f"---\n{ModelCardData(**data).to_yaml()}\n---\n")
    assert str(ModelCard(card)) == card
    assert ModelCard(card).data.to_dict() == data


def test_diffusers_is_told_what_a_pipeline_does_without() -> None:
    for given in ([], ["text_encoder_3"]):
        made = report(family="sd3", components={name: {} for name in given}, notes=[])
        ours, theirs = snippets(model_card(made, "StableDiffusion3Pipeline"))
        assert '.from_pretrained(".")' in ours
        absent = "" if given else ", text_encoder_3=None, tokenizer_3=None"
        assert f'.from_pretrained("."{absent})' in theirs


def test_metadata_of_others() -> None:
    made = report(tables={"ldm_unet": SHA})
    data = metadata(made, "StableDiffusionXLImg2ImgPipeline")
    assert data["pipeline_tag"] == "image-to-image"
    assert data["tags"] == ["stable-diffusion", "weightport"]
    assert data.keys() == {"library_name", "pipeline_tag", "tags"}


def test_how_it_was_converted() -> None:
    text = body(report(), "StableDiffusionPipeline")
    assert "weightport 1.2.3" in text
    assert f"| unet | u.h5 | legacy HDF5 weights | `{SHA}` |" in text
    assert f"| kerascv_unet | `{SHA}` |" in text
    assert "- `dtype`: F16\n- a note" in text


def test_parity() -> None:
    assert "Not checked" in body(report(), None)
    text = body(report(), None, parity=parity())
    assert (
        "All checks passed, in float32; the whole report is [`parity.html`](parity.html)." in text
    )
    assert "| unet | kerascv | 2.6e-06 | 3.0e-06 | 1.0e-05 | 1.5e-04 | passed |" in text
    assert "**Failed**" in body(report(), None, parity=parity(passed=False))


def test_names_cannot_break_out() -> None:
    source = {"part": "unet", "path": "u", "format": "f", "files": {"a|b<img>\n[x](http://y)": SHA}}
    text = body(report(sources=[source]), None)
    assert r"| unet | a\|b\<img>\x0a[x]\(http://y) | f |" in text


@pytest.mark.parametrize(
    ("class_name", "images"),
    [
        ("StableDiffusionXLPipeline", []),
        ("StableDiffusionInpaintPipeline", ["image", "mask_image"]),
        ("StableDiffusionXLControlNetInpaintPipeline", ["image", "mask_image", "control_image"]),
        ("StableDiffusionControlNetPipeline", ["image"]),
        ("StableDiffusionDepth2ImgPipeline", ["image"]),
        ("StableDiffusionXLInstructPix2PixPipeline", ["image"]),
        ("StableDiffusionUpscalePipeline", ["image"]),
    ],
)
def test_snippets_give_the_images_that_a_pipeline_needs(class_name: str, images: list[str]) -> None:
    made = report(options={"variant": "fp16"})
    for code in snippets(body(made, class_name, "org/name", "v2")):
        compile(code, "snippet", "exec")
        assert 'from_pretrained("org/name", variant="fp16", revision="v2")' in code
        assert re.findall(r'(\w+)=Image.open\("\1.png"\)', code) == images


def test_a_part_of_a_pipeline_has_no_snippet() -> None:
    text = body(report(notes=["lacks vae (give its file)"]), "StableDiffusionPipeline")
    assert "Not a whole pipeline: it lacks vae (give its file)." in text
    assert snippets(text) == []


def test_refreshing_keeps_what_the_user_wrote() -> None:
    card = model_card(report(), None).replace(START, "Mine above.\n\n" + START) + "Mine below.\n"
    new = refresh(card, body(report(), None, "org/name"))
    assert new == card.replace('from_pretrained(".")', 'from_pretrained("org/name")')
    assert new.count(START) == new.count(END) == 1
    assert refresh("My own card.", "other") == "My own card."


def test_convert_writes_it(place: Path, sd1_keras: dict[str, Path]) -> None:
    for name in ("a", "b"):
        weightport.convert(list(sd1_keras.values()), place / name, license="mit", image_size=64)
    card = (place / "a" / "README.md").read_text()
    assert card == (place / "b" / "README.md").read_text()
    data = ModelCard(card).data.to_dict()
    assert (data["license"], data["base_model"]) == ("mit", "CompVis/stable-diffusion-v1-4")
    made = json.loads((place / "a" / "conversion.json").read_text())
    assert "README.md" not in made["files"], "it may be edited"
    assert made["options"]["license"] == "mit"
    weightport.convert(list(sd1_keras.values()), place / "c", base_model="org/base")
    assert ModelCard.load(place / "c" / "README.md").data.to_dict()["base_model"] == "org/base"


@pytest.mark.parametrize(
    "option", ["--license=MIT license", "--base-model=base", "--license=a\nb: c"]
)
def test_wrong_metadata(place: Path, sd1_keras: dict[str, Path], option: str) -> None:
    ended = run("convert", sd1_keras["unet"], "-o", place / "out", option)
    assert_refused(ended, option.split("=")[0], "as the Hub does|not a Hub id")


def test_the_snippets_run(
    place: Path, sd1_keras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weightport.convert(list(sd1_keras.values()), place / "repo", image_size=64)
    ours, theirs = snippets((place / "repo" / "README.md").read_text())
    assert "from weightport import" in ours
    assert "from diffusers import" in theirs
    monkeypatch.chdir(place / "repo")
    for code in (ours, theirs):
        quick = code.replace('horse")', 'horse", num_inference_steps=2)')
        exec(compile(quick, "README.md", "exec"), {})
        image = place / "repo" / "image.png"
        assert image.stat().st_size > 0
        image.unlink()


def test_a_controlnet(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = write_controlnet(place / "controlnet", "sd1")
    weightport.convert(repo, place / "out")
    monkeypatch.chdir(place / "out")
    for code in snippets((place / "out" / "README.md").read_text()):
        exec(compile(code, "README.md", "exec"), {})
