"""The pipelines against diffusers: same weights, same seed, same latents and images.

With one of diffusers' schedulers in both, latents are bit-equal; with ours they differ by its
rounding only.
"""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import weightport
from weightport.runtime.registry import PIPELINES

from ...support import pipeline_pairs as pairs

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
EDIT = {**ONE, "image": IMAGE}
INPAINT = {"image": IMAGE, "mask_image": MASK}
LED = {"image": IMAGE, "control_image": CONTROL}
WINDOW = {
    "control_guidance_start": 0.2,
    "control_guidance_end": 0.8,
    "controlnet_conditioning_scale": 0.7,
}


def several_controlnets() -> tuple[Any, Any]:
    first, second = pairs.controlnets("sd", 5), pairs.controlnets("sd", 6)
    return [first[0], second[0]], [first[1], second[1]]


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "controlnet": lambda: {"controlnet": pairs.controlnets("sd", 5)},
    "pooled controlnet": lambda: {
        "controlnet": pairs.controlnets("sd", 5, global_pool_conditions=True)
    },
    "controlnets": lambda: {"controlnet": several_controlnets()},
    "xl controlnet": lambda: {"controlnet": pairs.controlnets("xl", 5)},
    "means": lambda: {"vae": pairs.vaes("means")},
    "tiny vae": lambda: {"vae": pairs.vaes("tiny")},
    "asymmetric vae": lambda: {"vae": pairs.vaes("asymmetric")},
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
    "image, tiny vae": ("Img2Img", "sd", "tiny vae", {**ONE, "image": IMAGE}),
    "inpaint 9, asymmetric vae": (
        "Inpaint",
        "inpaint",
        "asymmetric vae",
        {"prompt": "a cat", **INPAINT},
    ),
    "inpaint 9, weak": ("Inpaint", "inpaint", "none", {**ONE, **INPAINT, "strength": 0.6}),
    "inpaint 9, encoded": (
        "Inpaint",
        "inpaint",
        "none",
        {**ONE, **INPAINT, "masked_image_latents": LATENTS},
    ),
    "pix2pix": ("InstructPix2Pix", "pix2pix", "none", EDIT),
    "pix2pix, no guidance": (
        "InstructPix2Pix",
        "pix2pix",
        "none",
        {**ONE, "image": IMAGE, "image_guidance_scale": 0.5},
    ),
    "upscale": ("Upscale", "upscale", "none", {**ONE, "image": IMAGE, "noise_level": 33}),
    "depth": (
        "Depth2Img",
        "depth",
        "none",
        {**ONE, "image": IMAGE, "depth_map": pixels(3, 20, 20)[:, 0]},
    ),
    "control": ("ControlNet", "sd", "controlnet", {**TWO, "image": CONTROL, **WINDOW}),
    "control, guess": (
        "ControlNet",
        "sd",
        "controlnet",
        {**ONE, "image": CONTROL, "guess_mode": True},
    ),
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
    "controls, an image for each prompt": (
        *("ControlNet", "sd", "controlnets"),
        {**TWO, "image": [[CONTROL, SECOND_CONTROL], [IMAGE, CONTROL]]},
    ),
    "control image": ("ControlNetImg2Img", "sd", "controlnet", {**ONE, **LED}),
    "control inpaint 4": ("ControlNetInpaint", "sd", "controlnet", {**ONE, **INPAINT, **LED}),
    "control inpaint 9": (
        "ControlNetInpaint",
        "inpaint",
        "controlnet",
        {**ONE, **INPAINT, **LED, "strength": 0.6},
    ),
    "xl": ("XL", "xl", "none", TWO),
    "xl, negative": (
        "XL",
        "xl",
        "none",
        {**TWO, "prompt_2": ["u", "v"], "negative_prompt": "x", **SIZES},
    ),
    "xl, two negatives": (
        "XL",
        "xl",
        "none",
        {**TWO, "negative_prompt": "x", "negative_prompt_2": "y"},
    ),
    "xl, encoded negative": ("XL", "xl", "encoded negative", TWO),
    "xl, clip_skip": ("XL", "xl", "none", {**TWO, "clip_skip": 1, "negative_prompt": "x"}),
    "xl, rescale": ("XL", "xl", "none", {**TWO, "guidance_rescale": 0.5}),
    "xl, crops": (
        "XL",
        "xl",
        "none",
        {**TWO, **CROPS, **SIZES, "original_size": (50, 60), "target_size": (7, 8)},
    ),
    "xl, first part": ("XL", "xl", "none", {**ONE, "denoising_end": 0.6}),
    "xl image": (
        "XLImg2Img",
        "xl",
        "none",
        {**ONE, "image": IMAGE, "strength": 0.8, **SIZES, **CROPS},
    ),
    "xl image, scaled latents": (
        "XLImg2Img",
        "xl",
        "means",
        {**ONE, "image": IMAGE, "strength": 0.8},
    ),
    "refiner": (
        "XLImg2Img",
        "refiner",
        "refiner",
        {**ONE, "image": IMAGE, "strength": 0.8, **CROPS},
    ),
    "refiner, last part": (
        "XLImg2Img",
        "refiner",
        "refiner",
        {**ONE, "image": LATENTS, "denoising_start": 0.5},
    ),
    "refiner, middle part": (
        *("XLImg2Img", "refiner", "refiner"),
        {**ONE, "image": LATENTS, "denoising_start": 0.2, "denoising_end": 0.7},
    ),
    "xl inpaint 4": ("XLInpaint", "xl", "none", {**ONE, **INPAINT}),
    "xl inpaint 4, strong": ("XLInpaint", "xl", "none", {**ONE, **INPAINT, "strength": 1.0}),
    "xl inpaint 9": ("XLInpaint", "xl inpaint", "none", {**ONE, **INPAINT, "strength": 0.6}),
    "xl inpaint, last part": (
        "XLInpaint",
        "xl",
        "none",
        {**ONE, **INPAINT, "denoising_start": 0.4},
    ),
    "xl pix2pix": (
        "XLInstructPix2Pix",
        "xl pix2pix",
        "none",
        {**ONE, "image": IMAGE, "guidance_rescale": 0.4},
    ),
    "cosxl": ("XLInstructPix2Pix", "xl pix2pix", "cosxl", {**ONE, "image": IMAGE}),
    "xl control": (
        "XLControlNet",
        "xl",
        "xl controlnet",
        {**TWO, "image": CONTROL, **SIZES, **WINDOW},
    ),
    "xl control, guess": (
        "XLControlNet",
        "xl",
        "xl controlnet",
        {**ONE, "image": CONTROL, "guess_mode": True},
    ),
    "xl control image": ("XLControlNetImg2Img", "xl", "xl controlnet", {**ONE, **LED, **SIZES}),
    "xl control inpaint": ("XLControlNetInpaint", "xl", "xl controlnet", {**ONE, **INPAINT, **LED}),
    "lcm": ("LatentConsistencyModel", "lcm", "lcm", TWO),
    "lcm image": ("LatentConsistencyModelImg2Img", "lcm", "lcm", {**ONE, "image": IMAGE}),
    "lcm, original steps": (
        "LatentConsistencyModel",
        "lcm",
        "lcm",
        {**ONE, "original_inference_steps": 20},
    ),
}


