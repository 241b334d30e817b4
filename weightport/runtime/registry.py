"""The classes of the runtime, by name, and what a repository may call them.

The tables are closed: a repository chooses among our classes, and nothing is imported because a
file names it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

MODULES: dict[str, tuple[str, ...]] = {  # modules of weightport.runtime -> public classes
    "models.unet": ("UNet2DConditionModel",),
    "models.controlnet": (
        "ControlNetModel",
        "MultiControlNetModel",
    ),
    "models.mmdit": ("SD3Transformer2DModel",),
    "models.flux": ("FluxTransformer2DModel",),
    "models.vae": ("AutoencoderKL",),
    "models.autoencoder_tiny": ("AutoencoderTiny",),
    "models.asymmetric_vae": ("AsymmetricAutoencoderKL",),
    "models.clip": (
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
    ),
    "models.t5": ("T5EncoderModel",),
    "text.tokenizer": ("CLIPTokenizer",),
    "text.t5_tokenizer": ("T5Tokenizer",),
    "models.safety_checker": (
        "CLIPImageProcessor",
        "StableDiffusionSafetyChecker",
    ),
    "loading.model": ("AutoModel",),
    "pipelines.base": ("DiffusionPipeline",),
    "pipelines.auto": (
        "AutoPipelineForText2Image",
        "AutoPipelineForImage2Image",
        "AutoPipelineForInpainting",
    ),
    "pipelines.stable_diffusion": (
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "LatentConsistencyModelPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
        "StableDiffusionUpscalePipeline",
        "StableDiffusionDepth2ImgPipeline",
    ),
    "pipelines.stable_diffusion_xl": (
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
    ),
    "pipelines.stable_diffusion_3": (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    ),
    "pipelines.flux": (
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxFillPipeline",
        "FluxControlPipeline",
        "FluxKontextPipeline",
    ),
    "pipelines.controlnet": (
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
    ),
    "schedulers": (
        "CMStochasticIterativeScheduler",
        "CosineDPMSolverMultistepScheduler",
        "DDIMScheduler",
        "DDIMInverseScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverMultistepInverseScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EDMDPMSolverMultistepScheduler",
        "EDMEulerScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "HeunDiscreteScheduler",
        "IPNDMScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KerasCVScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    ),
}
PUBLIC = {name: module for module, names in MODULES.items() for name in names}
PIPELINES = (
    *MODULES["pipelines.stable_diffusion"],
    *MODULES["pipelines.stable_diffusion_xl"],
    *MODULES["pipelines.stable_diffusion_3"],
    *MODULES["pipelines.flux"],
    *MODULES["pipelines.controlnet"],
)
COMPONENTS: dict[str, tuple[str, ...]] = {  # library in model_index.json -> classes
    "diffusers": (
        "UNet2DConditionModel",
        "SD3Transformer2DModel",
        "FluxTransformer2DModel",
        *MODULES["models.controlnet"],
        "AutoencoderKL",
        "AutoencoderTiny",
        "AsymmetricAutoencoderKL",
        *MODULES["schedulers"],
    ),
    "transformers": (
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "T5EncoderModel",
        "CLIPTokenizer",
        "T5Tokenizer",
        "CLIPImageProcessor",
    ),
    "stable_diffusion": ("StableDiffusionSafetyChecker",),
}
ALIASES = {
    **dict.fromkeys(
        ("CLIPFeatureExtractor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"),
        "CLIPImageProcessor",
    ),
    "CLIPTokenizerFast": "CLIPTokenizer",
    "T5TokenizerFast": "T5Tokenizer",
}


def public_class(name: str) -> type[Any]:
    """A class of the runtime by its name.

    Raises:
        KeyError: there is none.
    """
    kind: type[Any] = getattr(import_module(f"{__package__}.{PUBLIC[name]}"), name)
    return kind


def component_class(library: str, name: str) -> type[Any] | None:
    """Our class for an entry of `model_index.json`; None if there is none."""
    name = name.removeprefix("FlashPack")
    name = ALIASES.get(name, name)
    is_known = name in COMPONENTS.get(library, ()) and name in PUBLIC
    return public_class(name) if is_known else None


def library_of(kind: type) -> str:
    """What `model_index.json` calls the library of a class: diffusers' names for ours, or the
    package it is from."""
    package = kind.__module__.split(".")[0]
    is_ours = package == __name__.split(".")[0]
    return str(getattr(kind, "library", package)) if is_ours else package
