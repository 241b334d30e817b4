"""The pipelines of Stable Diffusion 1 and 2, with diffusers' names and call arguments: each says
what its components are and how a run starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..images import ImageInput, OutputType
from ..models.autoencoders import Autoencoder
from ..models.clip import CLIPTextModel
from ..models.safety_checker import CLIPImageProcessor, StableDiffusionSafetyChecker
from ..models.unet import UNet2DConditionModel
from ..sampling.arguments import Arguments, Callback, Generator, StepCallback, Texts
from ..sampling.checks import Requirements, check
from ..sampling.latents import Codec
from ..sampling.results import Safety
from ..sampling.schedule import Scheduler
from ..sampling.starts import (
    FROM_DEPTH,
    FROM_EDITED,
    FROM_IMAGE,
    FROM_MASK,
    FROM_SMALL,
    from_small,
)
from ..sampling.state import Run, StableDiffusionPipelineOutput
from ..text.tokenizer import CLIPTokenizer
from .latent import TENSORS
from .unet import UNetPipeline, warn_if_unchecked

DISTILLED_TENSORS = (*TENSORS, "denoised", "w_embedding")


class StableDiffusionBase(UNetPipeline):
    """What the pipelines of Stable Diffusion 1 and 2 share: one text encoder, a safety checker."""

    _optional_components: ClassVar[list[str]] = [
        "safety_checker",
        "feature_extractor",
        "image_encoder",
    ]

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
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
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
        )

    def run_safety_checker(
        self, image: Any, device: torch.device | str, dtype: torch.dtype
    ) -> tuple[Any, list[bool] | None]:
        """Images in [-1, 1], black where the safety checker objects, and where it does; None
        without one."""
        if self.safety_checker is None:
            return image, None
        safety = Safety(self.safety_checker, self.feature_extractor)
        return safety.censor(image.to(device), self.image_processor, dtype)

    def check_inputs(
        self,
        prompt: Texts | None,
        height: int | None,
        width: int | None,
        callback_steps: int | None = None,
        negative_prompt: Texts | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
    ) -> None:
        """Find arguments of a call that contradict each other or make no sense.

        Raises:
            TypeError: an argument is of the wrong kind.
            ValueError: anything else is wrong.
        """
        given = {key: value for key, value in locals().items() if value is not None}
        check(Arguments.of(given), Requirements({}, False, self._callback_tensor_inputs))

    def encode_prompt(
        self,
        prompt: Texts | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Texts | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The embeddings of prompts and of negative prompts, (b, tokens, d)."""
        encoded = self._encode(locals())
        return encoded.prompt, encoded.negative


class StableDiffusionPipeline(StableDiffusionBase):
    """Text-to-image."""

    family = "StableDiffusion"
    scheduler_fixes: ClassVar[dict[str, Any]] = {"steps_offset": 1, "clip_sample": False}

    def __call__(
        self,
        prompt: Texts | None = None,
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
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: StepCallback | None = None,
        callback_steps: int = 1,
    ) -> StableDiffusionPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusionPipelineOutput.of(self._sample(locals()), return_dict)


class StableDiffusionImg2ImgPipeline(StableDiffusionBase):
    """Image-to-image."""

    family = "StableDiffusion"
    start = FROM_IMAGE
    scheduler_fixes: ClassVar[dict[str, Any]] = {"steps_offset": 1, "clip_sample": False}

    def __call__(
        self,
        prompt: Texts | None = None,
        image: ImageInput | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: Texts | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, float] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: StepCallback | None = None,
        callback_steps: int = 1,
    ) -> StableDiffusionPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusionPipelineOutput.of(self._sample(locals()), return_dict)


class StableDiffusionInpaintPipeline(StableDiffusionBase):
    """Inpainting, by a UNet made for it (9 channels) or by any other (4)."""

    family = "StableDiffusion"
    start = FROM_MASK
    scheduler_fixes: ClassVar[dict[str, Any]] = {"steps_offset": 1, "skip_prk_steps": True}

    def __call__(
        self,
        prompt: Texts | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
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
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: StepCallback | None = None,
        callback_steps: int = 1,
    ) -> StableDiffusionPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusionPipelineOutput.of(self._sample(locals()), return_dict)


