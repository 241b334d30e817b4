"""Makes the bytes of output tensors, block by block, from lazy sources: copied, transposed, cast,
counted.

Stored tensors and their axis permutations take constant memory; a tensor that is computed is held
whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property

import numpy as np

from ...io.arrays import DTYPES, Array
from ...io.dtypes import EIGHT_BITS
from ...mappings.ops import Op, Run
from ..checkpoint import Stored, Tensor, stored_in
from .cast import Float16Cast
from .transpose import READ, Shape, Turned, coalesced, copy_view, row_blocks, strips

_BLOCK = 1 << 19  # bytes that are handed over at once
_PANEL = 57 << 19  # bytes of a tensor that are held to be transposed: half a kernel of 1280
_STRIP = 1 << 20  # bytes that are transposed at once
DEPTH = 5  # blocks that exist at a time: one written, one hashed, one being made, two that wait
_EXPONENT = {
    "F64": 0x7FF0 << 48,
    "F32": 0x7F80 << 16,
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F8_E4M3": 0x7F,  # has no Inf: one pattern is NaN
    "F8_E5M2": 0x7C,
}  # all set: Inf or NaN


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

    def __init__(self) -> None:
        self._spare = np.empty(0, np.uint8)

    # Made when needed: a large array lies on huge pages, of which the kernel fills in whole ones
    # around its header.
    @cached_property
    def _ring(self) -> Iterator[Array]:
        return itertools.cycle([np.empty(_BLOCK, np.uint8) for _ in range(DEPTH)])

    @cached_property
    def _panel(self) -> Array:
        return np.empty(_PANEL, np.uint8)

    def _scratch(self, nbytes: int) -> Array:
        """At least so many bytes: for a block before its cast, rows that are read, or a strip after
        its cast."""
        if len(self._spare) < nbytes:
            self._spare = np.empty(nbytes, np.uint8)
        return self._spare

    def _before_cast(self, output: Output, data: Array, nbytes: int) -> Array:
        """Where so many bytes of the sources go: into `data`, or beside it if they are cast."""
        is_cast = output.sources[0].dtype != output.dtype
        return (self._scratch(nbytes) if is_cast else data)[:nbytes]

    @cached_property
    def _float16(self) -> Float16Cast:
        return Float16Cast()

    def of(self, outputs: Iterable[Output]) -> Generator[Block, None, None]:
        """The bytes of the outputs, one after another."""
        in_order = list(outputs)
        for number, output in enumerate(in_order):
            for following in in_order[number + 1 : number + 2]:
                _fetch(following)
            if output.nbytes:
                yield from self._of(output)

    def _of(self, output: Output) -> Iterator[Block]:
        moves = _moves(output)
        source = output.sources[0]
        if _in_order(output, moves):
            for place in _places(output):
                yield from self._copied(output, place)
            return
        turned = None
        if moves is not None and isinstance(source, Stored):
            turned = Turned.of(source, *moves)
        if turned is not None:
            yield from self._turned(output, turned)
        else:
            yield from self._rearranged(output, _computed(output))
        for source in output.sources:
            for place in stored_in(source):
                place.file.take(place.offset, place.nbytes)

    def _copied(self, output: Output, place: Stored) -> Iterator[Block]:
        """Stored bytes as they lie."""
        itemsize = DTYPES[place.dtype].itemsize
        step = _BLOCK // _widest(output) * itemsize
        for start in range(0, place.nbytes, step):
            nbytes = min(step, place.nbytes - start)
            data = next(self._ring)
            bits = self._before_cast(output, data, nbytes)
            place.file.read_into(place.offset + start, bits.data)
            place.file.take(place.offset + start, nbytes)
            yield self._block(output, bits.view(_bits(place.dtype)), data)

    def _rearranged(self, output: Output, view: Array) -> Iterator[Block]:
        """An array in memory, mostly a view with its axes permuted."""
        for index in row_blocks(view.shape, _BLOCK // _widest(output)):
            piece = view[index]
            data = next(self._ring)
            bits = self._before_cast(output, data, piece.nbytes).view(view.dtype)
            copy_view(piece, bits.reshape(piece.shape))
            yield self._block(output, bits, data)

    def _turned(self, output: Output, turned: Turned) -> Iterator[Block]:
        """A stored tensor whose last axis comes first, a range of its rows after the other."""
        dtype = _bits(output.dtype)
        for columns in turned.panels(_PANEL):
            panel = turned.read(columns, self._panel, self._scratch(READ))
            for strip in strips(panel, _STRIP):
                cast = self._scratch(strip.size * dtype.itemsize)
                made = self._block(output, strip.reshape(-1), cast)
                rows = np.frombuffer(made.data, dtype).reshape(strip.shape)[:, :-1].T
                for index in row_blocks(rows.shape, _BLOCK // dtype.itemsize):
                    piece = rows[index]
                    data = next(self._ring)[: piece.nbytes]
                    np.copyto(data.view(dtype).reshape(piece.shape), piece)
                    yield replace(made, data=data.data)
                    made = replace(made, nonfinite=0, overflow=0)

    def _block(self, output: Output, bits: Array, data: Array) -> Block:
        """Count in the sources' bits, and cast them into `data` if they do not stay as they are."""
        source = output.sources[0].dtype
        nonfinite = _count_nonfinite(bits, source)
        if source == output.dtype:
            return Block(output.key, bits.view(np.uint8).data, nonfinite)
        dtype = DTYPES[output.dtype]
        cast = data[: bits.size * dtype.itemsize].view(dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # counted instead
            if (source, output.dtype) == ("F32", "F16"):
                self._float16(bits.view(DTYPES[source]), cast)
            elif source in EIGHT_BITS:
                np.take(_values(source, output.dtype), bits, out=cast, mode="clip")
            else:
                np.copyto(cast, bits.view(DTYPES[source]), casting="unsafe")
        overflow = _count_nonfinite(cast.view(_bits(output.dtype)), output.dtype) - nonfinite
        return Block(output.key, cast.view(np.uint8).data, nonfinite, overflow)


def _fetch(output: Output) -> None:
    """Let stored sources come from the disk while others are read."""
    for source in output.sources:
        if isinstance(source, Stored):
            source.file.fetch(source.offset, source.nbytes)


def _widest(output: Output) -> int:
    """Bytes of an element, before or after its cast."""
    return max(DTYPES[output.sources[0].dtype].itemsize, DTYPES[output.dtype].itemsize)


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


@cache
def _values(source: str, dtype: str) -> Array:
    """What each of the 256 numbers of eight bits is in another dtype."""
    values: Array = np.arange(256, dtype=np.uint8).view(DTYPES[source]).astype(np.float32)
    return values.astype(DTYPES[dtype])


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
