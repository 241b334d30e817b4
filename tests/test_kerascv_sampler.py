"""`KerasCVScheduler` with converted weights draws the images of the real keras-cv's `generate_image`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import weightport
from weightport.runtime.layers import apply_semantics
from weightport.runtime.schedulers import KerasCVScheduler
from weightport.runtime.unet import UNet2DConditionModel
from weightport.runtime.vae import AutoencoderKL

from .keras_files import interpreter, keras_files

ORACLE = Path(__file__).resolve().parent / "oracle" / "sample_kerascv.py"
STEPS = (5, 30)  # 30 are 31 for the older generation


@pytest.mark.parametrize(("environment", "generation"), [("k2", "0.7"), ("k3", "0.8")])
@torch.no_grad()
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
    for steps in STEPS:
        scheduler = KerasCVScheduler(generation=generation)
        scheduler.set_timesteps(steps)
        sample = torch.from_numpy(expected["noise"]).permute(0, 3, 1, 2)
        for t in scheduler.timesteps:
            without, guided = unet(sample, t, unconditional).sample, unet(sample, t, context).sample
            sample = scheduler.step(without + 3.0 * (guided - without), t, sample).prev_sample
        image = vae.decode(sample / vae.config.scaling_factor).sample.permute(0, 2, 3, 1).numpy()
        image = np.clip((image + 1) / 2 * 255, 0, 255).astype("uint8")
        theirs = expected[f"images_{steps}"].astype(int)
        assert theirs.std() > 10
        assert abs(image.astype(int) - theirs).max() <= 1
