"""A picture by stable-diffusion.cpp, of an original checkpoint, on the processor:

python stable_diffusion_cpp_image.py CHECKPOINT SIZE THREADS STEPS
"""

import sys

from stable_diffusion_cpp import StableDiffusion


def main(checkpoint: str, size: str, threads: str, steps: str) -> None:
    """With the weights as they are in the file, and guidance."""
    model = StableDiffusion(model_path=checkpoint, n_threads=int(threads), verbose=False)
    model.generate_image(
        prompt="a photo of a cat",
        width=int(size),
        height=int(size),
        cfg_scale=7.5,
        sample_steps=int(steps),
        seed=0,
    )


main(*sys.argv[1:])
