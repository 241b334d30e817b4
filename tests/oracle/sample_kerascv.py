"""Sample images with the real keras-cv's `generate_image`, from small random models; runs in a
Keras environment.

    python sample_kerascv.py OUT STEPS...

OUT receives the weights of the models, and `images.npz`: the noise, the contexts, and `images_N`
for every N of STEPS.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import kerascv_models as models
import numpy as np
from keras_cv.src.models.stable_diffusion.stable_diffusion import StableDiffusionBase

LENGTH = 77  # tokens of a prompt


class Small(StableDiffusionBase):
    """KerasCV's pipeline around two given models."""

    def __init__(self, unet: Any, decoder: Any, unconditional: Any) -> None:
        super().__init__(models.IMAGE_SIZE, models.IMAGE_SIZE, jit_compile=False)
        self._unet, self._decoder, self._unconditional = unet, decoder, unconditional

    @property
    def diffusion_model(self) -> Any:
        """The UNet."""
        return self._unet

    def _get_unconditional_context(self) -> Any:
        return self._unconditional

    def _get_timestep_embedding(self, timestep: Any, batch_size: int) -> Any:
        width = self._unet.inputs[1].shape[-1]
        return super()._get_timestep_embedding(timestep, batch_size, dim=width)


def main(out: str, *steps: str) -> None:
    """Build, sample and save."""
    made = {}
    for name in ("unet", "decoder", "image_encoder"):
        with models.narrow("v1"):
            made[name] = models.build(name, "v1")
        models.randomise(made[name], name, seed=0)
        made[name].save_weights(Path(out) / f"{name}.weights.h5")
    unet, rng = made["unet"], np.random.default_rng(0)
    side, width = models.IMAGE_SIZE // 8, unet.inputs[2].shape[-1]
    noise = rng.standard_normal((1, side, side, 4)).astype("f4")
    contexts = rng.standard_normal((2, 1, LENGTH, width)).astype("f4")
    pipeline = Small(unet, made["decoder"], contexts[0])
    images = {
        f"images_{n}": pipeline.generate_image(
            contexts[1], num_steps=int(n), unconditional_guidance_scale=3.0, diffusion_noise=noise
        )
        for n in steps
    }
    np.savez(Path(out) / "images.npz", noise=noise, contexts=contexts, **images)


if __name__ == "__main__":
    main(*sys.argv[1:])
