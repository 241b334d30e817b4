"""The pipelines of SD 3 and Flux against diffusers: same weights, same seed, the same bits in
float32, bfloat16 and float16, with the schedulers of each library."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image

import weightport
from weightport.comparison.schedulers import OF_FLOWS, Experiment, compare
from weightport.mappings.facts import facts
from weightport.recipe import Maker, Recipe

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


@pytest.fixture(autouse=True)
def small_kontext(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images that Kontext was trained on are large for a VAE that halves but once."""
    sizes = [(24, 40), (32, 32), (40, 24)]
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", sizes)
    monkeypatch.setitem(facts("flux")["kontext"], "sizes", sizes)


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
NEGATIVE_ONE = {"negative_prompt": "x", "true_cfg_scale": 3.0}
CONTROL_32_24 = CONTROL[..., :24]
PICTURE = Image.fromarray((CONTROL[0].permute(1, 2, 0).numpy() * 255).astype("uint8"))
KONTEXT = {"image": PICTURE, "max_area": 32 * 24}
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
    "flux fill": ("FluxFill", "fill", "dynamic", {**TWO, **INPAINT}),
    "flux fill, weak": ("FluxFill", "fill", "none", {**ONE, **INPAINT, "strength": 0.6}),
    "flux control": ("FluxControl", "control", "dynamic", {**TWO, "control_image": CONTROL_32_24}),
    "flux control, pictures": ("FluxControl", "control", "none", {**ONE, "control_image": PICTURE}),
    "flux kontext": ("FluxKontext", "dev", "dynamic", {**ONE, **NEGATIVE_ONE, **KONTEXT}),
    "flux kontext, as it is": (
        *("FluxKontext", "schnell", "none"),
        {**TWO, **KONTEXT, "_auto_resize": False},
    ),
    "flux kontext, no image": ("FluxKontext", "dev", "none", {**ONE, "max_area": 32 * 24}),
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


@pytest.mark.parametrize("name", ["sd3", "sd3 image, weak", "sd3 inpaint 16", "flux fill, weak"])
def test_the_scheduler_of_diffusers_serves_as_well(name: str) -> None:
    theirs, ours, arguments = make(name)
    ours.scheduler = copy.deepcopy(theirs.scheduler)
    expected, found = results(theirs, ours, arguments)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    [
        *("sd3, negative", "sd3 image", "sd3 inpaint 16", "sd3 inpaint 33"),
        *("flux, negative", "flux image, weak", "flux inpaint", "flux fill", "flux control"),
        "flux kontext, as it is",
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


# --- from repositories, and to other pipelines ----------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [("StableDiffusion3", {}), ("StableDiffusion3", NO_T5), ("Flux", {})],
    ids=["sd3", "sd3 without t5", "flux"],
)
def test_a_saved_pipeline_gives_the_same_in_both_libraries(
    name: str, parts: dict[str, Any], tmp_path: Path
) -> None:
    kind = "dev" if name == "Flux" else "sd3"
    theirs, ours = pairs.build(f"{name}Pipeline", kind, **parts)
    arguments = {**ONE, "num_inference_steps": 2, "output_type": "latent"}
    expected, _ = results(theirs, ours, arguments)
    ours.save_pretrained(tmp_path / "ours", variant="fp32")
    theirs.save_pretrained(tmp_path / "theirs", variant="fp32")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        again: Any = weightport.DiffusionPipeline.from_pretrained(folder, variant="fp32")
        assert type(again) is type(ours)
        assert [one is None for one in again.components.values()] == [
            one is None for one in ours.components.values()
        ]
        absent = dict.fromkeys(parts)  # diffusers wants to be told
        library = getattr(diffusers, f"{name}Pipeline").from_pretrained(
            folder, variant="fp32", **absent
        )
        library.set_progress_bar_config(disable=True)
        for pipe in (again, library):
            found = pipe(**arguments, generator=seeded(7))[0]
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        half = weightport.DiffusionPipeline.from_pretrained(
            folder, variant="fp32", dtype=torch.bfloat16
        )
        assert half.dtype is torch.bfloat16


