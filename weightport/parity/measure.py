"""How far two results are apart, and how far they may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..differences import Array, max_abs, psnr
from ..mappings.facts import facts

FLOAT64 = 1e-12
# The repo's weights are rounded: about ten units in the last place.
ROUNDED = {"F16": 5e-3, "BF16": 4e-2}


@dataclass(frozen=True)
class Error:
    """The difference of two results, over all elements.

    Attributes:
        relative_l2: norm of the difference by norm of the expected.
        psnr: in dB, of the expected's range; None where the two are equal.
    """

    max_abs: float
    relative_l2: float
    cosine: float
    psnr: float | None


def measure(ours: Sequence[Array], expected: Sequence[Array]) -> Error:
    """The error of a list of results, taken together.

    Raises:
        ValueError: shapes that differ.
    """
    shapes = [array.shape for array in ours]
    wanted = [array.shape for array in expected]
    if shapes != wanted:
        raise ValueError(f"shapes {shapes} and {wanted}")
    a = _joined(ours)
    b = _joined(expected)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Error(math.inf, math.inf, 0.0, -math.inf)
    norm = float(np.linalg.norm(a - b))
    return Error(
        max_abs=max_abs(a, b),
        relative_l2=_relative(norm, float(np.linalg.norm(b))),
        cosine=_cosine(a, b),
        psnr=_psnr(a, b) if norm else None,
    )


def _joined(arrays: Sequence[Array]) -> Array:
    return np.concatenate([array.ravel().astype(np.float64) for array in arrays])


def _relative(norm: float, scale: float) -> float:
    if scale:
        return norm / scale
    return math.inf if norm else 0.0


def _cosine(a: Array, b: Array) -> float:
    product = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    if product:
        return float(a @ b) / product
    return float(np.array_equal(a, b))  # nothing has no direction


def _psnr(a: Array, b: Array) -> float | None:
    span = float(b.max() - b.min())
    return psnr(a, b, span) if span else None


def tolerance(name: str, dtype: str, weights: Sequence[str]) -> float:
    """The largest relative L2 with which a check passes.

    Args:
        name: the check's.
        dtype: what both sides compute in.
        weights: dtypes of the repo's weights that are rounded from the source's.
    """
    float32 = facts("parity")["tolerances"]
    exact = FLOAT64 if dtype == "float64" else float32.get(name, float32["every"])
    rounded = [ROUNDED[kind] for kind in weights if kind in ROUNDED]
    return max([exact, *rounded])
