"""Whose maths a model follows, where two sources of the same weights differ."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .models.clip import CLIPTextEncoder
from .models.layers import GEGLU

Semantics = Literal["diffusers", "kerascv", "kerashub"]


def apply_semantics(model: nn.Module, semantics: Semantics) -> None:
    """Let a model of the runtime compute as `semantics` says; it computes as diffusers until then.

    KerasCV differs from diffusers in two things: the GELU of GEGLU is the tanh approximation, and
    the epsilon of a GroupNorm is 1e-5 also where diffusers fixes 1e-6: in the VAE and in front of
    transformer blocks. keras-hub differs in one: the last normalisation of a text encoder has an
    epsilon of 1e-6.

    Raises:
        ValueError: an unknown name.
    """
    known = get_args(Semantics)
    if semantics not in known:
        raise ValueError(f"semantics must be one of {', '.join(known)}, not {semantics!r}")
    if semantics == "kerascv":
        _follow_kerascv(model)
    elif semantics == "kerashub" and isinstance(model, CLIPTextEncoder):
        model.text_model.final_layer_norm.eps = 1e-6


def _follow_kerascv(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, GEGLU):
            module.gelu = kerascv_gelu
        elif isinstance(module, nn.GroupNorm) and module.eps == 1e-6:  # not one of the config
            module.eps = 1e-5


def kerascv_gelu(x: Tensor) -> Tensor:
    """The tanh approximation of GELU with KerasCV's digits of sqrt(2 / pi) (`diffusion_model.py`,
    0.3.5 to 0.9.0)."""
    return 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x**2)))
