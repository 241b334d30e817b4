"""Autoencoders beside `AutoencoderKL`: bit for bit those of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import weightport.models

TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
}
TWO_STAGES: dict[str, Any] = {
    "encoder_block_out_channels": (4, 4),
    "decoder_block_out_channels": (4, 4),
    "num_encoder_blocks": (2, 1),
    "num_decoder_blocks": (1, 2),
    "latent_channels": 16,
    "scaling_factor": 0.5,
}
ASYMMETRIC: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "down_block_out_channels": (8, 8, 16, 16),
    "layers_per_down_block": 2,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "up_block_out_channels": (8, 16, 32, 32),
    "layers_per_up_block": 1,
    "norm_num_groups": 4,
}


LATENTS = torch.zeros(1, 4, 4, 4)


def pair(name: str, options: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """A random model of diffusers, and ours of its files."""
    torch.manual_seed(0)
    theirs = getattr(diffusers, name)(**options).eval()
    theirs.save_pretrained(folder)
    return theirs, getattr(weightport.models, name).from_pretrained(folder)


def image(edge: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, edge, edge, generator=generator) * 2 - 1


@pytest.mark.parametrize("options", [TINY, TWO_STAGES], ids=["four stages", "two stages"])
@torch.no_grad()
def test_tiny(options: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = pair("AutoencoderTiny", options, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert {key: said[key] for key in ours.config} == dict(ours.config)
    x = image(32)
    z = theirs.encode(x).latents
    assert torch.equal(ours.encode(x).latents, z)
    assert torch.equal(ours.encode(x, return_dict=False)[0], z)
    assert torch.equal(ours.decode(z).sample, theirs.decode(z).sample)
    assert torch.equal(ours(x).sample, theirs(x).sample)
    assert torch.equal(ours.scale_latents(z), theirs.scale_latents(z))


@torch.no_grad()
def test_tiny_in_parts(tmp_path: Path) -> None:
    """Tiles and slices of images."""
    theirs, ours = pair("AutoencoderTiny", TINY, tmp_path)
    x = image(640)
    for model in (theirs, ours):
        model.enable_tiling()
        model.enable_slicing()
    z = theirs.encode(x).latents
    whole = ours.encoder(x)
    assert torch.equal(ours.encode(x).latents, z)
    assert not torch.equal(z, whole)
    assert torch.equal(ours.decode(z).sample, theirs.decode(z).sample)
    ours.disable_tiling()
    assert torch.equal(ours.encode(x).latents, whole)


@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_asymmetric(masked: bool, tmp_path: Path) -> None:
    theirs, ours = pair("AsymmetricAutoencoderKL", ASYMMETRIC, tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert {key: said[key] for key in ours.config} == dict(ours.config)
    x = image(32)
    mask = (image(32, 2)[:, :1] > 0).float() if masked else None
    assert torch.equal(ours.encode(x).latent_dist.mean, theirs.encode(x).latent_dist.mean)
    z = theirs.encode(x).latent_dist.mode()
    wanted = theirs.decode(z, None, x, mask).sample
    assert torch.equal(ours.decode(z, None, x, mask).sample, wanted)
    assert torch.equal(ours(x, mask).sample, theirs(x, mask).sample)
    assert torch.equal(ours.decode(z).sample, wanted) is not masked


@torch.no_grad()
def test_an_image_of_another_size_is_refused(tmp_path: Path) -> None:
    _, ours = pair("AsymmetricAutoencoderKL", ASYMMETRIC, tmp_path)
    with pytest.raises(ValueError, match="of the size that is decoded"):
        ours.decode(LATENTS, image=torch.zeros(1, 3, 64, 64), mask=torch.ones(1, 1, 64, 64))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("AutoencoderTiny", {"num_encoder_blocks": (1, 2)}, "a number for each of encoder_block"),
        ("AutoencoderTiny", {"act_fn": "gelu"}, "act_fn"),
        ("AsymmetricAutoencoderKL", {"up_block_types": ("X",)}, r"must be \[Attn\]Up"),
    ],
)
def test_what_is_not_implemented_is_refused(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(weightport.models, name)(**options)


def test_a_vae_that_takes_images_whole_says_so() -> None:
    vae = weightport.models.AsymmetricAutoencoderKL(**ASYMMETRIC)
    nothing: Any = None
    pipe = weightport.StableDiffusionPipeline(
        vae, nothing, nothing, nothing, nothing, requires_safety_checker=False
    )
    with pytest.raises(NotImplementedError, match="AsymmetricAutoencoderKL takes images whole"):
        pipe.enable_vae_tiling()
