"""Whatever a pipeline's `vae` may be."""

from .asymmetric_vae import AsymmetricAutoencoderKL
from .autoencoder_tiny import AutoencoderTiny
from .vae import AutoencoderKL

Autoencoder = AutoencoderKL | AutoencoderTiny | AsymmetricAutoencoderKL
