"""Images that KerasCV draws with given models, from random noise and contexts."""

from typing import Any

import kerascv_models as models
import numpy as np
from keras_cv.src.models.stable_diffusion.stable_diffusion import StableDiffusionBase

LENGTH = 77  # tokens of a prompt


class Pipeline(StableDiffusionBase):
    """KerasCV's pipeline around two models, in place of those that it would download."""

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


def draw(unet: Any, decoder: Any, steps: tuple[int, ...]) -> dict[str, Any]:
    """`noise` (1, side, side, 4), `contexts` (2, 1, LENGTH, width), unconditional first, and
    `images_N` of each number of steps."""
    rng = np.random.default_rng(0)
    side = models.IMAGE_SIZE // 8
    width = unet.inputs[2].shape[-1]
    noise = rng.standard_normal((1, side, side, 4)).astype("f4")
    contexts = rng.standard_normal((2, 1, LENGTH, width)).astype("f4")
    pipeline = Pipeline(unet, decoder, contexts[0])
    images = {
        f"images_{n}": pipeline.generate_image(
            contexts[1], num_steps=n, unconditional_guidance_scale=3.0, diffusion_noise=noise
        )
        for n in steps
    }
    return {"noise": noise, "contexts": contexts, **images}
