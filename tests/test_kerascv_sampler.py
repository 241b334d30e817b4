"""Our pipeline with `KerasCVScheduler` and converted weights draws what the real keras-cv's `generate_image` does."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weightport
from weightport.runtime.layers import apply_semantics
from weightport.runtime.pipelines import StableDiffusionPipeline
from weightport.runtime.schedulers import KerasCVScheduler
from weightport.runtime.unet import UNet2DConditionModel
from weightport.runtime.vae import AutoencoderKL

from .keras_files import interpreter, keras_files

ORACLE = Path(__file__).resolve().parent / "oracle" / "sample_kerascv.py"
STEPS = (5, 30)  # 30 are 31 for the older generation


@pytest.mark.parametrize(("environment", "generation"), [("k2", "0.7"), ("k3", "0.8")])
def test_images_are_those_of_kerascv(environment: str, generation: str, tmp_path: Path) -> None:
    made = keras_files(environment, "--size", "small", "--version", "v1", "--formats", "weights.h5,model.h5")
    command = [
        interpreter(environment),
        ORACLE,
        tmp_path / "images.npz",
        str(made.made["flags"]["seed"]),
        *map(str, STEPS),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    expected = np.load(tmp_path / "images.npz")
    repo = tmp_path / "repo"
    weightport.convert([made.path(name, "weights.h5") for name in ("unet", "decoder", "image_encoder")], repo)
    unet = UNet2DConditionModel.from_pretrained(repo, subfolder="unet")
    vae = AutoencoderKL.from_pretrained(repo, subfolder="vae")
    apply_semantics(unet, "kerascv")
    apply_semantics(vae, "kerascv")
    unconditional, context = torch.from_numpy(expected["contexts"])
    scheduler = KerasCVScheduler(generation=generation)
    pipe: Any = StableDiffusionPipeline(vae, None, None, unet, scheduler, requires_safety_checker=False)
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
        image = (255 * image).astype("uint8")  # KerasCV truncates
        theirs = expected[f"images_{steps}"].astype(int)
        assert theirs.std() > 10
        assert abs(image.astype(int) - theirs).max() <= 1
