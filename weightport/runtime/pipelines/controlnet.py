"""The pipelines that ControlNets lead, with diffusers' names and call arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from ..images import ImageInput, OutputType
from ..models.autoencoders import Autoencoder
from ..models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ..models.controlnet import ControlNetModel, MultiControlNetModel
from ..models.safety_checker import CLIPImageProcessor, StableDiffusionSafetyChecker
from ..models.unet import UNet2DConditionModel
from ..sampling.arguments import Callback, Generator, Size, StepCallback, Texts
from ..sampling.schedule import Scheduler
from ..sampling.starts import FROM_IMAGE, FROM_MASK
from ..sampling.state import StableDiffusionPipelineOutput, StableDiffusionXLPipelineOutput
from ..text.tokenizer import CLIPTokenizer
from .stable_diffusion import StableDiffusionBase
from .stable_diffusion_xl import StableDiffusionXLBase
from .unet import warn_if_unchecked

ControlNets = ControlNetModel | MultiControlNetModel | Sequence[ControlNetModel]


class StableDiffusionControlNetPipeline(StableDiffusionBase):
    """Text-to-image, led by one or several ControlNets."""

    family = "StableDiffusion"
    control_argument = "image"

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        controlnet: ControlNets,
        scheduler: Scheduler,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: None = None,
        requires_safety_checker: bool = True,
    ) -> None:
        warn_if_unchecked(safety_checker, requires_safety_checker)
        self.register_to_config(
            requires_safety_checker=requires_safety_checker,
        )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )

    def __call__(
        self,
        prompt: Texts | None = None,
        image: ImageInput | Sequence[ImageInput] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: Texts | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, float] | None = None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: StepCallback | None = None,
        callback_steps: int = 1,
    ) -> StableDiffusionPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusionPipelineOutput.of(self._sample(locals()), return_dict)


class StableDiffusionControlNetImg2ImgPipeline(StableDiffusionBase):
    """Image-to-image, led by ControlNets."""

    family = "StableDiffusion"
    start = FROM_IMAGE
    control_argument = "control_image"

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        controlnet: ControlNets,
        scheduler: Scheduler,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: None = None,
        requires_safety_checker: bool = True,
    ) -> None:
        warn_if_unchecked(safety_checker, requires_safety_checker)
        self.register_to_config(
            requires_safety_checker=requires_safety_checker,
        )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )

    def __call__(
        self,
        prompt: Texts | None = None,
        image: ImageInput | None = None,
        control_image: ImageInput | Sequence[ImageInput] | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: Texts | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, float] | None = None,
        controlnet_conditioning_scale: float | list[float] = 0.8,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: StepCallback | None = None,
        callback_steps: int = 1,
    ) -> StableDiffusionPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusionPipelineOutput.of(self._sample(locals()), return_dict)


class StableDiffusionControlNetInpaintPipeline(StableDiffusionBase):
    """Inpainting, led by ControlNets."""

    family = "StableDiffusion"
    start = FROM_MASK
    control_argument = "control_image"

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        controlnet: ControlNets,
        scheduler: Scheduler,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: None = None,
        requires_safety_checker: bool = True,
    ) -> None:
        warn_if_unchecked(safety_checker, requires_safety_checker)
        self.register_to_config(
            requires_safety_checker=requires_safety_checker,
        )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )

    def __call__(
        self,
        prompt: Texts | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        control_image: ImageInput | Sequence[ImageInput] | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: Texts | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, float] | None = None,
        controlnet_conditioning_scale: float | list[float] = 0.5,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: StepCallback | None = None,
        callback_steps: int = 1,
    ) -> StableDiffusionPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusionPipelineOutput.of(self._sample(locals()), return_dict)


class StableDiffusionXLControlNetPipeline(StableDiffusionXLBase):
    """Text-to-image with SDXL, led by ControlNets."""

    _optional_components: ClassVar[list[str]] = [
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "feature_extractor",
        "image_encoder",
    ]
    family = "StableDiffusionXL"
    control_argument = "image"

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        controlnet: ControlNets,
        scheduler: Scheduler,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: None = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        self.register_to_config(
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )

    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        image: ImageInput | Sequence[ImageInput] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: Texts | None = None,
        negative_prompt_2: Texts | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, float] | None = None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: StepCallback | None = None,
        callback_steps: int = 1,
    ) -> StableDiffusionXLPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusionXLPipelineOutput.of(self._sample(locals()), return_dict)


class StableDiffusionXLControlNetImg2ImgPipeline(StableDiffusionXLBase):
    """Image-to-image with SDXL, led by ControlNets."""

    _optional_components: ClassVar[list[str]] = [
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "feature_extractor",
        "image_encoder",
    ]
    family = "StableDiffusionXL"
    start = FROM_IMAGE
    control_argument = "control_image"
    is_refining = True

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        controlnet: ControlNets,
        scheduler: Scheduler,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: None = None,
        requires_aesthetics_score: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        self.register_to_config(
            requires_aesthetics_score=requires_aesthetics_score,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )

    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        image: ImageInput | None = None,
        control_image: ImageInput | Sequence[ImageInput] | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        negative_prompt: Texts | None = None,
        negative_prompt_2: Texts | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, float] | None = None,
        controlnet_conditioning_scale: float | list[float] = 0.8,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: StepCallback | None = None,
        callback_steps: int = 1,
    ) -> StableDiffusionXLPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusionXLPipelineOutput.of(self._sample(locals()), return_dict)


class StableDiffusionXLControlNetInpaintPipeline(StableDiffusionXLBase):
    """Inpainting with SDXL, led by ControlNets."""

    _optional_components: ClassVar[list[str]] = [
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "feature_extractor",
        "image_encoder",
    ]
    family = "StableDiffusionXL"
    start = FROM_MASK
    control_argument = "control_image"
    is_refining = True

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        controlnet: ControlNets,
        scheduler: Scheduler,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: None = None,
        requires_aesthetics_score: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        self.register_to_config(
            requires_aesthetics_score=requires_aesthetics_score,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            controlnet=controlnet,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )

    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        control_image: ImageInput | Sequence[ImageInput] | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.9999,
        num_inference_steps: int = 50,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: Texts | None = None,
        negative_prompt_2: Texts | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, float] | None = None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        guidance_rescale: float = 0.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: StepCallback | None = None,
        callback_steps: int = 1,
    ) -> StableDiffusionXLPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusionXLPipelineOutput.of(self._sample(locals()), return_dict)
