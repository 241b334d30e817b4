"""The models of diffusers, where scripts look for them."""

from .runtime.loading.model import AutoModel
from .runtime.models.asymmetric_vae import AsymmetricAutoencoderKL
from .runtime.models.autoencoder_tiny import AutoencoderTiny
from .runtime.models.controlnet import ControlNetModel, MultiControlNetModel
from .runtime.models.flux import FluxTransformer2DModel
from .runtime.models.mmdit import SD3Transformer2DModel
from .runtime.models.unet import UNet2DConditionModel
from .runtime.models.vae import AutoencoderKL

__all__ = [
    "AsymmetricAutoencoderKL",
    "AutoModel",
    "AutoencoderKL",
    "AutoencoderTiny",
    "ControlNetModel",
    "FluxTransformer2DModel",
    "MultiControlNetModel",
    "SD3Transformer2DModel",
    "UNet2DConditionModel",
]
