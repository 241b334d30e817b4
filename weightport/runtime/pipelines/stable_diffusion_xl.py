"""The pipelines of SDXL, with diffusers' names and call arguments.

`add_watermarker` is accepted and ignored: nothing is ever watermarked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ..images import ImageInput, OutputType
from ..models.autoencoders import Autoencoder
from ..models.clip import CLIPTextModel, CLIPTextModelWithProjection
from ..models.safety_checker import CLIPImageProcessor
from ..models.unet import UNet2DConditionModel
from ..sampling import sizes
from ..sampling.arguments import Arguments, Callback, Generator, Size, StepCallback, Texts
from ..sampling.checks import Requirements
from ..sampling.latents import Codec
from ..sampling.prompts import Embeddings, PenultimateStates, PromptEncoder
from ..sampling.schedule import Scheduler
from ..sampling.starts import FROM_EDITED, FROM_IMAGE, FROM_MASK, from_edited
from ..sampling.state import Run, StableDiffusionXLPipelineOutput
from ..text.tokenizer import CLIPTokenizer
from .latent import TENSORS
from .unet import UNetPipeline


class StableDiffusionXLBase(UNetPipeline):
    """What the pipelines of SDXL share: two text encoders, and sizes as conditions.

    Attributes:
        is_refining: whether it tells the negative prompt sizes of its own, as what starts from an
            image does.
    """

    tensors = (*TENSORS, "add_text_embeds", "add_time_ids", "negative_pooled_prompt_embeds")
    is_refining: ClassVar[bool] = False

    text_encoder_2: CLIPTextModelWithProjection
    tokenizer_2: CLIPTokenizer

    def encode_prompt(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Texts | None = None,
        negative_prompt_2: Texts | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: None = None,
        clip_skip: int | None = None,
    ) -> Embeddings:
        """Embeddings of prompts and negative prompts, (b, tokens, d), and pooled ones, (b, d)."""
        return self._encode(locals())

    @property
    def default_sample_size(self) -> int:
        """The edge of latents that the UNet was trained for."""
        size = self.unet.config.get("sample_size") or 128
        return int(size[0] if isinstance(size, (list, tuple)) else size)

    def _get_add_time_ids(
        self,
        original_size: Size,
        crops_coords_top_left: Size,
        target_size: Size,
        dtype: torch.dtype,
        text_encoder_projection_dim: int | None = None,
    ) -> Tensor:
        """Sizes and crop as the UNet is told them, (1, 6)."""
        told = [*original_size, *crops_coords_top_left, *target_size]
        return torch.tensor([told], dtype=dtype)

    @property
    def codec(self) -> Codec:
        """The VAE, in float32 where its config asks for that."""
        return replace(super().codec, may_widen=True)

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """Both text encoders, or the refiner's one."""
        model = self.unet if self.text_encoder_2 is None else self.text_encoder_2
        return PenultimateStates(
            [self.tokenizer, self.tokenizer_2],
            [self.text_encoder, self.text_encoder_2],
            model.dtype,
            bool(self.config.get("force_zeros_for_empty_prompt")),
        )

    def _requirements(self, arguments: Arguments) -> Requirements:
        return replace(super()._requirements(arguments), is_pooled=True)

    def _describe(self, run: Run) -> None:
        """Set the conditions that the image sizes are.

        Raises:
            ValueError: the UNet expects another number of them.
        """
        is_scored = bool(self.config.get("requires_aesthetics_score"))
        negative: sizes.Negative = "scored" if is_scored else "own" if self.is_refining else "same"
        super()._describe(run)
        told = sizes.describe(run.arguments.described, run.size, negative)
        config = self.unet.config
        pooled = run.conditions.add_text_embeds
        given = len(told[0]) * config.addition_time_embed_dim
        given += 0 if pooled is None else pooled.shape[-1]
        wanted = config.projection_class_embeddings_input_dim
        if given != wanted:
            advice = f"check requires_aesthetics_score ({is_scored}) and text_encoder_2"
            raise ValueError(
                f"the conditions have {given} features, the UNet expects {wanted}: {advice}"
            )
        run.conditions.add_time_ids = sizes.rows(
            told, run.guide, run.noise, run.batch, joins_late=self.is_refining
        )


class StableDiffusionXLPipeline(StableDiffusionXLBase):
    """Text-to-image with SDXL; `denoising_end` leaves the rest to a refiner."""

    _optional_components: ClassVar[list[str]] = [
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "image_encoder",
        "feature_extractor",
    ]
    family = "StableDiffusionXL"

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        image_encoder: None = None,
        feature_extractor: CLIPImageProcessor | None = None,
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
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )

    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
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
        guidance_rescale: float = 0.0,
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


class StableDiffusionXLImg2ImgPipeline(StableDiffusionXLBase):
    """Image-to-image with SDXL or its refiner; `denoising_start` takes over where another model
    left off."""

    _optional_components: ClassVar[list[str]] = [
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "image_encoder",
        "feature_extractor",
    ]
    family = "StableDiffusionXL"
    start = FROM_IMAGE
    is_refining = True

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        image_encoder: None = None,
        feature_extractor: CLIPImageProcessor | None = None,
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
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )

    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        image: ImageInput | None = None,
        strength: float = 0.3,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
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
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, float] | None = None,
        guidance_rescale: float = 0.0,
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


class StableDiffusionXLInpaintPipeline(StableDiffusionXLBase):
    """Inpainting with SDXL."""

    _optional_components: ClassVar[list[str]] = [
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "image_encoder",
        "feature_extractor",
    ]
    family = "StableDiffusionXL"
    start = FROM_MASK
    is_refining = True

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        image_encoder: None = None,
        feature_extractor: CLIPImageProcessor | None = None,
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
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )

    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.9999,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 7.5,
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
        guidance_rescale: float = 0.0,
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


class StableDiffusionXLInstructPix2PixPipeline(StableDiffusionXLBase):
    """Edit an image by an instruction, with SDXL."""

    _optional_components: ClassVar[list[str]] = [
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
    ]
    start = FROM_EDITED
    is_guided_by_image = True

    def __init__(
        self,
        vae: Autoencoder,
        text_encoder: CLIPTextModel | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        tokenizer_2: CLIPTokenizer | None,
        unet: UNet2DConditionModel,
        scheduler: Scheduler,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        is_cosxl_edit: bool = False,
    ) -> None:
        self.register_to_config(
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            is_cosxl_edit=is_cosxl_edit,
        )
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
        )

    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        image: ImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 100,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        image_guidance_scale: float = 1.5,
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
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback: StepCallback | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, float] | None = None,
        guidance_rescale: float = 0.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
    ) -> StableDiffusionXLPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusionXLPipelineOutput.of(self._sample(locals()), return_dict)

    def _begin(self, run: Run, codec: Codec) -> None:
        scales_image = bool(self.config.get("is_cosxl_edit"))
        from_edited(run, codec, self._channels(), scales_image=scales_image)
