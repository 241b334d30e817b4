"""The pipelines, with diffusers' names and call arguments: each says what its components are and
how a run starts.

`sampling.sample` does the work for all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature
from itertools import takewhile
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..images import VaeImageProcessor
from ..loading.components import correct_sample_size
from ..loading.config import Config
from ..models.controlnet import MultiControlNetModel
from ..sampling import loop as sampling
from ..sampling.loop import Options, Run, join
from ..speed import compile_model, pack_model
from ..text.textual_inversion import load_textual_inversion
from .base import DiffusionPipeline

# components, in the order of the constructors; `?` after those that may be None
LATENT = "vae text_encoder tokenizer unet"
XL = "vae text_encoder? text_encoder_2? tokenizer? tokenizer_2? unet"
CHECKER = "safety_checker? feature_extractor?"
# arguments of calls, in diffusers' order
SIZE = "height width"
SCHEDULE = "num_inference_steps timesteps sigmas"
GUIDANCE = "guidance_scale negative_prompt num_images_per_prompt eta generator"
EMBEDS = "prompt_embeds negative_prompt_embeds"
ADAPTER = "ip_adapter_image ip_adapter_image_embeds"
OUTPUT = "output_type return_dict cross_attention_kwargs"
TEXT = f"{GUIDANCE} latents {EMBEDS} {ADAPTER} {OUTPUT}"
CONTROL = "controlnet_conditioning_scale guess_mode control_guidance_start control_guidance_end"
CALLBACK = "callback_on_step_end callback_on_step_end_tensor_inputs"
LAST = f"clip_skip {CALLBACK}"
XL_GUIDANCE = "guidance_scale negative_prompt negative_prompt_2 num_images_per_prompt eta generator"
POOLED = "pooled_prompt_embeds negative_pooled_prompt_embeds"
XL_TEXT = f"{XL_GUIDANCE} latents {EMBEDS} {POOLED} {ADAPTER} {OUTPUT}"
SIZES = "original_size crops_coords_top_left target_size"
ALL_SIZES = f"{SIZES} negative_original_size negative_crops_coords_top_left negative_target_size"
AESTHETIC = "aesthetic_score negative_aesthetic_score"
PAINTED = f"image mask_image masked_image_latents {SIZE} padding_mask_crop strength {SCHEDULE}"
DISTILLED = (
    "original_inference_steps timesteps guidance_scale num_images_per_prompt generator latents"
    f" prompt_embeds {ADAPTER} {OUTPUT} {LAST}"
)
XL_PART = f"denoising_start denoising_end {XL_TEXT} guidance_rescale {ALL_SIZES} {AESTHETIC} {LAST}"
LED = f"control_image {SIZE} strength num_inference_steps"
LED_PAINTED = (
    f"image mask_image control_image {SIZE} padding_mask_crop strength num_inference_steps"
)
# the watermark is accepted and ignored: nothing is ever watermarked
WATERMARK: dict[str, Any] = {"force_zeros_for_empty_prompt": True, "add_watermarker": None}
DEFAULTS = {field.name: field.default for field in fields(Options)}
ENCODE = "device num_images_per_prompt do_classifier_free_guidance"
ENCODE_DEFAULTS = DEFAULTS | {
    "device": None,
    "do_classifier_free_guidance": True,
    "lora_scale": None,
}


def make_method(
    work: Callable[..., Any], names: list[str], defaults: Mapping[str, Any]
) -> Callable[..., Any]:
    """`work(self, **arguments)` as a method with a signature of these names; those without a
    default are required."""
    kind = Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        Parameter(name, kind, default=defaults.get(name, Parameter.empty)) for name in names
    ]
    signature = Signature([Parameter("self", kind), *parameters])

    @wraps(work)
    def method(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return work(**bound.arguments)

    method.__signature__ = signature  # type: ignore[attr-defined]
    return method


def _init(self: LatentDiffusionPipeline, **given: Any) -> None:
    """Make a pipeline of its components."""
    options = {name: given.pop(name) for name in self.options}
    if options.get("requires_safety_checker") and given["safety_checker"] is None:
        warnings.warn(
            "there is no safety checker: every image is shown, whatever is on it", stacklevel=4
        )
    self.register_to_config(
        **{name: value for name, value in options.items() if name != "add_watermarker"}
    )
    self.register_modules(**given)


def _call(self: LatentDiffusionPipeline, **given: Any) -> Any:
    """Make images; `weightport.runtime.sampling.loop.Options` describes the arguments."""
    return sampling.sample(self, Options(**given))


def _encode(
    self: LatentDiffusionPipeline,
    device: Any,
    do_classifier_free_guidance: bool,
    lora_scale: None,
    **given: Any,
) -> tuple[Any, ...]:
    """The embeddings of prompts and negative prompts, (b, tokens, d), and for SDXL the pooled ones,
    (b, d)."""
    embeddings = sampling.encode_prompts(
        self, Options(**given), device, do_classifier_free_guidance
    )
    return embeddings if self.is_xl else embeddings[:2]


class LatentDiffusionPipeline(DiffusionPipeline):
    """The base of all pipelines of this family.

    Attributes:
        parts: the names of the components, for the constructor.
        options: its other arguments.
        call: the names of the call's arguments, in diffusers' order.
        defaults: of the arguments, where they are not those of `Options`.
        scheduler_fixes: options that early configs have wrong; the constructor changes them in the
            scheduler.
        start: what sets the first latents.
        tensors: what a callback may ask for, beside what it may in the base classes.
        is_xl: whether the text encoders and conditions are SDXL's.
        is_lcm: whether guidance is a condition of the UNet, as in a latent consistency model.
    """

    parts: ClassVar[str] = ""
    options: ClassVar[dict[str, Any]] = {}
    call: ClassVar[str] = ""
    defaults: ClassVar[dict[str, Any]] = {}
    scheduler_fixes: ClassVar[dict[str, Any]] = {}
    start: Callable[..., None] = sampling.start_from_noise
    is_xl: ClassVar[bool] = False
    is_lcm: ClassVar[bool] = False
    tensors: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "negative_prompt_embeds")
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ()

    num_timesteps: int = 0
    _guidance_scale: float = 1.0
    _image_guidance_scale: float = 1.5
    _guidance_rescale: float = 0.0
    _interrupt: bool = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = cls.__dict__
        tensors = [
            name for base in reversed(cls.__mro__) for name in base.__dict__.get("tensors", ())
        ]
        led = [cls.control_argument()] if "controlnet" in cls.parts.split() else []
        cls._callback_tensor_inputs = own.get("_callback_tensor_inputs", (*tensors, *led))
        if not own.keys().isdisjoint(("parts", "options")):
            parts = cls.parts.split()
            cls._optional_components = [part[:-1] for part in parts if part.endswith("?")]
            last = {
                part[:-1]: None
                for part in takewhile(lambda part: part.endswith("?"), reversed(parts))
            }
            names = [part.removesuffix("?") for part in parts]
            cls.__init__ = make_method(_init, [*names, *cls.options], last | cls.options)  # type: ignore[method-assign]
        if "call" in own:
            cls.__call__ = make_method(_call, cls.call.split(), DEFAULTS | cls.defaults)  # type: ignore[method-assign]

    @classmethod
    def takes(cls, name: str) -> bool:
        """Whether the call has an argument of this name."""
        return name in cls.call.split()

    # --- the state of a run -----------------------------------------------------------------------

    guidance_scale = property(attrgetter("_guidance_scale"), doc="Weight of the prompt.")
    image_guidance_scale = property(
        attrgetter("_image_guidance_scale"), doc="Weight of the image to edit."
    )
    guidance_rescale = property(
        attrgetter("_guidance_rescale"), doc="Share of it whose deviation is corrected."
    )
    interrupt = property(attrgetter("_interrupt"), doc="Whether the run is to stop.")

    def begin(self, o: Options) -> None:
        """Take over what callbacks may change during the run, by the names with an underscore."""
        self._guidance_scale, self._image_guidance_scale = o.guidance_scale, o.image_guidance_scale
        self._guidance_rescale, self._interrupt = o.guidance_rescale, False

    @property
    def branches(self) -> int:
        """How often the UNet sees each image in a step: once without guidance, twice with it."""
        guided = (
            self.guidance_scale > 1
            and not self.is_lcm
            and not self.unet.config.get("time_cond_proj_dim")
        )
        if self.takes("image_guidance_scale"):
            return 3 if guided and self.image_guidance_scale >= 1 else 1
        return 2 if guided else 1

    # --- components -------------------------------------------------------------------------------

    @property
    def vae_scale_factor(self) -> int:
        """Pixels for each latent, on an edge; without a VAE 8, as in most of this family."""
        return 8 if self.vae is None else int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def pixels(self, latents: Tensor) -> tuple[int, int]:
        """The height and width of what the VAE makes of latents."""
        return latents.shape[-2] * self.vae_scale_factor, latents.shape[-1] * self.vae_scale_factor

    @property
    def image_processor(self) -> VaeImageProcessor:
        """What images go through."""
        return VaeImageProcessor(
            self.vae_scale_factor, vae_latent_channels=self.vae.config.latent_channels
        )

    @property
    def mask_processor(self) -> VaeImageProcessor:
        """What masks go through."""
        return VaeImageProcessor(
            self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )

    @property
    def control_image_processor(self) -> VaeImageProcessor:
        """What the images of ControlNets go through."""
        return VaeImageProcessor(self.vae_scale_factor, do_normalize=False)

    @classmethod
    def control_argument(cls) -> str:
        """The argument that brings the ControlNets' images."""
        return "control_image" if cls.takes("control_image") else "image"

    @property
    def controlnets(self) -> list[Any]:
        """The ControlNets, if the pipeline has any."""
        net = self.components.get("controlnet")
        return [] if net is None else list(getattr(net, "nets", [net]))

    def register_modules(self, **components: Any) -> None:
        """Make these the components; several ControlNets become one model, and options of old
        schedulers are put right.

        Raises:
            ValueError: there is a safety checker but nothing that prepares images for it.
        """
        net = components.get("controlnet")
        if isinstance(net, (list, tuple)):
            components["controlnet"] = MultiControlNetModel(list(net))
        if (
            components.get("safety_checker") is not None
            and components.get("feature_extractor") is None
        ):
            raise ValueError(
                "a safety_checker needs a feature_extractor; pass both, or safety_checker=None"
            )
        scheduler: Any = components.get("scheduler")
        if isinstance(config := getattr(scheduler, "config", None), Config):
            fixes = {key: value for key, value in self.scheduler_fixes.items() if key in config}
            unset = [key for key in config.get("_use_default_values", ()) if key not in fixes]
            scheduler.config = Config({**config, **fixes, "_use_default_values": unset})
        if self.scheduler_fixes:
            correct_sample_size(components.get("unet"))
        super().register_modules(**components)

    @contextmanager
    def full_precision_vae(self, *dtypes: torch.dtype) -> Iterator[Any]:
        """The VAE, in float32 if it has one of these dtypes and SDXL's config says so:
        `force_upcast`."""
        dtype = self.vae.dtype
        upcast = self.is_xl and dtype in dtypes and self.vae.config.get("force_upcast", True)
        try:
            yield self.vae.to(torch.float32) if upcast else self.vae
        finally:
            if upcast:
                self.vae.to(dtype)

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Any,
        token: str | list[str | None] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        **options: Any,
    ) -> None:
        """Teach the pipeline new words; see `textual_inversion.load_textual_inversion`."""
        tokenizer, text_encoder = tokenizer or self.tokenizer, text_encoder or self.text_encoder
        load_textual_inversion(
            tokenizer, text_encoder, pretrained_model_name_or_path, token, **options
        )

    def compile(self) -> None:
        """Compile the UNet for speed; images then differ by rounding. See `speed.compile_model`."""
        compile_model(self.unet)

    def pack(self) -> None:
        """Bring weights into the order that kernels read, for speed; images differ by rounding. See
        `pack_model`."""
        for model in (self.unet, *self.controlnets):
            pack_model(model)

    encode_prompt = make_method(
        _encode,
        f"prompt {ENCODE} negative_prompt {EMBEDS} lora_scale clip_skip".split(),
        ENCODE_DEFAULTS,
    )

    def describe_size(self, o: Options, run: Run) -> None:
        """Set the conditions that SDXL has beside the prompt."""


