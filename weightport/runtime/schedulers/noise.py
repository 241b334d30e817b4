"""The noise that a model was trained with, as its config says, in float32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...noise_schedule import CURVES, curved_betas, ending_at_zero, even_betas

TINY_ALPHA_BAR = 2**-24  # stands for a terminal ᾱ of 0 where σ = √((1-ᾱ)/ᾱ) must be finite


def make_betas(config: Mapping[str, Any]) -> Tensor:
    """β of every training timestep, float32 (num_train_timesteps,).

    Raises:
        ValueError: a `beta_schedule` that does not exist.
    """
    if config["trained_betas"] is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float32)
    steps = config["num_train_timesteps"]
    low = config["beta_start"]
    high = config["beta_end"]
    schedule = config["beta_schedule"]
    if schedule == "sigmoid":
        return torch.linspace(-6, 6, steps).sigmoid().mul(high - low).add(low)
    if schedule in CURVES:
        return torch.tensor(curved_betas(schedule, steps), dtype=torch.float32)
    try:
        return even_betas(schedule, low, high, steps, _linspace)
    except KeyError:
        raise ValueError(f"beta_schedule = {schedule!r} does not exist") from None


def _linspace(start: float, end: float, steps: int) -> Tensor:
    return torch.linspace(start, end, steps, dtype=torch.float32)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """β of the same schedule, ending where nothing of the image is left."""
    alpha_bar = ending_at_zero((1 - betas).cumprod(0))
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