def make(name: str, scheduler: tuple[Any, Any] | None = None) -> tuple[Any, Any, dict[str, Any]]:
    """Two pipelines for a case, and the arguments of their calls."""
    short, unet, parts, arguments = CASES[name]
    full = f"{short}Pipeline" if short.startswith("Latent") else f"StableDiffusion{short}Pipeline"
    theirs, ours = pairs.build(
        full, unet, **PARTS[parts]() | ({"scheduler": scheduler} if scheduler else {})
    )
    return theirs, ours, {"num_inference_steps": 4, "output_type": "latent", **arguments}


def results(theirs: Any, ours: Any, arguments: dict[str, Any], seeds: int = 0) -> tuple[Any, Any]:
    """What both return with the same seed, or with one seed for each of `seeds` images."""
    first, second = (
        pipe(**arguments, generator=[seeded(7 + i) for i in range(seeds)] if seeds else seeded(7))[
            0
        ]
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
def test_latents_are_equal_with_one_scheduler(name: str) -> None:
    """To the last bit in all cases but those where the number of threads decides how a sum is
    split."""
    scheduler = one_scheduler("LCMScheduler" if "lcm" in CASES[name][2] else "DDIMScheduler")
    theirs, ours = results(*make(name, scheduler))
    assert torch.equal(theirs, ours) or distance(theirs, ours) <= 1e-6


@pytest.mark.parametrize(
    "name", ["text", "image", "inpaint 4, weak", "pix2pix", "upscale", "refiner, middle part"]
)
@pytest.mark.parametrize(
    "kind",
    ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"],
)
def test_latents_agree_with_each_scheduler(name: str, kind: str) -> None:
    theirs, ours, arguments = make(name, pairs.schedulers(kind))
    assert distance(*results(theirs, ours, arguments)) <= ROUNDING


@pytest.mark.parametrize("name", ["lcm", "lcm image", "lcm, original steps"])
def test_latent_consistency_with_our_scheduler(name: str) -> None:
    theirs, ours, arguments = make(name)
    assert type(ours.scheduler) is weightport.LCMScheduler
    assert distance(*results(theirs, ours, arguments)) <= ROUNDING


def test_zero_terminal_signal_to_noise() -> None:
    """As Lin et al. (https://arxiv.org/abs/2305.08891) have it: both libraries' schedulers, and
    guidance rescaled."""
    options = {
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "prediction_type": "v_prediction",
    }
    theirs, ours, arguments = make(
        "text, linear projections", pairs.schedulers("DDIMScheduler", **options)
    )
    assert distance(*results(theirs, ours, {**arguments, "guidance_rescale": 0.7})) <= ROUNDING


@pytest.mark.parametrize("name", ["text", "image", "inpaint 9, weak", "control", "xl", "xl image"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(name: str, dtype: str) -> None:
    """Latents and images; SDXL's VAE computes in float32 where float16 would overflow, and goes
    back."""
    target = getattr(torch, dtype)
    theirs, ours, arguments = make(name, one_scheduler())
    for pipe in (theirs, ours):
        for part, model in pipe.components.items():
            if isinstance(model, torch.nn.Module):
                setattr(pipe, part, copy.deepcopy(model).to(target))
    first, second = results(theirs, ours, arguments)
    assert second.dtype is target
    assert distance(first.float(), second.float()) <= torch.finfo(target).eps
    first, second = results(theirs, ours, {**arguments, "output_type": "np"})
    assert np.abs(first - second).max() <= torch.finfo(target).eps
    assert ours.vae.dtype is target


@pytest.mark.parametrize(
    "name", ["text", "text, negative", "xl, two negatives", "inpaint 4, weak", "image"]
)
def test_a_list_of_generators_ties_seeds_to_images(name: str) -> None:
    theirs, ours, arguments = make(name, one_scheduler())
    count = 4 if CASES[name][3]["prompt"] == TWO["prompt"] else 2
    assert torch.equal(*results(theirs, ours, arguments, seeds=count))


def test_an_image_does_not_depend_on_its_batch() -> None:
    """Its seed decides, and the bits of sums that kernels split by the size of a batch."""
    _, ours, arguments = make("text")
    both = ours(**{**arguments, "prompt": "a cat"}, generator=[seeded(7), seeded(8)]).images
    for seed, image in zip((7, 8), both, strict=True):
        alone = ours(
            **{**arguments, "prompt": "a cat", "num_images_per_prompt": 1}, generator=seeded(seed)
        ).images
        assert distance(alone[0], image) <= ROUNDING


OTHERS = ["image, tiny vae", "inpaint 9, asymmetric vae"]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
@pytest.mark.parametrize(
    "name", ["text", "inpaint 4", "control", "xl image", "upscale", "lcm", *OTHERS]
)
def test_images_are_identical(name: str, output_type: str) -> None:
    scheduler = one_scheduler("LCMScheduler" if "lcm" in CASES[name][2] else "DDIMScheduler")
    theirs, ours, arguments = make(name, scheduler)
    for mine, their in zip(
        *results(theirs, ours, {**arguments, "output_type": output_type}), strict=True
    ):
        assert type(mine) is type(their)
        assert_same_levels(np.asarray(mine), np.asarray(their))


def assert_same_levels(mine: np.ndarray[Any, Any], their: np.ndarray[Any, Any]) -> None:
    """Identical images, but for a value on the edge of two levels: the place of a tensor in memory
    decides kernels."""
    if mine.dtype.kind == "f":
        np.testing.assert_allclose(mine, their, rtol=0, atol=1e-6)
        return
    apart = np.abs(mine.astype(int) - their)
    assert apart.max() <= 1
    assert np.count_nonzero(apart) <= apart.size / 1000


def picture(seed: int, size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    channels = () if mode == "L" else (3,)
    values = np.random.default_rng(seed).integers(
        0, 256, (size[1] // 4, size[0] // 4, *channels), dtype=np.uint8
    )
    return Image.fromarray(values).resize(size)


@pytest.mark.parametrize(
    "name", ["image", "inpaint 4", "inpaint 9, weak", "pix2pix", "upscale", "control", "xl image"]
)
def test_pil_images_go_in_and_come_out_identical(name: str) -> None:
    theirs, ours, arguments = make(name, one_scheduler())
    arguments |= {"output_type": "pil", "image": picture(1, (37, 33))}
    if "mask_image" in arguments:
        arguments["mask_image"] = picture(2, (37, 33), "L")
    for mine, their in zip(*results(theirs, ours, arguments), strict=True):
        assert mine.size == their.size
        assert_same_levels(np.asarray(mine), np.asarray(their))


@pytest.mark.parametrize("name", ["inpaint 4", "xl inpaint 9"])
def test_padding_mask_crop_paints_the_surroundings_only(name: str) -> None:
    theirs, ours, arguments = make(name, one_scheduler())
    mask = Image.new("L", (60, 44))
    mask.paste(255, (10, 8, 22, 30))
    arguments |= {
        "image": picture(1, (60, 44)),
        "mask_image": mask,
        "padding_mask_crop": 4,
        "output_type": "pil",
    }
    for mine, their in zip(*results(theirs, ours, arguments), strict=True):
        assert_same_levels(np.asarray(mine), np.asarray(their))


def test_clip_skip_works_where_upstream_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.6 took away what diffusers reaches for (diffusers #14124); given back, both
    agree."""
    theirs, ours, arguments = make("text, negative", one_scheduler())
    arguments["clip_skip"] = 1
    mine = ours(**arguments, generator=seeded(7))[0]
    if not hasattr(theirs.text_encoder, "text_model"):
        with pytest.raises(AttributeError, match="text_model"):
            theirs(**arguments, generator=seeded(7))
        monkeypatch.setattr(
            type(theirs.text_encoder), "text_model", property(lambda self: self), raising=False
        )
    assert torch.equal(mine, theirs(**arguments, generator=seeded(7))[0])
    assert not torch.equal(mine, ours(**{**arguments, "clip_skip": None}, generator=seeded(7))[0])


@pytest.mark.parametrize("name", ["text", "xl control, guess"])
def test_packed_pipelines_differ_by_rounding(name: str) -> None:
    theirs, ours, arguments = make(name, one_scheduler())
    for part in {"unet", "controlnet"} & ours.components.keys():  # others share them
        setattr(ours, part, copy.deepcopy(getattr(ours, part)))
    ours.pack()
    assert type(ours.unet.conv_in.forward).__name__ == "PackedConvolution"
    assert distance(*results(theirs, ours, arguments)) <= ROUNDING


def test_embeddings_take_the_place_of_prompts() -> None:
    _, ours, arguments = make("xl, two negatives")
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    embeds = ours.encode_prompt(TWO["prompt"], negative_prompt="x", negative_prompt_2="y")
    given = {"num_inference_steps": 4, "output_type": "latent", "num_images_per_prompt": 2}
    given |= dict(zip(names, embeds, strict=True))
    assert torch.equal(
        ours(**given, generator=seeded(7)).images, ours(**arguments, generator=seeded(7)).images
    )
    _, sd, arguments = make("text")
    positive, negative = sd.encode_prompt(TWO["prompt"])
    given = {key: value for key, value in arguments.items() if key != "prompt"}
    given |= {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    assert torch.equal(sd(**given, generator=seeded(7))[0], sd(**arguments, generator=seeded(7))[0])


@pytest.mark.parametrize("name", ["text", "xl"])
def test_parts_that_a_run_does_not_need_may_be_none(name: str) -> None:
    """Text encoders where embeddings are given, the VAE where latents are asked for."""
    theirs, ours, arguments = make(name, one_scheduler())
    names = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )
    given = dict(zip(names, ours.encode_prompt(arguments.pop("prompt")), strict=False)) | arguments
    unused = {
        part: None
        for part in ours.components
        if part.startswith(("vae", "text_encoder", "tokenizer"))
    }
    lean = [type(pipe)(**{**pipe.components, **unused}) for pipe in (theirs, ours)]
    lean[0].set_progress_bar_config(disable=True)
    assert torch.equal(*results(lean[0], lean[1], given))
    with pytest.raises(
        ValueError, match="there is no tokenizer or no text encoder; give embeddings"
    ):
        lean[1](**arguments, prompt="a cat")
    with pytest.raises(ValueError, match="the pipeline has no vae"):
        lean[1](**{**given, "output_type": "pil"})
    with pytest.raises(ValueError, match="the pipeline has no unet, scheduler"):
        type(ours)(**{**ours.components, "unet": None, "scheduler": None})(
            **arguments, prompt="a cat"
        )


@pytest.mark.parametrize("name", ["text", "xl", "image"])
def test_the_dtype_of_the_unet_decides(name: str) -> None:
    """Where a dict gave each part its own: upstream stops at the first matrix."""
    theirs, ours, arguments = make(name, one_scheduler())
    whole = ours(**arguments, generator=seeded(7))[0]
    for pipe in (theirs, ours):
        pipe.unet = copy.deepcopy(pipe.unet).to(torch.bfloat16)
    latents = ours(**arguments, generator=seeded(7))[0]
    assert latents.dtype is torch.bfloat16
    assert latents.isfinite().all()
    with pytest.raises(RuntimeError, match="dtype"):
        theirs(**arguments, generator=seeded(7))
    if name != "image":
        assert distance(whole, latents.float()) < 1


def test_callbacks_see_and_change_tensors_and_stop_the_run() -> None:
    def no_guidance_after_two_steps(
        pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        seen.append((type(pipe).__name__, step, int(timestep), sorted(tensors)))
        if step == 1:
            pipe._guidance_scale = 0.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        return tensors

    def stop_after_two_steps(
        pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return tensors

    theirs, ours, arguments = make("text", one_scheduler())
    for callback in (no_guidance_after_two_steps, stop_after_two_steps):
        seen: list[Any] = []
        arguments |= {
            "callback_on_step_end": callback,
            "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        }
        assert torch.equal(*results(theirs, ours, arguments))
        assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    with pytest.raises(ValueError, match="nonsense"):
        ours(**{**arguments, "callback_on_step_end_tensor_inputs": ["nonsense"]})


def test_custom_timesteps_and_sigmas() -> None:
    steps, levels = [900, 600, 300, 5], [10.0, 5.0, 2.0, 0.5, 0.0]
    for given in ({"timesteps": steps}, {"sigmas": levels}):
        theirs, ours, arguments = make("xl", one_scheduler("EulerDiscreteScheduler"))
        assert torch.equal(*results(theirs, ours, {**arguments, **given}))
    _, ours, arguments = make("text")
    with pytest.raises(ValueError, match="DDIMScheduler does not take sigmas"):
        ours(**arguments, sigmas=levels)
    with pytest.raises(ValueError, match="either timesteps or sigmas"):
        ours(**arguments, sigmas=levels, timesteps=steps)


@pytest.mark.parametrize("vae", ["tiling", "slicing"])
def test_vae_tiling_and_slicing(vae: str) -> None:
    theirs, ours, arguments = make("image", one_scheduler())
    arguments |= {"image": picture(3, (52, 44)), "output_type": "pt"}
    try:
        for pipe in (theirs, ours):
            getattr(pipe.vae, f"enable_{vae}")()
        first, second = results(theirs, ours, arguments)
    finally:
        for pipe in (theirs, ours):
            getattr(pipe.vae, f"disable_{vae}")()
    assert distance(first, second) <= ROUNDING
    whole = ours(**arguments, generator=seeded(7))[0]
    assert (distance(whole, second) <= ROUNDING) == (vae == "slicing")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("text", {"prompt": None}, "give a prompt or prompt_embeds"),
        ("text", {"height": 30}, "height = 30"),
        ("text", {"height": 32.0}, "height = 32.0 must be a whole multiple of 8"),
        ("text", {"latents": torch.zeros(1, 4, 8, 8)}, "latents must have the shape"),
        ("text", {"latents": torch.zeros(4, 4, 2, 4)}, "latents must have the shape"),
        ("text", {"output_type": "jpg"}, "output_type = 'jpg'"),
        ("text", {"negative_prompt": ["a", "b", "c"]}, "3 negative prompts"),
        ("text", {"generator": [seeded(1)] * 3}, "3 generators are given for 4 images"),
        ("text", {"prompt_embeds": torch.zeros(1, 12, 16)}, "not both"),
        ("text", {"num_inference_steps": 0}, "num_inference_steps = 0"),
        ("text", {"num_images_per_prompt": 0}, "num_images_per_prompt = 0"),
        ("text", {"clip_skip": -1}, "clip_skip = -1"),
        ("text", {"clip_skip": 9}, "clip_skip = 9 leaves no layer"),
        ("xl", {"clip_skip": 9}, "clip_skip = 9 leaves no layer"),
        ("image", {"strength": 1.5}, "strength = 1.5"),
        ("image", {"strength": 0.0}, "no step is left"),
        ("image", {"image": None}, "image is needed"),
        ("depth", {"depth_map": None}, "depth_map is needed"),
        ("upscale", {"noise_level": 351}, "noise_level = 351"),
        ("controls", {"image": [CONTROL]}, "1 values for 2 ControlNets"),
        (
            "controls",
            {"control_guidance_start": 0.9, "control_guidance_end": 0.5},
            "control_guidance_start",
        ),
        ("xl", {"prompt": None, "prompt_embeds": torch.zeros(1, 12, 32)}, "pooled_prompt_embeds"),
        ("refiner, middle part", {"denoising_end": 0.1}, "denoising_start = 0.2"),
    ],
)
def test_contradictions_are_named(name: str, arguments: dict[str, Any], message: str) -> None:
    _, ours, usual = make(name)
    with pytest.raises(ValueError, match=message):
        ours(**{**usual, **arguments})


def test_a_unet_of_another_task_is_named() -> None:
    _, ours, arguments = make("text")
    ours.unet = type(ours.unet).from_config({**ours.unet.config, "in_channels": 9})
    with pytest.raises(ValueError, match="4 channels are given, but this model takes 9"):
        ours(**arguments)


def test_grey_images_become_colours() -> None:
    _, ours, arguments = make("image")
    grey = picture(3, (32, 32)).convert("L")
    images = [
        ours(**{**arguments, "image": image}, generator=seeded(7))[0]
        for image in (grey, grey.convert("RGB"))
    ]
    assert torch.equal(*(torch.as_tensor(np.asarray(image)) for image in images))


def test_a_constant_depth_map_gives_an_image() -> None:
    _, ours, arguments = make("depth")
    constant = torch.ones_like(arguments["depth_map"])
    result = ours(
        **{**arguments, "depth_map": constant, "output_type": "latent"}, generator=seeded(7)
    )[0]
    assert result.isfinite().all()


def test_unknown_arguments_are_refused() -> None:
    _, ours, arguments = make("text")
    with pytest.raises(TypeError, match="strenght"):
        ours(**arguments, strenght=1)


def test_signatures_are_those_of_diffusers() -> None:
    assert len(PIPELINES) == 27
    for name in PIPELINES:
        theirs = inspect.signature(getattr(diffusers, name).__call__).parameters
        mine = inspect.signature(getattr(weightport, name).__call__).parameters
        old = {"kwargs", "callback", "callback_steps"}
        shared = [key for key in theirs if key not in old]
        assert [key for key in mine if key in shared] == shared, name
        for key in shared:
            if key != "callback_on_step_end_tensor_inputs":
                assert mine[key].default == theirs[key].default, (name, key)
        tensors = {*getattr(getattr(diffusers, name), "_callback_tensor_inputs", ())}
        tensors -= {
            "negative_add_time_ids",
            "add_neg_time_ids",
        }  # which are the first rows of add_time_ids
        assert tensors <= {*getattr(weightport, name)._callback_tensor_inputs}, name
        init = inspect.signature(getattr(diffusers, name).__init__).parameters
        assert set(inspect.signature(getattr(weightport, name).__init__).parameters) == set(init), (
            name
        )


@pytest.mark.parametrize("name", ["text", "xl, two negatives", "refiner", "control"])
def test_a_saved_pipeline_gives_the_same_in_both_libraries(name: str, tmp_path: Path) -> None:
    _, ours, arguments = make(name)
    ours.save_pretrained(tmp_path)
    expected = ours(**arguments, generator=seeded(7))[0]
    again: Any = weightport.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is type(ours)
    # mapped weights are aligned in another way, for which kernels may sum in another order
    assert distance(again(**arguments, generator=seeded(7))[0], expected) <= ROUNDING
    theirs = getattr(diffusers, type(ours).__name__).from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    assert distance(theirs(**arguments, generator=seeded(7))[0], expected) <= ROUNDING


def test_several_controlnets_are_saved_and_loaded_by_both_libraries(tmp_path: Path) -> None:
    theirs, ours, arguments = make("controls")
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    expected = ours(**arguments, generator=seeded(7))[0]
    for folder in (tmp_path / "theirs", tmp_path / "ours"):
        assert sorted(path.name for path in folder.glob("controlnet*")) == [
            "controlnet",
            "controlnet_1",
        ]
        entry = json.loads((folder / "model_index.json").read_text())["controlnet"]
        assert entry == ["diffusers", "MultiControlNetModel"]
        again: Any = weightport.DiffusionPipeline.from_pretrained(folder)
        for mine, saved in zip(again.controlnet.nets, ours.controlnet.nets, strict=True):
            assert torch.equal(mine.conv_in.weight, saved.conv_in.weight)
        assert distance(again(**arguments, generator=seeded(7))[0], expected) <= ROUNDING
    loaded = diffusers.StableDiffusionControlNetPipeline.from_pretrained(tmp_path / "ours")
    loaded.set_progress_bar_config(disable=True)
    assert distance(loaded(**arguments, generator=seeded(7))[0], expected) <= ROUNDING
    half = weightport.DiffusionPipeline.from_pretrained(
        tmp_path / "ours", dtype={"controlnet": torch.float16}
    )
    assert [net.dtype for net in half.controlnet.nets] == [torch.float16] * 2


def test_one_repository_serves_every_task(tmp_path: Path) -> None:
    """By another class's `from_pretrained`, or with the components of a pipeline that is there."""
    _, ours, arguments = make("image")
    text = weightport.StableDiffusionPipeline(**ours.components, requires_safety_checker=False)
    text.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no safety checker"):
        loaded = weightport.StableDiffusionImg2ImgPipeline.from_pretrained(
            tmp_path, safety_checker=None, requires_safety_checker=True
        )
    shared = weightport.StableDiffusionImg2ImgPipeline(
        **text.components, requires_safety_checker=False
    )
    assert shared.unet is text.unet
    expected = ours(**arguments, generator=seeded(7))
    assert torch.equal(shared(**arguments, generator=seeded(7)).images, expected.images)
    assert distance(loaded(**arguments, generator=seeded(7)).images, expected.images) <= ROUNDING
    assert loaded(**arguments, generator=seeded(7)).nsfw_content_detected is None
    plain: Any = shared(**arguments, generator=seeded(7), return_dict=False)
    images, flags = plain
    assert torch.equal(images, expected.images)
    assert flags is None


def test_the_safety_checker_blackens_what_it_flags() -> None:
    class Checker:
        def __call__(self, images: Any, clip_input: Any) -> tuple[Any, list[bool]]:
            images[1] = 0
            return images, [False, True]

    class Extractor:
        def __call__(self, images: Any, return_tensors: str) -> Any:
            assert [image.size for image in images] == [(32, 32)] * 2
            return SimpleNamespace(pixel_values=torch.zeros(2, 3, 4, 4))

    _, ours, arguments = make("inpaint 4")
    checked = type(ours)(
        **{**ours.components, "safety_checker": Checker(), "feature_extractor": Extractor()}
    )
    output = checked(**{**arguments, "output_type": "np"}, generator=seeded(7))
    plain = ours(**{**arguments, "output_type": "np"}, generator=seeded(7))
    assert output.nsfw_content_detected == [False, True]
    assert plain.nsfw_content_detected is None
    assert np.array_equal(output.images[0], plain.images[0])
    assert not output.images[1].any()
    with pytest.raises(ValueError, match="feature_extractor"):
        type(ours)(**{**ours.components, "safety_checker": Checker()})