class FromImage:
    """A task: what starts from an image."""

    start: Callable[..., None] = sampling.start_from_image


class FromMask:
    """What paints inside a mask."""

    start: Callable[..., None] = sampling.start_from_mask
    tensors: ClassVar[tuple[str, ...]] = ("mask", "masked_image_latents")


class FromEdited:
    """What has the image to edit beside the latents."""

    start: Callable[..., None] = sampling.start_from_edited
    tensors: ClassVar[tuple[str, ...]] = ("image_latents",)


class StableDiffusionPipeline(LatentDiffusionPipeline):
    """Text-to-image."""

    parts = f"{LATENT} scheduler {CHECKER} image_encoder?"
    options: ClassVar[dict[str, Any]] = {"requires_safety_checker": True}
    call = f"prompt {SIZE} {SCHEDULE} {TEXT} guidance_rescale {LAST}"
    scheduler_fixes: ClassVar[dict[str, Any]] = {"steps_offset": 1, "clip_sample": False}


class StableDiffusionImg2ImgPipeline(FromImage, StableDiffusionPipeline):
    """Image-to-image."""

    call = f"prompt image strength {SCHEDULE} {GUIDANCE} {EMBEDS} {ADAPTER} {OUTPUT} {LAST}"


class StableDiffusionInpaintPipeline(FromMask, StableDiffusionPipeline):
    """Inpainting, by a UNet made for it (9 channels) or by any other (4)."""

    call = f"prompt {PAINTED} {TEXT} {LAST}"
    defaults: ClassVar[dict[str, Any]] = {"strength": 1.0}
    scheduler_fixes: ClassVar[dict[str, Any]] = {"steps_offset": 1, "skip_prk_steps": True}


