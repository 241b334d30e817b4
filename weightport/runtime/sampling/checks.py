"""Arguments that make no sense, found before the work begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..images import OUTPUT_TYPES
from .arguments import Arguments, Beginning, Prompts, Result, Steps, require

MOST_TOKENS = 512  # that T5 was trained with


@dataclass(frozen=True)
class Requirements:
    """What a pipeline asks of the arguments of its call.

    Attributes:
        needs: name -> value of those that it cannot do without.
        is_pooled: whether embeddings come with pooled ones, as SDXL's.
        tensors: what callbacks may ask for.
        max_noise_level: of the image that is enlarged.
        unit: of height and width, in pixels.
    """

    needs: Mapping[str, Any]
    is_pooled: bool
    tensors: tuple[str, ...]
    max_noise_level: int | None = None
    unit: int = 8


def check(arguments: Arguments, requirements: Requirements) -> None:
    """Find arguments that contradict each other, are missing or out of range.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: anything else is wrong.
    """
    _check_numbers(arguments, requirements.unit)
    _check_prompts(arguments.prompts, requirements.is_pooled)
    _check_steps(arguments.steps)
    for name, value in requirements.needs.items():
        require(value is not None, f"{name} is needed")
    _check_beginning(arguments.beginning, arguments.result, requirements.max_noise_level)
    _check_result(arguments.result, requirements.tensors)


def _check_numbers(arguments: Arguments, unit: int) -> None:
    least = {
        "num_inference_steps": (arguments.steps.num_inference_steps, 1),
        "num_images_per_prompt": (arguments.prompts.num_images_per_prompt, 1),
        "clip_skip": (arguments.prompts.clip_skip, 0),
        "callback_steps": (arguments.result.callback_steps, 1),
    }
    for name, (value, bound) in least.items():
        require(value is None or value >= bound, f"{name} = {value} must be at least {bound}")
    length = arguments.prompts.max_sequence_length
    require(0 < length <= MOST_TOKENS, f"max_sequence_length = {length} must be 1 to {MOST_TOKENS}")
    edges = {"height": arguments.beginning.height, "width": arguments.beginning.width}
    for name, edge in edges.items():
        if edge is not None:
            is_whole = not isinstance(edge, float) and edge % unit == 0
            require(is_whole, f"{name} = {edge} must be a whole multiple of {unit}")


def _check_prompts(prompts: Prompts, is_pooled: bool) -> None:
    positive = prompts.prompt_embeds
    negative = prompts.negative_prompt_embeds
    _either("prompt", prompts.prompt, "prompt_embeds", positive)
    _either("negative_prompt", prompts.negative_prompt, "negative_prompt_embeds", negative)
    is_given = prompts.prompt is not None or positive is not None
    require(is_given, "give a prompt or prompt_embeds")
    texts = {
        "prompt": prompts.prompt,
        "prompt_2": prompts.prompt_2,
        "prompt_3": prompts.prompt_3,
        "negative_prompt": prompts.negative_prompt,
        "negative_prompt_2": prompts.negative_prompt_2,
        "negative_prompt_3": prompts.negative_prompt_3,
    }
    for name, text in texts.items():
        is_list = isinstance(text, list) and bool(text)
        if not (text is None or isinstance(text, str) or is_list):
            raise TypeError(f"{name} must be a text or a list of texts, not {text!r}")
    shapes = [tuple(x.shape) for x in (positive, negative) if x is not None]
    names = "prompt_embeds and negative_prompt_embeds"
    require(len(set(shapes)) < 2, f"{names} must have the same shape, not {shapes}")
    if is_pooled:
        _pooled("", positive, prompts.pooled_prompt_embeds)
        _pooled("negative_", negative, prompts.negative_pooled_prompt_embeds)


def _either(one: str, value: object, other: str, other_value: object) -> None:
    both = value is not None and other_value is not None
    require(not both, f"give either {one} or {other}, not both")


def _pooled(prefix: str, embeds: object, pooled: object) -> None:
    is_whole = embeds is None or pooled is not None
    require(is_whole, f"{prefix}prompt_embeds needs {prefix}pooled_prompt_embeds")


def _check_steps(steps: Steps) -> None:
    _either("timesteps", steps.timesteps, "sigmas", steps.sigmas)
    strength = steps.strength
    require(0 <= strength <= 1, f"strength = {strength} must be between 0 and 1")
    start = steps.denoising_start
    end = steps.denoising_end
    ordered = start is None or end is None or start < end
    require(ordered, f"denoising_start = {start} must be less than denoising_end = {end}")


def _check_beginning(beginning: Beginning, result: Result, max_noise_level: int | None) -> None:
    level = beginning.noise_level
    is_low = max_noise_level is None or level <= max_noise_level
    require(is_low, f"noise_level = {level} must be at most {max_noise_level}")
    can_crop = result.output_type == "pil" and hasattr(beginning.image, "crop")
    require(
        can_crop or beginning.padding_mask_crop is None,
        "padding_mask_crop needs PIL images and output_type = 'pil'",
    )


def _check_result(result: Result, tensors: tuple[str, ...]) -> None:
    form = result.output_type
    choices = ", ".join(OUTPUT_TYPES)
    require(form in OUTPUT_TYPES, f"output_type = {form!r} must be one of {choices}")
    unknown = sorted(set(result.callback_on_step_end_tensor_inputs) - set(tensors))
    require(not unknown, f"callback_on_step_end_tensor_inputs: {unknown} not in {tensors}")
