"""The one sampling function, which every pipeline calls, and the parts that it is made of.

A pipeline chooses among these parts: how the prompt is encoded, what the latents start from, what
else the UNet sees. The order of random draws is that of diffusers, so that one seed gives one
image: first the noise of the VAE's posterior, then the noise of the latents, then the posterior of
the masked image.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..images import OUTPUT_TYPES, Box, OutputType, apply_overlay, crop_region
from ..models.attention import constant_context

if TYPE_CHECKING:
    from ..pipelines.stable_diffusion import LatentDiffusionPipeline

Generator = torch.Generator | list[torch.Generator] | None
Size = tuple[int, int]


@dataclass
class Options:
    """The arguments of the pipelines' calls; each pipeline takes those that make sense for it.

    Attributes:
        prompt: what to draw, one text or one for each image.
        prompt_2: the text for the second text encoder of SDXL, by default the same.
        image: the image to start from, see `VaeImageProcessor.preprocess`; to ControlNet
            text-to-image, the control.
        mask_image: white where to paint, black where to keep.
        masked_image_latents: the encoded image without what the mask covers, in place of encoding
            it.
        control_image: what a ControlNet follows; a list for several.
        depth_map: (b, h, w), nearer is higher.
        height: of the result in pixels, by default what the UNet was trained for.
        width: likewise.
        padding_mask_crop: paint only the surroundings of the mask, this many pixels wider, at full
            size.
        strength: how much of the image to replace, from 0 to 1.
        num_inference_steps: of the scheduler.
        original_inference_steps: the steps that an LCM was distilled from.
        timesteps: take these in place of the scheduler's spacing.
        sigmas: likewise, as noise levels.
        denoising_start: skip this fraction of the run: another model did it.
        denoising_end: stop after this fraction of the run, for another model to go on.
        guidance_scale: weight of the prompt against the negative prompt; not above 1 means no
            guidance.
        image_guidance_scale: weight of the image, for InstructPix2Pix.
        guidance_rescale: share of the guided prediction that gets the deviation of the unguided one
            (Lin et al., https://arxiv.org/abs/2305.08891, section 3.4).
        noise_level: the noise added to the image that is enlarged.
        negative_prompt: what not to draw.
        negative_prompt_2: for the second text encoder of SDXL, by default the same.
        num_images_per_prompt: images for each prompt.
        eta: the share of noise in DDIM.
        generator: one for all, or a list with one for each image.
        latents: noise to start from in place of random.
        prompt_embeds: in place of the prompt, (b, tokens, d); also `negative_`, and `pooled_` (b,
            d) for SDXL.
        output_type: pil, np, pt or latent.
        return_dict: False for a plain tuple.
        controlnet_conditioning_scale: weight of the ControlNet, or of each.
        guess_mode: the ControlNet acts on the prompted half only, and leads even without a prompt.
        control_guidance_start: the fraction of the run at which it begins to act, or of each.
        control_guidance_end: at which it ends.
        original_size: SDXL: (height, width) that the training image is said to have had.
        crops_coords_top_left: SDXL: where it is said to have been cropped.
        target_size: SDXL: the size it is said to have been scaled to.
        aesthetic_score: SDXL's refiner: how beautiful it is said to be.
        clip_skip: how many of the text encoder's last layers to leave out.
        callback_on_step_end: called as (pipeline, step, timestep, tensors); returns the tensors to
            go on with.
        callback_on_step_end_tensor_inputs: the names of the tensors it gets.
    """

    prompt: str | list[str] | None = None
    prompt_2: str | list[str] | None = None
    image: Any = None
    mask_image: Any = None
    masked_image_latents: Tensor | None = None
    control_image: Any = None
    depth_map: Tensor | None = None
    height: int | None = None
    width: int | None = None
    padding_mask_crop: int | None = None
    strength: float = 0.8
    num_inference_steps: int = 50
    original_inference_steps: int | None = None
    timesteps: list[int] | None = None
    sigmas: list[float] | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    guidance_scale: float = 7.5
    image_guidance_scale: float = 1.5
    guidance_rescale: float = 0.0
    noise_level: int = 20
    negative_prompt: str | list[str] | None = None
    negative_prompt_2: str | list[str] | None = None
    num_images_per_prompt: int = 1
    eta: float = 0.0
    generator: Generator = None
    latents: Tensor | None = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    output_type: OutputType = "pil"
    return_dict: bool = True
    controlnet_conditioning_scale: float | list[float] = 1.0
    guess_mode: bool = False
    control_guidance_start: float | list[float] = 0.0
    control_guidance_end: float | list[float] = 1.0
    original_size: Size | None = None
    crops_coords_top_left: Size = (0, 0)
    target_size: Size | None = None
    negative_original_size: Size | None = None
    negative_crops_coords_top_left: Size = (0, 0)
    negative_target_size: Size | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    clip_skip: int | None = None
    callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    ip_adapter_image: None = None
    ip_adapter_image_embeds: None = None
    cross_attention_kwargs: None = None


@dataclass
class Run:
    """The state of one run. Conditions have `branches * batch` rows: those of the negative prompt
    come first.

    Attributes:
        batch: images to make.
        size: their height and width in pixels.
        extras: names of the tensors that the UNet sees as further channels.
        clean: latents of the image that an inpainting UNet of 4 channels keeps outside the mask.
        noise: what was added to them.
        crop: the box of the image that is painted, where it is not all of it.
    """

    batch: int
    size: Size
    device: torch.device
    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None
    add_text_embeds: Tensor | None
    negative_pooled_prompt_embeds: Tensor | None
    timesteps: Tensor = field(init=False)
    latents: Tensor = field(init=False)
    denoised: Tensor | None = None
    add_time_ids: Tensor | None = None
    w_embedding: Tensor | None = None
    class_labels: Tensor | None = None
    image: Any = None
    control_image: Any = None
    image_latents: Tensor | None = None
    depth_mask: Tensor | None = None
    mask: Any = None
    masked_image_latents: Tensor | None = None
    extras: tuple[str, ...] = ()
    clean: Any = None
    noise: Tensor | None = None
    crop: Box | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that latents are computed in."""
        return self.prompt_embeds.dtype


class StableDiffusionPipelineOutput(NamedTuple):
    """What a pipeline returns: the images, and for each whether the safety checker objects to
    it."""

    images: Any
    nsfw_content_detected: list[bool] | None


class StableDiffusionXLPipelineOutput(NamedTuple):
    """What an SDXL pipeline returns."""

    images: Any


@torch.no_grad()
def sample(pipe: LatentDiffusionPipeline, o: Options) -> Any:
    """Make images: every pipeline's call.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the arguments do not fit together, or not to the models.
    """
    check(pipe, o)
    pipe.begin(o)
    scheduler, run = pipe.scheduler, begin_run(pipe, o)
    run.timesteps = choose_timesteps(pipe, o, run.device)
    pipe.num_timesteps = len(run.timesteps)
    prepare_control(pipe, o, run)
    pipe.start(o, run)
    pipe.describe_size(o, run)
    if dim := pipe.unet.config.get("time_cond_proj_dim"):
        run.w_embedding = (
            embed_guidance(o.guidance_scale, dim).expand(run.batch, dim).to(run.device, run.dtype)
        )
    taken = inspect.signature(scheduler.step).parameters
    random = {name: getattr(o, name) for name in ("eta", "generator") if name in taken}

    with (
        constant_context(pipe.unet, *pipe.controlnets),
        pipe.progress_bar(total=len(run.timesteps)) as bar,
    ):
        for i, t in enumerate(run.timesteps):
            if pipe.interrupt:
                break
            x = scheduler.scale_model_input(torch.cat([run.latents] * pipe.branches), t)
            added = (
                {"text_embeds": run.add_text_embeds, "time_ids": run.add_time_ids}
                if pipe.is_xl
                else None
            )
            prediction = pipe.unet(
                torch.cat([x, *(getattr(run, name) for name in run.extras)], dim=1),
                t,
                encoder_hidden_states=run.prompt_embeds,
                class_labels=run.class_labels,
                timestep_cond=run.w_embedding,
                added_cond_kwargs=added,
                **control(pipe, o, run, i, x, added),
            ).sample
            step = scheduler.step(guide(pipe, prediction), t, run.latents, **random)
            run.latents, run.denoised = step.prev_sample, getattr(step, "denoised", None)
            if run.clean is not None:
                run.latents = keep_unmasked(scheduler, run, i)
            if o.callback_on_step_end is not None:
                tensors = {
                    name: getattr(run, name) for name in o.callback_on_step_end_tensor_inputs
                }
                for name, value in (o.callback_on_step_end(pipe, i, t, tensors) or {}).items():
                    setattr(run, name, value)
            bar.update()
    return finish(pipe, o, run)


def guide(pipe: LatentDiffusionPipeline, prediction: Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, https://arxiv.org/abs/2207.12598), with
    InstructPix2Pix's third branch (Brooks et al., https://arxiv.org/abs/2211.09800, equation 3)."""
    if pipe.branches == 1:
        return prediction
    if pipe.branches == 3:
        text, image, none = prediction.chunk(3)
        guided: Tensor = (
            none + pipe.guidance_scale * (text - image) + pipe.image_guidance_scale * (image - none)
        )
    else:
        none, text = prediction.chunk(2)
        guided = none + pipe.guidance_scale * (text - none)
    if pipe.guidance_rescale > 0:
        dims = list(range(1, text.ndim))
        rescaled = guided * (text.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
        guided = pipe.guidance_rescale * rescaled + (1 - pipe.guidance_rescale) * guided
    return guided


def embed_guidance(guidance_scale: float, dim: int) -> Tensor:
    """Sinusoidal features (1, dim) of the guidance scale, for a UNet that has it as a condition.

    Meng et al., On Distillation of Guided Diffusion Models, arXiv 2210.03142; the frequencies are
    LCM's.
    """
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1))
    )
    angles = (torch.tensor([guidance_scale - 1]) * 1000)[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def join(pipe: LatentDiffusionPipeline, positive: Any, negative: Any) -> Any:
    """The rows of a condition in the order of the guidance's branches."""
    if negative is None or pipe.branches == 1:
        return positive
    return torch.cat([positive, negative, negative] if pipe.branches == 3 else [negative, positive])


def keep_unmasked(scheduler: Any, run: Run, i: int) -> Tensor:
    """The latents after step `i`, replaced by those of the image where the mask is black."""
    kept: Tensor = run.clean
    mask: Tensor = run.mask[: run.batch]
    if i < len(run.timesteps) - 1:
        kept = scheduler.add_noise(kept, run.noise, run.timesteps[i + 1 : i + 2])
    return run.latents * mask + (1 - mask) * kept


# --- before the loop ------------------------------------------------------------------------------


def begin_run(pipe: LatentDiffusionPipeline, o: Options) -> Run:
    """Encode the prompts: the beginning of a run.

    Raises:
        ValueError: the generators are not as many as the images.
    """
    encoded = encode_prompts(pipe, o, pipe.device, pipe.branches > 1)
    cast: list[Any] = [None if x is None else x.to(pipe.unet.dtype) for x in encoded]
    positive, negative, pooled, negative_pooled = cast
    edges = pipe.unet.config.get("sample_size") or 64
    edges = edges if isinstance(edges, (list, tuple)) else (edges, edges)
    height, width = (edge * pipe.vae_scale_factor for edge in edges)
    if isinstance(o.generator, list):
        count = len(o.generator)
        require(
            count in (1, len(positive)), f"{count} generators are given for {len(positive)} images"
        )
        o.generator = o.generator[0] if count == 1 else o.generator
    embeds, pooled = join(pipe, positive, negative), join(pipe, pooled, negative_pooled)
    size = (o.height or height, o.width or width)
    return Run(len(positive), size, pipe.device, embeds, negative, pooled, negative_pooled)


def choose_timesteps(pipe: LatentDiffusionPipeline, o: Options, device: torch.device) -> Tensor:
    """The timesteps of a run: of the scheduler, or the user's; then the part that strength and
    start and end leave.

    Raises:
        ValueError: the scheduler cannot take them, or none is left.
    """
    scheduler, partial = pipe.scheduler, pipe.takes("strength")
    names = [
        "timesteps",
        "sigmas",
        "original_inference_steps",
        *(["strength"] if pipe.is_lcm and partial else []),
    ]
    given: dict[str, Any] = {
        name: getattr(o, name) for name in names if getattr(o, name) is not None
    }
    for name in given.keys() - inspect.signature(scheduler.set_timesteps).parameters.keys():
        raise ValueError(
            f"{type(scheduler).__name__} does not support {name}; choose another scheduler"
        )
    custom = not given.keys().isdisjoint(("timesteps", "sigmas"))
    if not custom:
        given["num_inference_steps"] = o.num_inference_steps
    scheduler.set_timesteps(device=device, **given)
    timesteps: Tensor = scheduler.timesteps
    steps = len(timesteps) if custom else o.num_inference_steps
    trained = scheduler.config.num_train_timesteps
    begin = 0
    if o.denoising_start is not None:
        left = int((timesteps < round(trained - o.denoising_start * trained)).sum())
        left += scheduler.order == 2 and left % 2 == 0  # a step of two calls is not torn apart
        begin = len(timesteps) - left
    elif partial and not pipe.is_lcm:
        begin = (steps - min(int(steps * o.strength), steps)) * scheduler.order
    if begin:
        timesteps = timesteps[begin:]
        if hasattr(scheduler, "set_begin_index"):  # else it looks the first timestep up
            scheduler.set_begin_index(begin)
    if o.denoising_end is not None and 0 < o.denoising_end < 1:
        timesteps = timesteps[
            : int((timesteps >= round(trained - o.denoising_end * trained)).sum())
        ]
    require(
        len(timesteps) > 0,
        f"no step is left of {steps}: raise num_inference_steps, strength or denoising_end",
    )
    return timesteps


def draw(shape: Sequence[int], run: Run, generator: Generator) -> Tensor:
    """Normal noise, drawn on the generator's device. With a list of generators, each draws one
    row."""
    if isinstance(generator, list):
        return torch.cat([draw((1, *shape[1:]), run, one) for one in generator])
    device = generator.device if generator is not None else run.device
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=run.dtype).to(
        run.device
    )


