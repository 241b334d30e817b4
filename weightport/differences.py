"""How far two arrays are apart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def max_abs(a: Array, b: Array) -> float:
    """The largest absolute difference of two arrays of one shape; equal infinities do not differ.

    NaN if either has a NaN, and 0 if they are empty.
    """
    x = a.astype(np.float64)
    y = b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # where both are infinite
        difference = np.where(x == y, 0.0, x - y)
    return float(np.abs(difference).max(initial=0.0))


def psnr(a: Array, b: Array, peak: float) -> float:
    """Peak signal-to-noise ratio of two arrays of one shape, in dB; infinite for equal ones.

    Args:
        peak: the largest difference that two values can have, such as 255.
    """
    difference = a.astype(np.float64) - b.astype(np.float64)
    return decibels(float(np.square(difference).mean()), peak)


def decibels(error: float, peak: float) -> float:
    """The peak signal-to-noise ratio that a mean square error is; infinite if there is none."""
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)
