"""How far two results are apart, and how far they may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Relative L2 that float32 programs with the same maths stay below; measured figures are in
# docs/parity.md.
TOLERANCES = {"decoder": 5e-6, "image_encoder": 5e-6}
TOLERANCE = 3e-6
FLOAT64 = 1e-12
ROUNDED = {
    "F16": 5e-3,
    "BF16": 4e-2,
}  # the repo's weights are rounded: about ten units in the last place


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
    a, b = (
        np.concatenate([array.ravel().astype(np.float64) for array in side])
        for side in (ours, expected)
    )
    if [x.shape for x in ours] != [x.shape for x in expected]:
        raise ValueError(f"shapes {[x.shape for x in ours]} and {[x.shape for x in expected]}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Error(math.inf, math.inf, 0.0, -math.inf)
    difference = a - b
    norm, scale = float(np.linalg.norm(difference)), float(np.linalg.norm(b))
    product = float(np.linalg.norm(a)) * scale
    rmse, span = norm / math.sqrt(b.size), float(b.max() - b.min())
    return Error(
        max_abs=float(np.abs(difference).max()),
        relative_l2=norm / scale if scale else math.inf if norm else 0.0,
        cosine=float(a @ b) / product if product else float(norm == 0),
        psnr=20 * math.log10(span / rmse) if rmse and span else None,
    )


def tolerance(name: str, dtype: str, weights: Sequence[str]) -> float:
    """The largest relative L2 with which a check passes.

    Args:
        name: the check's.
        dtype: what both sides compute in.
        weights: dtypes of the repo's weights that are rounded from the source's.
    """
    exact = FLOAT64 if dtype == "float64" else TOLERANCES.get(name, TOLERANCE)
    return max([exact, *(ROUNDED[kind] for kind in weights if kind in ROUNDED)])
