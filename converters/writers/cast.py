"""Floats of one width become those of another, and what is no finite number is counted.

float32 becomes float16 by integer arithmetic: the same bits as numpy's own cast, in two thirds of
its time.
"""

from __future__ import annotations

from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

from ...io.arrays import DTYPES, Array
from ...io.dtypes import EIGHT_BITS

_EXPONENT = {
    "F64": 0x7FF0 << 48,
    "F32": 0x7F80 << 16,
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F8_E4M3": 0x7F,  # has no Inf: one pattern is NaN
    "F8_E5M2": 0x7C,
}  # all set: Inf or NaN
_CHUNK = 1 << 17  # elements at once: the scratch arrays stay in the cache
# float32 bits of the normal float16 numbers, before they are rounded
_SMALLEST = 0x38800000
_LARGEST = 0x477FEFFF
_REBIAS = (1 << 32) - ((127 - 15) << 23)  # to the exponent's other bias, modulo 2^32
_BELOW_HALF = 0xFFF  # of the 13 bits that are dropped


class Counted(NamedTuple):
    """Bytes of an output, and what was counted in them."""

    data: Array
    nonfinite: int
    overflow: int


class Cast:
    """Casts and counts; one for each thread, as it holds scratch arrays."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes

    @cached_property
    def scratch(self) -> Array:
        """As many bytes as were asked for, to read to what is cast then."""
        return np.empty(self._nbytes, np.uint8)

    @cached_property
    def _float16(self) -> Float16Cast:
        return Float16Cast()

    def __call__(self, bits: Array, source: str, dtype: str, data: Array) -> Counted:
        """Count in the sources' bits, and cast them into `data` if they do not stay as they are."""
        nonfinite = _count_nonfinite(bits, source)
        if source == dtype:
            return Counted(bits.view(np.uint8), nonfinite, 0)
        cast = data[: bits.size * DTYPES[dtype].itemsize].view(DTYPES[dtype])
        with np.errstate(over="ignore", invalid="ignore"):  # counted instead
            if (source, dtype) == ("F32", "F16"):
                self._float16(bits.view(DTYPES[source]), cast)
            elif source in EIGHT_BITS:
                np.take(_values(source, dtype), bits, out=cast, mode="clip")
            else:
                np.copyto(cast, bits.view(DTYPES[source]), casting="unsafe")
        overflow = _count_nonfinite(cast.view(bits_of(dtype)), dtype) - nonfinite
        return Counted(cast.view(np.uint8), nonfinite, overflow)


def bits_of(dtype: str) -> np.dtype[np.unsignedinteger]:
    """Unsigned integers of a dtype's width: moving and counting them never changes a NaN."""
    return np.dtype(f"<u{DTYPES[dtype].itemsize}")


@cache
def _values(source: str, dtype: str) -> Array:
    """What each of the 256 numbers of eight bits is in another dtype."""
    values: Array = np.arange(256, dtype=np.uint8).view(DTYPES[source]).astype(np.float32)
    return values.astype(DTYPES[dtype])


def _count_nonfinite(bits: Array, dtype: str) -> int:
    """How many floats are NaN or Inf. Mostly none is, which the largest bit patterns of both signs
    tell quickly."""
    if dtype not in _EXPONENT:
        return 0
    exponent = _EXPONENT[dtype]
    sign = 1 << 8 * bits.itemsize - 1
    if bits.view(f"<i{bits.itemsize}").max() < exponent and bits.max() < exponent | sign:
        return 0
    mask = bits.dtype.type(exponent)
    return int(np.count_nonzero((bits & mask) == mask))


class Float16Cast:
    """Rounds to nearest, ties to even, as IEEE 754 has it; holds the scratch arrays."""

    def __init__(self) -> None:
        self._rounded = np.empty(_CHUNK, np.uint32)
        self._rare = np.empty(_CHUNK, bool)
        self._sign = np.empty(_CHUNK, np.uint16)

    def __call__(self, source: Array, target: Array) -> None:
        """Cast a contiguous float32 array of one axis into a float16 one."""
        for start in range(0, source.size, _CHUNK):
            self._cast(source[start : start + _CHUNK], target[start : start + _CHUNK])

    def _cast(self, source: Array, target: Array) -> None:
        bits = source.view(np.uint32)
        halves = target.view(np.uint16)
        size = source.size
        rounded = self._rounded[:size]
        rare = self._rare[:size]
        sign = self._sign[:size]
        np.bitwise_and(bits, np.uint32(0x7FFFFFFF), out=rounded)
        rounded -= np.uint32(_SMALLEST)  # what is smaller wraps around
        np.greater(rounded, np.uint32(_LARGEST - _SMALLEST), out=rare)
        np.right_shift(bits, np.uint32(13), out=rounded)
        rounded &= np.uint32(1)  # of an odd result, a tie goes up
        rounded += bits
        rounded += np.uint32(_REBIAS + _BELOW_HALF)
        rounded >>= np.uint32(13)
        np.copyto(halves, rounded, casting="unsafe")
        np.bitwise_and(bits.view(np.uint16)[1::2], np.uint16(0x8000), out=sign)
        halves |= sign
        others = np.flatnonzero(rare)  # subnormal, too large, or not a number
        target[others] = source[others]
