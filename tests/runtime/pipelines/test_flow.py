"""The pipelines of SD 3 and Flux against diffusers: same weights, same seed, the same bits in
float32, bfloat16 and float16, with the schedulers of each library."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from ...support import flow_pairs as pairs


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


IMAGE, CONTROL = pixels(9), pixels(10)
MASK = (pixels(8, 1) > 0.5).float()
SIZE = {"height": 32, "width": 24, "max_sequence_length": 9}
TWO = {"prompt": ["a cat", "dogs"], "num_images_per_prompt": 2, **SIZE}
ONE = {"prompt": "a cat", "num_images_per_prompt": 2, **SIZE}
NEGATIVE = {"negative_prompt": ["x", "why not"], "true_cfg_scale": 3.0}
NO_T5: dict[str, Any] = {"text_encoder_3": (None, None), "tokenizer_3": (None, None)}
SKIPPING = {
    "skip_guidance_layers": [1],
    "skip_layer_guidance_stop": 0.9,
    "skip_layer_guidance_scale": 1.5,
}
INPAINT = {"image": IMAGE, "mask_image": MASK}
PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "dynamic": lambda: {"scheduler": pairs.scheduler(**pairs.DYNAMIC)},
    "no t5": lambda: NO_T5,
    "karras": lambda: {"scheduler": pairs.scheduler(use_karras_sigmas=True)},
}
SD3 = "StableDiffusion3"
# name -> pipeline without its ending, transformer, parts, arguments of the call
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "sd3": (SD3, "sd3", "none", TWO),
    "sd3, negative": (
        SD3,
        "sd3",
        "none",
        {**TWO, "negative_prompt": ["x", ""], "prompt_3": ["u", "v"]},
    ),
    "sd3, no guidance": (SD3, "sd3", "none", {**ONE, "guidance_scale": 1.0}),
    "sd3, no t5": (SD3, "sd3", "no t5", {**ONE, "negative_prompt_2": "x"}),
    "sd3, dynamic": (SD3, "sd3", "dynamic", ONE),
    "sd3, mu": (SD3, "sd3", "dynamic", {**ONE, "mu": 0.7}),
    "sd3, sigmas": (SD3, "sd3", "none", {**ONE, "sigmas": [1.0, 0.7, 0.2]}),
    "sd3, clip_skip": (SD3, "sd3", "none", {**ONE, "clip_skip": 1, "negative_prompt": "x"}),
    "sd3, skipping": (SD3, "sd3", "none", {**TWO, **SKIPPING}),
    "sd3 image": (f"{SD3}Img2Img", "sd3", "none", {**TWO, "image": IMAGE}),
    "sd3 image, weak": (
        *(f"{SD3}Img2Img", "sd3", "dynamic"),
        {**ONE, "image": IMAGE, "strength": 0.45},
    ),
    "sd3 inpaint 16": (f"{SD3}Inpaint", "sd3", "none", {**TWO, **INPAINT}),
    "sd3 inpaint 16, strong": (f"{SD3}Inpaint", "sd3", "none", {**ONE, **INPAINT, "strength": 1.0}),
    "sd3 inpaint 33": (f"{SD3}Inpaint", "sd3 inpaint", "dynamic", {**ONE, **INPAINT}),
    "flux dev": ("Flux", "dev", "dynamic", TWO),
    "flux schnell": ("Flux", "schnell", "none", {**TWO, "prompt_2": ["u", "v"]}),
    "flux, negative": ("Flux", "dev", "dynamic", {**TWO, **NEGATIVE}),
    "flux, sigmas": ("Flux", "dev", "dynamic", {**ONE, "sigmas": [1.0, 0.7, 0.2]}),
    "flux, karras": ("Flux", "dev", "karras", ONE),
    "flux image": ("FluxImg2Img", "dev", "dynamic", {**TWO, "image": IMAGE}),
    "flux image, weak": (
        *("FluxImg2Img", "schnell", "none"),
        {**TWO, **NEGATIVE, "image": IMAGE, "strength": 0.45},
    ),
    "flux inpaint": ("FluxInpaint", "dev", "dynamic", {**TWO, **INPAINT}),
    "flux inpaint, strong": ("FluxInpaint", "dev", "none", {**ONE, **INPAINT, "strength": 1.0}),
}


def make(name: str, **parts: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Two pipelines for a case, and the arguments of their calls."""
    short, kind, which, arguments = CASES[name]
    theirs, ours = pairs.build(f"{short}Pipeline", kind, **(PARTS[which]() | parts))
    steps = {} if "sigmas" in arguments else {"num_inference_steps": 4}
    if short == "Flux" and "sigmas" in arguments:
        steps = {"num_inference_steps": 3}
    return theirs, ours, {**steps, "output_type": "latent", **arguments}


def results(theirs: Any, ours: Any, arguments: dict[str, Any], seeds: int = 0) -> tuple[Any, Any]:
    """What both return with the same seed, or with one seed for each of `seeds` images."""
    found = []
    for pipe in (theirs, ours):
        generators = [seeded(7 + i) for i in range(seeds)] if seeds else seeded(7)
        found.append(pipe(**arguments, generator=generators)[0])
    return found[0], found[1]


def cast(pipe: Any, dtype: torch.dtype) -> None:
    for part, model in pipe.components.items():
        if isinstance(model, torch.nn.Module):
            setattr(pipe, part, copy.deepcopy(model).to(dtype))


@pytest.mark.parametrize("name", CASES)
def test_latents_are_equal(name: str) -> None:
    theirs, ours, arguments = make(name)
    expected, found = results(theirs, ours, arguments)
    assert expected.isfinite().all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    [
        *("sd3, negative", "sd3 image", "sd3 inpaint 16", "sd3 inpaint 33"),
        *("flux, negative", "flux image, weak", "flux inpaint"),
    ],
)
def test_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    theirs, ours, arguments = make(name)
    for pipe in (theirs, ours):
        cast(pipe, dtype)
    expected, found = results(theirs, ours, arguments)
    assert found.dtype is dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["sd3", "sd3 image", "sd3 inpaint 16", "flux dev", "flux inpaint"])
def test_images_are_equal(name: str) -> None:
    theirs, ours, arguments = make(name)
    expected, found = results(theirs, ours, {**arguments, "output_type": "np"})
    np.testing.assert_array_equal(found, expected)
