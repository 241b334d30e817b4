"""Arrays of NumPy, for those who compute; who only looks at a file does without this module."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from .dtypes import WORDS

Array = np.ndarray[Any, Any]


def _little_endian(word: str) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, word, word))
    return dtype if dtype.isnative else dtype.newbyteorder("<")


DTYPES = {name: _little_endian(word) for name, word in WORDS.items()}
"""safetensors' names of dtypes -> numpy's dtypes."""
