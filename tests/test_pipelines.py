"""The pipelines against diffusers: same weights, same seed, same latents and images.

With one of diffusers' schedulers in both, latents are bit-equal; with ours they differ by its rounding only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from . import pipeline_pairs as pairs  # noqa: E402

ROUNDING = 1e-6  # of our schedulers, relative, after four steps


@pytest.fixture(autouse=True)
def quick_torch() -> Iterator[None]:
    """No gradients, and one thread: for tensors this small, more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    diffusers.logging.set_verbosity_error()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
    torch.set_num_threads(threads)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(seed: int, channels: int = 3, size: int = 32) -> torch.Tensor:
    return torch.rand(1, channels, size, size, generator=seeded(seed))


IMAGE, CONTROL, SECOND_CONTROL = pixels(9), pixels(10), pixels(11)
MASK = (pixels(8, 1) > 0.5).float()
LATENTS = torch.randn(1, 4, 16, 16, generator=seeded(4))
TWO = {"prompt": ["a cat", "dogs"], "num_images_per_prompt": 2}
ONE = {"prompt": "a cat", "num_images_per_prompt": 2}
SIZES = {"negative_original_size": (10, 20), "negative_target_size": (30, 40)}
CROPS = {"crops_coords_top_left": (1, 2), "negative_crops_coords_top_left": (3, 4)}
INPAINT = {"image": IMAGE, "mask_image": MASK}
LED = {"image": IMAGE, "control_image": CONTROL}
WINDOW = {"control_guidance_start": 0.2, "control_guidance_end": 0.8, "controlnet_conditioning_scale": 0.7}


