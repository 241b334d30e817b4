"""Our pipeline with `KerasCVScheduler` and converted weights draws what the real keras-cv's
`generate_image` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

import weightport
from weightport.runtime.models.unet import UNet2DConditionModel
from weightport.runtime.models.vae import AutoencoderKL
from weightport.runtime.pipelines.stable_diffusion import StableDiffusionPipeline
from weightport.runtime.schedulers import KerasCVScheduler
from weightport.runtime.semantics import apply_semantics

from .test_keras_files import RUNS, made_by

PARTS = ("unet", "decoder", "image_encoder")
STEPS = (4, 6)  # of both runs; 6 are 7 for the older generation


@pytest.mark.parametrize(("environment", "generation"), [("k2", "0.7"), ("k3", "0.8")])
def test_images_are_those_of_kerascv(
    environment: str, generation: Literal["0.7", "0.8"], tmp_path: Path
) -> None:
    run = f"{environment} plain"
    files = made_by(run, RUNS[run])
    expected = np.load(files.folder / files.made["images"])
    repo = tmp_path / "repo"
    weightport.convert([files.path(part, "weights.h5") for part in PARTS], repo)
    unet = UNet2DConditionModel.from_pretrained(repo, subfolder="unet")
    vae = AutoencoderKL.from_pretrained(repo, subfolder="vae")
    apply_semantics(unet, "kerascv")
    apply_semantics(vae, "kerascv")
    unconditional, context = torch.from_numpy(expected["contexts"])
    scheduler = KerasCVScheduler(generation=generation)
    pipe: Any = StableDiffusionPipeline(
        vae, None, None, unet, scheduler, requires_safety_checker=False
    )
    for steps in STEPS:
        image = pipe(
            prompt_embeds=context,
            negative_prompt_embeds=unconditional,
            latents=torch.from_numpy(expected["noise"]).permute(0, 3, 1, 2),
            height=8 * expected["noise"].shape[1],
            width=8 * expected["noise"].shape[2],
            num_inference_steps=steps,
            guidance_scale=3.0,
            output_type="np",
        ).images
        assert len(scheduler.timesteps) == steps + (steps == 6 and generation == "0.7")
        image = (255 * image).astype("uint8")  # KerasCV truncates
        theirs = expected[f"images_{steps}"].astype(int)
        assert theirs.std() > 10
        assert abs(image.astype(int) - theirs).max() <= 1
