"""Axis permutations of large arrays, in pieces that stay in the processor's cache.

One strided copy of a whole kernel touches a new cache line, often a new page, for every element.
Here a few columns of a stored kernel are brought together, and transposed inside the cache. An
array in memory is copied tile by tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType

import numpy as np

from ...io.arrays import Array
from ...io.dtypes import ITEMSIZES
from ..checkpoint import Stored

TILE = 128  # elements on a side
READ = 1 << 19  # bytes that are read at once, whole rows
_MOST_ROWS = 1 << 18  # of a tensor: a panel has a column of them at least
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

    What is stored are the rows of a matrix. The result is that matrix transposed, with its rows,
    columns now, in another order.

    Attributes:
        rows: the axes that the stored rows make up.
        order: which of these follow one another in the result.
        width: elements of a stored row, and rows of the result.
    """

    source: Stored
    rows: Shape
    order: Shape
    width: int

    @staticmethod
    def of(source: Stored, shape: Shape, permutation: Shape) -> Turned | None:
        """None for another permutation, for very long rows, or for very many. Both are
        `coalesced`."""
        *rows, width = shape
        if not rows or permutation[0] != len(rows):
            return None
        if width * ITEMSIZES[source.dtype] > READ or math.prod(rows) > _MOST_ROWS:
            return None
        return Turned(source, tuple(rows), permutation[1:], width)

    @property
    def itemsize(self) -> int:
        """Bytes of an element as it is stored."""
        return ITEMSIZES[self.source.dtype]

    def panels(self, nbytes: int) -> Iterator[slice]:
        """Ranges of columns of the stored matrix, about as large, each of which `read` holds in at
        most so many bytes."""
        most = nbytes // self.itemsize // math.prod(self.rows)
        columns = -(-self.width // -(-self.width // most))
        step = min(most, -(-columns // _LINE) * _LINE)
        for start in range(0, self.width, step):
            yield slice(start, min(start + step, self.width))

    def read(self, columns: slice, panel: Array, space: Array) -> Array:
        """A range of columns of the stored matrix, its rows in the result's order.

        Args:
            panel: bytes to hold it.
            space: `READ` bytes to read to.
        """
        count = columns.stop - columns.start
        matrix = panel.view(f"<u{self.itemsize}")[: math.prod(self.rows) * count]
        in_order = matrix.reshape(*(self.rows[axis] for axis in self.order), count)
        as_stored = in_order.transpose(*np.argsort(self.order), -1)
        chunk = space[:READ].view(matrix.dtype)
        offset = self.source.offset
        for index in row_blocks(self.rows, len(chunk) // self.width):
            target = as_stored[index]
            whole = chunk[: target.size // count * self.width]
            self.source.file.read_into(offset, whole.view(np.uint8).data)
            offset += whole.nbytes
            np.copyto(target, whole.reshape(*target.shape[:-1], self.width)[..., columns])
        return matrix.reshape(-1, count)


def strips(matrix: Array, nbytes: int) -> Iterator[Array]:
    """A few columns of a matrix after the other, copied to where they lie close together: about so
    many bytes, which are to stay in the processor's cache while they are transposed.

    A column of zeros ends each: it keeps rows from being a power of two apart.
    """
    rows, columns = matrix.shape
    line = _LINE // matrix.itemsize
    most = max(nbytes // matrix.itemsize // rows, 1)
    step = most - most % line if most > line else most
    space = np.empty(rows * (min(step, columns) + 1), matrix.dtype)
    for start in range(0, columns, step):
        count = min(step, columns - start)
        strip = space[: rows * (count + 1)].reshape(rows, count + 1)
        np.copyto(strip[:, :count], matrix[:, start : start + count])
        strip[:, count] = 0
        yield strip
