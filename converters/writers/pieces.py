"""Makes the bytes of output tensors, block by block, from lazy sources: copied, transposed, cast,
counted.

Bytes that stay as they are, parts of a fused tensor among them, pass through a small buffer that
stays in the cache. Stored tensors and their axis permutations take constant memory; a tensor that
is computed is held whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

import numpy as np

from ...io.dtypes import EIGHT_BITS
from ...mappings.ops import Op, Run
from ..checkpoint import DTYPES, Array, Stored, Tensor
from .cast import Float16Cast
from .transpose import Shape, coalesced, copy_view, panels, row_blocks

_CHUNK = (
    1 << 19
)  # bytes copied at once: few hand-overs, and still in the cache when they are written
_BLOCK = 4 << 20  # bytes transposed at once: whole tiles of output rows
_PANEL = 64 << 20  # bytes of a transposed tensor that are held at once
DEPTH = 3  # blocks that exist at a time: one written, one waiting, one being made
_EXPONENT = {
    "F64": 0x7FF0 << 48,
    "F32": 0x7F80 << 16,
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F8_E4M3": 0x7F,  # has no Inf: one pattern is NaN
    "F8_E5M2": 0x7C,
}  # all set: Inf or NaN
_Fill = Callable[[Array], None]


@dataclass(frozen=True)
class Output:
    """A tensor to write: `sources`, rearranged by `op` and cast to `dtype`.

    Attributes:
        key: its name in the file.
        dtype: a key of `DTYPES`; it may differ from the sources' only between floats.
        shape: its shape, which the sources and the op give.
        sources: tensors of one dtype.
        op: None where the elements stay in their order.
        part: which of the op's results.
        parts: how many results the op has.
    """

    key: str
    dtype: str
    shape: Shape
    sources: tuple[Tensor, ...]
    op: Op | None = None
    part: int = 0
    parts: int = 1

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Block:
    """Consecutive bytes of one output, and what was counted in them."""

    key: str
    data: memoryview
    nonfinite: int = 0
    overflow: int = 0


class Blocks:
    """Makes outputs block by block in a few buffers: a block is valid until `DEPTH - 1` more have
    been made."""

    # Made when needed: a large array lies on huge pages, of which the kernel fills in whole ones
    # around its header.
    @cached_property
    def _ring(self) -> Iterator[Array]:
        return itertools.cycle([np.empty(_BLOCK, np.uint8) for _ in range(DEPTH)])

    @cached_property
    def _small(self) -> Iterator[Array]:
        """Buffers for mere copying."""
        return itertools.cycle([np.empty(_CHUNK, np.uint8) for _ in range(DEPTH)])

    @cached_property
    def _raw(self) -> Array:
        """A block before its cast."""
        return np.empty(_BLOCK, np.uint8)

    @cached_property
    def _panel(self) -> Array:
        return np.empty(_PANEL, np.uint8)

    @cached_property
    def _float16(self) -> Float16Cast:
        return Float16Cast()

    def of(self, outputs: Sequence[Output]) -> Iterator[Block]:
        """The bytes of the outputs, one after another."""
        for output in outputs:
            if output.nbytes:
                for shape, fill in self._pieces(output):
                    yield self._block(output, shape, fill)

    def _block(self, output: Output, shape: Shape, fill: _Fill) -> Block:
        """Fill one block with the sources' bits, count in it, cast it."""
        source = output.sources[0].dtype
        nbytes = math.prod(shape) * max(DTYPES[source].itemsize, DTYPES[output.dtype].itemsize)
        data = next(self._small if nbytes <= _CHUNK else self._ring)
        raw = data if source == output.dtype else self._raw
        bits = raw[: math.prod(shape) * DTYPES[source].itemsize].view(_bits(source))
        fill(bits.reshape(shape))
        nonfinite = _count_nonfinite(bits, source)
        if source == output.dtype:
            return Block(output.key, bits.view(np.uint8).data, nonfinite)
        cast = data[: math.prod(shape) * DTYPES[output.dtype].itemsize].view(DTYPES[output.dtype])
        with np.errstate(over="ignore", invalid="ignore"):  # counted instead
            if (source, output.dtype) == ("F32", "F16"):
                self._float16(bits.view(DTYPES[source]), cast)
            elif source in EIGHT_BITS:
                np.take(_values(source, output.dtype), bits, out=cast, mode="clip")
            else:
                np.copyto(cast, bits.view(DTYPES[source]), casting="unsafe")
        overflow = _count_nonfinite(cast.view(_bits(output.dtype)), output.dtype) - nonfinite
        return Block(output.key, cast.view(np.uint8).data, nonfinite, overflow)

    def _pieces(self, output: Output) -> Iterator[tuple[Shape, _Fill]]:
        """Shapes of the output's blocks in order, each with the function that fills it."""
        source = output.sources[0]
        moves = _moves(output)
        if _in_order(output, moves):
            for place in _places(output):
                yield from _chunks(place)
            return
        if moves is None or not isinstance(source, Stored):
            views = iter([_computed(output)])
        else:
            views = panels(source, _bits(source.dtype), *moves, self._panel)
        width = max(DTYPES[source.dtype].itemsize, DTYPES[output.dtype].itemsize)
        for view in views:
            for index in row_blocks(view.shape, _BLOCK // width):
                block = view[index]
                yield block.shape, partial(copy_view, block)


def as_stored(output: Output) -> Stored | None:
    """The bytes in a file that an output is, where it is some as they lie; None for others."""
    if output.dtype != output.sources[0].dtype or not _in_order(output, _moves(output)):
        return None
    places = list(_places(output))
    return places[0] if len(places) == 1 else None


def _in_order(output: Output, moves: tuple[Shape, Shape] | None) -> bool:
    """Whether the output, whose axes move so, is bytes of its sources as they lie."""
    still = output.op is None or output.op.keeps_order or (moves is not None and len(moves[0]) < 2)
    return still and all(isinstance(source, Stored) for source in output.sources)


def _places(output: Output) -> Iterator[Stored]:
    """The stored bytes of an output whose elements stay in their order: its sources, or runs of
    their rows."""
    runs = [Run(place, 0, 1, 1) for place in range(len(output.sources))]
    if output.op is not None and output.op.keeps_order:
        runs = output.op.runs(output.part, output.parts, len(output.sources))
    for run in runs:
        source = output.sources[run.source]
        assert isinstance(source, Stored)
        share = source.nbytes // run.of
        count = share * (run.last - run.first) // DTYPES[source.dtype].itemsize
        yield replace(source, shape=(count,), offset=source.offset + run.first * share)


def _moves(output: Output) -> tuple[Shape, Shape] | None:
    """Coalesced (shape, permutation) of an output that is one source with its axes permuted; None
    for the rest."""
    if output.op is None or len(output.sources) > 1 or output.parts > 1:
        return None
    shape = output.sources[0].shape
    permutation = output.op.permutation(len(shape))
    return None if permutation is None else coalesced(shape, permutation)


def _computed(output: Output) -> Array:
    """The bits of an output that is held in memory whole."""
    arrays = [source.numpy() for source in output.sources]
    if output.op is not None:
        arrays = output.op.apply(arrays, output.parts)
    return np.atleast_1d(arrays[output.part]).view(_bits(output.sources[0].dtype))


def _chunks(source: Stored) -> Iterator[tuple[Shape, _Fill]]:
    """A stored tensor in the order of its bytes."""
    for start in range(0, source.nbytes, _CHUNK):
        count = min(_CHUNK, source.nbytes - start) // DTYPES[source.dtype].itemsize
        yield (count,), partial(_read, source, start)


@cache
def _values(source: str, dtype: str) -> Array:
    """What each of the 256 numbers of eight bits is in another dtype."""
    values: Array = np.arange(256, dtype=np.uint8).view(DTYPES[source]).astype(np.float32)
    return values.astype(DTYPES[dtype])


def _read(source: Stored, start: int, target: Array) -> None:
    source.file.read_into(source.offset + start, target.view(np.uint8).data)


def _bits(dtype: str) -> np.dtype[np.unsignedinteger]:
    """Unsigned integers of a dtype's width: moving and counting them never changes a NaN."""
    return np.dtype(f"<u{DTYPES[dtype].itemsize}")


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