def several_controlnets() -> tuple[Any, Any]:
    first, second = pairs.controlnets("sd", 5), pairs.controlnets("sd", 6)
    return [first[0], second[0]], [first[1], second[1]]


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "controlnet": lambda: {"controlnet": pairs.controlnets("sd", 5)},
    "pooled controlnet": lambda: {"controlnet": pairs.controlnets("sd", 5, global_pool_conditions=True)},
    "controlnets": lambda: {"controlnet": several_controlnets()},
    "xl controlnet": lambda: {"controlnet": pairs.controlnets("xl", 5)},
    "means": lambda: {"vae": pairs.vaes("means")},
    "refiner": lambda: {"requires_aesthetics_score": True},
    "encoded negative": lambda: {"force_zeros_for_empty_prompt": False},
    "cosxl": lambda: {"is_cosxl_edit": True},
    "lcm": lambda: {"scheduler": pairs.schedulers("LCMScheduler")},
}
# name -> pipeline without its prefix and ending, UNet, parts, arguments of the call
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "text": ("", "sd", "none", TWO),
    "text, negative": ("", "sd", "none", {**TWO, "negative_prompt": ["x", ""]}),
    "text, no guidance": ("", "sd", "none", {**TWO, "guidance_scale": 1.0}),
    "text, rescale": ("", "sd", "none", {**TWO, "guidance_rescale": 0.7}),
    "text, eta": ("", "sd", "none", {**TWO, "eta": 0.7}),
    "text, size": ("", "sd", "none", {**ONE, "height": 40, "width": 24}),
    "text, latents": ("", "sd", "none", {"prompt": "a cat", "latents": LATENTS}),
    "text, guidance as a condition": ("", "lcm", "none", ONE),
    "text, linear projections": ("", "v", "none", ONE),
    "image": ("Img2Img", "sd", "none", {**ONE, "image": IMAGE}),
    "image, strong": ("Img2Img", "sd", "none", {**ONE, "image": IMAGE, "strength": 1.0}),
    "image, two prompts": ("Img2Img", "sd", "none", {**TWO, "image": torch.cat([IMAGE, CONTROL])}),
    "image as latents": ("Img2Img", "sd", "none", {**ONE, "image": LATENTS}),
    "inpaint 4": ("Inpaint", "sd", "none", {**ONE, **INPAINT}),
    "inpaint 4, weak": ("Inpaint", "sd", "none", {**ONE, **INPAINT, "strength": 0.6}),
    "inpaint 9": ("Inpaint", "inpaint", "none", {**ONE, **INPAINT}),
    "inpaint 9, weak": ("Inpaint", "inpaint", "none", {**ONE, **INPAINT, "strength": 0.6}),
    "inpaint 9, encoded": ("Inpaint", "inpaint", "none", {**ONE, **INPAINT, "masked_image_latents": LATENTS}),
    "pix2pix": ("InstructPix2Pix", "pix2pix", "none", {**ONE, "image": IMAGE}),
    "pix2pix, no guidance": (
        "InstructPix2Pix",
        "pix2pix",
        "none",
        {**ONE, "image": IMAGE, "image_guidance_scale": 0.5},
    ),
    "upscale": ("Upscale", "upscale", "none", {**ONE, "image": IMAGE, "noise_level": 33}),
    "depth": ("Depth2Img", "depth", "none", {**ONE, "image": IMAGE, "depth_map": pixels(3, 20, 20)[:, 0]}),
    "control": ("ControlNet", "sd", "controlnet", {**TWO, "image": CONTROL, **WINDOW}),
    "control, guess": ("ControlNet", "sd", "controlnet", {**ONE, "image": CONTROL, "guess_mode": True}),
    "control, pooled": ("ControlNet", "sd", "pooled controlnet", {**ONE, "image": CONTROL}),
    "controls": (
        *("ControlNet", "sd", "controlnets"),
        {
            **ONE,
            "image": [CONTROL, SECOND_CONTROL],
            "controlnet_conditioning_scale": [0.5, 1.0],
            "control_guidance_end": [0.5, 1.0],
        },
    ),
    "controls, guess": (
        *("ControlNet", "sd", "controlnets"),
        {**ONE, "image": [CONTROL, SECOND_CONTROL], "guess_mode": True},
    ),
    "control image": ("ControlNetImg2Img", "sd", "controlnet", {**ONE, **LED}),
    "control inpaint 4": ("ControlNetInpaint", "sd", "controlnet", {**ONE, **INPAINT, **LED}),
    "control inpaint 9": ("ControlNetInpaint", "inpaint", "controlnet", {**ONE, **INPAINT, **LED, "strength": 0.6}),
    "xl": ("XL", "xl", "none", TWO),
    "xl, negative": ("XL", "xl", "none", {**TWO, "prompt_2": ["u", "v"], "negative_prompt": "x", **SIZES}),
    "xl, two negatives": ("XL", "xl", "none", {**TWO, "negative_prompt": "x", "negative_prompt_2": "y"}),
    "xl, encoded negative": ("XL", "xl", "encoded negative", TWO),
    "xl, clip_skip": ("XL", "xl", "none", {**TWO, "clip_skip": 1, "negative_prompt": "x"}),
    "xl, rescale": ("XL", "xl", "none", {**TWO, "guidance_rescale": 0.5}),
    "xl, crops": ("XL", "xl", "none", {**TWO, **CROPS, **SIZES, "original_size": (50, 60), "target_size": (7, 8)}),
    "xl, first part": ("XL", "xl", "none", {**ONE, "denoising_end": 0.6}),
    "xl image": ("XLImg2Img", "xl", "none", {**ONE, "image": IMAGE, "strength": 0.8, **SIZES, **CROPS}),
    "xl image, scaled latents": ("XLImg2Img", "xl", "means", {**ONE, "image": IMAGE, "strength": 0.8}),
    "refiner": ("XLImg2Img", "refiner", "refiner", {**ONE, "image": IMAGE, "strength": 0.8, **CROPS}),
    "refiner, last part": ("XLImg2Img", "refiner", "refiner", {**ONE, "image": LATENTS, "denoising_start": 0.5}),
    "refiner, middle part": (
        *("XLImg2Img", "refiner", "refiner"),
        {**ONE, "image": LATENTS, "denoising_start": 0.2, "denoising_end": 0.7},
    ),
    "xl inpaint 4": ("XLInpaint", "xl", "none", {**ONE, **INPAINT}),
    "xl inpaint 4, strong": ("XLInpaint", "xl", "none", {**ONE, **INPAINT, "strength": 1.0}),
    "xl inpaint 9": ("XLInpaint", "xl inpaint", "none", {**ONE, **INPAINT, "strength": 0.6}),
    "xl inpaint, last part": ("XLInpaint", "xl", "none", {**ONE, **INPAINT, "denoising_start": 0.4}),
    "xl pix2pix": ("XLInstructPix2Pix", "xl pix2pix", "none", {**ONE, "image": IMAGE, "guidance_rescale": 0.4}),
    "cosxl": ("XLInstructPix2Pix", "xl pix2pix", "cosxl", {**ONE, "image": IMAGE}),
    "xl control": ("XLControlNet", "xl", "xl controlnet", {**TWO, "image": CONTROL, **SIZES, **WINDOW}),
    "xl control, guess": ("XLControlNet", "xl", "xl controlnet", {**ONE, "image": CONTROL, "guess_mode": True}),
    "xl control image": ("XLControlNetImg2Img", "xl", "xl controlnet", {**ONE, **LED, **SIZES}),
    "xl control inpaint": ("XLControlNetInpaint", "xl", "xl controlnet", {**ONE, **INPAINT, **LED}),
    "lcm": ("LatentConsistencyModel", "lcm", "lcm", TWO),
    "lcm image": ("LatentConsistencyModelImg2Img", "lcm", "lcm", {**ONE, "image": IMAGE}),
    "lcm, original steps": ("LatentConsistencyModel", "lcm", "lcm", {**ONE, "original_inference_steps": 20}),
}


