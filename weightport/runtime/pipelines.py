"""The pipelines, with diffusers' names and call arguments: each says what its components are and how a run starts.

`sampling.sample` does the work for all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import sampling
from .config import Config
from .controlnet import MultiControlNetModel
from .images import VaeImageProcessor
from .loading import correct_sample_size
from .pipeline import DiffusionPipeline
from .sampling import Options, Run, join, last_state, sample, tokenize
from .speed import compile_model
from .textual_inversion import load_textual_inversion

LATENT = "vae text_encoder tokenizer unet"
XL = "vae text_encoder text_encoder_2 tokenizer tokenizer_2 unet"
CHECKER = "safety_checker=None feature_extractor=None"
TEXT = "guidance_scale negative_prompt num_images_per_prompt eta generator"
EMBEDS = "prompt_embeds negative_prompt_embeds"
ADAPTER = "ip_adapter_image ip_adapter_image_embeds"
OUTPUT = "output_type return_dict cross_attention_kwargs"
REST = f"{ADAPTER} {OUTPUT}"
CALLBACK = "callback_on_step_end callback_on_step_end_tensor_inputs"
LAST = f"clip_skip {CALLBACK}"
CONTROL = "controlnet_conditioning_scale guess_mode control_guidance_start control_guidance_end"
XL_TEXT = "guidance_scale negative_prompt negative_prompt_2 num_images_per_prompt eta generator"
XL_EMBEDS = f"{EMBEDS} pooled_prompt_embeds negative_pooled_prompt_embeds"
SIZES = "original_size crops_coords_top_left target_size"
ALL_SIZES = f"{SIZES} negative_original_size negative_crops_coords_top_left negative_target_size"
AESTHETIC = "aesthetic_score negative_aesthetic_score"
SCHEDULE = "num_inference_steps timesteps sigmas"
# the watermark is accepted and ignored: nothing is ever watermarked
WATERMARK: dict[str, Any] = {"force_zeros_for_empty_prompt": True, "add_watermarker": None}
DEFAULTS = {field.name: field.default for field in fields(Options)}


def make_init(parts: str, options: dict[str, Any]) -> Callable[..., None]:
    """A pipeline's constructor: the names of its components, those that may be missing with `=None`; its options."""
    parameter, kind = inspect.Parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [part.removesuffix("=None") for part in parts.split()]
    optional = {part.removesuffix("=None") for part in parts.split() if part.endswith("=None")}
    parameters = [parameter(name, kind, default=None if name in optional else parameter.empty) for name in names]
    parameters += [parameter(name, kind, default=value) for name, value in options.items()]
    signature = inspect.Signature(parameters)

    def __init__(self: LatentDiffusionPipeline, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self.register_to_config(**{name: bound.arguments[name] for name in options if name != "add_watermarker"})
        self.register_modules(**{name: bound.arguments[name] for name in names})

    __init__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[parameter("self", kind), *parameters]
    )
    return __init__


def make_call(arguments: list[str], defaults: dict[str, Any]) -> Callable[..., Any]:
    """A pipeline's `__call__`, with a signature of `arguments`; `Options` says what each means."""
    parameter, kind = inspect.Parameter, inspect.Parameter.POSITIONAL_OR_KEYWORD
    values = DEFAULTS | defaults
    signature = inspect.Signature([parameter(name, kind, default=values[name]) for name in arguments])

    def __call__(self: LatentDiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        """Make images; `weightport.runtime.sampling.Options` describes the arguments."""
        return sample(self, Options(**{**defaults, **signature.bind(*args, **kwargs).arguments}))

    own = parameter("self", kind)
    __call__.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[own, *signature.parameters.values()]
    )
    return __call__


