"""Axis permutations of large arrays, in pieces that stay in the processor's cache.

One strided copy of a whole kernel touches a new cache line, often a new page, for every element.
Here a stored kernel is read a few rows at a time, which are transposed inside the cache: in a fifth
of the time. An array in memory is copied tile by tile.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import EllipsisType

import numpy as np

from ...io.arrays import Array
from ...io.dtypes import ITEMSIZES
from ..checkpoint import Stored

TILE = 128  # elements on a side
_CHUNK = 1 << 17  # elements of rows that are transposed at once
_ROWS = 256  # of them at most: the system reads into at most 1024 places at once
_MOST_ROWS = 1 << 18  # of a tensor: their order is held
_LINE = 64  # bytes of a cache line

Shape = tuple[int, ...]
Index = tuple[int | slice | EllipsisType, ...]


def coalesced(shape: Shape, permutation: Shape) -> tuple[Shape, Shape]:
    """The same permutation over the fewest axes: size-1 axes dropped, axes that stay together
    merged.

    Returns (shape, permutation); one axis or none means that the bytes do not move.
    """
    kept = [axis for axis, size in enumerate(shape) if size != 1]
    runs: list[list[int]] = []
    for axis in (kept.index(axis) for axis in permutation if shape[axis] != 1):
        if runs and runs[-1][-1] + 1 == axis:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    in_order = sorted(runs)
    sizes = tuple(math.prod(shape[kept[axis]] for axis in run) for run in in_order)
    return sizes, tuple(in_order.index(run) for run in runs)


def row_blocks(shape: Shape, limit: int) -> Iterator[Index]:
    """Indices that cut an array, in row-major order, into contiguous blocks of at most `limit`
    elements."""
    row = math.prod(shape[1:])
    if math.prod(shape) <= limit:
        yield (...,)
    elif row > limit:
        for index in range(shape[0]):
            for rest in row_blocks(shape[1:], limit):
                yield (index, *rest)
    else:
        step = whole_tiles(limit // row)
        for start in range(0, shape[0], step):
            yield (slice(start, start + step),)


def whole_tiles(length: int) -> int:
    """`length`, rounded down to whole tiles if it has at least one."""
    return length - length % TILE if length > TILE else max(length, 1)


def copy_view(source: Array, target: Array) -> None:
    """Copy a transposed view into a contiguous array of the same shape and dtype, tile by tile."""
    strides = [
        stride if size > 1 else math.inf
        for stride, size in zip(source.strides, source.shape, strict=True)
    ]
    fast = strides.index(min(strides)) if source.ndim > 1 else 0
    if fast == source.ndim - 1 or source.ndim < 2:
        np.copyto(target, source)  # runs of neighbours stay neighbours
        return
    slow = max((axis for axis in range(source.ndim) if axis != fast), key=source.shape.__getitem__)
    source, target = (np.moveaxis(array, (slow, fast), (-2, -1)) for array in (source, target))
    # A cache line more than a tile per row: rows a power of two apart would all fall into the same
    # cache sets.
    scratch = np.empty((TILE, TILE + _LINE // source.itemsize), source.dtype)
    for index in np.ndindex(source.shape[:-2]):
        _copy_matrix(source[index], target[index], scratch)


def _copy_matrix(source: Array, target: Array, scratch: Array) -> None:
    for i in range(0, source.shape[0], TILE):
        for j in range(0, source.shape[1], TILE):
            piece = source[i : i + TILE, j : j + TILE]
            tile = scratch[: piece.shape[0], : piece.shape[1]]
            np.copyto(tile, piece)
            np.copyto(target[i : i + TILE, j : j + TILE], tile)


# --- stored tensors whose last axis comes first ---------------------------------------------------


@dataclass(frozen=True)
class Turned:
    """A stored tensor whose last axis comes first, as in every kernel of Keras.

    What is stored are the rows of a matrix, `width` elements each. The result is that matrix
    transposed, with its rows, columns now, in another order.

    Attributes:
        order: the stored rows in the order in which the result has them.
        period: after how many of these the pattern comes again, one row further.
        width: elements of a stored row, and rows of the result.
    """

    source: Stored
    order: Array
    period: int
    width: int

    @staticmethod
    def of(source: Stored, shape: Shape, permutation: Shape) -> Turned | None:
        """None for another permutation, or for rows without number. Both are `coalesced`."""
        rows = shape[:-1]
        if not rows or permutation[0] != len(rows) or math.prod(rows) > _MOST_ROWS:
            return None
        stored = np.arange(math.prod(rows)).reshape(rows)
        order = stored.transpose(permutation[1:]).reshape(-1)
        return Turned(source, order, shape[permutation[-1]], shape[-1])

    @property
    def itemsize(self) -> int:
        """Bytes of an element as it is stored."""
        return ITEMSIZES[self.source.dtype]

    def panels(self, limit: int) -> Iterator[slice]:
        """Ranges of rows of the result, about as large, which have at most `limit` elements each.

        None has more elements than `fill` prepares at once.
        """
        most = min(limit // len(self.order), _CHUNK)
        columns = -(-self.width // -(-self.width // most))
        step = min(most, -(-columns // _LINE) * _LINE)
        for start in range(0, self.width, step):
            yield slice(start, min(start + step, self.width))

    def fill(self, rows: slice, target: Array, prepare: Callable[[Array], Array]) -> None:
        """Write a range of rows of the result to `target`, which has as many.

        Args:
            prepare: called with a few stored rows, flat and with zeros between them; gives an
                array, as long, of what to write.
        """
        columns = rows.stop - rows.start
        count = min(_ROWS, max(1, _CHUNK // columns))
        count -= count % self.period if count > self.period else 0
        # A cache line more than a row: rows a power of two apart would all fall into the same
        # cache sets.
        chunk = np.zeros((count, columns + _LINE // self.itemsize), f"<u{self.itemsize}")
        for start, taken in self._chunks(rows, chunk):
            ready = prepare(taken.reshape(-1)).reshape(taken.shape)
            np.copyto(target[:, start : start + count], ready[:, :columns].T)

    def _chunks(self, rows: slice, chunk: Array) -> Iterator[tuple[int, Array]]:
        """A range of columns of the stored matrix, some rows at a time: where they begin in the
        result's order, and the rows."""
        columns = rows.stop - rows.start
        places = [memoryview(row[:columns].view(np.uint8)) for row in chunk]
        left = (self.width - columns) * self.itemsize if len(chunk) > 1 else 0
        between = memoryview(bytearray(left))
        row_nbytes = self.width * self.itemsize
        base = self.source.offset + rows.start * self.itemsize
        pattern = np.empty(0, self.order.dtype)
        runs: list[tuple[int, list[memoryview]]] = []
        for start in range(0, len(self.order), len(chunk)):
            wanted = self.order[start : start + len(chunk)]
            relative = wanted - wanted[0]
            if not np.array_equal(relative, pattern):
                pattern = relative
                found = _runs(pattern)
                runs = [
                    (row, _spaced([places[at] for at in where], between)) for row, where in found
                ]
            for row, spaced in runs:
                offset = base + (int(wanted[0]) + row) * row_nbytes
                self.source.file.read_into_each(offset, spaced)
            yield start, chunk[: len(wanted)]


def _runs(wanted: Array) -> Iterator[tuple[int, Array]]:
    """The runs of neighbours among some rows: the first of each, and where they are wanted."""
    where = np.argsort(wanted)
    breaks = np.flatnonzero(np.diff(wanted[where]) != 1) + 1
    for run in np.split(where, breaks):
        yield int(wanted[run[0]]), run


def _spaced(places: Sequence[memoryview], between: memoryview) -> list[memoryview]:
    """Where to read rows to, with another place for what lies between them."""
    if not between:
        return list(places)
    pairs = zip(places, itertools.repeat(between))
    return list(itertools.chain.from_iterable(pairs))[:-1]
