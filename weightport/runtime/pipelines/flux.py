"""The pipelines of FLUX.1, with diffusers' names and call arguments."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...mappings.facts import facts
from ..images import ImageInput, OutputType, edges_of
from ..models.autoencoders import Autoencoder
from ..models.clip import CLIPTextModel
from ..models.flux import FluxTransformer2DModel
from ..models.t5 import T5EncoderModel
from ..sampling.arguments import Arguments, Callback, Generator, Size, Texts
from ..sampling.checks import Requirements
from ..sampling.guidance import Guide
from ..sampling.latents import Codec, PackedCodec, tile
from ..sampling.prompts import Embeddings, PooledAndT5, PromptEncoder
from ..sampling.schedule import Scheduler
from ..sampling.starts import (
    FROM_BLENDED,
    FROM_FILLED,
    FROM_LED,
    FROM_NOISE,
    FROM_RESIZED,
    Channels,
)
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

    def _requirements(self, arguments: Arguments) -> Requirements:
        """Of any height and width, which are rounded."""
        return replace(super()._requirements(arguments), unit=1)

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
        channels = self.denoiser.out_channels // 4
        return Channels(channels, channels)

    def _describe(self, run: Run) -> None:
        """Set the places of the patches."""
        unit = self.vae_scale_factor * self._patch
        height, width = (edge // unit for edge in run.size)
        own = places(height, width).to(run.device, run.dtype)
        others = run.conditions.places
        run.conditions.places = own if others is None else torch.cat([own, others])

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
        beside = run.beside
        patches = torch.cat([run.latents, *beside.channels()], dim=2)
        if beside.reference is not None:
            patches = torch.cat([patches, beside.reference], dim=1)
        prediction: Tensor
        (prediction,) = self.transformer(  # a plain tuple, as compilers like it
            patches,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=run.timesteps[i].expand(run.batch).to(run.dtype) / 1000,
            img_ids=run.conditions.places,
            txt_ids=_text_places(prompt),
            guidance=guidance,
            return_dict=False,
        )
        return prediction[:, : run.latents.shape[1]]


def places(height: int, width: int, image: int = 0) -> Tensor:
    """Where so many patches are, (height · width, 3): of which image, in which row and column."""
    rows = torch.arange(height, dtype=torch.float32)
    columns = torch.arange(width, dtype=torch.float32)
    return torch.cartesian_prod(torch.tensor([float(image)]), rows, columns)


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


class FluxSpecialPipeline(FluxBase):
    """What the pipelines share whose transformer is made for their task."""

    _optional_components: ClassVar[list[str]] = []

    def __init__(
        self,
        scheduler: Scheduler,
        vae: Autoencoder,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5Tokenizer,
        transformer: FluxTransformer2DModel,
    ) -> None:
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            scheduler=scheduler,
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


class FluxFillPipeline(FluxSpecialPipeline):
    """Inpainting by a transformer that is made for it."""

    family = "FluxFill"
    start = FROM_FILLED
    _callback_tensor_inputs = FluxBase.tensors

    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        image: ImageInput | None = None,
        mask_image: ImageInput | None = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 30.0,
        num_images_per_prompt: int = 1,
        generator: Generator = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, float] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
    ) -> FluxPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return FluxPipelineOutput.of(self._sample(locals()), return_dict)

    def _requirements(self, arguments: Arguments) -> Requirements:
        """Latents take the place of neither, but `masked_image_latents` that of both."""
        beginning = arguments.beginning
        needs = {"image": beginning.image, "mask_image": beginning.mask_image}
        if beginning.masked_image_latents is not None:
            needs = {"image": beginning.image if beginning.latents is None else beginning.latents}
        return replace(super()._requirements(arguments), needs=needs)


class FluxControlPipeline(FluxSpecialPipeline):
    """Text-to-image that keeps to edges or depth."""

    family = "FluxControl"
    start = FROM_LED

    def __call__(
        self,
        prompt: Texts | None = None,
        prompt_2: Texts | None = None,
        control_image: ImageInput | Sequence[ImageInput] | None = None,
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
        output_type: OutputType = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, float] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
    ) -> FluxPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return FluxPipelineOutput.of(self._sample(locals()), return_dict)


class FluxKontextPipeline(FluxGeneralPipeline):
    """Text-to-image that sees another image, to change it or to take from it."""

    family = "FluxKontext"
    start = FROM_NOISE

    def __call__(
        self,
        image: ImageInput | None = None,
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
        max_area: int = 1024**2,
        _auto_resize: bool = True,
    ) -> FluxPipelineOutput:
        """Make images; `sampling.arguments` says what the arguments mean."""
        return FluxPipelineOutput.of(self._sample(locals()), return_dict)

    def _size(self, arguments: Arguments) -> Size:
        """An area in the proportions that are asked for, in whole patches."""
        beginning = arguments.beginning
        trained = 128 * self.vae_scale_factor
        asked = (beginning.height or trained, beginning.width or trained)
        ratio = asked[1] / asked[0]
        unit = self.vae_scale_factor * self._patch
        width = round((beginning.max_area * ratio) ** 0.5) // unit * unit
        height = round((beginning.max_area / ratio) ** 0.5) // unit * unit
        if (height, width) != asked:
            message = f"height and width = {asked} become {(height, width)}, by max_area"
            warnings.warn(message, stacklevel=2)
        return height, width

    def _begin(self, run: Run, codec: Codec) -> None:
        """Noise, and the image as further patches."""
        beginning = run.arguments.beginning
        if beginning.image is not None:
            edges = edges_of(beginning.image)
            if beginning._auto_resize:
                edges = _trained_for(edges)
            image = codec.images.preprocess(beginning.image, *edges)
            latents = image
            if not codec.is_encoded(image):
                encoded = codec.encode(image, None).to(run.dtype)
                latents = codec.statistics(encoded).normalise(encoded)
            latents = tile(latents.to(run.device, run.dtype), run.batch)
            run.beside.reference = codec.pack(latents)
            height, width = (edge // self._patch for edge in latents.shape[-2:])
            run.conditions.places = places(height, width, 1).to(run.device, run.dtype)
        super()._begin(run, codec)


def _trained_for(edges: Size) -> Size:
    """The height and width that Kontext was trained for, whose proportions are nearest."""
    height, width = edges
    ratio = width / height
    sizes: list[tuple[int, int]] = facts("flux")["kontext"]["sizes"]
    _, width, height = min((abs(ratio - w / h), w, h) for w, h in sizes)
    return height, width
