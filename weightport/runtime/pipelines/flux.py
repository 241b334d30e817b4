"""The pipelines of FLUX.1, with diffusers' names and call arguments."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..images import ImageInput, OutputType
from ..models.autoencoders import Autoencoder
from ..models.clip import CLIPTextModel
from ..models.flux import FluxTransformer2DModel
from ..models.t5 import T5EncoderModel
from ..sampling.arguments import Arguments, Callback, Generator, Size, Texts
from ..sampling.guidance import Guide
from ..sampling.latents import Codec, PackedCodec
from ..sampling.prompts import Embeddings, PooledAndT5, PromptEncoder
from ..sampling.schedule import Scheduler
from ..sampling.starts import FROM_BLENDED, FROM_RESIZED, Channels
from ..sampling.state import Conditions, FluxPipelineOutput, Run
from ..text.t5_tokenizer import T5Tokenizer
from ..text.tokenizer import CLIPTokenizer
from .flow import FlowPipeline


class FluxBase(FlowPipeline):
    """What the pipelines of Flux share: T5 for the prompt, CLIP for what is pooled, latents in
    patches of 2 x 2."""

    max_shift = 1.15
    is_even = True
    tensors = ("latents", "prompt_embeds")
    _patch = 2

    transformer: FluxTransformer2DModel
    text_encoder_2: T5EncoderModel
    tokenizer_2: T5Tokenizer

    def encode_prompt(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = 512,
        lora_scale: None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Embeddings of prompts, (b, tokens, d), pooled ones, (b, d), and the places of tokens,
        (tokens, 3)."""
        given = {**locals(), "do_classifier_free_guidance": False}
        encoded = self._encode(given)
        return encoded.prompt, encoded.pooled, _text_places(encoded.prompt)

    @property
    def codec(self) -> Codec:
        """The VAE, whose latents are packed into patches."""
        return PackedCodec(self.vae, processor=self._processor, is_shifted=True)

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """CLIP and T5."""
        model: Any = self.denoiser if self.text_encoder_2 is None else self.text_encoder_2
        return PooledAndT5(
            [self.tokenizer, self.tokenizer_2],
            [self.text_encoder, self.text_encoder_2],
            model.dtype,
        )

    def _guide(self, arguments: Arguments) -> Guide:
        prompts = arguments.prompts
        embeds = (prompts.negative_prompt_embeds, prompts.negative_pooled_prompt_embeds)
        has_negative = prompts.negative_prompt is not None or None not in embeds
        return Guide(self._dials(arguments), is_condition=not has_negative, is_beside=True)

    def _conditions(self, encoded: Embeddings, guide: Guide) -> Conditions:
        """The prompts, and the negative ones, which the model sees by themselves."""
        return super()._conditions(encoded, Guide(guide.dials, is_condition=True))

    def _trained_edges(self) -> Sequence[int]:
        return (128, 128)

    def _size(self, arguments: Arguments) -> Size:
        """Height and width that are asked for, in whole patches."""
        size = super()._size(arguments)
        unit = self.vae_scale_factor * self._patch
        height, width = (edge // unit * unit for edge in size)
        if (height, width) != size:
            warnings.warn(
                f"height and width = {size} become {(height, width)}, multiples of {unit}",
                stacklevel=2,
            )
        return height, width

    def _channels(self) -> Channels:
        channels = self.denoiser.config.in_channels // 4
        return Channels(channels, channels)

    def _describe(self, run: Run) -> None:
        """Set the places of the patches."""
        unit = self.vae_scale_factor * self._patch
        height, width = (edge // unit for edge in run.size)
        run.conditions.places = places(height, width).to(run.device, run.dtype)

    def predict(self, run: Run, i: int, x: Tensor) -> Tensor:
        """What the transformer makes of the latents in step `i`, guided: of each prompt by
        itself."""
        conditions = run.conditions
        both = [(conditions.prompt_embeds, conditions.add_text_embeds)]
        if run.guide.branches > 1 and conditions.negative_prompt_embeds is not None:
            negative = conditions.negative_prompt_embeds
            both.insert(0, (negative, conditions.negative_pooled_prompt_embeds))
        return run.guide.guide(torch.cat([self._predicted(run, i, *one) for one in both]))

    def _predicted(self, run: Run, i: int, prompt: Tensor, pooled: Tensor | None) -> Tensor:
        guidance = None
        if self.transformer.config.guidance_embeds:
            scale = torch.tensor([run.guide.dials.guidance_scale], device=run.device)
            guidance = scale.expand(run.batch)
        prediction: Tensor
        (prediction,) = self.transformer(  # a plain tuple, as compilers like it
            torch.cat([run.latents, *run.beside.channels()], dim=2),
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=run.timesteps[i].expand(run.batch).to(run.dtype) / 1000,
            img_ids=run.conditions.places,
            txt_ids=_text_places(prompt),
            guidance=guidance,
            return_dict=False,
        )
        return prediction


def places(height: int, width: int) -> Tensor:
    """Where so many patches are, (height · width, 3): of which image, in which row and column."""
    rows = torch.arange(height, dtype=torch.float32)
    columns = torch.arange(width, dtype=torch.float32)
    return torch.cartesian_prod(torch.zeros(1), rows, columns)


def _text_places(prompt: Tensor) -> Tensor:
    """Where tokens are, (tokens, 3): all in one place."""
    return prompt.new_zeros(prompt.shape[1], 3)


class FluxGeneralPipeline(FluxBase):
    """What the pipelines share whose transformer is made for no other task."""

    family = "Flux"

    def __init__(
        self,
        scheduler: Scheduler,
        vae: Autoencoder,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5Tokenizer,
        transformer: FluxTransformer2DModel,
        image_encoder: None = None,
        feature_extractor: None = None,
    ) -> None:
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )


class FluxPipeline(FluxGeneralPipeline):
    """Text-to-image."""

    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        negative_prompt: Texts | None = None,
        negative_prompt_2: Texts | None = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        negative_ip_adapter_image: None = None,
        negative_ip_adapter_image_embeds: None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, float] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
    ) -> FluxPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return FluxPipelineOutput.of(self._sample(locals()), return_dict)


class FluxImg2ImgPipeline(FluxGeneralPipeline):
    """Image-to-image."""

    start = FROM_RESIZED

    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        negative_prompt: Texts | None = None,
        negative_prompt_2: Texts | None = None,
        true_cfg_scale: float = 1.0,
        image: ImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        negative_ip_adapter_image: None = None,
        negative_ip_adapter_image_embeds: None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, float] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
    ) -> FluxPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return FluxPipelineOutput.of(self._sample(locals()), return_dict)


class FluxInpaintPipeline(FluxGeneralPipeline):
    """Inpainting."""

    start = FROM_BLENDED
    _callback_tensor_inputs = FluxBase.tensors

    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        negative_prompt: Texts | None = None,
        negative_prompt_2: Texts | None = None,
        true_cfg_scale: float = 1.0,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        negative_ip_adapter_image: None = None,
        negative_ip_adapter_image_embeds: None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, float] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
    ) -> FluxPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return FluxPipelineOutput.of(self._sample(locals()), return_dict)
