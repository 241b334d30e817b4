"""Stored tensors whose last axis comes first, made panel by panel ahead of their use: a panel is a
range of rows of the result, as many as memory is for."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ...io.arrays import DTYPES, Array
from .cast import Cast, Counted, bits_of
from .transpose import Turned

_PANEL = 57 << 18  # bytes: a quarter of a kernel of 1280
_ROWS = 2 << 20  # bytes of stored rows, cast at once
AHEAD = 2  # panels that exist at a time: one in use, one being filled


class TurnedTo(NamedTuple):
    """A tensor to turn, and the dtype that it becomes."""

    tensor: Turned
    dtype: str

    @property
    def panels(self) -> list[slice]:
        """The rows of each panel."""
        widest = max(self.tensor.itemsize, DTYPES[self.dtype].itemsize)
        return list(self.tensor.panels(_PANEL // widest))


class Panels:
    """Fills panels: one is valid until `AHEAD - 1` more have been made."""

    def __init__(self) -> None:
        self._cast = Cast(_ROWS)

    # Made when needed: a large array lies on huge pages, of which the kernel fills in whole ones
    # around its header.
    @cached_property
    def _buffers(self) -> Iterator[Array]:
        return itertools.cycle([np.empty(_PANEL, np.uint8) for _ in range(AHEAD)])

    def of(self, wanted: list[TurnedTo]) -> Generator[Counted, None, None]:
        """The panels of all tensors, one after another."""
        for one in wanted:
            for rows in one.panels:
                yield self._filled(one, rows)

    def _filled(self, wanted: TurnedTo, rows: slice) -> Counted:
        turned, dtype = wanted
        bits = bits_of(dtype)
        nonfinite = 0
        overflow = 0

        def prepare(stored: Array) -> Array:
            nonlocal nonfinite, overflow
            counted = self._cast(stored, turned.source.dtype, dtype, self._cast.scratch)
            nonfinite += counted.nonfinite
            overflow += counted.overflow
            return counted.data.view(bits)

        nbytes = (rows.stop - rows.start) * len(turned.order) * bits.itemsize
        panel = next(self._buffers)[:nbytes]
        turned.fill(rows, panel.view(bits).reshape(-1, len(turned.order)), prepare)
        return Counted(panel, nonfinite, overflow)