class LatentDiffusionPipeline(DiffusionPipeline):
    """The base of all pipelines of this family.

    Attributes:
        parts: the names of the components, for the constructor.
        options: its other arguments.
        call: the names of the call's arguments, in diffusers' order.
        defaults: of the arguments, where they are not those of `Options`.
        scheduler_fixes: options that early configs have wrong; the constructor changes them in the scheduler.
        start: what sets the first latents.
        control_argument: the argument that brings the ControlNet's image.
        is_xl: whether the text encoders and conditions are SDXL's.
        is_lcm: whether guidance is a condition of the UNet, as in a latent consistency model.
    """

    parts: ClassVar[str] = ""
    options: ClassVar[dict[str, Any]] = {}
    call: ClassVar[str] = ""
    defaults: ClassVar[dict[str, Any]] = {}
    scheduler_fixes: ClassVar[dict[str, Any]] = {}
    start: Callable[[LatentDiffusionPipeline, Options, Run], None] = staticmethod(sampling.start_from_noise)
    control_argument: ClassVar[str] = "control_image"
    is_xl: ClassVar[bool] = False
    is_lcm: ClassVar[bool] = False
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "negative_prompt_embeds")

    num_timesteps: int = 0
    _guidance_scale: float = 1.0
    _image_guidance_scale: float = 1.5
    _guidance_rescale: float = 0.0
    _clip_skip: int | None = None
    _interrupt: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "parts" in cls.__dict__:
            cls.__init__ = make_init(cls.parts, cls.options)  # type: ignore[method-assign]
        if "call" in cls.__dict__:
            cls.__call__ = make_call(cls.call.split(), cls.defaults)  # type: ignore[method-assign]

    @classmethod
    def takes(cls, name: str) -> bool:
        """Whether the call has an argument of this name."""
        return name in cls.call.split()

    # --- the state of a run -------------------------------------------------------------------------------------------

    def begin(self, o: Options) -> None:
        """Take over what callbacks may look at or change during the run."""
        self._guidance_scale, self._image_guidance_scale = o.guidance_scale, o.image_guidance_scale
        self._guidance_rescale, self._clip_skip, self._interrupt = o.guidance_rescale, o.clip_skip, False

    @property
    def guidance_scale(self) -> float:
        """Weight of the prompt; a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def image_guidance_scale(self) -> float:
        """Weight of the image, for InstructPix2Pix."""
        return self._image_guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """Share of the guided prediction whose deviation is corrected."""
        return self._guidance_rescale

    @property
    def clip_skip(self) -> int | None:
        """How many of the text encoder's last layers are left out."""
        return self._clip_skip

    @property
    def interrupt(self) -> bool:
        """Whether the run is to stop; a callback may set `_interrupt`."""
        return self._interrupt

    @property
    def branches(self) -> int:
        """How often the UNet sees each image in a step: once without guidance, twice with it."""
        guided = self.guidance_scale > 1 and not self.is_lcm and not self.unet.config.get("time_cond_proj_dim")
        if self.takes("image_guidance_scale"):
            return 3 if guided and self.image_guidance_scale >= 1 else 1
        return 2 if guided else 1

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether there is guidance."""
        return self.branches > 1

    # --- components ---------------------------------------------------------------------------------------------------

    @property
    def vae_scale_factor(self) -> int:
        """Pixels for each latent, on an edge."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def image_processor(self) -> VaeImageProcessor:
        """What images go through."""
        return VaeImageProcessor(self.vae_scale_factor, vae_latent_channels=self.vae.config.latent_channels)

    @property
    def mask_processor(self) -> VaeImageProcessor:
        """What masks go through."""
        return VaeImageProcessor(self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True)

    @property
    def control_image_processor(self) -> VaeImageProcessor:
        """What the images of ControlNets go through."""
        return VaeImageProcessor(self.vae_scale_factor, do_normalize=False, do_convert_rgb=True)

    @property
    def controlnets(self) -> list[Any]:
        """The ControlNets, if the pipeline has any."""
        net = self.components.get("controlnet")
        return [] if net is None else list(getattr(net, "nets", [net]))

    @property
    def scales_edited(self) -> bool:
        """Whether the image to edit is scaled as latents are: in CosXL only."""
        return bool(self.config.get("is_cosxl_edit"))

    def register_modules(self, **components: Any) -> None:
        """Make these the components; several ControlNets become one model, and options of old schedulers are put right.

        Raises:
            ValueError: there is a safety checker but nothing that prepares images for it.
        """
        net = components.get("controlnet")
        if isinstance(net, (list, tuple)):
            components["controlnet"] = MultiControlNetModel(list(net))
        if components.get("safety_checker") is not None and components.get("feature_extractor") is None:
            raise ValueError("a safety_checker needs a feature_extractor; pass both, or safety_checker=None")
        if isinstance(config := getattr(components.get("scheduler"), "config", None), Config):
            fixes = {key: value for key, value in self.scheduler_fixes.items() if key in config}
            unset = [key for key in config.get("_use_default_values", ()) if key not in fixes]
            config.update(fixes | {"_use_default_values": unset})
        if self.scheduler_fixes:
            correct_sample_size(components.get("unet"))
        super().register_modules(**components)

    @contextmanager
    def full_precision_vae(self) -> Iterator[Any]:
        """The VAE, in float32 where float16 would overflow: SDXL's configs say so with `force_upcast`."""
        upcast = self.is_xl and self.vae.dtype is torch.float16 and self.vae.config.get("force_upcast", True)
        if upcast:
            self.vae.to(torch.float32)
        try:
            yield self.vae
        finally:
            if upcast:
                self.vae.to(torch.float16)

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | list[str | None] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        **options: Any,
    ) -> None:
        """Teach the pipeline new words; see `textual_inversion.load_textual_inversion`."""
        load_textual_inversion(
            tokenizer or self.tokenizer,
            text_encoder or self.text_encoder,
            pretrained_model_name_or_path,
            token,
            **options,
        )

    def compile(self) -> None:
        """Compile the UNet for speed; images then differ by rounding. See `speed.compile_model`."""
        compile_model(self.unet)

    def enable_vae_slicing(self) -> None:
        """Let the VAE take one image at a time."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Let the VAE take all images at once."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Let the VAE take large images in overlapping tiles; the result differs a little."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Let the VAE take images whole."""
        self.vae.disable_tiling()

    # --- conditions ---------------------------------------------------------------------------------------------------

    def begin_run(self, o: Options, embeds: tuple[Tensor, Tensor | None]) -> Run:
        """A run for the encoded prompts."""
        positive, negative = embeds
        default = self.unet.config.get("sample_size") or 64
        sizes = default if isinstance(default, (list, tuple)) else (default, default)
        height, width = (edge * self.vae_scale_factor for edge in sizes)
        run = Run(len(positive), (o.height or height, o.width or width), self.device, positive, negative)
        if isinstance(o.generator, list) and len(o.generator) not in (1, run.batch):
            raise ValueError(f"{len(o.generator)} generators are given for {run.batch} images")
        run.prompt_embeds = join(self, positive, negative)
        return run

    def encode(self, o: Options) -> Run:
        """Encode the prompts: the beginning of a run."""
        return self.begin_run(
            o,
            self.encode_prompt(
                o.prompt,
                self.device,
                o.num_images_per_prompt,
                self.branches > 1,
                o.negative_prompt,
                o.prompt_embeds,
                o.negative_prompt_embeds,
                clip_skip=o.clip_skip,
            ),
        )

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The embeddings of the prompts and, with guidance, of the negative prompts: (b, tokens, d) each."""
        dtype = self.unet.dtype if self.text_encoder is None else self.text_encoder.dtype

        def embed(texts: list[str], skip: int | None) -> Tensor:
            return last_state(self.text_encoder, tokenize(self.tokenizer, texts), skip)

        if prompt_embeds is None:
            prompt_embeds = embed(listed(prompt, 1), clip_skip)
        if negative_prompt_embeds is None and do_classifier_free_guidance:
            negative_prompt_embeds = embed(listed(negative_prompt, len(prompt_embeds)), None)
        positive = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, 0)
        if negative_prompt_embeds is None or not do_classifier_free_guidance:
            return positive, negative_prompt_embeds
        return positive, negative_prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, 0)

    def describe_size(self, o: Options, run: Run) -> None:
        """Set the conditions that SDXL has beside the prompt."""


def listed(text: str | list[str] | None, count: int) -> list[str]:
    """Texts for `count` prompts: one for all, or one for each.

    Raises:
        ValueError: there is another number of them.
    """
    texts = [text or ""] * count if text is None or isinstance(text, str) else text
    if count > 1 and len(texts) != count:
        raise ValueError(f"{len(texts)} negative prompts are given for {count} prompts")
    return texts


class StableDiffusionPipeline(LatentDiffusionPipeline):
    """Text-to-image."""

    parts = f"{LATENT} scheduler {CHECKER} image_encoder=None"
    options: ClassVar[dict[str, Any]] = {"requires_safety_checker": True}
    _optional_components: ClassVar[list[str]] = ["safety_checker", "feature_extractor", "image_encoder"]
    call = f"prompt height width {SCHEDULE} {TEXT} latents {EMBEDS} {REST} guidance_rescale {LAST}"
    scheduler_fixes: ClassVar[dict[str, Any]] = {"steps_offset": 1, "clip_sample": False}


class StableDiffusionImg2ImgPipeline(StableDiffusionPipeline):
    """Image-to-image."""

    call = f"prompt image strength {SCHEDULE} {TEXT} {EMBEDS} {REST} {LAST}"
    start = staticmethod(sampling.start_from_image)


class StableDiffusionInpaintPipeline(StableDiffusionPipeline):
    """Inpainting, by a UNet made for it (9 channels) or by any other (4)."""

    call = (
        f"prompt image mask_image masked_image_latents height width padding_mask_crop strength {SCHEDULE} {TEXT} "
        f"latents {EMBEDS} {REST} {LAST}"
    )
    defaults: ClassVar[dict[str, Any]] = {"strength": 1.0}
    scheduler_fixes: ClassVar[dict[str, Any]] = {"steps_offset": 1, "skip_prk_steps": True}
    start = staticmethod(sampling.start_from_mask)
    _callback_tensor_inputs = (*StableDiffusionPipeline._callback_tensor_inputs, "mask", "masked_image_latents")


class StableDiffusionInstructPix2PixPipeline(StableDiffusionPipeline):
    """Edit an image by an instruction."""

    call = (
        "prompt image num_inference_steps guidance_scale image_guidance_scale negative_prompt num_images_per_prompt "
        f"eta generator latents {EMBEDS} {ADAPTER} output_type return_dict {CALLBACK} cross_attention_kwargs"
    )
    defaults: ClassVar[dict[str, Any]] = {"num_inference_steps": 100}
    scheduler_fixes: ClassVar[dict[str, Any]] = {}
    start = staticmethod(sampling.start_from_edited)
    _callback_tensor_inputs = (*StableDiffusionPipeline._callback_tensor_inputs, "image_latents")


class LatentConsistencyModelPipeline(StableDiffusionPipeline):
    """Text-to-image in few steps (Luo et al., https://arxiv.org/abs/2310.04378)."""

    call = (
        "prompt height width num_inference_steps original_inference_steps timesteps guidance_scale "
        f"num_images_per_prompt generator latents prompt_embeds {REST} {LAST}"
    )
    defaults: ClassVar[dict[str, Any]] = {"num_inference_steps": 4, "guidance_scale": 8.5}
    scheduler_fixes: ClassVar[dict[str, Any]] = {}
    is_lcm = True
    _callback_tensor_inputs = ("latents", "denoised", "prompt_embeds", "w_embedding")


class LatentConsistencyModelImg2ImgPipeline(LatentConsistencyModelPipeline):
    """Image-to-image in few steps."""

    call = (
        "prompt image num_inference_steps strength original_inference_steps timesteps guidance_scale "
        f"num_images_per_prompt generator latents prompt_embeds {REST} {LAST}"
    )
    start = staticmethod(sampling.start_from_image)


class StableDiffusionUpscalePipeline(LatentDiffusionPipeline):
    """Enlarge an image four times."""

    parts = f"{LATENT} low_res_scheduler scheduler {CHECKER} watermarker=None"
    options: ClassVar[dict[str, Any]] = {"max_noise_level": 350}
    _optional_components: ClassVar[list[str]] = ["watermarker", "safety_checker", "feature_extractor"]
    call = (
        "prompt image num_inference_steps guidance_scale noise_level negative_prompt num_images_per_prompt eta "
        f"generator latents {EMBEDS} {OUTPUT} {LAST}"
    )
    defaults: ClassVar[dict[str, Any]] = {"num_inference_steps": 75, "guidance_scale": 9.0}
    start = staticmethod(sampling.start_from_small)

    @property
    def image_processor(self) -> VaeImageProcessor:
        """What images go through."""
        return VaeImageProcessor(
            self.vae_scale_factor, "bicubic", vae_latent_channels=self.vae.config.latent_channels + 1
        )


class StableDiffusionDepth2ImgPipeline(LatentDiffusionPipeline):
    """Image-to-image that keeps to a depth map."""

    parts = f"{LATENT} scheduler depth_estimator=None feature_extractor=None"
    _optional_components: ClassVar[list[str]] = ["depth_estimator", "feature_extractor"]
    call = f"prompt image depth_map strength num_inference_steps {TEXT} {EMBEDS} {OUTPUT} {LAST}"
    start = staticmethod(sampling.start_from_depth)
    _callback_tensor_inputs = (*LatentDiffusionPipeline._callback_tensor_inputs, "depth_mask")


class StableDiffusionControlNetPipeline(LatentDiffusionPipeline):
    """Text-to-image, led by one or several ControlNets."""

    parts = f"{LATENT} controlnet scheduler {CHECKER} image_encoder=None"
    options: ClassVar[dict[str, Any]] = {"requires_safety_checker": True}
    _optional_components: ClassVar[list[str]] = ["safety_checker", "feature_extractor", "image_encoder"]
    call = f"prompt image height width {SCHEDULE} {TEXT} latents {EMBEDS} {REST} {CONTROL} {LAST}"
    control_argument = "image"
    _callback_tensor_inputs = (*LatentDiffusionPipeline._callback_tensor_inputs, "image")


class StableDiffusionControlNetImg2ImgPipeline(StableDiffusionControlNetPipeline):
    """Image-to-image, led by ControlNets."""

    call = (
        f"prompt image control_image height width strength num_inference_steps {TEXT} latents {EMBEDS} {REST} "
        f"{CONTROL} {LAST}"
    )
    defaults: ClassVar[dict[str, Any]] = {"controlnet_conditioning_scale": 0.8}
    start = staticmethod(sampling.start_from_image)
    control_argument = "control_image"
    _callback_tensor_inputs = (*LatentDiffusionPipeline._callback_tensor_inputs, "control_image")


class StableDiffusionControlNetInpaintPipeline(StableDiffusionControlNetPipeline):
    """Inpainting, led by ControlNets."""

    call = (
        "prompt image mask_image control_image height width padding_mask_crop strength num_inference_steps "
        f"{TEXT} latents {EMBEDS} {REST} {CONTROL} {LAST}"
    )
    defaults: ClassVar[dict[str, Any]] = {"strength": 1.0, "controlnet_conditioning_scale": 0.5}
    start = staticmethod(sampling.start_from_mask)
    control_argument = "control_image"
    _callback_tensor_inputs = (*StableDiffusionInpaintPipeline._callback_tensor_inputs, "control_image")


# --- SDXL -----------------------------------------------------------------------------------------------------------


class _XLPipeline(LatentDiffusionPipeline):
    """What the pipelines of SDXL share: two text encoders, and sizes as conditions."""

    _optional_components: ClassVar[list[str]] = [
        *("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "image_encoder", "feature_extractor")
    ]
    is_xl = True
    _callback_tensor_inputs = (
        *LatentDiffusionPipeline._callback_tensor_inputs,
        *("add_text_embeds", "add_time_ids", "negative_pooled_prompt_embeds"),
    )

    def encode(self, o: Options) -> Run:
        """Encode the prompts: the beginning of a run."""
        positive, negative, pooled, negative_pooled = self.encode_prompt(
            o.prompt,
            o.prompt_2,
            self.device,
            o.num_images_per_prompt,
            self.branches > 1,
            o.negative_prompt,
            o.negative_prompt_2,
            o.prompt_embeds,
            o.negative_prompt_embeds,
            o.pooled_prompt_embeds,
            o.negative_pooled_prompt_embeds,
            clip_skip=o.clip_skip,
        )
        run = self.begin_run(o, (positive, negative))
        run.add_text_embeds, run.negative_pooled_prompt_embeds = join(self, pooled, negative_pooled), negative_pooled
        return run

    def encode_prompt(  # type: ignore[override]
        self,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The embeddings of prompts and negative prompts, (b, tokens, d), then the pooled ones, (b, d)."""
        if prompt_embeds is None:
            prompts = listed(prompt, 1)
            prompt_embeds, pooled_prompt_embeds = self._embed(prompts, listed(prompt_2 or prompts, 1), clip_skip or 0)
        assert pooled_prompt_embeds is not None
        if negative_prompt_embeds is None and do_classifier_free_guidance:
            if negative_prompt is None and self.config.get("force_zeros_for_empty_prompt"):
                negative_prompt_embeds = torch.zeros_like(prompt_embeds)
                negative_pooled_prompt_embeds = torch.zeros_like(pooled_prompt_embeds)
            else:
                texts = listed(negative_prompt, len(prompt_embeds))
                second = listed(negative_prompt_2 or texts, len(prompt_embeds))
                negative_prompt_embeds, negative_pooled_prompt_embeds = self._embed(texts, second, 0)
        dtype = self.unet.dtype if self.text_encoder_2 is None else self.text_encoder_2.dtype

        def repeated(x: Tensor | None, to: torch.dtype) -> Any:
            return None if x is None else x.to(device, to).repeat_interleave(num_images_per_prompt, 0)

        return (
            repeated(prompt_embeds, dtype),
            repeated(negative_prompt_embeds, dtype),
            repeated(pooled_prompt_embeds, pooled_prompt_embeds.dtype),
            repeated(negative_pooled_prompt_embeds, pooled_prompt_embeds.dtype),
        )

    def _embed(self, prompts: list[str], prompts_2: list[str], clip_skip: int) -> tuple[Tensor, Tensor]:
        """The penultimate states of the text encoders side by side, and the projected pooled state of the last one."""
        pairs = [(self.tokenizer, self.text_encoder), (self.tokenizer_2, self.text_encoder_2)]
        pairs = [(tokenizer, encoder) for tokenizer, encoder in pairs if tokenizer is not None]
        states, pooled = [], torch.empty(0)
        # the refiner's one encoder gets the first prompt
        for (tokenizer, encoder), texts in zip(pairs, (prompts, prompts_2), strict=False):
            output = encoder(tokenize(tokenizer, texts).to(encoder.device), output_hidden_states=True)
            states.append(output.hidden_states[-(clip_skip + 2)])
            pooled = output[0]
        return torch.cat(states, dim=-1), pooled

    def describe_size(self, o: Options, run: Run) -> None:
        """Set the conditions that the image sizes are.

        Raises:
            ValueError: the UNet expects another number of them.
        """
        original, crop, target = o.original_size or run.size, o.crops_coords_top_left, o.target_size or run.size
        scored = bool(self.config.get("requires_aesthetics_score"))
        positive = (*original, *crop, o.aesthetic_score) if scored else (*original, *crop, *target)
        negative_original, negative_crop = o.negative_original_size, o.negative_crops_coords_top_left
        negative_target = o.negative_target_size
        late = self.takes("aesthetic_score")
        if scored:
            negative: Any = (*(negative_original or original), *negative_crop, o.negative_aesthetic_score)
        elif late:
            negative = (*(negative_original or original), *crop, *(negative_target or target))
        elif negative_original is not None and negative_target is not None:
            negative = (*negative_original, *negative_crop, *negative_target)
        else:
            negative = positive
        config = self.unet.config
        given = len(positive) * config.addition_time_embed_dim + run.add_text_embeds.shape[-1]  # type: ignore[union-attr]
        if given != (wanted := config.projection_class_embeddings_input_dim):
            raise ValueError(
                f"the conditions have {given} features, the UNet expects {wanted}: check requires_aesthetics_score "
                f"({scored}) and text_encoder_2"
            )
        rows = [torch.tensor([ids], dtype=run.dtype, device=run.device) for ids in (positive, negative)]
        if late:
            run.add_time_ids = join(self, *(row.repeat(run.batch, 1) for row in rows))
        else:  # here diffusers lets rows of both signs alternate, and images depend on it
            run.add_time_ids = join(self, *rows).repeat(run.batch, 1)


class StableDiffusionXLPipeline(_XLPipeline):
    """Text-to-image with SDXL; `denoising_end` leaves the rest to a refiner."""

    parts = f"{XL} scheduler image_encoder=None feature_extractor=None"
    options: ClassVar[dict[str, Any]] = WATERMARK
    call = (
        f"prompt prompt_2 height width {SCHEDULE} denoising_end {XL_TEXT} latents {XL_EMBEDS} {REST} "
        f"guidance_rescale {ALL_SIZES} {LAST}"
    )
    defaults: ClassVar[dict[str, Any]] = {"guidance_scale": 5.0}


class StableDiffusionXLImg2ImgPipeline(_XLPipeline):
    """Image-to-image with SDXL or its refiner; `denoising_start` takes over where another model left off."""

    parts = f"{XL} scheduler image_encoder=None feature_extractor=None"
    options: ClassVar[dict[str, Any]] = {"requires_aesthetics_score": False} | WATERMARK
    call = (
        f"prompt prompt_2 image strength {SCHEDULE} denoising_start denoising_end {XL_TEXT} latents {XL_EMBEDS} {REST} "
        f"guidance_rescale {ALL_SIZES} {AESTHETIC} {LAST}"
    )
    defaults: ClassVar[dict[str, Any]] = {"guidance_scale": 5.0, "strength": 0.3}
    start = staticmethod(sampling.start_from_image)


class StableDiffusionXLInpaintPipeline(StableDiffusionXLImg2ImgPipeline):
    """Inpainting with SDXL."""

    call = (
        f"prompt prompt_2 image mask_image masked_image_latents height width padding_mask_crop strength {SCHEDULE} "
        f"denoising_start denoising_end {XL_TEXT} latents {XL_EMBEDS} {REST} guidance_rescale {ALL_SIZES} "
        f"{AESTHETIC} {LAST}"
    )
    defaults: ClassVar[dict[str, Any]] = {"guidance_scale": 7.5, "strength": 0.9999}
    start = staticmethod(sampling.start_from_mask)
    _callback_tensor_inputs = (*_XLPipeline._callback_tensor_inputs, "mask", "masked_image_latents")


class StableDiffusionXLInstructPix2PixPipeline(_XLPipeline):
    """Edit an image by an instruction, with SDXL."""

    parts = f"{XL} scheduler"
    options: ClassVar[dict[str, Any]] = WATERMARK | {"is_cosxl_edit": False}
    call = (
        "prompt prompt_2 image height width num_inference_steps denoising_end guidance_scale image_guidance_scale "
        f"negative_prompt negative_prompt_2 num_images_per_prompt eta generator latents {XL_EMBEDS} output_type "
        f"return_dict {CALLBACK} cross_attention_kwargs guidance_rescale {SIZES}"
    )
    defaults: ClassVar[dict[str, Any]] = {"guidance_scale": 5.0, "num_inference_steps": 100}
    start = staticmethod(sampling.start_from_edited)


class StableDiffusionXLControlNetPipeline(_XLPipeline):
    """Text-to-image with SDXL, led by ControlNets."""

    parts = f"{XL} controlnet scheduler feature_extractor=None image_encoder=None"
    options: ClassVar[dict[str, Any]] = WATERMARK
    call = (
        f"prompt prompt_2 image height width {SCHEDULE} denoising_end {XL_TEXT} latents {XL_EMBEDS} {REST} "
        f"{CONTROL} {ALL_SIZES} {LAST}"
    )
    defaults: ClassVar[dict[str, Any]] = {"guidance_scale": 5.0}
    control_argument = "image"
    _callback_tensor_inputs = (*_XLPipeline._callback_tensor_inputs, "image")


class StableDiffusionXLControlNetImg2ImgPipeline(_XLPipeline):
    """Image-to-image with SDXL, led by ControlNets."""

    parts = f"{XL} controlnet scheduler feature_extractor=None image_encoder=None"
    options: ClassVar[dict[str, Any]] = {"requires_aesthetics_score": False} | WATERMARK
    call = (
        f"prompt prompt_2 image control_image height width strength num_inference_steps {XL_TEXT} latents {XL_EMBEDS} "
        f"{REST} {CONTROL} {ALL_SIZES} {AESTHETIC} {LAST}"
    )
    defaults: ClassVar[dict[str, Any]] = {"guidance_scale": 5.0, "controlnet_conditioning_scale": 0.8}
    start = staticmethod(sampling.start_from_image)
    _callback_tensor_inputs = (*_XLPipeline._callback_tensor_inputs, "control_image")


class StableDiffusionXLControlNetInpaintPipeline(StableDiffusionXLControlNetImg2ImgPipeline):
    """Inpainting with SDXL, led by ControlNets."""

    call = (
        "prompt prompt_2 image mask_image control_image height width padding_mask_crop strength num_inference_steps "
        f"denoising_start denoising_end {XL_TEXT} latents {EMBEDS} {ADAPTER} pooled_prompt_embeds "
        f"negative_pooled_prompt_embeds {OUTPUT} {CONTROL} guidance_rescale {SIZES} {AESTHETIC} {LAST}"
    )
    defaults: ClassVar[dict[str, Any]] = {"guidance_scale": 5.0, "strength": 0.9999}
    start = staticmethod(sampling.start_from_mask)
    _callback_tensor_inputs = (*StableDiffusionXLInpaintPipeline._callback_tensor_inputs, "control_image")
