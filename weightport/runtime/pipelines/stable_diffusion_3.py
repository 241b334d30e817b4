"""The pipelines of Stable Diffusion 3 and 3.5, with diffusers' names and call arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..images import ImageInput, OutputType
from ..models.autoencoders import Autoencoder
from ..models.clip import CLIPTextModelWithProjection
from ..models.mmdit import SD3Transformer2DModel
from ..models.t5 import T5EncoderModel
from ..sampling import results
from ..sampling.arguments import Arguments, Callback, Generator, Texts
from ..sampling.checks import Requirements
from ..sampling.prompts import Embeddings, PromptEncoder, ThreeEncoders
from ..sampling.schedule import Scheduler
from ..sampling.starts import FROM_MASK, FROM_RESIZED
from ..sampling.state import Images, Run, StableDiffusion3PipelineOutput
from ..text.t5_tokenizer import T5Tokenizer
from ..text.tokenizer import CLIPTokenizer
from .flow import FlowPipeline

NEGATIVES = (
    "latents",
    "prompt_embeds",
    "negative_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


class StableDiffusion3Base(FlowPipeline):
    """What the pipelines of SD 3 share: three text encoders, of which T5 may be missing."""

    family = "StableDiffusion3"
    max_shift = 1.16

    transformer: SD3Transformer2DModel
    text_encoder_2: CLIPTextModelWithProjection
    tokenizer_2: CLIPTokenizer
    text_encoder_3: T5EncoderModel | None
    tokenizer_3: T5Tokenizer | None

    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: Scheduler,
        vae: Autoencoder,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        text_encoder_3: T5EncoderModel | None,
        tokenizer_3: T5Tokenizer | None,
        image_encoder: None = None,
        feature_extractor: None = None,
    ) -> None:
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            text_encoder_3=text_encoder_3,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            tokenizer_3=tokenizer_3,
            transformer=transformer,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )

    def encode_prompt(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        prompt_3: Texts | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Texts | None = None,
        negative_prompt_2: Texts | None = None,
        negative_prompt_3: Texts | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        max_sequence_length: int = 256,
        lora_scale: None = None,
    ) -> Embeddings:
        """Embeddings of prompts and negative prompts, (b, tokens, d), and pooled ones, (b, d)."""
        return self._encode(locals())

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """Both CLIPs and T5."""
        model: Any = self.denoiser if self.text_encoder is None else self.text_encoder
        return ThreeEncoders(
            [self.tokenizer, self.tokenizer_2, self.tokenizer_3],
            [self.text_encoder, self.text_encoder_2, self.text_encoder_3],
            model.dtype,
            width=self.denoiser.config.joint_attention_dim,
        )

    @property
    def patch_size(self) -> int:
        """Latents of a patch, on an edge."""
        return int(self.denoiser.config.patch_size)

    @property
    def _patch(self) -> int:
        return self.patch_size

    def _requirements(self, arguments: Arguments) -> Requirements:
        unit = self.vae_scale_factor * self.patch_size
        return replace(super()._requirements(arguments), unit=unit)

    def predict(self, run: Run, i: int, x: Tensor) -> Tensor:
        """What the transformer makes of the latents in step `i`, guided.

        Led away from what it makes of them without some blocks: Hyung et al.,
        https://arxiv.org/abs/2411.18664.
        """
        conditions = run.conditions
        predicted = self._predicted(run, i, x, conditions.prompt_embeds, conditions.add_text_embeds)
        guided = run.guide.guide(predicted)
        guidance = run.arguments.guidance
        total = run.scheduler.num_inference_steps
        start = total * guidance.skip_layer_guidance_start
        stop = total * guidance.skip_layer_guidance_stop
        skipped = guidance.skip_guidance_layers
        if skipped is None or run.guide.branches == 1 or not start < i < stop:
            return guided
        rows = slice(run.batch, None)
        pooled = conditions.add_text_embeds
        without = self._predicted(
            run,
            i,
            x[rows],
            conditions.prompt_embeds[rows],
            None if pooled is None else pooled[rows],
            skipped,
        )
        return guided + (predicted[rows] - without) * guidance.skip_layer_guidance_scale

    def _predicted(
        self,
        run: Run,
        i: int,
        x: Tensor,
        prompt: Tensor,
        pooled: Tensor | None,
        skipped: Sequence[int] | None = None,
    ) -> Tensor:
        prediction: Tensor
        (prediction,) = self.transformer(  # a plain tuple, as compilers like it
            torch.cat([x, *run.beside.channels()], dim=1),
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=run.timesteps[i].expand(len(x)),
            return_dict=False,
            skip_layers=skipped,
        )
        return prediction


class StableDiffusion3Pipeline(StableDiffusion3Base):
    """Text-to-image."""

    tensors = ("latents", "prompt_embeds", "pooled_prompt_embeds")

    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        prompt_3: Texts | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        negative_prompt: Texts | None = None,
        negative_prompt_2: Texts | None = None,
        negative_prompt_3: Texts | None = None,
        num_images_per_prompt: int = 1,
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
        joint_attention_kwargs: dict[str, float] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 256,
        skip_guidance_layers: Sequence[int] | None = None,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_stop: float = 0.2,
        skip_layer_guidance_start: float = 0.01,
        mu: float | None = None,
    ) -> StableDiffusion3PipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusion3PipelineOutput.of(self._sample(locals()), return_dict)


class StableDiffusion3Img2ImgPipeline(StableDiffusion3Base):
    """Image-to-image."""

    start = FROM_RESIZED
    tensors = NEGATIVES

    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        prompt_3: Texts | None = None,
        height: int | None = None,
        width: int | None = None,
        image: ImageInput | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        negative_prompt: Texts | None = None,
        negative_prompt_2: Texts | None = None,
        negative_prompt_3: Texts | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, float] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 256,
        mu: float | None = None,
    ) -> StableDiffusion3PipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusion3PipelineOutput.of(self._sample(locals()), return_dict)


class StableDiffusion3InpaintPipeline(StableDiffusion3Base):
    """Inpainting, by a transformer made for it (33 channels) or by any other (16)."""

    start = FROM_MASK
    tensors = NEGATIVES
    _callback_tensor_inputs = NEGATIVES

    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        prompt_3: Texts | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        negative_prompt: Texts | None = None,
        negative_prompt_2: Texts | None = None,
        negative_prompt_3: Texts | None = None,
        num_images_per_prompt: int = 1,
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
        joint_attention_kwargs: dict[str, float] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 256,
        mu: float | None = None,
    ) -> StableDiffusion3PipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return StableDiffusion3PipelineOutput.of(self._sample(locals()), return_dict)

    def finish(self, run: Run) -> Images:
        """Latents to images; diffusers leaves the VAE's mean out here, and images depend on it."""
        return results.finish(run, run.latents, replace(self.codec, is_shifted=False), None)
