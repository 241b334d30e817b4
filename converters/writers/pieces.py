"""Makes the bytes of output tensors, block by block, from lazy sources: copied, transposed, cast,
counted.

Stored tensors and their axis permutations take constant memory; a tensor that is computed is held
whole.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ...io.arrays import DTYPES, Array
from ...mappings.ops import Op, Run
from ..checkpoint import Stored, Tensor, stored_in
from .background import read_ahead
from .cast import Cast, Counted, bits_of
from .panels import AHEAD, Panels, TurnedTo
from .transpose import Shape, Turned, coalesced, copy_view, row_blocks

_BLOCK = 1 << 19  # bytes that are handed over at once
DEPTH = 5  # blocks that exist at a time: one written, one hashed, one being made, two that wait


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
        self._cast = Cast(_BLOCK)
        self._panels = Panels()

    # Made when needed, as those of panels.
    @cached_property
    def _ring(self) -> Iterator[Array]:
        return itertools.cycle([np.empty(_BLOCK, np.uint8) for _ in range(DEPTH)])

    def of(self, outputs: Iterable[Output]) -> Generator[Block, None, None]:
        """The bytes of the outputs, one after another."""
        in_order = [output for output in outputs if output.nbytes]
        turned = {output.key: found for output in in_order if (found := _turned(output))}
        panels = read_ahead(self._panels.of(list(turned.values())), AHEAD)
        with contextlib.closing(panels):
            for number, output in enumerate(in_order):
                for following in in_order[number + 1 : number + 2]:
                    _fetch(following)
                if output.key in turned:
                    count = len(turned[output.key].panels)
                    yield from self._cut(output, itertools.islice(panels, count))
                elif _in_order(output, _moves(output)):
                    yield from self._copied(output)
                else:
                    yield from self._rearranged(output)

    def _copied(self, output: Output) -> Iterator[Block]:
        """Stored bytes as they lie."""
        for place in _places(output):
            itemsize = DTYPES[place.dtype].itemsize
            step = _BLOCK // _widest(output) * itemsize
            for start in range(0, place.nbytes, step):
                nbytes = min(step, place.nbytes - start)
                data = next(self._ring)
                bits = (data if place.dtype == output.dtype else self._cast.scratch)[:nbytes]
                place.file.read_into(place.offset + start, bits.data)
                place.file.take(place.offset + start, nbytes)
                yield self._block(output, bits.view(bits_of(place.dtype)), data)

    def _rearranged(self, output: Output) -> Iterator[Block]:
        """An array in memory, mostly a view with its axes permuted."""
        view = _computed(output)
        _take(output)
        for index in row_blocks(view.shape, _BLOCK // _widest(output)):
            piece = view[index]
            data = next(self._ring)
            place = data if output.sources[0].dtype == output.dtype else self._cast.scratch
            bits = place[: piece.nbytes].view(view.dtype)
            copy_view(piece, bits.reshape(piece.shape))
            yield self._block(output, bits, data)

    def _cut(self, output: Output, panels: Iterable[Counted]) -> Iterator[Block]:
        """A stored tensor whose last axis comes first."""
        for panel in panels:
            counts = (panel.nonfinite, panel.overflow)
            # The last blocks are copies: when the next panel is asked for, nobody reads this one.
            starts = range(0, len(panel.data), _BLOCK)
            for number, start in enumerate(starts, 1):
                data = panel.data[start : start + _BLOCK]
                if number > len(starts) - (DEPTH - 1):
                    copy = next(self._ring)[: len(data)]
                    np.copyto(copy, data)
                    data = copy
                yield Block(output.key, data.data, *counts)
                counts = (0, 0)
        _take(output)

    def _block(self, output: Output, bits: Array, data: Array) -> Block:
        counted = self._cast(bits, output.sources[0].dtype, output.dtype, data)
        return Block(output.key, counted.data.data, counted.nonfinite, counted.overflow)


def _turned(output: Output) -> TurnedTo | None:
    """What to turn, of an output that is a stored tensor whose last axis comes first."""
    moves = _moves(output)
    source = output.sources[0]
    if moves is None or _in_order(output, moves) or not isinstance(source, Stored):
        return None
    turned = Turned.of(source, *moves)
    return None if turned is None else TurnedTo(turned, output.dtype)


def _take(output: Output) -> None:
    """Nothing is read for an output again."""
    for source in output.sources:
        for place in stored_in(source):
            place.file.take(place.offset, place.nbytes)


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
    return np.atleast_1d(arrays[output.part]).view(bits_of(output.sources[0].dtype))
