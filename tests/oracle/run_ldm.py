"""The models inside an original checkpoint, as their first authors run them.

UNet and VAE are the real `ldm` modules, in the copy that `stable-diffusion-sdkit` on PyPI carries;
the VAE is that of `weightport parity`. Of OpenCLIP's text tower, another package of CompVis's
stack, the few lines that Stable Diffusion 2 runs are written here.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "weightport" / "parity" / "runners"))

from run_ldm import Autoencoder

__all__ = ["Autoencoder", "OpenCLIPText", "randomise", "text_encoder", "unet"]

HEADS: dict[
    str, dict[str, Any]
] = {  # v1-inference.yaml of CompVis, v2-inference.yaml of Stability-AI
    "sd1": {"num_heads": 8},
    "sd2": {"num_head_channels": 64, "use_linear_in_transformer": True},
}


def unet(family: str, widths: Sequence[int], context_dim: int) -> nn.Module:
    """The UNet of the published YAML files, at any widths."""
    return UNetModel(
        image_size=32,  # not used
        in_channels=4,
        out_channels=4,
        model_channels=widths[0],
        channel_mult=[width // widths[0] for width in widths],
        num_res_blocks=2,
        attention_resolutions=[4, 2, 1],
        use_spatial_transformer=True,
        context_dim=context_dim,
        legacy=False,
        **HEADS[family],
    )


class _Layer(nn.Module):
    """A pre-norm transformer layer with a fused query, key and value projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        hidden = 4 * width
        mlp = {
            "c_fc": nn.Linear(width, hidden),
            "gelu": nn.GELU(),
            "c_proj": nn.Linear(hidden, width),
        }
        self.mlp = nn.Sequential(OrderedDict(mlp))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class OpenCLIPText(nn.Module):
    """OpenCLIP's text tower of 24 layers, under the names of its state dict."""

    def __init__(self, width: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(77, width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(_Layer(width, heads) for _ in range(24))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, width))
        self.logit_scale = nn.Parameter(torch.empty(()))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (b, n) -> what Stable Diffusion 2 is conditioned on: the last layer but one, after
        the final norm.

        `FrozenOpenCLIPEmbedder` with layer="penultimate", in ldm/modules/encoders/modules.py.
        """
        n = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:n]
        mask = torch.full((n, n), -torch.inf).triu(1)
        layers = list(self.transformer.get_submodule("resblocks").children())
        for layer in layers[:-1]:
            x = layer(x, mask)
        return self.ln_final(x)


def text_encoder(family: str, width: int, heads: int, vocabulary: int) -> nn.Module:
    """SD 1.x: CLIP in transformers, as CompVis uses it; SD 2.x: OpenCLIP."""
    if family == "sd2":
        return OpenCLIPText(width, heads, vocabulary)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    return CLIPTextModel(
        CLIPTextConfig(
            **sizes, vocab_size=vocabulary, hidden_act="quick_gelu", num_hidden_layers=12
        )
    )


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Random values for every parameter (ldm starts many convolutions at zero), of a size that
    keeps signals level."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        random = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(random / parameter[0].numel() ** 0.5)
        else:
            parameter.copy_(
                0.1 * random + (1 if name.endswith("weight") else 0)
            )  # gains of norms are near 1
    return model.eval()
