"""What the pipelines share whose denoiser is a transformer of a flow, as those of SD 3 and Flux."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..sampling.arguments import Arguments, Size
from ..sampling.checks import Requirements
from ..sampling.latents import Codec
from ..sampling.schedule import Flow
from .latent import LatentDiffusionPipeline


class FlowPipeline(LatentDiffusionPipeline):
    """The base of these pipelines.

    Attributes:
        max_shift: how far a flow is shifted for large images, where the scheduler does not say.
        is_even: whether σ goes from 1 in even steps.
    """

    denoiser_name = "transformer"
    _lora_loadable_modules = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    max_shift: ClassVar[float]
    is_even: ClassVar[bool] = False
    _optional_components: ClassVar[list[str]] = ["image_encoder", "feature_extractor"]

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        transformer_lora_layers: Mapping[str, Tensor] | None = None,
        text_encoder_lora_layers: Mapping[str, Tensor] | None = None,
        text_encoder_2_lora_layers: Mapping[str, Tensor] | None = None,
        weight_name: str | None = None,
        transformer_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_2_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Save what was trained, as diffusers does: one safetensors file with PEFT's configs.

        Raises:
            ValueError: there is nothing to save.
        """
        layers = {
            "transformer": transformer_lora_layers,
            "text_encoder": text_encoder_lora_layers,
            "text_encoder_2": text_encoder_2_lora_layers,
        }
        configs = {
            "transformer": transformer_lora_adapter_metadata,
            "text_encoder": text_encoder_lora_adapter_metadata,
            "text_encoder_2": text_encoder_2_lora_adapter_metadata,
        }
        cls._save_adapters(save_directory, layers, configs, weight_name)

    @property
    def codec(self) -> Codec:
        """The VAE, whose latents have a mean."""
        return replace(super().codec, is_shifted=True)

    @property
    def _patch(self) -> int:
        """Latents of a patch, on an edge."""
        raise NotImplementedError

    def _flow(self, size: Size) -> Flow:
        height, width = (edge // self.vae_scale_factor // self._patch for edge in size)
        return Flow(height * width, self.max_shift, self.is_even)

    def _requirements(self, arguments: Arguments) -> Requirements:
        return replace(super()._requirements(arguments), is_pooled=True)

    @property
    def default_sample_size(self) -> int:
        """The edge of latents that the transformer was trained for."""
        return int(self._trained_edges()[0])

    @property
    def tokenizer_max_length(self) -> int:
        """Tokens that CLIP takes."""
        return 77 if self.tokenizer is None else self.tokenizer.model_max_length
