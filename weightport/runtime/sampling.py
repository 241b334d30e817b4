"""The one sampling function, which every pipeline calls, and the parts that it is made of.

A pipeline chooses among these parts: how the prompt is encoded, what the latents start from, what else the UNet sees.
The order of random draws is that of diffusers, so that one seed gives one image: first the noise of the VAE's
posterior, then the noise of the latents, then the posterior of the masked image.
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

from .images import OutputType, apply_overlay, crop_region
from .speed import constant_context

if TYPE_CHECKING:
    from .pipelines import LatentDiffusionPipeline

Generator = torch.Generator | list[torch.Generator] | None
Size = tuple[int, int]


@dataclass
class Options:
    """The arguments of the pipelines' calls; each pipeline takes those that make sense for it.

    Attributes:
        prompt: what to draw, one text or one for each image.
        prompt_2: the text for the second text encoder of SDXL, by default the same.
        image: the image to start from, see `VaeImageProcessor.preprocess`; to ControlNet text-to-image, the control.
        mask_image: white where to paint, black where to keep.
        masked_image_latents: the encoded image without what the mask covers, in place of encoding it.
        control_image: what a ControlNet follows; a list for several.
        depth_map: (b, h, w), nearer is higher.
        height: of the result in pixels, by default what the UNet was trained for.
        width: likewise.
        padding_mask_crop: paint only the surroundings of the mask, this many pixels wider, at full size.
        strength: how much of the image to replace, from 0 to 1.
        num_inference_steps: of the scheduler.
        original_inference_steps: the steps that an LCM was distilled from.
        timesteps: take these in place of the scheduler's spacing.
        sigmas: likewise, as noise levels.
        denoising_start: skip this fraction of the run: another model did it.
        denoising_end: stop after this fraction of the run, for another model to go on.
        guidance_scale: weight of the prompt against the negative prompt; not above 1 means no guidance.
        image_guidance_scale: weight of the image, for InstructPix2Pix.
        guidance_rescale: share of the guided prediction that gets the deviation of the unguided one (Lin et al.,
            https://arxiv.org/abs/2305.08891, section 3.4).
        noise_level: the noise added to the image that is enlarged.
        negative_prompt: what not to draw.
        negative_prompt_2: for the second text encoder of SDXL, by default the same.
        num_images_per_prompt: images for each prompt.
        eta: the share of noise in DDIM.
        generator: one for all, or a list with one for each image.
        latents: noise to start from in place of random.
        prompt_embeds: in place of the prompt, (b, tokens, d); also `negative_`, and `pooled_` (b, d) for SDXL.
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
        callback_on_step_end: called as (pipeline, step, timestep, tensors); returns the tensors to go on with.
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
    """The state of one run. Conditions have `branches * batch` rows: those of the negative prompt come first.

    Attributes:
        batch: images to make.
        size: their height and width in pixels.
        extras: names of the tensors that the UNet sees as further channels.
        clean: latents of the image that an inpainting UNet of 4 channels keeps outside the mask.
        noise: what was added to them.
    """

    batch: int
    size: Size
    device: torch.device
    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None
    add_text_embeds: Tensor | None = None
    add_time_ids: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    timesteps: Tensor = field(default_factory=lambda: torch.empty(0))
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    denoised: Tensor | None = None
    w_embedding: Tensor | None = None
    class_labels: Tensor | None = None
    image: Any = None
    control_image: Any = None
    image_latents: Tensor | None = None
    depth_mask: Tensor | None = None
    mask: Tensor | None = None
    masked_image_latents: Tensor | None = None
    extras: tuple[str, ...] = ()
    clean: Tensor | None = None
    noise: Tensor | None = None
    crop: tuple[int, int, int, int] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that latents are computed in."""
        return self.prompt_embeds.dtype


class StableDiffusionPipelineOutput(NamedTuple):
    """What a pipeline returns: the images, and for each whether the safety checker objects to it."""

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
    scheduler = pipe.scheduler
    run = pipe.encode(o)
    run.timesteps = choose_timesteps(pipe, o, run.device)
    pipe.num_timesteps = len(run.timesteps)
    prepare_control(pipe, o, run)
    pipe.start(pipe, o, run)
    pipe.describe_size(o, run)
    if dim := pipe.unet.config.get("time_cond_proj_dim"):
        run.w_embedding = embed_guidance(o.guidance_scale, dim).expand(run.batch, dim).to(run.device, run.dtype)
    random = {"eta": o.eta, "generator": o.generator}
    random = {name: value for name, value in random.items() if name in inspect.signature(scheduler.step).parameters}

    with constant_context(pipe.unet, *pipe.controlnets), pipe.progress_bar(total=len(run.timesteps)) as bar:
        for i, t in enumerate(run.timesteps):
            if pipe.interrupt:
                break
            x = scheduler.scale_model_input(torch.cat([run.latents] * pipe.branches), t)
            added = {"text_embeds": run.add_text_embeds, "time_ids": run.add_time_ids} if pipe.is_xl else None
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
                tensors = {name: getattr(run, name) for name in o.callback_on_step_end_tensor_inputs}
                for name, value in (o.callback_on_step_end(pipe, i, t, tensors) or {}).items():
                    setattr(run, name, value)
            bar.update()
    return finish(pipe, o, run)


def guide(pipe: LatentDiffusionPipeline, prediction: Tensor) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, https://arxiv.org/abs/2207.12598), with InstructPix2Pix's third
    branch (Brooks et al., https://arxiv.org/abs/2211.09800, equation 3)."""
    if pipe.branches == 1:
        return prediction
    if pipe.branches == 3:
        text, image, none = prediction.chunk(3)
        guided = none + pipe.guidance_scale * (text - image) + pipe.image_guidance_scale * (image - none)
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

    Meng et al., On Distillation of Guided Diffusion Models, arXiv 2210.03142; the frequencies are LCM's.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    angles = (torch.tensor([guidance_scale - 1]) * 1000)[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def join(pipe: LatentDiffusionPipeline, positive: Tensor, negative: Tensor | None) -> Tensor:
    """The rows of a condition in the order of the guidance's branches."""
    if negative is None or pipe.branches == 1:
        return positive
    return torch.cat([positive, negative, negative] if pipe.branches == 3 else [negative, positive])


def keep_unmasked(scheduler: Any, run: Run, i: int) -> Tensor:
    """The latents after step `i`, replaced by those of the image where the mask is black."""
    assert run.clean is not None
    assert run.mask is not None
    kept = run.clean
    if i < len(run.timesteps) - 1:
        kept = scheduler.add_noise(kept, run.noise, run.timesteps[i + 1 : i + 2])
    mask = run.mask[: run.batch]
    return (1 - mask) * kept + mask * run.latents


# --- before the loop --------------------------------------------------------------------------------------------------


def choose_timesteps(pipe: LatentDiffusionPipeline, o: Options, device: torch.device) -> Tensor:
    """The timesteps of a run: of the scheduler, or the user's; then the part that strength and start and end leave.

    Raises:
        ValueError: the scheduler cannot take them, or none is left.
    """
    scheduler, takes = pipe.scheduler, inspect.signature(pipe.scheduler.set_timesteps).parameters
    special: dict[str, Any] = {
        "timesteps": o.timesteps,
        "sigmas": o.sigmas,
        "original_inference_steps": o.original_inference_steps,
    }
    if pipe.is_lcm and pipe.takes("strength"):
        special["strength"] = o.strength
    given = {name: value for name, value in special.items() if value is not None}
    for name in given:
        if name not in takes:
            raise ValueError(f"{type(scheduler).__name__} does not support {name}; choose another scheduler")
    custom = o.timesteps is not None or o.sigmas is not None
    scheduler.set_timesteps(
        **({} if custom else {"num_inference_steps": o.num_inference_steps}), device=device, **given
    )
    timesteps: Tensor = scheduler.timesteps
    steps = len(timesteps) if custom else o.num_inference_steps
    trained = scheduler.config.num_train_timesteps
    if o.denoising_start is not None:
        left = int((timesteps < round(trained - o.denoising_start * trained)).sum())
        left += scheduler.order == 2 and left % 2 == 0  # a step of two calls is not torn apart
        begin = len(timesteps) - left
    else:
        partial = pipe.takes("strength") and not pipe.is_lcm
        begin = (steps - min(int(steps * o.strength), steps)) * scheduler.order if partial else 0
    if begin:
        timesteps = timesteps[begin:]
        if hasattr(scheduler, "set_begin_index"):  # else it looks the first timestep up
            scheduler.set_begin_index(begin)
    if o.denoising_end is not None and 0 < o.denoising_end < 1:
        timesteps = timesteps[: int((timesteps >= round(trained - o.denoising_end * trained)).sum())]
    if not len(timesteps):
        raise ValueError(f"no step is left of {steps}: raise num_inference_steps, strength or denoising_end")
    return timesteps


def draw(shape: Sequence[int], run: Run, generator: Generator) -> Tensor:
    """Normal noise, drawn on the generator's device. With a list of generators, each draws one row."""
    if isinstance(generator, list):
        rows = [draw((1, *shape[1:]), run, one) for one in generator]
        return torch.cat(rows) if len(rows) > 1 else draw(shape, run, generator[0])
    device = generator.device if generator is not None else run.device
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=run.dtype).to(run.device)