@pytest.mark.parametrize("family", ["StableDiffusion3", "Flux"])
def test_pipelines_of_other_tasks_share_the_components(family: str) -> None:
    _, ours = pairs.build(f"{family}Pipeline", "dev" if family == "Flux" else "sd3")
    image = weightport.AutoPipelineForImage2Image.from_pipe(ours)
    mask = weightport.AutoPipelineForInpainting.from_pipe(image)
    text = weightport.AutoPipelineForText2Image.from_pipe(mask)
    kinds = [type(one).__name__ for one in (image, mask, text)]
    assert kinds == [f"{family}{task}Pipeline" for task in ("Img2Img", "Inpaint", "")]
    assert text.components == ours.components


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository of a tiny Flux."""
    folder = tmp_path_factory.mktemp("flux") / "repo"
    with torch.no_grad():
        _, ours = pairs.build("FluxPipeline", "dev", **PARTS["dynamic"]())
        ours.save_pretrained(folder)
    return folder


def test_generate_makes_an_image_and_makes_it_again(flux: Path) -> None:
    recipe = Recipe(str(flux), "a cat", steps=2, size=(32, 16), scheduler="dpm++2m")
    image, made = Maker(recipe, quiet=True).make(3)
    again, _ = Maker(made, quiet=True).make(3)
    assert image.size == (32, 16)
    assert image.tobytes() == again.tobytes()
    with pytest.raises(ValueError, match="ddim cannot serve a model of a flow"):
        Maker(replace(recipe, scheduler="ddim"), quiet=True)


def test_schedulers_of_flows_converge_to_one_image(flux: Path, tmp_path: Path) -> None:
    pipe: Any = weightport.DiffusionPipeline.from_pretrained(flux)
    pipe.set_progress_bar_config(disable=True)
    experiment = Experiment(("a fox",), steps=(4, 32), size=(32, 32), reference_steps=64)
    comparison = compare(pipe, experiment, tmp_path)
    assert {run.scheduler for run in comparison.runs} == set(OF_FLOWS)
    for few, many in zip(comparison.runs[::2], comparison.runs[1::2], strict=True):
        assert many.rmse < few.rmse / 2, few.scheduler


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("sd3", {"height": 30}, "height = 30 must be a whole multiple of 4"),
        ("sd3", {"max_sequence_length": 600}, "max_sequence_length = 600 must be 1 to 512"),
        ("flux dev", {"prompt": None}, "give a prompt or prompt_embeds"),
        ("flux dev", {"latents": torch.zeros(2, 5, 64)}, "latents must have 48 patches"),
        ("flux dev", {"ip_adapter_image": CONTROL}, "ip_adapter_image is not supported"),
        ("flux fill", {"mask_image": None}, "mask_image is needed"),
        ("flux control", {"control_image": None}, "control_image is needed"),
    ],
)
def test_arguments_that_make_no_sense(name: str, changes: dict[str, Any], told: str) -> None:
    _, ours, arguments = make(name)
    with pytest.raises(ValueError, match=told):
        ours(**{**arguments, "num_images_per_prompt": 1, **changes})


def test_callbacks_see_and_change_what_diffusers_shows() -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {key: tensor * 1.01 for key, tensor in tensors.items()}

    for name in ("sd3", "flux dev"):
        theirs, ours, arguments = make(name)
        names = ours._callback_tensor_inputs
        arguments |= {
            "callback_on_step_end": change,
            "callback_on_step_end_tensor_inputs": list(names),
        }
        expected, found = results(theirs, ours, arguments)
        assert torch.equal(found, expected)


def test_flux_rounds_edges_down_with_a_warning() -> None:
    theirs, ours, arguments = make("flux dev")
    arguments |= {"height": 35, "width": 27}
    with pytest.warns(UserWarning, match="become"):
        expected, found = results(theirs, ours, arguments)
    assert torch.equal(found, expected)
