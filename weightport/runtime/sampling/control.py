"""ControlNets: what they follow, and what they add inside the UNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..images import VaeImageProcessor
from ..models.controlnet import ControlNetModel
from .arguments import Control, require
from .latents import tile
from .state import Leading, Run, Window


def per_net(value: Any, count: int, name: str) -> list[Any]:
    """The values of an argument, one for each of so many ControlNets.

    Raises:
        ValueError: there is another number of them.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    require(len(values) == count, f"{name} has {len(values)} values for {count} ControlNets")
    return values


def windows(control: Control, count: int) -> list[Window]:
    """How strongly and when each of so many ControlNets acts.

    Raises:
        ValueError: there is another number of values, or a window is empty or outside the run.
    """
    weights = per_net(control.controlnet_conditioning_scale, count, "controlnet_conditioning_scale")
    starts = per_net(control.control_guidance_start, count, "control_guidance_start")
    ends = per_net(control.control_guidance_end, count, "control_guidance_end")
    found = [Window(*one) for one in zip(weights, starts, ends, strict=True)]
    for _, start, end in found:
        inside = 0 <= start < end <= 1
        what = f"control_guidance_start and _end = {(start, end)}"
        require(inside, f"{what} must be 0 <= start < end <= 1")
    return found


def lead(
    run: Run, nets: Sequence[ControlNetModel], argument: str, processor: VaeImageProcessor
) -> None:
    """Prepare the images that the ControlNets follow; they set the size of the result.

    Args:
        run: what they lead.
        nets: one or several.
        argument: the name of the call's argument that brought the images.
        processor: what the images go through.

    Raises:
        ValueError: there is not one image for each ControlNet.
    """
    control = run.arguments.control
    beginning = run.arguments.beginning
    guesses = control.guess_mode or bool(nets[0].config.get("global_pool_conditions"))
    rows = run.batch * (1 if guesses else run.guide.branches)
    images = []
    for image in _followed(control.control_image, len(nets), argument):
        pixels = processor.preprocess(image, beginning.height, beginning.width)
        is_one = len(pixels) == 1
        copies = run.batch if is_one else run.arguments.prompts.num_images_per_prompt
        each = tile(pixels.repeat_interleave(copies, 0), rows)
        images.append(each.to(run.device, nets[0].dtype))
    height, width = images[0].shape[-2:]
    run.size = (height, width)
    run.leading = Leading(argument, list(nets), images, windows(control, len(nets)), guesses)


def _followed(given: Any, count: int, argument: str) -> list[Any]:
    """What each of so many ControlNets follows: one image, or one for each prompt.

    Raises:
        ValueError: there is not one image for each ControlNet.
    """
    if count == 1:
        return [given]
    if not (isinstance(given, list) and any(isinstance(images, list) for images in given)):
        return per_net(given, count, argument)
    prompts = [per_net(images, count, argument) for images in given]
    return [list(images) for images in zip(*prompts, strict=True)]


def residuals(run: Run, leading: Leading, i: int, x: Tensor) -> dict[str, Any]:
    """What the ControlNets add inside the UNet in step `i`, by the names of its arguments."""
    total = len(run.timesteps)
    conditions = run.conditions
    is_one_sided = leading.guesses and run.guide.branches > 1
    rows = slice(run.batch, None) if is_one_sided else slice(None)
    added = conditions.added()
    added = added and {name: value[rows] for name, value in added.items()}
    sums: list[Tensor] = []
    for net, image, window in zip(leading.nets, leading.images, leading.windows, strict=True):
        acts = window.start <= i / total and (i + 1) / total <= window.end
        down, mid = net(  # a plain tuple, as compilers like it
            x[rows],
            run.timesteps[i],
            encoder_hidden_states=conditions.prompt_embeds[rows],
            controlnet_cond=image,
            conditioning_scale=window.weight * float(acts),
            guess_mode=leading.guesses,
            added_cond_kwargs=added,
            return_dict=False,
        )
        terms = [*down, mid]
        sums = [a + b for a, b in zip(sums, terms, strict=True)] if sums else terms
    if is_one_sided:
        sums = [torch.cat([torch.zeros_like(one), one]) for one in sums]
    return {
        "down_block_additional_residuals": tuple(sums[:-1]),
        "mid_block_additional_residual": sums[-1],
    }
