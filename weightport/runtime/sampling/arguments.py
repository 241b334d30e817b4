"""The arguments of the pipelines' calls, in the parts that sampling is made of; each pipeline takes
those that make sense for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..images import ImageInput, OutputType

Texts = str | list[str]
Size = tuple[int, int]
Generator = torch.Generator | list[torch.Generator] | None
Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any] | None]
StepCallback = Callable[[int, Any, Tensor], None]
# what diffusers' calls take and ours refuse, rather than to ignore it
REFUSED = (
    "ip_adapter_image",
    "ip_adapter_image_embeds",
    "negative_ip_adapter_image",
    "negative_ip_adapter_image_embeds",
)


@dataclass(frozen=True)
class Prompts:
    """What to draw.

    Attributes:
        prompt: one text, or one for each image.
        prompt_2: the text for the second text encoder, by default the same.
        prompt_3: the text for the third one of SD 3, by default the first.
        negative_prompt: what not to draw.
        negative_prompt_2: for the second text encoder, by default the same.
        negative_prompt_3: for the third one, by default the first.
        prompt_embeds: in place of the prompt, (b, tokens, d).
        pooled_prompt_embeds: for models that take pooled ones too, (b, d).
        num_images_per_prompt: images for each prompt.
        clip_skip: how many of the text encoder's last layers to leave out.
        max_sequence_length: tokens for T5.
    """

    prompt: Texts | None = None
    prompt_2: Texts | None = None
    prompt_3: Texts | None = None
    negative_prompt: Texts | None = None
    negative_prompt_2: Texts | None = None
    negative_prompt_3: Texts | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    num_images_per_prompt: int = 1
    clip_skip: int | None = None
    max_sequence_length: int = 512


@dataclass(frozen=True)
class Steps:
    """Which timesteps a run visits.

    Attributes:
        num_inference_steps: of the scheduler.
        original_inference_steps: the steps that an LCM was distilled from.
        timesteps: take these in place of the scheduler's spacing.
        sigmas: likewise, as noise levels.
        mu: how far a flow is shifted towards noise, where the image's size is not to decide that.
        strength: how much of the image to replace, from 0 to 1.
        denoising_start: skip this fraction of the run: another model did it.
        denoising_end: stop after this fraction of the run, for another model to go on.
    """

    num_inference_steps: int = 50
    original_inference_steps: int | None = None
    timesteps: list[int] | None = None
    sigmas: list[float] | None = None
    mu: float | None = None
    strength: float = 0.8
    denoising_start: float | None = None
    denoising_end: float | None = None


@dataclass(frozen=True)
class Guidance:
    """How strongly the prompt leads.

    Attributes:
        guidance_scale: weight of the prompt against the negative prompt; not above 1 means no
            guidance.
        image_guidance_scale: weight of the image, for InstructPix2Pix.
        guidance_rescale: share of the guided prediction that gets the deviation of the unguided one
            (Lin et al., https://arxiv.org/abs/2305.08891, section 3.4).
        true_cfg_scale: weight of the prompt against the negative prompt, for a model that has the
            guidance scale as a condition.
        skip_guidance_layers: the numbers of blocks without which the model predicts once more, and
            is led away from that.
        skip_layer_guidance_scale: how strongly.
        skip_layer_guidance_stop: the fraction of the run at which that ends.
        skip_layer_guidance_start: at which it begins.
    """

    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5
    guidance_rescale: float = 0.0
    true_cfg_scale: float = 1.0
    skip_guidance_layers: Sequence[int] | None = None
    skip_layer_guidance_scale: float = 2.8
    skip_layer_guidance_stop: float = 0.2
    skip_layer_guidance_start: float = 0.01


@dataclass(frozen=True)
class Draws:
    """What is random.

    Attributes:
        generator: one for all, or a list with one for each image.
        eta: the share of noise in DDIM.
    """

    generator: Generator = None
    eta: float = 0.0


@dataclass(frozen=True)
class Beginning:
    """What the first latents come from.

    Attributes:
        image: the image to start from, see `VaeImageProcessor.preprocess`.
        mask_image: white where to paint, black where to keep.
        masked_image_latents: the encoded image without what the mask covers, in place of encoding
            it.
        depth_map: (b, h, w), nearer is higher.
        latents: noise to start from in place of random.
        height: of the result in pixels, by default what the UNet was trained for.
        width: likewise.
        padding_mask_crop: paint only the surroundings of the mask, this many pixels wider, at full
            size.
        noise_level: the noise added to the image that is enlarged.
        max_area: of Flux Kontext's result in pixels, whatever its height and width.
        _auto_resize: bring the image that it sees to one of the sizes that it was trained on.
    """

    image: ImageInput | None = None
    mask_image: ImageInput | None = None
    masked_image_latents: Tensor | None = None
    depth_map: Tensor | None = None
    latents: Tensor | None = None
    height: int | None = None
    width: int | None = None
    padding_mask_crop: int | None = None
    noise_level: int = 20
    max_area: int = 1024**2
    _auto_resize: bool = True


@dataclass(frozen=True)
class Control:
    """How ControlNets lead.

    Attributes:
        control_image: what a ControlNet follows, a list for several; text-to-image calls it
            `image`.
        controlnet_conditioning_scale: weight of the ControlNet, or of each.
        guess_mode: the ControlNet acts on the prompted half only, and leads even without a prompt.
        control_guidance_start: the fraction of the run at which it begins to act, or of each.
        control_guidance_end: at which it ends.
    """

    control_image: ImageInput | Sequence[ImageInput] | None = None
    controlnet_conditioning_scale: float | list[float] = 1.0
    guess_mode: bool = False
    control_guidance_start: float | list[float] = 0.0
    control_guidance_end: float | list[float] = 1.0


@dataclass(frozen=True)
class Described:
    """What SDXL is told of the image that it seems to be trained on.

    Attributes:
        original_size: (height, width) that the training image is said to have had.
        crops_coords_top_left: where it is said to have been cropped.
        target_size: the size it is said to have been scaled to.
        aesthetic_score: how beautiful it is said to be, for the refiner.
    """

    original_size: Size | None = None
    crops_coords_top_left: Size = (0, 0)
    target_size: Size | None = None
    negative_original_size: Size | None = None
    negative_crops_coords_top_left: Size = (0, 0)
    negative_target_size: Size | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5


@dataclass(frozen=True)
class Result:
    """What the caller gets.

    Attributes:
        output_type: pil, np, pt or latent.
        callback_on_step_end: called as (pipeline, step, timestep, tensors); returns the tensors to
            go on with.
        callback_on_step_end_tensor_inputs: the names of the tensors it gets; one that has
            `tensor_inputs` gets those.
        callback: the older form, called as (step, timestep, latents); it changes nothing.
        callback_steps: how often that is called, every step by default.
    """

    output_type: OutputType = "pil"
    callback_on_step_end: Callback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    callback: StepCallback | None = None
    callback_steps: int = 1


@dataclass(frozen=True)
class Arguments:
    """All arguments of a call."""

    prompts: Prompts = field(default_factory=Prompts)
    steps: Steps = field(default_factory=Steps)
    guidance: Guidance = field(default_factory=Guidance)
    draws: Draws = field(default_factory=Draws)
    beginning: Beginning = field(default_factory=Beginning)
    control: Control = field(default_factory=Control)
    described: Described = field(default_factory=Described)
    result: Result = field(default_factory=Result)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Arguments:
        """The arguments with these names.

        Raises:
            ValueError: one of them is not supported.
        """
        for name in REFUSED:
            require(given.get(name) is None, f"{name} is not supported")
        wanted = getattr(given.get("callback_on_step_end"), "tensor_inputs", None)
        if wanted is not None:
            given = {**given, "callback_on_step_end_tensor_inputs": wanted}
        return cls(
            _part(Prompts, given),
            _part(Steps, given),
            _part(Guidance, given),
            _part(Draws, given),
            _part(Beginning, given),
            _part(Control, given),
            _part(Described, given),
            _part(Result, given),
        )


Part = TypeVar("Part")


def _part(kind: type[Part], given: Mapping[str, Any]) -> Part:
    names = [one.name for one in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: given[name] for name in names if name in given})


def require(holds: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not holds:
        raise ValueError(message)
