"""Tensor operations of the mapping language: rearrangements in einops notation.

    "... i o -> o i ..."   Dense and Conv kernels of any rank, Keras to PyTorch
    "1 1 i o -> o i"       a 1x1 convolution read as a linear layer
    "(p o) i -> p o i"     one fused tensor to as many targets as the row names; reversed, a merge

An axis is a name, `1`, `...` (any number of axes) or a group `(a b)`. Where an op has several
results (or sources), the first axis of that side counts them. Sizes come from the shapes. Reversed,
an op is undone. Notation: https://einops.rocks
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np

from .errors import MappingError

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
Axis = tuple[str, ...]  # the names merged in one axis; () is `1`, ("...",) the ellipsis

_ELLIPSIS: Axis = ("...",)
_TOKEN = re.compile(r"\s*(\(|\)|\.\.\.|1(?!\w)|[A-Za-z_]\w*)\s*")


@dataclass(frozen=True)
class Op:
    """A rearrangement of source tensors into target tensors; see the module's notation.

    Raises:
        MappingError: the text is not a rearrangement, or does not fit the given shapes.
    """

    source: tuple[Axis, ...]
    target: tuple[Axis, ...]

    @staticmethod
    @cache
    def parse(text: str) -> Op:
        """Read `"source axes -> target axes"`."""
        source, arrow, target = text.partition("->")
        op = Op(_axes(source, text), _axes(target, text))
        names = _names(op.source)
        if not arrow or sorted(names) != sorted(_names(op.target)) or len(set(names)) != len(names):
            raise MappingError(f"op `{text}`: both sides must hold the same axes, each once")
        return op

    def __str__(self) -> str:
        return f"{_text(self.source)} -> {_text(self.target)}"

    @cached_property
    def inverse(self) -> Op:
        """The op that undoes this one."""
        return Op(self.target, self.source)

    @cached_property
    def keeps_order(self) -> bool:
        """Whether the elements stay in their order.

        Then sources one after another are the results one after another.
        """
        return _names(self.source) == _names(self.target)

    def permutation(self, ndim: int) -> tuple[int, ...] | None:
        """Source axes in target order, if that (and axes of size one) is all that this op changes.

        Then one result equals `source.transpose(permutation).reshape(target_shape)`.
        """
        source, target = self._spread(ndim)
        if len(source) != ndim or any(len(axis) > 1 for axis in source + target):
            return None
        position = {axis[0]: place for place, axis in enumerate(source) if axis}
        ones = tuple(place for place, axis in enumerate(source) if not axis)
        return ones + tuple(position[axis[0]] for axis in target if axis)

    def shapes(self, sources: Sequence[Shape], results: int = 1) -> list[Shape]:
        """Shapes of the results for sources of the given shapes."""
        shapes = [tuple(shape) for shape in sources]
        return [self._plan(shapes, results).result] * results

    def apply(self, arrays: Sequence[Array], results: int = 1) -> list[Array]:
        """The results for the given arrays; views where numpy can make one."""
        plan = self._plan([array.shape for array in arrays], results)
        stacked = arrays[0] if len(arrays) == 1 else np.stack(arrays)
        moved = stacked.reshape(plan.atoms).transpose(plan.order)
        if results == 1:
            return [moved.reshape(plan.result)]
        return list(moved.reshape((results, *plan.result)))

    def _spread(self, ndim: int) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
        """The axes of both sides, for a source of `ndim` dimensions."""
        more = len(self.target) - len(self.source)
        return _spread(self.source, ndim), _spread(self.target, ndim + more)

    def _plan(self, shapes: Sequence[Shape], results: int) -> _Plan:
        """How sources of the given shapes are rearranged."""
        if len(set(shapes)) != 1:
            raise MappingError(f"op `{self}`: sources of different shapes {sorted(set(shapes))}")
        shape = shapes[0] if len(shapes) == 1 else (len(shapes), *shapes[0])
        misfit = MappingError(f"op `{self}`: does not fit shape {shape}")
        source, target = self._spread(len(shape))
        if len(source) != len(shape):
            raise misfit
        sizes = {}
        if results > 1 and len(target[0]) == 1:
            sizes[target[0][0]] = results
        for axis, size in zip(source, shape, strict=True):
            if not _solve(axis, size, sizes):
                raise misfit
        names = _names(source)
        place = {name: i for i, name in enumerate(names)}
        rearranged = tuple(math.prod(sizes[name] for name in axis) for axis in target)
        return _Plan(
            atoms=tuple(sizes[name] for name in names),
            order=tuple(place[name] for name in _names(target)),
            result=rearranged[1:] if results > 1 else rearranged,
        )


class _Plan(NamedTuple):
    """A rearrangement at work: the shape by single axes, their order in the target, and the shape
    of one result."""

    atoms: Shape
    order: tuple[int, ...]
    result: Shape


def _names(axes: Sequence[Axis]) -> list[str]:
    """The names in axes, in order."""
    return [name for axis in axes for name in axis]


def _axes(side: str, text: str) -> tuple[Axis, ...]:
    axes: list[Axis] = []
    group: list[str] | None = None
    position = 0
    while position < len(side.rstrip()):
        token = _TOKEN.match(side, position)
        if token is None:
            raise MappingError(f"op `{text}`: cannot read `{side[position:].strip()}`")
        position = token.end()
        word = token[1]
        if word == "(":
            group = []
        elif word == ")":
            if group is None:
                raise MappingError(f"op `{text}`: `)` without `(`")
            axes.append(tuple(group))
            group = None
        elif group is not None:
            group.append(word)
        else:
            axes.append(() if word == "1" else (word,))
    if group is not None:
        raise MappingError(f"op `{text}`: `(` without `)`")
    return tuple(axes)


def _text(axes: tuple[Axis, ...]) -> str:
    return " ".join(map(_axis_text, axes))


def _axis_text(axis: Axis) -> str:
    if not axis:
        return "1"
    return axis[0] if len(axis) == 1 else f"({' '.join(axis)})"


def _spread(axes: tuple[Axis, ...], ndim: int) -> tuple[Axis, ...]:
    """Replace the ellipsis by as many axes as a tensor of `ndim` dimensions needs."""
    if _ELLIPSIS not in axes:
        return axes
    at = axes.index(_ELLIPSIS)
    missing = ndim - len(axes) + 1
    between = tuple((f"...{i}",) for i in range(missing))
    return axes[:at] + between + axes[at + 1 :]


def _solve(axis: Axis, size: int, sizes: dict[str, int]) -> bool:
    """Record the sizes of the names in one axis of known size.

    False if they do not fit it, or more than one of them is unknown.
    """
    unknown = [name for name in axis if name not in sizes]
    known = math.prod(sizes[name] for name in axis if name in sizes)
    if len(unknown) > 1 or known == 0 or size % known:
        return False
    if not unknown:
        return size == known
    sizes[unknown[0]] = size // known
    return True
