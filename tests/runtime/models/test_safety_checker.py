"""The safety checker and its image processor against diffusers' and transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import (
    StableDiffusionSafetyChecker as Theirs,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from weightport.runtime.models.safety_checker import (
    CLIPImageProcessor,
    StableDiffusionSafetyChecker,
)

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 30,
    "patch_size": 6,
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A checker whose thresholds lie among the cosines of random images, and its folder."""
    torch.manual_seed(0)
    model = Theirs(CLIPConfig(vision_config=VISION, projection_dim=16)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_embeds"):
            parameter.data.normal_()
        else:
            parameter.data.normal_(std=0.2)
    with torch.no_grad():
        image = torch.nn.functional.normalize(
            model.visual_projection(model.vision_model(pixels())[1])
        )
        for name, quantile in (("concept_embeds", 0.97), ("special_care_embeds", 0.9)):
            cosines = image @ torch.nn.functional.normalize(getattr(model, name)).T
            getattr(model, f"{name}_weights").copy_(cosines.quantile(quantile, dim=0))
    folder = tmp_path_factory.mktemp("checker") / "safety_checker"
    model.save_pretrained(folder)
    return model, folder


def pixels(count: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, 30, 30, generator=torch.Generator().manual_seed(1))


def test_flags_and_black_images(theirs: tuple[Any, Path]) -> None:
    model, folder = theirs
    ours = StableDiffusionSafetyChecker.from_pretrained(folder)
    images = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    black, flags = ours(pixels(), images)
    expected, expected_flags = model(pixels(), images.clone())
    assert 8 < sum(flags) < 56, "both outcomes are tested"
    assert (ours.scores(pixels())[0] > 0).any(), "special concepts are tested"
    assert flags == expected_flags
    assert torch.equal(black, expected)
    assert images.amax(dim=(1, 2, 3)).all(), "the images given are left alone"
    arrays, flags = ours(pixels(), images.numpy())
    assert flags == expected_flags
    assert np.array_equal(arrays, expected.numpy())


def test_embeddings(theirs: tuple[Any, Path]) -> None:
    model, folder = theirs
    ours = StableDiffusionSafetyChecker.from_pretrained(folder)
    with torch.no_grad():
        got = ours.visual_projection(ours.vision_model(pixels()))
        expected = model.visual_projection(model.vision_model(pixels())[1])
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_files_of_both_generations(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = theirs
    ours = StableDiffusionSafetyChecker.from_pretrained(folder)
    ours.save_pretrained(tmp_path / "ours")
    state = load_file(tmp_path / "ours" / "model.safetensors")
    assert "vision_model.vision_model.pre_layrnorm.weight" in state, "the names of transformers 4"
    state["vision_model.vision_model.embeddings.position_ids"] = torch.arange(26)[None]
    save_file(state, tmp_path / "ours" / "model.safetensors")
    again = StableDiffusionSafetyChecker.from_pretrained(tmp_path / "ours")
    reread = Theirs.from_pretrained(tmp_path / "ours").eval()
    _, expected = model(pixels(), torch.ones(64, 1))
    for checker in (again, reread):
        assert checker(pixels(), torch.ones(64, 1))[1] == expected


def test_an_old_config(theirs: tuple[Any, Path]) -> None:
    legacy = {
        "vision_config": {"top_k": 50, "hidden_size": 768},
        "vision_config_dict": VISION,
        "projection_dim": 16,
    }
    with torch.device("meta"):
        model = StableDiffusionSafetyChecker(legacy)
    assert {key: v.shape for key, v in model.state_dict().items()} == {
        StableDiffusionSafetyChecker.rename(key): v.shape
        for key, v in theirs[0].state_dict().items()
    }


def image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * height)
    bands = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    return Image.fromarray(rng.integers(0, 256, (height, width, bands), np.uint8).squeeze(), mode)


CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "old numbers": {"size": 40, "crop_size": 32},
    "padded": {"size": {"shortest_edge": 20}, "crop_size": {"height": 31, "width": 24}},
    "stretched": {"size": {"height": 30, "width": 50}, "crop_size": {"height": 30, "width": 30}},
    "no resize": {"do_resize": False, "crop_size": {"height": 16, "width": 17}},
    "bilinear": {"resample": 2},
    "only rescaled": {
        "do_normalize": False,
        "do_center_crop": False,
        "size": {"shortest_edge": 33},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_identical_pixels(name: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CONFIGS[name]))
    ours, theirs = (
        kind.from_pretrained(tmp_path) for kind in (CLIPImageProcessor, CLIPImageProcessorPil)
    )
    ours.save_pretrained(tmp_path / "again")
    again = CLIPImageProcessor.from_pretrained(tmp_path / "again")
    reread = CLIPImageProcessorPil.from_pretrained(tmp_path / "again")
    for picture in (
        image(64, 48),
        image(45, 301),
        image(224, 224),
        image(512, 511),
        image(50, 40, "L"),
        image(33, 99, "RGBA"),
    ):
        expected = theirs(picture, return_tensors="pt").pixel_values
        for processor in (ours, again, reread):
            got = processor(picture, return_tensors="pt").pixel_values
            assert got.dtype == expected.dtype == torch.float32
            assert torch.equal(got, expected), picture


def test_batches_of_images() -> None:
    ours, theirs = CLIPImageProcessor(), CLIPImageProcessorPil()
    pictures = [image(64, 48), image(70, 90)]
    expected = theirs(pictures, return_tensors="np").pixel_values
    assert np.array_equal(ours(pictures, return_tensors="np").pixel_values, expected)
    assert np.array_equal(np.stack(ours(pictures).pixel_values), expected)
    assert ours(pictures, return_tensors="pt").to("meta").pixel_values.is_meta