class StableDiffusionInstructPix2PixPipeline(FromEdited, StableDiffusionPipeline):
    """Edit an image by an instruction."""

    call = (
        "prompt image num_inference_steps guidance_scale image_guidance_scale negative_prompt"
        f" num_images_per_prompt eta generator latents {EMBEDS} {ADAPTER} output_type return_dict"
        f" {CALLBACK} cross_attention_kwargs"
    )
    defaults: ClassVar[dict[str, Any]] = {"num_inference_steps": 100}
    scheduler_fixes: ClassVar[dict[str, Any]] = {}


class LatentConsistencyModelPipeline(StableDiffusionPipeline):
    """Text-to-image in few steps (Luo et al., https://arxiv.org/abs/2310.04378)."""

    call = f"prompt {SIZE} num_inference_steps {DISTILLED}"
    defaults: ClassVar[dict[str, Any]] = {"num_inference_steps": 4, "guidance_scale": 8.5}
    scheduler_fixes: ClassVar[dict[str, Any]] = {}
    is_lcm = True
    tensors: ClassVar[tuple[str, ...]] = ("denoised", "w_embedding")


class LatentConsistencyModelImg2ImgPipeline(FromImage, LatentConsistencyModelPipeline):
    """Image-to-image in few steps."""

    call = f"prompt image num_inference_steps strength {DISTILLED}"