class StableDiffusionInstructPix2PixPipeline(StableDiffusionBase):
    """Edit an image by an instruction."""

    start = FROM_EDITED
    is_guided_by_image = True

    def __call__(
        self,
        prompt: Texts | None = None,
        image: ImageInput | None = None,
        num_inference_steps: int = 100,
        guidance_scale: float = 7.5,
        image_guidance_scale: float = 1.5,
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
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: StepCallback | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, float] | None = None,
    ) -> StableDiffusionPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusionPipelineOutput.of(self._sample(locals()), return_dict)


class LatentConsistencyModelPipeline(StableDiffusionBase):
    """Text-to-image in few steps (Luo et al., https://arxiv.org/abs/2310.04378)."""

    family = "LatentConsistencyModel"
    is_distilled = True
    tensors = DISTILLED_TENSORS

    def __call__(
        self,
        prompt: Texts | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        guidance_scale: float = 8.5,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, float] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: StepCallback | None = None,
        callback_steps: int = 1,
    ) -> StableDiffusionPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusionPipelineOutput.of(self._sample(locals()), return_dict)


class LatentConsistencyModelImg2ImgPipeline(StableDiffusionBase):
    """Image-to-image in few steps."""

    family = "LatentConsistencyModel"
    start = FROM_IMAGE
    is_distilled = True
    tensors = DISTILLED_TENSORS

    def __call__(
        self,
        prompt: Texts | None = None,
        image: ImageInput | None = None,
        num_inference_steps: int = 4,
        strength: float = 0.8,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        guidance_scale: float = 8.5,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, float] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: StepCallback | None = None,
        callback_steps: int = 1,
    ) -> StableDiffusionPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusionPipelineOutput.of(self._sample(locals()), return_dict)


class StableDiffusionUpscalePipeline(StableDiffusionBase):
    """Enlarge an image four times."""

    _optional_components: ClassVar[list[str]] = [
        "safety_checker",
        "feature_extractor",
        "watermarker",
    ]
    start = FROM_SMALL

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        low_res_scheduler: Scheduler,
        scheduler: Scheduler,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        watermarker: None = None,
        max_noise_level: int = 350,
    ) -> None:
        self.register_to_config(
            max_noise_level=max_noise_level,
        )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            low_res_scheduler=low_res_scheduler,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            watermarker=watermarker,
        )

    def __call__(
        self,
        prompt: Texts | None = None,
        image: ImageInput | None = None,
        num_inference_steps: int = 75,
        guidance_scale: float = 9.0,
        noise_level: int = 20,
        negative_prompt: Texts | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, float] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: StepCallback | None = None,
        callback_steps: int = 1,
    ) -> StableDiffusionPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusionPipelineOutput.of(self._sample(locals()), return_dict)

    @property
    def codec(self) -> Codec:
        """The VAE; a small image has one channel less than latents and must not be taken for
        them."""
        codec = super().codec
        channels = codec.model.config.latent_channels + 1
        return replace(codec, resample="bicubic", latent_channels=channels)

    def _begin(self, run: Run, codec: Codec) -> None:
        from_small(run, codec, self._channels(), self.low_res_scheduler)


class StableDiffusionDepth2ImgPipeline(StableDiffusionBase):
    """Image-to-image that keeps to a depth map."""

    _optional_components: ClassVar[list[str]] = [
        "depth_estimator",
        "feature_extractor",
    ]
    start = FROM_DEPTH

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        depth_estimator: None = None,
        feature_extractor: CLIPImageProcessor | None = None,
    ) -> None:
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            depth_estimator=depth_estimator,
            feature_extractor=feature_extractor,
        )

    def __call__(
        self,
        prompt: Texts | None = None,
        image: ImageInput | None = None,
        depth_map: Tensor | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: Texts | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generator = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, float] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: StepCallback | None = None,
        callback_steps: int = 1,
    ) -> StableDiffusionPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusionPipelineOutput.of(self._sample(locals()), return_dict)