def tile(x: Tensor, rows: int) -> Tensor:
    """Repeat a batch as a whole up to `rows`.

    Raises:
        ValueError: it does not divide them.
    """
    if rows % len(x):
        raise ValueError(f"{len(x)} images cannot be shared by {rows} results")
    return torch.cat([x] * (rows // len(x)))


def encode_image(pipe: LatentDiffusionPipeline, image: Tensor, generator: Generator, *, mode: bool = False) -> Tensor:
    """Pixels (b, 3, h, w) -> unscaled latents: random ones, or the most probable."""
    with pipe.full_precision_vae() as vae:
        image = image.to(vae.device, vae.dtype)
        if mode or not isinstance(generator, list):
            posterior = vae.encode(image).latent_dist
            latents: Tensor = posterior.mode() if mode else posterior.sample(generator)
            return latents
        return torch.cat(
            [
                vae.encode(one).latent_dist.sample(seed)
                for one, seed in zip(image.chunk(len(image)), generator, strict=False)
            ]
        )


def scale(pipe: LatentDiffusionPipeline, latents: Tensor) -> Tensor:
    """Latents of the VAE -> what the UNet was trained on."""
    config = pipe.vae.config
    factor = float(config.scaling_factor)
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return latents * factor
    mean, std = (torch.tensor(config[f"latents_{name}"]).view(1, -1, 1, 1).to(latents) for name in ("mean", "std"))
    return (latents - mean) * factor / std


def unscale(pipe: LatentDiffusionPipeline, latents: Tensor) -> Tensor:
    """The inverse of `scale`."""
    config = pipe.vae.config
    factor = float(config.scaling_factor)
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return latents / factor
    mean, std = (torch.tensor(config[f"latents_{name}"]).view(1, -1, 1, 1).to(latents) for name in ("mean", "std"))
    return latents * std / factor + mean


def is_latents(pipe: LatentDiffusionPipeline, image: Tensor) -> bool:
    """Whether an image comes already encoded."""
    return bool(image.shape[1] == pipe.vae.config.latent_channels != pipe.vae.config.in_channels)


def start_from_noise(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> None:
    """Text-to-image: noise in the size of the result."""
    latent_size = (edge // pipe.vae_scale_factor for edge in run.size)
    shape = (run.batch, pipe.vae.config.latent_channels, *latent_size)
    noise = draw(shape, run, o.generator) if o.latents is None else o.latents.to(run.device)
    run.latents = noise * pipe.scheduler.init_noise_sigma


def start_from_image(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> None:
    """Image-to-image (Meng et al., SDEdit, https://arxiv.org/abs/2108.01073): noise is added to the image."""
    if o.latents is not None:
        run.latents = o.latents.to(run.device)
        return
    image = pipe.image_processor.preprocess(o.image, o.height, o.width)
    if is_latents(pipe, image):
        latents = image.to(run.device, run.dtype)
    else:
        image = tile(image, run.batch) if isinstance(o.generator, list) and len(image) < run.batch else image
        latents = scale(pipe, encode_image(pipe, image, o.generator).to(run.dtype))
    run.latents = latents = tile(latents, run.batch)
    run.size = latents.shape[-2] * pipe.vae_scale_factor, latents.shape[-1] * pipe.vae_scale_factor
    if o.denoising_start is None:
        first = run.timesteps[:1].repeat(run.batch)
        run.latents = pipe.scheduler.add_noise(latents, draw(latents.shape, run, o.generator), first)


def start_from_depth(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> None:
    """Image-to-image with a depth map beside the latents.

    Raises:
        ValueError: there is no depth map.
    """
    if o.depth_map is None:
        raise ValueError("depth_map is needed, (b, h, w): depth estimation is not part of the runtime")
    start_from_image(pipe, o, run)
    depth = o.depth_map.to(run.device, run.dtype)[:, None]
    depth = F.interpolate(depth, run.latents.shape[-2:], mode="bicubic", align_corners=False)
    low, high = depth.amin((1, 2, 3), keepdim=True), depth.amax((1, 2, 3), keepdim=True)
    depth = 2.0 * (depth - low) / (high - low) - 1.0
    run.depth_mask = torch.cat([tile(depth, run.batch)] * pipe.branches)
    run.extras = ("depth_mask",)


def start_from_mask(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> None:
    """Inpainting: noise, or the noisy image, and what the mask leaves of the image.

    Raises:
        ValueError: the UNet is not of a kind that can inpaint.
    """
    channels, whole = pipe.unet.config.in_channels, o.strength == 1.0
    if channels not in (4, 9):
        raise ValueError(f"inpainting needs a UNet of 4 or 9 input channels, not {channels}")
    height, width = run.size
    mode: Any = "default"
    if o.padding_mask_crop is not None:
        run.crop, mode = crop_region(o.mask_image, width, height, o.padding_mask_crop), "fill"
    pixels = pipe.image_processor.preprocess(o.image, height, width, mode, run.crop)
    mask = pipe.mask_processor.preprocess(o.mask_image, height, width, mode, run.crop)
    encoded = is_latents(pipe, pixels)

    def encode(image: Tensor) -> Tensor:
        latents = image if is_latents(pipe, image) else scale(pipe, encode_image(pipe, image, o.generator))
        return tile(latents.to(run.device, run.dtype), run.batch).contiguous()

    clean = encode(pixels) if encoded or channels == 4 or (o.latents is None and not whole) else None
    shape = (run.batch, pipe.vae.config.latent_channels, *(edge // pipe.vae_scale_factor for edge in run.size))
    run.noise = draw(shape, run, o.generator) if o.latents is None or o.denoising_start is not None else o.latents
    run.noise = run.noise.to(run.device)
    if o.denoising_start is not None:
        assert clean is not None
        run.latents = clean
    elif whole or o.latents is not None or clean is None:
        run.latents = run.noise * pipe.scheduler.init_noise_sigma
    else:
        run.latents = pipe.scheduler.add_noise(clean, run.noise, run.timesteps[:1].repeat(run.batch))

    small = F.interpolate(mask, (height // pipe.vae_scale_factor, width // pipe.vae_scale_factor))
    run.mask = torch.cat([tile(small.to(run.device, run.dtype), run.batch)] * pipe.branches)
    masked = o.masked_image_latents
    if masked is None and not encoded:
        masked = encode(pixels * (mask < 0.5))  # with 4 channels for the sake of the random draw
    if channels == 9:
        if masked is None:
            raise ValueError("masked_image_latents is needed where the image is given as latents")
        run.masked_image_latents = torch.cat([tile(masked.to(run.device, run.dtype), run.batch)] * pipe.branches)
        run.extras = ("mask", "masked_image_latents")
    else:
        run.clean = clean


def start_from_edited(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> None:
    """InstructPix2Pix: noise, and the image to edit beside it; the third branch sees none."""
    image = pipe.image_processor.preprocess(o.image, o.height, o.width)
    latents = image.to(run.device, run.dtype) if is_latents(pipe, image) else encode_image(pipe, image, None, mode=True)
    latents = tile(latents.to(run.dtype), run.batch)
    if pipe.scales_edited:
        latents = latents * pipe.vae.config.scaling_factor
    branches = [latents, latents, torch.zeros_like(latents)]
    run.image_latents, run.extras = torch.cat(branches[: pipe.branches]), ("image_latents",)
    run.size = latents.shape[-2] * pipe.vae_scale_factor, latents.shape[-1] * pipe.vae_scale_factor
    start_from_noise(pipe, o, run)


def start_from_small(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> None:
    """Enlarging: noise in the size of the small image, which is beside it with a little noise added."""
    image = pipe.image_processor.preprocess(o.image).to(run.device, run.dtype)
    level = torch.tensor([o.noise_level], dtype=torch.long, device=run.device)
    image = pipe.low_res_scheduler.add_noise(image, draw(image.shape, run, o.generator), level)
    run.size = image.shape[-2] * pipe.vae_scale_factor, image.shape[-1] * pipe.vae_scale_factor
    run.image, run.extras = tile(image, run.batch * pipe.branches), ("image",)
    run.class_labels = level.expand(len(run.image))
    start_from_noise(pipe, o, run)


# --- ControlNet -------------------------------------------------------------------------------------------------------


def per_net(value: Any, count: int, name: str) -> list[Any]:
    """One value for each ControlNet.

    Raises:
        ValueError: there is another number of them.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} values for {count} ControlNets")
    return values


def guesses(pipe: LatentDiffusionPipeline, o: Options) -> bool:
    """Whether the ControlNets act on the prompted half only."""
    return o.guess_mode or bool(pipe.controlnets[0].config.get("global_pool_conditions"))


def prepare_control(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> None:
    """The images that the ControlNets follow, one row for each row of the UNet's batch; they set the size.

    Raises:
        ValueError: there is not one image for each ControlNet.
    """
    if not pipe.controlnets:
        return
    given = getattr(o, pipe.control_argument)
    many = len(pipe.controlnets) > 1
    images = per_net(given, len(pipe.controlnets), pipe.control_argument) if many else [given]
    rows = run.batch * (1 if guesses(pipe, o) else pipe.branches)
    prepared = []
    for image in images:
        pixels = pipe.control_image_processor.preprocess(image, o.height, o.width)
        once = run.batch if len(pixels) == 1 else o.num_images_per_prompt
        prepared.append(tile(pixels.repeat_interleave(once, 0), rows).to(run.device, pipe.controlnets[0].dtype))
    run.size = prepared[0].shape[-2], prepared[0].shape[-1]
    setattr(run, pipe.control_argument, prepared if many else prepared[0])


def control(
    pipe: LatentDiffusionPipeline, o: Options, run: Run, i: int, x: Tensor, added: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What the ControlNets add inside the UNet in step `i`."""
    nets, total = pipe.controlnets, len(run.timesteps)
    if not nets:
        return {}
    one_sided = guesses(pipe, o) and pipe.branches > 1
    rows = slice(run.batch, None) if one_sided else slice(None)
    images = getattr(run, pipe.control_argument)
    sums: list[Tensor] = []
    for net, image, weight, start, end in zip(
        nets,
        images if len(nets) > 1 else [images],
        per_net(o.controlnet_conditioning_scale, len(nets), "controlnet_conditioning_scale"),
        per_net(o.control_guidance_start, len(nets), "control_guidance_start"),
        per_net(o.control_guidance_end, len(nets), "control_guidance_end"),
        strict=True,
    ):
        acts = start <= i / total and (i + 1) / total <= end
        down, mid = net(
            x[rows],
            run.timesteps[i],
            encoder_hidden_states=run.prompt_embeds[rows],
            controlnet_cond=image,
            conditioning_scale=weight * float(acts),
            guess_mode=guesses(pipe, o),
            added_cond_kwargs=added and {name: value[rows] for name, value in added.items()},
        )
        sums = [a + b for a, b in zip(sums, [*down, mid], strict=True)] if sums else [*down, mid]
    if one_sided:
        sums = [torch.cat([torch.zeros_like(x), x]) for x in sums]
    return {"down_block_additional_residuals": tuple(sums[:-1]), "mid_block_additional_residual": sums[-1]}


# --- after the loop ---------------------------------------------------------------------------------------------------


def finish(pipe: LatentDiffusionPipeline, o: Options, run: Run) -> Any:
    """Latents -> what the caller asked for."""
    latents = run.denoised if pipe.is_lcm and run.denoised is not None else run.latents
    flagged: list[bool] | None = None
    if o.output_type == "latent":
        images: Any = latents
    else:
        with pipe.full_precision_vae() as vae:
            pixels = vae.decode(unscale(pipe, latents.to(vae.dtype))).sample
        pixels, flagged = check_safety(pipe, pixels, run.dtype)
        images = pipe.image_processor.postprocess(pixels, o.output_type, [not flag for flag in flagged or ()])
    if run.crop is not None:
        images = [apply_overlay(pipe.image_processor, o.mask_image, o.image, one, run.crop) for one in images]
    if pipe.is_xl:
        return StableDiffusionXLPipelineOutput(images) if o.return_dict else (images,)
    return StableDiffusionPipelineOutput(images, flagged) if o.return_dict else (images, flagged)


def check_safety(pipe: LatentDiffusionPipeline, pixels: Tensor, dtype: torch.dtype) -> tuple[Any, list[bool] | None]:
    """The images, black where the safety checker objects, and where it does; None without a safety checker."""
    if pipe.is_xl or pipe.safety_checker is None:
        return pixels, None
    seen = pipe.feature_extractor(pipe.image_processor.postprocess(pixels), return_tensors="pt")
    checked, flagged = pipe.safety_checker(images=pixels, clip_input=seen.pixel_values.to(pixels.device, dtype))
    return checked, [bool(flag) for flag in flagged]


# --- the prompt -------------------------------------------------------------------------------------------------------


def tokenize(tokenizer: Any, prompts: list[str]) -> Tensor:
    """Texts -> token ids (b, model_max_length); warns of what does not fit."""
    prompts = [tokenizer.expand(prompt) for prompt in prompts]
    limit = tokenizer.model_max_length
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        if len(ids) > limit:
            rest = tokenizer.decode(ids[limit - 1 : -1])
            warnings.warn(f"the prompt is longer than {limit} tokens; this is left out: {rest}", stacklevel=2)
    tokens = tokenizer(prompts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
    result: Tensor = tokens.input_ids
    return result


def last_state(encoder: Any, ids: Tensor, clip_skip: int | None) -> Tensor:
    """What SD's UNet sees of a text: the last hidden state, or an earlier one, after the final norm."""
    output = encoder(ids.to(encoder.device), output_hidden_states=True)
    if clip_skip is None:
        state: Tensor = output.last_hidden_state
    else:
        state = encoder.text_model.final_layer_norm(output.hidden_states[-(clip_skip + 1)])
    return state


# --- checks -----------------------------------------------------------------------------------------------------------


def check(pipe: LatentDiffusionPipeline, o: Options) -> None:
    """Find arguments that make no sense before the work begins.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: arguments contradict each other, or one is missing or out of range.
    """
    for name in ("ip_adapter_image", "ip_adapter_image_embeds", "cross_attention_kwargs"):
        if getattr(o, name) is not None:
            raise ValueError(f"{name} is not supported")
    for text, embeds in (("prompt", "prompt_embeds"), ("negative_prompt", "negative_prompt_embeds")):
        if getattr(o, text) is not None and getattr(o, embeds) is not None:
            raise ValueError(f"give either {text} or {embeds}, not both")
    if o.prompt is None and o.prompt_embeds is None:
        raise ValueError("give a prompt or prompt_embeds")
    for name in ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2"):
        value = getattr(o, name)
        if not (value is None or isinstance(value, str) or (isinstance(value, list) and value)):
            raise TypeError(f"{name} must be a text or a list of texts, not {value!r}")
    if o.prompt_embeds is not None and o.negative_prompt_embeds is not None:
        ours, theirs = tuple(o.prompt_embeds.shape), tuple(o.negative_prompt_embeds.shape)
        if ours != theirs:
            raise ValueError(f"prompt_embeds {ours} and negative_prompt_embeds {theirs} must have the same shape")
    for prefix in ("", "negative_"):
        embeds, pooled = getattr(o, f"{prefix}prompt_embeds"), getattr(o, f"{prefix}pooled_prompt_embeds")
        if pipe.is_xl and embeds is not None and pooled is None:
            raise ValueError(f"{prefix}prompt_embeds needs {prefix}pooled_prompt_embeds")
    for name in ("height", "width"):
        if (getattr(o, name) or 0) % 8:
            raise ValueError(f"{name} = {getattr(o, name)} must be a multiple of 8")
    for name in ("image", "mask_image", "control_image"):
        spared = name == "image" and o.latents is not None and pipe.takes("latents") and pipe.takes("strength")
        if pipe.takes(name) and getattr(o, name) is None and not spared:
            raise ValueError(f"{name} is needed")
    if not 0 <= o.strength <= 1:
        raise ValueError(f"strength = {o.strength} must be between 0 and 1")
    if o.denoising_start is not None and o.denoising_end is not None and o.denoising_start >= o.denoising_end:
        raise ValueError(f"denoising_start = {o.denoising_start} must be less than denoising_end = {o.denoising_end}")
    if o.timesteps is not None and o.sigmas is not None:
        raise ValueError("give either timesteps or sigmas, not both")
    if pipe.takes("noise_level") and o.noise_level > pipe.config.get("max_noise_level", 350):
        raise ValueError(f"noise_level = {o.noise_level} must be at most {pipe.config.max_noise_level}")
    if o.output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type = {o.output_type!r} must be one of pil, np, pt, latent")
    if o.padding_mask_crop is not None and not (o.output_type == "pil" and hasattr(o.image, "crop")):
        raise ValueError("padding_mask_crop needs PIL images and output_type = 'pil'")
    unknown = set(o.callback_on_step_end_tensor_inputs) - set(pipe._callback_tensor_inputs)
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs: {sorted(unknown)} not in {pipe._callback_tensor_inputs}")
    for start, end in zip(
        per_net(o.control_guidance_start, max(len(pipe.controlnets), 1), "control_guidance_start"),
        per_net(o.control_guidance_end, max(len(pipe.controlnets), 1), "control_guidance_end"),
        strict=True,
    ):
        if not 0 <= start < end <= 1:
            raise ValueError(f"control_guidance_start = {start} and _end = {end} must be 0 <= start < end <= 1")
