"""What the pipelines share whose denoiser is a UNet: its conditions, ControlNets, a safety
checker."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..images import VaeImageProcessor
from ..loading.components import correct_sample_size
from ..models.controlnet import ControlNetModel, MultiControlNetModel
from ..models.unet import UNet2DConditionModel
from ..notices import FUSED, say_once
from ..sampling import control, results
from ..sampling.arguments import Arguments
from ..sampling.checks import Requirements
from ..sampling.guidance import Guide, embed_guidance
from ..sampling.latents import Codec
from ..sampling.prompts import LastStates, PromptEncoder
from ..sampling.state import Images, Run
from .latent import LatentDiffusionPipeline


class UNetPipeline(LatentDiffusionPipeline):
    """The base of the pipelines of Stable Diffusion 1, 2 and XL.

    Attributes:
        is_guided_by_image: whether guidance has a third branch.
    """

    denoiser_name = "unet"
    is_guided_by_image: ClassVar[bool] = False

    unet: UNet2DConditionModel

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | Path,
        unet_lora_layers: Mapping[str, Tensor] | None = None,
        text_encoder_lora_layers: Mapping[str, Tensor] | None = None,
        text_encoder_2_lora_layers: Mapping[str, Tensor] | None = None,
        weight_name: str | None = None,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_2_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Save what was trained, as diffusers does: one safetensors file with PEFT's configs.

        Raises:
            ValueError: there is nothing to save.
        """
        layers = {
            "unet": unet_lora_layers,
            "text_encoder": text_encoder_lora_layers,
            "text_encoder_2": text_encoder_2_lora_layers,
        }
        configs = {
            "unet": unet_lora_adapter_metadata,
            "text_encoder": text_encoder_lora_adapter_metadata,
            "text_encoder_2": text_encoder_2_lora_adapter_metadata,
        }
        cls._save_adapters(save_directory, layers, configs, weight_name)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the model is asked without the prompt as well."""
        is_condition = self.unet.config.get("time_cond_proj_dim") is not None
        return self._shown.guidance_scale > 1 and not is_condition

    @property
    def control_image_processor(self) -> VaeImageProcessor:
        """What the images of ControlNets go through."""
        return self.codec.controls

    @property
    def prompt_encoder(self) -> PromptEncoder:
        """The text encoder, or both."""
        model = self.unet if self.text_encoder is None else self.text_encoder
        return LastStates([self.tokenizer], [self.text_encoder], model.dtype)

    @property
    def controlnets(self) -> list[ControlNetModel]:
        """The ControlNets, if the pipeline has any."""
        net = self.components.get("controlnet")
        return [] if net is None else list(getattr(net, "nets", [net]))

    @property
    def _predicting(self) -> list[Any]:
        return [self.unet, *self.controlnets]

    def register_modules(self, **components: Any) -> None:
        """Make these the components; several ControlNets become one model, and options of old
        configs are put right.

        Raises:
            ValueError: there is a safety checker but nothing that prepares images for it.
        """
        net = components.get("controlnet")
        if isinstance(net, (list, tuple)):
            components["controlnet"] = MultiControlNetModel(list(net))
        is_checked = components.get("safety_checker") is not None
        if is_checked and components.get("feature_extractor") is None:
            raise ValueError(
                "a safety_checker needs a feature_extractor; pass both, or safety_checker=None"
            )
        if self.scheduler_fixes:
            correct_sample_size(components.get("unet"))
        super().register_modules(**components)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Weigh the UNet's skips by FreeU; see `UNet2DConditionModel.enable_freeu`."""
        self.unet.enable_freeu(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        """Join the UNet's skips as they are."""
        self.unet.disable_freeu()

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Of no effect, which is said once: fused projections take the same time here."""
        say_once(f"fuse_qkv_projections {FUSED}")

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Of no effect, as nothing is fused; said once."""
        say_once(f"unfuse_qkv_projections {FUSED}")

    # --- a run ------------------------------------------------------------------------------------

    def _requirements(self, arguments: Arguments) -> Requirements:
        requirements = super()._requirements(arguments)
        needs = dict(requirements.needs)
        if self.control_argument is not None:
            needs[self.control_argument] = arguments.control.control_image
            control.windows(arguments.control, len(self.controlnets))
        level = self.config.get("max_noise_level")
        return replace(requirements, needs=needs, max_noise_level=level)

    def _guide(self, arguments: Arguments) -> Guide:
        is_condition = self.is_distilled or bool(self.unet.config.get("time_cond_proj_dim"))
        return Guide(self._dials(arguments), is_condition, self.is_guided_by_image)

    def _begin(self, run: Run, codec: Codec) -> None:
        if self.control_argument is not None:
            control.lead(run, self.controlnets, self.control_argument, codec.controls)
        super()._begin(run, codec)

    def _describe(self, run: Run) -> None:
        """Set the guidance scale where it is a condition."""
        features = self.unet.config.get("time_cond_proj_dim")
        if features:
            scale = embed_guidance(run.guide.dials.guidance_scale, features)
            scales = scale.expand(run.batch, features)
            run.conditions.w_embedding = scales.to(run.device, run.dtype)

    def predict(self, run: Run, i: int, x: Tensor) -> Tensor:
        """What the UNet makes of the scaled latents in step `i`, guided."""
        conditions = run.conditions
        inner = {} if run.leading is None else control.residuals(run, run.leading, i, x)
        (prediction,) = self.unet(  # a plain tuple, as compilers like it
            torch.cat([x, *run.beside.channels()], dim=1),
            run.timesteps[i],
            encoder_hidden_states=conditions.prompt_embeds,
            class_labels=conditions.class_labels,
            timestep_cond=conditions.w_embedding,
            added_cond_kwargs=conditions.added(),
            return_dict=False,
            **inner,
        )
        return run.guide.guide(prediction)

    def finish(self, run: Run) -> Images:
        """Latents to images."""
        latents = run.latents
        if self.is_distilled and run.denoised is not None:
            latents = run.denoised
        checker = self.components.get("safety_checker")
        safety = None if checker is None else results.Safety(checker, self.feature_extractor)
        return results.finish(run, latents, self.codec, safety)


def warn_if_unchecked(safety_checker: object, is_required: bool) -> None:
    """Warn who makes a pipeline that should have a safety checker and has none."""
    if is_required and safety_checker is None:
        warnings.warn(
            "there is no safety checker: every image is shown, whatever is on it", stacklevel=3
        )
