"""How far two results are apart, and how far they may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..differences import Array, decibels
from ..mappings.facts import facts

FLOAT64 = 1e-12
BLOCK = 1 << 13  # elements that stay in a core's cache, and that no library shares among threads
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
    sums = _Sums()
    for pair in zip(ours, expected, strict=True):
        sums.add(*(np.ravel(array) for array in pair))
    return sums.error()


@dataclass
class _Sums:
    """What errors are made of, summed over two results a block at a time."""

    count: int = 0
    differences: float = 0.0
    ours: float = 0.0
    expected: float = 0.0
    products: float = 0.0
    max_abs: float = 0.0
    lowest: float = math.inf
    highest: float = -math.inf

    def add(self, ours: Array, expected: Array) -> None:
        """Two flat arrays more."""
        for start in range(0, ours.size, BLOCK):
            a = ours[start : start + BLOCK].astype(np.float64)
            b = expected[start : start + BLOCK].astype(np.float64)
            self.count += a.size
            self.ours += float(a @ a)
            self.expected += float(b @ b)
            self.products += float(a @ b)
            self.lowest = min(self.lowest, float(b.min()))
            self.highest = max(self.highest, float(b.max()))
            if math.isfinite(self.ours + self.expected):
                difference = a - b
                self.differences += float(difference @ difference)
                self.max_abs = max(self.max_abs, float(np.abs(difference, out=difference).max()))

    def error(self) -> Error:
        """The error of everything added; infinite where a value is not finite."""
        if not math.isfinite(self.ours + self.expected):
            return Error(math.inf, math.inf, 0.0, -math.inf)
        return Error(
            max_abs=self.max_abs,
            relative_l2=_relative(math.sqrt(self.differences), math.sqrt(self.expected)),
            cosine=self._cosine(),
            psnr=self._psnr(),
        )

    def _cosine(self) -> float:
        scale = math.sqrt(self.ours) * math.sqrt(self.expected)
        if scale:
            return self.products / scale
        return float(self.ours == self.expected)  # nothing has no direction

    def _psnr(self) -> float | None:
        span = self.highest - self.lowest
        if not (self.differences and span):
            return None
        return decibels(self.differences / self.count, span)


def _relative(norm: float, scale: float) -> float:
    if scale:
        return norm / scale
    return math.inf if norm else 0.0


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
