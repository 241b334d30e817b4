"""Axis permutations of large arrays, in pieces that stay in the processor's cache.

One strided copy of a whole kernel touches a new cache line, often a new page, for every element.
Here a tile is first copied out as it lies, and then transposed inside the cache: 5 to 10 times
faster on convolution kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import EllipsisType
from typing import Any

import numpy as np

from ..checkpoint import Array, Stored

TILE = 128  # elements on a side
_CHUNK = 1 << 18  # bytes read at once where only some columns of them are wanted

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
    scratch = np.empty((TILE, TILE + 64 // source.itemsize), source.dtype)
    for index in np.ndindex(source.shape[:-2]):
        _copy_matrix(source[index], target[index], scratch)


def _copy_matrix(source: Array, target: Array, scratch: Array) -> None:
    for i in range(0, source.shape[0], TILE):
        for j in range(0, source.shape[1], TILE):
            piece = source[i : i + TILE, j : j + TILE]
            tile = scratch[: piece.shape[0], : piece.shape[1]]
            np.copyto(tile, piece)
            np.copyto(target[i : i + TILE, j : j + TILE], tile)


def panels(
    source: Stored, dtype: np.dtype[Any], shape: Shape, permutation: Shape, buffer: Array
) -> Iterator[Array]:
    """The permuted tensor as views of consecutive ranges of its rows; each is valid until the next
    is asked for.

    A tensor larger than `buffer` whose last axis comes first (as in every Keras kernel) is read
    several times, only some columns of it each time. Any other large one is held in memory whole.
    """
    rows = math.prod(shape[:-1])
    width = shape[-1]
    step = min(width, whole_tiles(buffer.nbytes // (rows * dtype.itemsize)))
    if step < width and (permutation[0] != len(shape) - 1 or step < TILE):
        step = width
        buffer = np.empty(source.nbytes, np.uint8)
    for start in range(0, width, step):
        columns = min(step, width - start)
        panel = buffer[: rows * columns * dtype.itemsize].view(dtype).reshape(rows, columns)
        if columns == width:
            source.file.read_into(source.offset, panel.view(np.uint8).reshape(-1).data)
        else:
            _read_columns(source, panel, start, width)
        yield panel.reshape(*shape[:-1], columns).transpose(permutation)


def _read_columns(source: Stored, panel: Array, start: int, width: int) -> None:
    """Fill `panel` with columns `start ...` of the stored matrix, reading whole rows a chunk at a
    time."""
    row_bytes = width * panel.itemsize
    chunk = np.empty((max(1, _CHUNK // row_bytes), width), panel.dtype)
    for row in range(0, len(panel), len(chunk)):
        part = chunk[: len(panel) - row]
        source.file.read_into(source.offset + row * row_bytes, part.view(np.uint8).reshape(-1).data)
        panel[row : row + len(part)] = part[:, start : start + panel.shape[1]]