class StableDiffusionUpscalePipeline(LatentDiffusionPipeline):
    """Enlarge an image four times."""

    parts = f"{LATENT} low_res_scheduler scheduler {CHECKER} watermarker?"
    options: ClassVar[dict[str, Any]] = {"max_noise_level": 350}
    call = (
        "prompt image num_inference_steps guidance_scale noise_level negative_prompt"
        f" num_images_per_prompt eta generator latents {EMBEDS} {OUTPUT} {LAST}"
    )
    defaults: ClassVar[dict[str, Any]] = {"num_inference_steps": 75, "guidance_scale": 9.0}
    start = sampling.start_from_small

    @property
    def image_processor(self) -> VaeImageProcessor:
        """What images go through; a small image has one channel less than latents and must not be
        taken for them."""
        channels = self.vae.config.latent_channels + 1
        return VaeImageProcessor(self.vae_scale_factor, "bicubic", vae_latent_channels=channels)


class StableDiffusionDepth2ImgPipeline(LatentDiffusionPipeline):
    """Image-to-image that keeps to a depth map."""

    parts = f"{LATENT} scheduler depth_estimator? feature_extractor?"
    call = (
        f"prompt image depth_map strength num_inference_steps {GUIDANCE} {EMBEDS} {OUTPUT} {LAST}"
    )
    start = sampling.start_from_depth
    tensors: ClassVar[tuple[str, ...]] = ("depth_mask",)


