"""The noise that a model was trained with: β of every training timestep, and ᾱ, the share of the
image that is left."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TINY_ALPHA_BAR = 2**-24  # stands for a terminal ᾱ of 0 where σ = √((1-ᾱ)/ᾱ) must be finite


def _cosine(t: float) -> float:
    """ᾱ(t) of Nichol and Dhariwal, Improved DDPM, eq. 17."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    """√ᾱ of a log-SNR with a Laplace distribution (Hang et al., Improved Noise Schedule, table
    1)."""
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


def _exponential(t: float) -> float:
    return math.exp(-12 * t)


ALPHA_BARS = {"squaredcos_cap_v2": _cosine, "laplace": _laplace, "exp": _exponential}


def make_betas(config: Mapping[str, Any]) -> Tensor:
    """β of every training timestep, float32 (num_train_timesteps,).

    Raises:
        ValueError: a `beta_schedule` that does not exist.
    """
    n, low, high = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["trained_betas"] is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float32)
    if (schedule := config["beta_schedule"]) == "linear":
        return torch.linspace(low, high, n, dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(low**0.5, high**0.5, n, dtype=torch.float32).square()
    if schedule == "sigmoid":
        return torch.linspace(-6, 6, n).sigmoid().mul(high - low).add(low)
    if schedule not in ALPHA_BARS:
        raise ValueError(f"beta_schedule = {schedule!r} does not exist")
    alpha_bar = ALPHA_BARS[schedule]
    betas = [min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), 0.999) for i in range(n)]
    return torch.tensor(betas, dtype=torch.float32)


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """β with √ᾱ shifted and scaled so that it ends at 0 (Lin et al., Common Diffusion Noise
    Schedules, algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
