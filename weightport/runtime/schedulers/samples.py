"""What is done to samples: linear combinations, noise, and what a model's output says of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TINY = 1e-6  # instead of dividing by zero
Generator = torch.Generator | list[torch.Generator] | None
Draw = Callable[..., Tensor]  # the noise of a step, like the output or what is given


def combine(a: float, x: Tensor, *terms: tuple[float, Tensor | None]) -> Tensor:
    """a·x + Σ b·m, products rounded before they are added.

    A coefficient of 0 leaves out its tensor, NaN or not.
    """
    total: Tensor | None
    if a == 0:
        total = None
    elif a == 1:
        total = x
    else:
        total = x * a
    for b, m in terms:
        if b and m is not None:
            total = m * b if total is None else total + m * b
    return torch.zeros_like(x) if total is None else total


def widened(sample: Tensor) -> Tensor:
    """`sample`, in float32 if it had less."""
    return sample if sample.dtype is torch.float64 else sample.float()


def draw_noise(like: Tensor, generator: Generator, dtype: torch.dtype) -> Tensor:
    """Standard normal noise in the shape of `like`, drawn where the generator is.

    Of several generators each draws a sample.
    """
    if isinstance(generator, list):
        if len(generator) > 1:
            parts = [draw_noise(like[i : i + 1], one, dtype) for i, one in enumerate(generator)]
            return torch.cat(parts)
        generator = generator[0]
    device = (generator or like).device
    noise = torch.randn(like.shape, generator=generator, device=device, dtype=dtype)
    return noise.to(like.device)


def beside(values: Tensor, like: Tensor) -> Tensor:
    """(b,) in a shape that multiplies samples."""
    return values.to(like.device).view(-1, *[1] * (like.ndim - 1))


def to_image(prediction_type: str, x: Tensor, output: Tensor, alpha: float, sigma: float) -> Tensor:
    """x₀ of a sample. Where nothing of the image is left in it, α = 0, a tiny share of one stands
    in."""
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return combine(alpha, x, (-sigma, output))
    x0 = combine(1, x, (-sigma, output))
    return x0 if prediction_type == "flow_prediction" else x0 / (alpha or TINY)


def to_noise(prediction_type: str, x: Tensor, output: Tensor, alpha: float, sigma: float) -> Tensor:
    """ε of a sample; likewise where there is no noise in it, σ = 0."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "sample":
        return combine(1, x, (-alpha, output)) / (sigma or TINY)
    share = sigma if prediction_type == "v_prediction" else 1
    return combine(share, x, (alpha, output))