def draw_latents(
    pipe: LatentDiffusionPipeline, o: Options, run: Run, given: Tensor | None
) -> Tensor:
    """Noise in the size of the result, unless it is given.

    Raises:
        ValueError: what is given is of another shape.
    """
    height, width = (edge // pipe.vae_scale_factor for edge in run.size)
    shape = (run.batch, pipe.unet.config.out_channels, height, width)
    require(
        given is None or given.shape == shape,
        f"latents must have the shape {shape}, as height and width ask for",
    )
    return draw(shape, run, o.generator) if given is None else given.to(run.device)


def tile(x: Tensor, rows: int) -> Tensor:
    """Repeat a batch as a whole up to `rows`.

    Raises:
        ValueError: it does not divide them.
    """
    require(rows % len(x) == 0, f"{len(x)} images cannot be shared by {rows} results")
    return torch.cat([x] * (rows // len(x)))


def for_each_branch(pipe: LatentDiffusionPipeline, run: Run, x: Tensor) -> Tensor:
    """A condition that is the same in all of the guidance's branches: a row for each row of the
    UNet's batch."""
    return torch.cat([tile(x.to(run.device, run.dtype), run.batch)] * pipe.branches)


def encode_image(
    pipe: LatentDiffusionPipeline, image: Tensor, generator: Generator, *, mode: bool = False
) -> Tensor:
    """Pixels (b, 3, h, w) -> unscaled latents: random ones, or the most probable."""
    image = image.to(pipe.vae.device, pipe.vae.dtype)  # rounded even where the VAE computes in more
    with pipe.full_precision_vae(torch.float16, torch.bfloat16) as vae:
        image = image.to(vae.dtype)
        seeds = generator if isinstance(generator, list) else [generator]
        parts = image.chunk(len(image)) if isinstance(generator, list) else [image]
        posteriors = (vae.encode(part).latent_dist for part in parts)
        return torch.cat(
            [
                x.mode() if mode else x.sample(seed)
                for x, seed in zip(posteriors, seeds, strict=False)
            ]
        )


def statistics(pipe: LatentDiffusionPipeline, latents: Tensor) -> tuple[Any, Any, float]:
    """Mean, deviation and scale of the VAE's latents, by which they become what the UNet was
    trained on."""
    config = pipe.vae.config
    given = [config.get(name) for name in ("latents_mean", "latents_std")]
    mean, std = (
        (0.0, 1.0)
        if None in given
        else (torch.tensor(x).view(1, -1, 1, 1).to(latents) for x in given)
    )
    return mean, std, float(config.scaling_factor)


def to_latents(pipe: LatentDiffusionPipeline, o: Options, run: Run, image: Tensor) -> Tensor:
    """An image as scaled latents, one row for each result; what comes as latents stays what it
    is."""
    if not is_latents(pipe, image):
        latents = encode_image(pipe, image, o.generator).to(run.dtype)
        mean, std, factor = statistics(pipe, latents)
        image = (latents - mean) * factor / std
    return tile(image.to(run.device, run.dtype), run.batch).contiguous()


def is_latents(pipe: LatentDiffusionPipeline, image: Tensor) -> bool:
    """Whether an image comes already encoded."""
    return bool(image.shape[1] == pipe.vae.config.latent_channels != pipe.vae.config.in_channels)


def add_noise(pipe: LatentDiffusionPipeline, run: Run, latents: Tensor, noise: Tensor) -> Tensor:
    """Latents as they are before the first step of the run."""
    noisy: Tensor = pipe.scheduler.add_noise(latents, noise, run.timesteps[:1].repeat(run.batch))
    return noisy


def start_from_noise(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> None:
    """Text-to-image: noise in the size of the result."""
    run.latents = draw_latents(pipe, o, run, o.latents) * pipe.scheduler.init_noise_sigma


def start_from_image(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> None:
    """Image-to-image (Meng et al., SDEdit, https://arxiv.org/abs/2108.01073): noise is added to the
    image."""
    if o.latents is not None:
        run.size = pipe.pixels(o.latents)
        run.latents = draw_latents(pipe, o, run, o.latents)
        return
    image = pipe.image_processor.preprocess(o.image, o.height, o.width)
    run.latents = to_latents(
        pipe, o, run, tile(image, run.batch) if isinstance(o.generator, list) else image
    )
    run.size = pipe.pixels(run.latents)
    if o.denoising_start is None:
        run.latents = add_noise(pipe, run, run.latents, draw(run.latents.shape, run, o.generator))


def start_from_depth(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> None:
    """Image-to-image with a depth map beside the latents.

    Raises:
        ValueError: there is no depth map.
    """
    if o.depth_map is None:
        raise ValueError(
            "depth_map is needed, (b, h, w): depth estimation is not part of the runtime"
        )
    start_from_image(pipe, o, run)
    depth = o.depth_map.to(run.device, run.dtype)[:, None]
    depth = F.interpolate(depth, run.latents.shape[-2:], mode="bicubic", align_corners=False)
    low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
    depth = 2.0 * (depth - low) / (high - low).clamp_min(torch.finfo(depth.dtype).eps) - 1.0
    run.depth_mask, run.extras = for_each_branch(pipe, run, depth), ("depth_mask",)


def start_from_mask(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> None:
    """Inpainting: noise, or the noisy image, and what the mask leaves of the image.

    Raises:
        ValueError: the UNet is not of a kind that can inpaint.
    """
    channels, whole = pipe.unet.config.in_channels, o.strength == 1.0
    height, width = run.size
    mode: Any = "default"
    if o.padding_mask_crop is not None:
        run.crop, mode = crop_region(o.mask_image, width, height, o.padding_mask_crop), "fill"
    pixels = pipe.image_processor.preprocess(o.image, height, width, mode, run.crop)
    mask = pipe.mask_processor.preprocess(o.mask_image, height, width, mode, run.crop)
    encoded, later = is_latents(pipe, pixels), o.denoising_start is not None
    clean = None
    if encoded or later or channels == 4 or (o.latents is None and not whole):
        clean = to_latents(pipe, o, run, pixels)
    run.noise = draw_latents(pipe, o, run, None if later else o.latents)
    if later and clean is not None:
        run.latents = clean
    elif whole or o.latents is not None or clean is None:
        run.latents = run.noise * pipe.scheduler.init_noise_sigma
    else:
        run.latents = add_noise(pipe, run, clean, run.noise)
    run.mask = for_each_branch(pipe, run, F.interpolate(mask, run.latents.shape[-2:]))
    masked = o.masked_image_latents
    if masked is None and not encoded:
        masked = to_latents(
            pipe, o, run, pixels * (mask < 0.5)
        )  # with 4 channels for the sake of the random draw
    if channels == 4:
        run.clean = clean
        return
    if masked is None:
        raise ValueError("masked_image_latents is needed where the image is given as latents")
    run.masked_image_latents, run.extras = (
        for_each_branch(pipe, run, masked),
        ("mask", "masked_image_latents"),
    )


def start_from_edited(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> None:
    """InstructPix2Pix: noise, and the image to edit beside it; the third branch sees none."""
    image = pipe.image_processor.preprocess(o.image, o.height, o.width)
    latents = image if is_latents(pipe, image) else encode_image(pipe, image, None, mode=True)
    latents = tile(latents.to(run.device, run.dtype), run.batch)
    if pipe.config.get("is_cosxl_edit"):  # here only the image is scaled as latents are
        latents = latents * pipe.vae.config.scaling_factor
    branches = [latents, latents, torch.zeros_like(latents)]
    run.image_latents, run.extras = torch.cat(branches[: pipe.branches]), ("image_latents",)
    run.size = pipe.pixels(latents)
    start_from_noise(pipe, o, run)


def start_from_small(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> None:
    """Enlarging: noise in the size of the small image, which is beside it with a little noise
    added."""
    image = pipe.image_processor.preprocess(o.image).to(run.device, run.dtype)
    level = torch.tensor([o.noise_level], dtype=torch.long, device=run.device)
    image = pipe.low_res_scheduler.add_noise(image, draw(image.shape, run, o.generator), level)
    run.size = pipe.pixels(image)
    run.image, run.extras = tile(image, run.batch * pipe.branches), ("image",)
    run.class_labels = level.expand(len(run.image))
    start_from_noise(pipe, o, run)


# --- ControlNet -----------------------------------------------------------------------------------


def per_net(pipe: LatentDiffusionPipeline, o: Options, name: str) -> list[Any]:
    """The values of an argument, one for each ControlNet.

    Raises:
        ValueError: there is another number of them.
    """
    value, count = getattr(o, name), max(len(pipe.controlnets), 1)
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    require(len(values) == count, f"{name} has {len(values)} values for {count} ControlNets")
    return values


def guesses(pipe: LatentDiffusionPipeline, o: Options) -> bool:
    """Whether the ControlNets act on the prompted half only."""
    return o.guess_mode or bool(pipe.controlnets[0].config.get("global_pool_conditions"))


def prepare_control(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> None:
    """The images that the ControlNets follow, one row for each row of the UNet's batch; they set
    the size.

    Raises:
        ValueError: there is not one image for each ControlNet.
    """
    if not pipe.controlnets:
        return
    name, many = pipe.control_argument(), len(pipe.controlnets) > 1
    rows = run.batch * (1 if guesses(pipe, o) else pipe.branches)
    prepared = []
    for image in per_net(pipe, o, name) if many else [getattr(o, name)]:
        pixels = pipe.control_image_processor.preprocess(image, o.height, o.width)
        once = run.batch if len(pixels) == 1 else o.num_images_per_prompt
        prepared.append(
            tile(pixels.repeat_interleave(once, 0), rows).to(run.device, pipe.controlnets[0].dtype)
        )
    run.size = prepared[0].shape[-2], prepared[0].shape[-1]
    setattr(run, name, prepared if many else prepared[0])


def control(
    pipe: LatentDiffusionPipeline,
    o: Options,
    run: Run,
    i: int,
    x: Tensor,
    added: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the ControlNets add inside the UNet in step `i`."""
    nets, total = pipe.controlnets, len(run.timesteps)
    if not nets:
        return {}
    one_sided = guesses(pipe, o) and pipe.branches > 1
    rows = slice(run.batch, None) if one_sided else slice(None)
    images = getattr(run, pipe.control_argument())
    names = ("controlnet_conditioning_scale", "control_guidance_start", "control_guidance_end")
    options = zip(*(per_net(pipe, o, name) for name in names), strict=True)
    sums: list[Tensor] = []
    for net, image, (weight, start, end) in zip(
        nets, images if len(nets) > 1 else [images], options, strict=True
    ):
        down, mid = net(
            x[rows],
            run.timesteps[i],
            encoder_hidden_states=run.prompt_embeds[rows],
            controlnet_cond=image,
            conditioning_scale=weight * float(start <= i / total and (i + 1) / total <= end),
            guess_mode=guesses(pipe, o),
            added_cond_kwargs=added and {name: value[rows] for name, value in added.items()},
        )
        sums = [a + b for a, b in zip(sums, [*down, mid], strict=True)] if sums else [*down, mid]
    if one_sided:
        sums = [torch.cat([torch.zeros_like(x), x]) for x in sums]
    return {
        "down_block_additional_residuals": tuple(sums[:-1]),
        "mid_block_additional_residual": sums[-1],
    }


# --- after the loop -------------------------------------------------------------------------------


def finish(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> Any:
    """Latents -> what the caller asked for."""
    images: Any = run.denoised if pipe.is_lcm and run.denoised is not None else run.latents
    flagged: list[bool] | None = None
    if o.output_type != "latent":
        with pipe.full_precision_vae(torch.float16) as vae:
            mean, std, factor = statistics(pipe, images.to(vae.dtype))
            pixels = vae.decode(images.to(vae.dtype) * std / factor + mean).sample
        pixels, flagged = check_safety(pipe, pixels, run.dtype)
        images = pipe.image_processor.postprocess(
            pixels, o.output_type, [not flag for flag in flagged or ()]
        )
    if run.crop is not None:
        images = [
            apply_overlay(pipe.image_processor, o.mask_image, o.image, one, run.crop)
            for one in images
        ]
    if pipe.is_xl:
        return StableDiffusionXLPipelineOutput(images) if o.return_dict else (images,)
    return StableDiffusionPipelineOutput(images, flagged) if o.return_dict else (images, flagged)


def check_safety(
    pipe: LatentDiffusionPipeline, pixels: Tensor, dtype: torch.dtype
) -> tuple[Any, list[bool] | None]:
    """The images, black where the safety checker objects, and where it does; None without a safety
    checker."""
    if pipe.components.get("safety_checker") is None:
        return pixels, None
    seen = pipe.feature_extractor(pipe.image_processor.postprocess(pixels), return_tensors="pt")
    checked, flagged = pipe.safety_checker(
        images=pixels, clip_input=seen.pixel_values.to(pixels.device, dtype)
    )
    return checked, [bool(flag) for flag in flagged]


# --- the prompt -----------------------------------------------------------------------------------


def encode_prompts(
    pipe: LatentDiffusionPipeline, o: Options, device: Any, guided: bool
) -> tuple[Any, ...]:
    """Encode the prompts, and with guidance the negative ones, unless embeddings are given in their
    place.

    Returns:
        The embeddings of the prompts and of the negative prompts, (b, tokens, d), and of both what
        SDXL pools, (b, d).
    """
    positive, pooled = o.prompt_embeds, o.pooled_prompt_embeds
    if positive is None:
        positive, pooled = embed(pipe, listed(o.prompt, 1), o.prompt_2, o.clip_skip or 0)
    negative, negative_pooled = o.negative_prompt_embeds, o.negative_pooled_prompt_embeds
    if negative is None and guided:
        if (
            pooled is not None
            and o.negative_prompt is None
            and pipe.config.get("force_zeros_for_empty_prompt")
        ):
            negative, negative_pooled = torch.zeros_like(positive), torch.zeros_like(pooled)
        else:
            negative, negative_pooled = embed(
                pipe, listed(o.negative_prompt, len(positive)), o.negative_prompt_2, 0
            )
    encoder = pipe.text_encoder_2 if pipe.is_xl else pipe.text_encoder
    dtype = (pipe.unet if encoder is None else encoder).dtype
    kept, count = None if pooled is None else pooled.dtype, o.num_images_per_prompt
    each = ((positive, dtype), (negative, dtype), (pooled, kept), (negative_pooled, kept))
    return tuple(
        None if x is None else x.to(device, to).repeat_interleave(count, 0) for x, to in each
    )


def embed(
    pipe: LatentDiffusionPipeline,
    prompts: list[str],
    prompts_2: str | list[str] | None,
    clip_skip: int,
) -> tuple[Tensor, Tensor | None]:
    """What the UNet sees of texts, and for SDXL the projected pooled state of the last text
    encoder.

    In SD it is the last hidden state after the final norm, or an earlier one after that norm; in
    SDXL the penultimate states of both text encoders, or earlier ones, side by side.
    """
    pairs = [
        (pipe.tokenizer, pipe.text_encoder),
        *([(pipe.tokenizer_2, pipe.text_encoder_2)] if pipe.is_xl else []),
    ]
    pairs = [pair for pair in pairs if None not in pair]
    require(
        bool(pairs),
        "there is no tokenizer or no text encoder; give embeddings, of negative prompts too",
    )
    left = pairs[0][1].config.num_hidden_layers - clip_skip
    require(left > 0, f"clip_skip = {clip_skip} leaves no layer of the text encoder")
    if not pipe.is_xl:
        ids = tokenize(pipe.tokenizer, prompts).to(pipe.text_encoder.device)
        output = pipe.text_encoder(ids, output_hidden_states=True)
        if not clip_skip:
            return output.last_hidden_state, None
        return pipe.text_encoder.text_model.final_layer_norm(
            output.hidden_states[-(clip_skip + 1)]
        ), None
    states, pooled = [], None
    # the refiner's one encoder gets the first prompt
    second = listed(prompts_2 or prompts, len(prompts), "texts for the second text encoder")
    for (tokenizer, encoder), texts in zip(pairs, (prompts, second), strict=False):
        output = encoder(tokenize(tokenizer, texts).to(encoder.device), output_hidden_states=True)
        states.append(output.hidden_states[-(clip_skip + 2)])
        pooled = output[0]
    return torch.cat(states, dim=-1), pooled


def listed(text: str | list[str] | None, count: int, what: str = "negative prompts") -> list[str]:
    """Texts for `count` prompts: one for all, or one for each.

    Raises:
        ValueError: there is another number of them.
    """
    texts = [text or ""] * count if text is None or isinstance(text, str) else text
    require(count == 1 or len(texts) == count, f"{len(texts)} {what} are given for {count} prompts")
    return texts


def tokenize(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Texts -> token ids (b, model_max_length); warns of what does not fit."""
    prompts = [tokenizer.expand(prompt) for prompt in prompts]
    for prompt in prompts:
        if rest := tokenizer.cut_off(prompt):
            limit = tokenizer.model_max_length
            warnings.warn(
                f"the prompt is longer than {limit} tokens; this is left out: {rest}", stacklevel=2
            )
    ids: Tensor = tokenizer(
        prompts, padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    return ids


# --- checks ---------------------------------------------------------------------------------------


def require(holds: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not holds:
        raise ValueError(message)


def check(pipe: LatentDiffusionPipeline, o: Options) -> None:
    """Find arguments that make no sense before the work begins.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: arguments contradict each other, or one is missing or out of range.
    """

    def given(name: str) -> bool:
        return getattr(o, name) is not None

    needed = {"unet": True, "scheduler": True, "vae": o.output_type != "latent"}
    lacking = [name for name, needs in needed.items() if needs and getattr(pipe, name) is None]
    require(not lacking, f"the pipeline has no {', '.join(lacking)}")
    for name, least in (("num_inference_steps", 1), ("num_images_per_prompt", 1), ("clip_skip", 0)):
        value = getattr(o, name)
        require(value is None or value >= least, f"{name} = {value} must be at least {least}")
    for name in ("height", "width"):
        value = getattr(o, name) or 0
        require(
            not isinstance(value, float) and value % 8 == 0,
            f"{name} = {value} must be a whole multiple of 8",
        )
    for name in ("ip_adapter_image", "ip_adapter_image_embeds", "cross_attention_kwargs"):
        require(not given(name), f"{name} is not supported")
    rivals = {
        "prompt": "prompt_embeds",
        "negative_prompt": "negative_prompt_embeds",
        "timesteps": "sigmas",
    }
    for one, other in rivals.items():
        require(not (given(one) and given(other)), f"give either {one} or {other}, not both")
    require(given("prompt") or given("prompt_embeds"), "give a prompt or prompt_embeds")
    for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
        value = getattr(o, name)
        if not (value is None or isinstance(value, str) or (isinstance(value, list) and value)):
            raise TypeError(f"{name} must be a text or a list of texts, not {value!r}")
    shapes = [tuple(x.shape) for x in (o.prompt_embeds, o.negative_prompt_embeds) if x is not None]
    require(
        len({*shapes}) < 2,
        f"prompt_embeds and negative_prompt_embeds must have the same shape, not {shapes}",
    )
    for prefix in ("", "negative_"):
        complete = (
            not pipe.is_xl
            or not given(f"{prefix}prompt_embeds")
            or given(f"{prefix}pooled_prompt_embeds")
        )
        require(complete, f"{prefix}prompt_embeds needs {prefix}pooled_prompt_embeds")
    for name in ("image", "mask_image", "control_image"):
        spared = (
            name == "image"
            and given("latents")
            and pipe.takes("latents")
            and pipe.takes("strength")
        )
        require(spared or not pipe.takes(name) or given(name), f"{name} is needed")
    require(0 <= o.strength <= 1, f"strength = {o.strength} must be between 0 and 1")
    start, end = o.denoising_start, o.denoising_end
    ordered = start is None or end is None or start < end
    require(ordered, f"denoising_start = {start} must be less than denoising_end = {end}")
    limit = pipe.config.get("max_noise_level")
    require(
        limit is None or o.noise_level <= limit,
        f"noise_level = {o.noise_level} must be at most {limit}",
    )
    require(
        o.output_type in OUTPUT_TYPES,
        f"output_type = {o.output_type!r} must be one of {', '.join(OUTPUT_TYPES)}",
    )
    croppable = o.output_type == "pil" and hasattr(o.image, "crop")
    require(
        croppable or not given("padding_mask_crop"),
        "padding_mask_crop needs PIL images and output_type = 'pil'",
    )
    known = pipe._callback_tensor_inputs
    unknown = sorted(set(o.callback_on_step_end_tensor_inputs) - set(known))
    require(not unknown, f"callback_on_step_end_tensor_inputs: {unknown} not in {known}")
    for edges in zip(
        *(per_net(pipe, o, f"control_guidance_{edge}") for edge in ("start", "end")), strict=True
    ):
        inside = 0 <= edges[0] < edges[1] <= 1
        require(inside, f"control_guidance_start and _end = {edges} must be 0 <= start < end <= 1")
