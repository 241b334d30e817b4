"""Which timesteps and noise levels a run visits. σ is the noise-to-signal ratio √((1-ᾱ)/ᾱ), large
to small.

float64 throughout, so that timesteps round as they do elsewhere; the schedulers keep σ in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Numbers = Sequence[float] | Array | Tensor
T = TypeVar("T", Array, Tensor)


def spaced(
    spacing: str,
    steps: int,
    total: int,
    offset: int = 0,
    *,
    spare: int = 0,
    last: int | None = None,
) -> Array:
    """`steps` timesteps of the `total` of training, descending, not rounded (Lin et al., table 2).

    Args:
        spacing: `linspace`, `leading` or `trailing`.
        steps: how many; rounding can make `trailing` one longer.
        total: `num_train_timesteps`.
        offset: is added to `leading`.
        spare: points at the clean end that are spaced for but left out.
        last: leave out the timesteps from here on.
    """
    if last is None:
        last = total
    points = steps + spare
    if spacing == "linspace":
        return np.linspace(0, last - 1, points)[::-1][:steps]
    if spacing == "leading":
        stride = last // points
        return np.arange(points, dtype=float)[::-1][:steps] * stride + offset
    if spacing == "trailing":
        return np.arange(last, 0, -total / steps).round() - 1
    raise ValueError(f"timestep_spacing = {spacing!r} must be linspace, leading or trailing")


class TrainedLevels:
    """σ of every training timestep, ascending, and their logarithms."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.sigmas: Array = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().numpy()
        self.logs: Array = np.log(self.sigmas)

    def at(self, timesteps: Array) -> Array:
        """σ at timesteps, which need not be whole numbers."""
        return np.asarray(np.interp(timesteps, np.arange(len(self.sigmas)), self.sigmas))

    def timesteps_of(self, sigmas: Array, dtype: Any = np.float64) -> Array:
        """The timesteps, not rounded, at which noise levels lie."""
        log_sigmas = np.log(np.maximum(sigmas, 1e-10))
        low = np.searchsorted(self.logs, log_sigmas, side="right") - 1
        low = low.clip(0, len(self.logs) - 2)
        high = low + 1
        weight = (self.logs[low] - log_sigmas) / (self.logs[low] - self.logs[high])
        weight = weight.clip(0, 1)
        return np.asarray((1 - weight) * low.astype(dtype) + weight * high.astype(dtype))


def power_spaced(high: float, low: float, ramp: T, rho: float) -> T:
    """From `high` to `low`, evenly spaced in σ^(1/ρ), where `ramp` goes from 0 to 1 (Karras et al.,
    EDM, eq. 5)."""
    start = high ** (1 / rho)
    end = low ** (1 / rho)
    return (start + ramp * (end - start)) ** rho  # type: ignore[no-any-return]


def karras(high: float, low: float, steps: int) -> Array:
    """Evenly spaced in σ^(1/7): dense at the clean end."""
    return power_spaced(high, low, np.linspace(0, 1, steps), 7.0)


def exponential(high: float, low: float, steps: int) -> Array:
    """Evenly spaced in log σ."""
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def lambdas(high: float, low: float, steps: int) -> Array:
    """Evenly spaced in λ, in float32 at the ends (Lu et al., DPM-Solver, section 3.4)."""
    start = float(np.log(np.float32(high)))
    end = float(np.log(np.float32(low)))
    return np.exp(start + np.linspace(0, 1, steps) * (end - start))


def beta(high: float, low: float, steps: int) -> Array:
    """Dense at both ends: quantiles of Beta(0.6, 0.6) (Lee et al., Beta Sampling is All You
    Need)."""
    quantiles = beta_quantile(1 - np.linspace(0, 1, steps), 0.6)
    return low + quantiles * (high - low)


def beta_quantile(p: Array, a: float) -> Array:
    """The inverse of the distribution function of Beta(a, a).

    Newton's method in u = xᵃ, in which the function is almost a line, on the power series of the
    incomplete beta function (DLMF 8.17.7), which x <= 1/2 makes converge; the other half is its
    mirror image.
    """
    k = np.arange(60)
    factors = np.r_[1, (k[1:] - a) / k[1:]]
    terms = np.cumprod(factors) / (a + k)
    scale = math.gamma(2 * a) / math.gamma(a) ** 2
    half = np.minimum(p, 1 - p)
    u = half / (scale * terms[0])
    for _ in range(6):
        x = u ** (1 / a)
        value = scale * u * (terms * x[:, None] ** k).sum(1)
        slope = scale / a * (1 - x) ** (a - 1)
        u = u - (value - half) / slope
    x = np.maximum(u, 0) ** (1 / a)
    return np.asarray(np.where(p > 0.5, 1 - x, x))


def flow_shifted(sigmas: Array, shift: float) -> Array:
    """σ of a flow, moved towards noise (Esser et al., Scaling Rectified Flow Transformers, eq.
    23)."""
    return np.asarray(shift * sigmas / (1 + (shift - 1) * sigmas))


def shifted(sigmas: Array, config: Mapping[str, Any], shift: float, mu: float | None) -> Array:
    """σ of a flow as its config wants them: moved by `shift`, or by `mu`, which the image size
    says; then stretched.

    Raises:
        ValueError: `mu` is needed and not given.
    """
    if not config["use_dynamic_shifting"]:
        sigmas = flow_shifted(sigmas, shift)
    elif mu is None:
        raise ValueError("use_dynamic_shifting needs mu")
    else:
        shift = math.exp(mu) if config["time_shift_type"] == "exponential" else mu
        sigmas = np.asarray(shift / (shift + (1 / sigmas - 1)))
    if last := config["shift_terminal"]:
        sigmas = 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - last))
    return sigmas
