"""How near the outputs of models with adapters are to those of PEFT."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    """Bit for bit."""
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other), (one - other).abs().max()


def assert_near(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> None:
    """Bit for bit in half precision; in float32 kernels may differ in the last one."""
    if a[0].dtype != torch.float32:
        assert_equal(a, b)
    for one, other in zip(a, b, strict=True):
        assert (one - other).norm() <= 5e-7 * other.norm()