class StableDiffusionControlNetPipeline(LatentDiffusionPipeline):
    """Text-to-image, led by one or several ControlNets."""

    parts = f"{LATENT} controlnet scheduler {CHECKER} image_encoder?"
    options: ClassVar[dict[str, Any]] = {"requires_safety_checker": True}
    call = f"prompt image {SIZE} {SCHEDULE} {TEXT} {CONTROL} {LAST}"


class StableDiffusionControlNetImg2ImgPipeline(FromImage, StableDiffusionControlNetPipeline):
    """Image-to-image, led by ControlNets."""

    call = f"prompt image {LED} {TEXT} {CONTROL} {LAST}"
    defaults: ClassVar[dict[str, Any]] = {"controlnet_conditioning_scale": 0.8}


class StableDiffusionControlNetInpaintPipeline(FromMask, StableDiffusionControlNetPipeline):
    """Inpainting, led by ControlNets."""

    call = f"prompt {LED_PAINTED} {TEXT} {CONTROL} {LAST}"
    defaults: ClassVar[dict[str, Any]] = {"strength": 1.0, "controlnet_conditioning_scale": 0.5}


# --- SDXL -----------------------------------------------------------------------------------------


class _XLPipeline(LatentDiffusionPipeline):
    """What the pipelines of SDXL share: two text encoders, and sizes as conditions."""

    parts = f"{XL} scheduler image_encoder? feature_extractor?"
    options: ClassVar[dict[str, Any]] = WATERMARK
    defaults: ClassVar[dict[str, Any]] = {"guidance_scale": 5.0}
    is_xl = True
    tensors: ClassVar[tuple[str, ...]] = (
        "add_text_embeds",
        "add_time_ids",
        "negative_pooled_prompt_embeds",
    )
    encode_prompt = make_method(
        _encode,
        f"prompt prompt_2 {ENCODE} negative_prompt negative_prompt_2 {EMBEDS} {POOLED} lora_scale"
        " clip_skip".split(),
        ENCODE_DEFAULTS,
    )

    def describe_size(self, o: Options, run: Run) -> None:
        """Set the conditions that the image sizes are.

        Raises:
            ValueError: the UNet expects another number of them.
        """
        original, crop, target = (
            o.original_size or run.size,
            o.crops_coords_top_left,
            o.target_size or run.size,
        )
        negative_original, negative_target = o.negative_original_size, o.negative_target_size
        negative_crop = o.negative_crops_coords_top_left
        scored, late = (
            bool(self.config.get("requires_aesthetics_score")),
            self.takes("aesthetic_score"),
        )
        positive = negative = (
            (*original, *crop, o.aesthetic_score) if scored else (*original, *crop, *target)
        )
        if scored:
            negative = (
                *(negative_original or original),
                *negative_crop,
                o.negative_aesthetic_score,
            )
        elif late:
            negative = (*(negative_original or original), *crop, *(negative_target or target))
        elif negative_original is not None and negative_target is not None:
            negative = (*negative_original, *negative_crop, *negative_target)
        config = self.unet.config
        given = len(positive) * config.addition_time_embed_dim + run.add_text_embeds.shape[-1]  # type: ignore[union-attr]
        if given != (wanted := config.projection_class_embeddings_input_dim):
            advice = f"check requires_aesthetics_score ({scored}) and text_encoder_2"
            raise ValueError(
                f"the conditions have {given} features, the UNet expects {wanted}: {advice}"
            )
        # joined first, rows of both signs alternate: diffusers does so here, and images depend on
        # it
        first, then = (run.batch, 1) if late else (1, run.batch)
        rows = (
            torch.tensor([ids], dtype=run.dtype, device=run.device) for ids in (positive, negative)
        )
        run.add_time_ids = join(self, *(row.repeat(first, 1) for row in rows)).repeat(then, 1)


