"""How runs begin: each function sets the first latents, and what the model sees beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import ResizeMode, crop_region
from .arguments import require
from .latents import Codec, tile
from .schedule import Scheduler
from .state import Run

Task = Literal["text-to-image", "image-to-image", "inpainting", "editing", "enlarging"]


class Channels(NamedTuple):
    """Of the model: what it takes, and how many of these are latents."""

    taken: int
    latents: int


@dataclass(frozen=True)
class Start:
    """How the runs of a pipeline begin.

    Attributes:
        begin: sets the first latents.
        task: what the pipeline does.
        needs: the names of the arguments that it cannot do without.
        is_partial: whether strength leaves out the first steps.
        tensors: what callbacks may ask for.
    """

    begin: Callable[[Run, Codec, Channels], None]
    task: Task
    needs: tuple[str, ...] = ()
    is_partial: bool = False
    tensors: tuple[str, ...] = ()


def from_noise(run: Run, codec: Codec, channels: Channels) -> None:
    """Text-to-image: noise in the size of the result."""
    given = run.arguments.beginning.latents
    drawn = _noise(run, codec, channels, given)
    run.latents = codec.pack(drawn * run.scheduler.init_noise_sigma)


def from_image(run: Run, codec: Codec, channels: Channels, *, resizes: bool = False) -> None:
    """Image-to-image (Meng et al., SDEdit, https://arxiv.org/abs/2108.01073): noise is added to the
    image, which keeps its size unless another is asked for, or `resizes`."""
    beginning = run.arguments.beginning
    if beginning.latents is not None:
        if not resizes:
            run.size = codec.pixels(beginning.latents)
        run.latents = codec.pack(_noise(run, codec, channels, beginning.latents))
        return
    edges = run.size if resizes else (beginning.height, beginning.width)
    image = codec.images.preprocess(beginning.image, *edges)
    if isinstance(run.noise.generator, list):
        image = tile(image, run.batch)
    latents = codec.to_latents(image, run.noise, run.batch)
    run.size = codec.pixels(latents)
    if run.arguments.steps.denoising_start is None:
        latents = _noisy(run, latents, run.noise.draw(latents.shape))
    run.latents = codec.pack(latents)


def from_depth(run: Run, codec: Codec, channels: Channels) -> None:
    """Image-to-image with a depth map beside the latents.

    Raises:
        ValueError: there is no depth map.
    """
    given = run.arguments.beginning.depth_map
    if given is None:
        raise ValueError(
            "depth_map is needed, (b, h, w): depth estimation is not part of the runtime"
        )
    from_image(run, codec, channels)
    depth = given.to(run.device, run.dtype)[:, None]
    depth = F.interpolate(depth, run.latents.shape[-2:], mode="bicubic", align_corners=False)
    low = depth.amin((1, 2, 3), keepdim=True)
    high = depth.amax((1, 2, 3), keepdim=True)
    extent = (high - low).clamp_min(torch.finfo(depth.dtype).eps)
    depth = 2.0 * (depth - low) / extent - 1.0
    run.beside.depth_mask = _everywhere(run, depth)


def from_mask(run: Run, codec: Codec, channels: Channels, *, blends: bool = False) -> None:
    """Inpainting: noise, or the noisy image, and what the mask leaves of the image.

    With `blends` the image is in the noise at full strength too.

    Raises:
        ValueError: the model is not of a kind that can inpaint.
    """
    beginning = run.arguments.beginning
    pixels, mask = _painted(run, codec)
    is_encoded = codec.is_encoded(pixels)
    is_later = run.arguments.steps.denoising_start is not None
    is_whole = run.arguments.steps.strength == 1.0 and not blends
    keeps_clean = channels.taken == channels.latents
    clean = None
    if is_encoded or is_later or keeps_clean or (beginning.latents is None and not is_whole):
        clean = codec.to_latents(pixels, run.noise, run.batch)
    noise = _noise(run, codec, channels, None if is_later else beginning.latents)
    if is_later and clean is not None:
        latents = clean
    elif is_whole or beginning.latents is not None or clean is None:
        latents = noise * run.scheduler.init_noise_sigma
    else:
        latents = _noisy(run, clean, noise)
    run.latents = codec.pack(latents)
    beside = run.beside
    beside.noise = codec.pack(noise)
    beside.pixels = pixels
    beside.pixel_mask = mask
    shrunk = F.interpolate(mask, latents.shape[-2:])
    beside.mask = _everywhere(run, codec.pack_mask(shrunk, channels.latents))
    masked = beginning.masked_image_latents
    if masked is None and not is_encoded:
        # with 4 channels for the sake of the random draw
        masked = codec.to_latents(pixels * (mask < 0.5), run.noise, run.batch)
    if keeps_clean and clean is not None:
        beside.clean = codec.pack(clean)
        return
    if masked is None:
        raise ValueError("masked_image_latents is needed where the image is given as latents")
    beside.masked_image_latents = _everywhere(run, masked)


def _painted(run: Run, codec: Codec) -> tuple[Tensor, Tensor]:
    """The image and the mask, or of both the surroundings of the mask."""
    beginning = run.arguments.beginning
    height, width = run.size
    mode: ResizeMode = "default"
    if beginning.padding_mask_crop is not None:
        mode = "fill"
        picture: Any = beginning.mask_image  # a PIL image, as `check` has found
        run.beside.crop = crop_region(picture, width, height, beginning.padding_mask_crop)
    crop = run.beside.crop
    pixels = codec.images.preprocess(beginning.image, height, width, mode, crop)
    mask = codec.masks.preprocess(beginning.mask_image, height, width, mode, crop)
    return pixels, mask


def from_edited(run: Run, codec: Codec, channels: Channels, *, scales_image: bool = False) -> None:
    """InstructPix2Pix: noise, and the image to edit beside it; the third branch sees none."""
    beginning = run.arguments.beginning
    image = codec.images.preprocess(beginning.image, beginning.height, beginning.width)
    latents = image if codec.is_encoded(image) else codec.encode(image, None)
    latents = tile(latents.to(run.device, run.dtype), run.batch)
    if scales_image:  # as latents are, and only it
        latents = latents * codec.model.config.scaling_factor
    branches = [latents, latents, torch.zeros_like(latents)]
    run.beside.image_latents = torch.cat(branches[: run.guide.branches])
    run.size = codec.pixels(latents)
    from_noise(run, codec, channels)


def from_small(run: Run, codec: Codec, channels: Channels, low_res_scheduler: Scheduler) -> None:
    """Enlarging: noise in the size of the small image, which is beside it with a little noise
    added."""
    beginning = run.arguments.beginning
    image = codec.images.preprocess(beginning.image).to(run.device, run.dtype)
    level = torch.tensor([beginning.noise_level], dtype=torch.long, device=run.device)
    image = low_res_scheduler.add_noise(image, run.noise.draw(image.shape), level)
    run.size = codec.pixels(image)
    small = tile(image, run.batch * run.guide.branches)
    run.beside.small_image = small
    run.conditions.class_labels = level.expand(len(small))
    from_noise(run, codec, channels)


def from_filled(run: Run, codec: Codec, channels: Channels) -> None:
    """Flux Fill: the noisy image, and beside it what the mask leaves of the image, and the mask in
    all its pixels."""
    beginning = run.arguments.beginning
    from_image(run, codec, channels, resizes=True)
    given = beginning.masked_image_latents
    if given is not None:
        run.beside.masked_image_latents = given.to(run.device, run.dtype)
        return
    pixels = codec.images.preprocess(beginning.image, *run.size)
    mask = codec.masks.preprocess(beginning.mask_image, *run.size)
    kept = codec.to_latents(pixels * (1 - mask), run.noise, run.batch)
    covered = F.pixel_unshuffle(tile(mask, run.batch), codec.scale_factor)
    parts = [codec.pack(kept), codec.pack(covered).to(run.device, run.dtype)]
    run.beside.masked_image_latents = torch.cat(parts, dim=-1)


def from_led(run: Run, codec: Codec, channels: Channels) -> None:
    """Flux Control: noise, and beside it an image of edges or of depth.

    A tensor is taken as it is; one of three dimensions is already in patches.
    """
    given: Any = run.arguments.control.control_image
    image = given if isinstance(given, Tensor) else codec.images.preprocess(given, *run.size)
    is_one = len(image) == 1
    copies = run.batch if is_one else run.arguments.prompts.num_images_per_prompt
    image = image.repeat_interleave(copies, 0)
    if image.ndim == 4:
        latents = codec.encode(image, run.noise).to(run.dtype)
        image = codec.pack(codec.statistics(latents).normalise(latents))
    run.beside.image_latents = image.to(run.device, run.dtype)
    from_noise(run, codec, channels)


def keep_unmasked(run: Run, i: int) -> Tensor:
    """The latents after step `i`, replaced by those of the image where the mask is black."""
    beside = run.beside
    if beside.clean is None or beside.mask is None or beside.noise is None:
        return run.latents
    kept = beside.clean
    mask = beside.mask[: run.batch]
    if i < len(run.timesteps) - 1:
        kept = run.scheduler.add_noise(kept, beside.noise, run.timesteps[i + 1 : i + 2])
    return run.latents * mask + (1 - mask) * kept


def _noise(run: Run, codec: Codec, channels: Channels, given: Tensor | None) -> Tensor:
    """Noise in the size of the result, unless it is given.

    Raises:
        ValueError: what is given is of another shape.
    """
    shape = codec.shape(run.batch, channels.latents, run.size)
    if given is None:
        return run.noise.draw(shape)
    if given.ndim < len(shape):
        given = codec.unpack(given, run.size)
    fits = given.shape == shape
    require(fits, f"latents must have the shape {shape}, as height and width ask for")
    return given.to(run.device, run.dtype)


def _noisy(run: Run, latents: Tensor, noise: Tensor) -> Tensor:
    """Latents as they are before the first step of the run."""
    return run.scheduler.add_noise(latents, noise, run.timesteps[:1].repeat(run.batch))


def _everywhere(run: Run, x: Tensor) -> Tensor:
    """What is the same in all branches: a row for each row of the model's batch."""
    return run.guide.repeat(tile(x.to(run.device, run.dtype), run.batch))


FROM_NOISE = Start(from_noise, "text-to-image")
FROM_IMAGE = Start(from_image, "image-to-image", ("image",), is_partial=True)
FROM_RESIZED = Start(
    partial(from_image, resizes=True), "image-to-image", ("image",), is_partial=True
)
FROM_BLENDED = Start(
    partial(from_mask, blends=True), "inpainting", ("image", "mask_image"), is_partial=True
)
FROM_FILLED = Start(from_filled, "inpainting", ("image", "mask_image"), is_partial=True)
FROM_LED = Start(from_led, "text-to-image", ("control_image",))
FROM_DEPTH = Start(
    from_depth, "image-to-image", ("image",), is_partial=True, tensors=("depth_mask",)
)
FROM_MASK = Start(
    from_mask,
    "inpainting",
    ("image", "mask_image"),
    is_partial=True,
    tensors=("mask", "masked_image_latents"),
)
FROM_EDITED = Start(from_edited, "editing", ("image",), tensors=("image_latents",))
FROM_SMALL = Start(from_noise, "enlarging", ("image",))  # by `from_small`: it needs a scheduler
