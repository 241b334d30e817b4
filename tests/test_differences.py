"""How far two arrays are apart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from weightport.differences import max_abs, psnr

ONE = np.array([1.0, 2.0], np.float16)


def test_the_largest_difference() -> None:
    assert max_abs(ONE, ONE) == 0
    assert max_abs(ONE, np.array([1.5, -2.0])) == 4
    assert max_abs(np.zeros((0, 3)), np.zeros((0, 3))) == 0
    assert max_abs(np.array([0], np.uint8), np.array([255], np.uint8)) == 255


@pytest.mark.filterwarnings("error")
def test_what_is_not_finite() -> None:
    infinite = np.array([math.inf, 1.0])
    assert max_abs(infinite, infinite) == 0
    assert max_abs(infinite, ONE) == math.inf
    assert math.isnan(max_abs(np.array([math.nan, 1.0]), ONE))


def test_signal_to_noise() -> None:
    black = np.zeros((2, 2, 3), np.uint8)
    assert psnr(black, black, peak=255) == math.inf
    assert psnr(black, black + 255, peak=255) == 0
    assert psnr(ONE, ONE + 0.1, peak=1) == pytest.approx(20, abs=0.1)
