"""The noise that models are trained with: β of every training timestep, and ᾱ, the share of the
image that is left. The formulas serve numpy and torch alike, each in its own precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")  # an array of numpy, or a tensor


def even_betas(
    schedule: str, start: float, end: float, steps: int, linspace: Callable[[float, float, int], T]
) -> T:
    """β from `start` to `end`, evenly spaced, or their square roots are.

    Raises:
        KeyError: the schedule is of another kind.
    """
    if schedule == "linear":
        return linspace(start, end, steps)
    if schedule == "scaled_linear":
        roots: Any = linspace(start**0.5, end**0.5, steps)
        squares: T = roots**2
        return squares
    raise KeyError(schedule)


def cosine(t: float) -> float:
    """ᾱ(t) of Nichol and Dhariwal, Improved DDPM, eq. 17."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def laplace(t: float) -> float:
    """√ᾱ of a log-SNR with a Laplace distribution (Hang et al., Improved Noise Schedule, table
    1)."""
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


def exponential(t: float) -> float:
    """ᾱ(t) that decays evenly."""
    return math.exp(-12 * t)


CURVES = {"squaredcos_cap_v2": cosine, "laplace": laplace, "exp": exponential}


def curved_betas(schedule: str, steps: int) -> list[float]:
    """β whose ᾱ follow a curve of the time, from 0 to 1.

    Raises:
        KeyError: the schedule is of another kind.
    """
    curve = CURVES[schedule]
    return [min(1 - curve((i + 1) / steps) / curve(i / steps), 0.999) for i in range(steps)]


def ending_at_zero(alpha_bar: T) -> T:
    """ᾱ with its root shifted and scaled so that nothing of the image is left at the end (Lin et
    al., Common Diffusion Noise Schedules, algorithm 1)."""
    values: Any = alpha_bar
    root = values**0.5
    first = root[0]
    last = root[-1]
    ended: T = ((root - last) * (first / (first - last))) ** 2
    return ended