def make(name: str, scheduler: tuple[Any, Any] | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """Two pipelines for a case, and the arguments of their calls."""
    short, unet, parts, arguments = CASES[name]
    full = f"{short}Pipeline" if short.startswith("Latent") else f"StableDiffusion{short}Pipeline"
    theirs, ours = pairs.build(full, unet, **{"scheduler": scheduler, **PARTS[parts]()})
    return theirs, ours, {"num_inference_steps": 4, "output_type": "latent", **arguments}


def results(theirs: Any, ours: Any, arguments: dict[str, Any], seeds: int = 0) -> tuple[Any, Any]:
    """What both return with the same seed, or with one seed for each of `seeds` images."""
    first, second = (
        pipe(**arguments, generator=[seeded(7 + i) for i in range(seeds)] if seeds else seeded(7))[0]
        for pipe in (theirs, ours)
    )
    return first, second


def distance(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert theirs.isfinite().all()
    return float((ours - theirs).norm() / theirs.norm())


def one_scheduler(kind: str = "DDIMScheduler", **options: Any) -> tuple[Any, Any]:
    theirs, _ = pairs.schedulers(kind, **options)
    return theirs, type(theirs).from_config(theirs.config)


@pytest.mark.parametrize("name", CASES)
def test_latents_are_bit_equal_with_one_scheduler(name: str) -> None:
    scheduler = one_scheduler("LCMScheduler" if "lcm" in CASES[name][2] else "DDIMScheduler")
    theirs, ours = results(*make(name, scheduler))
    assert torch.equal(theirs, ours), f"relative distance {distance(theirs, ours):.1e}"


@pytest.mark.parametrize("name", ["text", "image", "inpaint 4, weak", "pix2pix", "upscale", "refiner, middle part"])
@pytest.mark.parametrize(
    "kind", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_latents_agree_with_each_scheduler(name: str, kind: str) -> None:
    theirs, ours, arguments = make(name, pairs.schedulers(kind))
    assert distance(*results(theirs, ours, arguments)) <= ROUNDING
