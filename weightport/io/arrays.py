"""Arrays of NumPy, for those who compute; who only looks at a file does without this module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np

from .dtypes import WORDS

Array = np.ndarray[Any, Any]


@cache
def _little_endian(word: str) -> np.dtype[Any]:
    dtype: np.dtype[Any]
    try:
        dtype = np.dtype(word)
    except TypeError:
        import ml_dtypes  # has those that NumPy lacks; most files do without

        dtype = np.dtype(getattr(ml_dtypes, word))
    return dtype if dtype.isnative else dtype.newbyteorder("<")


class _Dtypes(Mapping[str, np.dtype[Any]]):
    """Each is made when it is first asked for."""

    def __getitem__(self, name: str) -> np.dtype[Any]:
        return _little_endian(WORDS[name])

    def __iter__(self) -> Iterator[str]:
        return iter(WORDS)

    def __len__(self) -> int:
        return len(WORDS)


DTYPES = _Dtypes()
"""safetensors' names of dtypes -> numpy's dtypes."""