class StableDiffusionXLPipeline(_XLPipeline):
    """Text-to-image with SDXL; `denoising_end` leaves the rest to a refiner."""

    call = (
        f"prompt prompt_2 {SIZE} {SCHEDULE} denoising_end {XL_TEXT} guidance_rescale {ALL_SIZES}"
        f" {LAST}"
    )


class StableDiffusionXLImg2ImgPipeline(FromImage, _XLPipeline):
    """Image-to-image with SDXL or its refiner; `denoising_start` takes over where another model
    left off."""

    options: ClassVar[dict[str, Any]] = {"requires_aesthetics_score": False} | WATERMARK
    call = f"prompt prompt_2 image strength {SCHEDULE} {XL_PART}"
    defaults: ClassVar[dict[str, Any]] = {"guidance_scale": 5.0, "strength": 0.3}


class StableDiffusionXLInpaintPipeline(FromMask, StableDiffusionXLImg2ImgPipeline):
    """Inpainting with SDXL."""

    call = f"prompt prompt_2 {PAINTED} {XL_PART}"
    defaults: ClassVar[dict[str, Any]] = {"guidance_scale": 7.5, "strength": 0.9999}


class StableDiffusionXLInstructPix2PixPipeline(FromEdited, _XLPipeline):
    """Edit an image by an instruction, with SDXL."""

    parts = f"{XL} scheduler"
    options: ClassVar[dict[str, Any]] = WATERMARK | {"is_cosxl_edit": False}
    call = (
        f"prompt prompt_2 image {SIZE} num_inference_steps denoising_end guidance_scale"
        " image_guidance_scale negative_prompt negative_prompt_2 num_images_per_prompt eta"
        f" generator latents {EMBEDS} {POOLED} output_type return_dict {CALLBACK}"
        f" cross_attention_kwargs guidance_rescale {SIZES}"
    )
    defaults: ClassVar[dict[str, Any]] = {"guidance_scale": 5.0, "num_inference_steps": 100}


class StableDiffusionXLControlNetPipeline(_XLPipeline):
    """Text-to-image with SDXL, led by ControlNets."""

    parts = f"{XL} controlnet scheduler feature_extractor? image_encoder?"
    call = (
        f"prompt prompt_2 image {SIZE} {SCHEDULE} denoising_end {XL_TEXT} {CONTROL} {ALL_SIZES}"
        f" {LAST}"
    )


class StableDiffusionXLControlNetImg2ImgPipeline(FromImage, StableDiffusionXLControlNetPipeline):
    """Image-to-image with SDXL, led by ControlNets."""

    options: ClassVar[dict[str, Any]] = {"requires_aesthetics_score": False} | WATERMARK
    call = f"prompt prompt_2 image {LED} {XL_TEXT} {CONTROL} {ALL_SIZES} {AESTHETIC} {LAST}"
    defaults: ClassVar[dict[str, Any]] = {
        "guidance_scale": 5.0,
        "controlnet_conditioning_scale": 0.8,
    }


class StableDiffusionXLControlNetInpaintPipeline(
    FromMask, StableDiffusionXLControlNetImg2ImgPipeline
):
    """Inpainting with SDXL, led by ControlNets."""

    call = (
        f"prompt prompt_2 {LED_PAINTED} denoising_start denoising_end {XL_GUIDANCE} latents"
        f" {EMBEDS} {ADAPTER} {POOLED} {OUTPUT} {CONTROL} guidance_rescale {SIZES} {AESTHETIC}"
        f" {LAST}"
    )
    defaults: ClassVar[dict[str, Any]] = {"guidance_scale": 5.0, "strength": 0.9999}
