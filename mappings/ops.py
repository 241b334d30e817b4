"""Tensor operations of the mapping language: rearrangements in einops notation, inverted by
reversal.

    "... i o -> o i ..."   Dense and Conv kernels of any rank, Keras to PyTorch
    "1 1 i o -> o i"       a 1x1 convolution read as a linear layer
    "(p o) i -> p o i"     one fused tensor to as many targets as the row names; reversed, a merge

An axis is a name, `1`, `...` (any number of axes) or a group `(a b)`. Where an op has several
results (or sources), the first axis of that side counts them. Sizes come from the shapes. Notation:
https://einops.rocks
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from .errors import MappingError

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
Axis = tuple[str, ...]  # the names merged in one axis; () is `1`, ("...",) the ellipsis

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
        names = [sorted(name for axis in side for name in axis) for side in (op.source, op.target)]
        if not arrow or names[0] != names[1] or len(set(names[0])) != len(names[0]):
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
        """Whether the elements stay in their order: sources one after another are the results one
        after another."""
        return [name for axis in self.source for name in axis] == [
            name for axis in self.target for name in axis
        ]

    def permutation(self, ndim: int) -> tuple[int, ...] | None:
        """Source axes in target order, if that (and dropping or adding size-1 axes) is all this op
        does.

        Then one result equals `source.transpose(permutation).reshape(target_shape)`.
        """
        source, target = (
            _spread(self.source, ndim),
            _spread(self.target, ndim - len(self.source) + len(self.target)),
        )
        if any(len(axis) > 1 for axis in source + target) or len(source) != ndim:
            return None
        position = {axis[0]: i for i, axis in enumerate(source) if axis}
        ones = tuple(i for i, axis in enumerate(source) if not axis)
        return ones + tuple(position[axis[0]] for axis in target if axis)

    def shapes(self, sources: Sequence[Shape], results: int = 1) -> list[Shape]:
        """Shapes of the results for sources of the given shapes."""
        return [self._plan(tuple(map(tuple, sources)), results)[2]] * results

    def apply(self, arrays: Sequence[Array], results: int = 1) -> list[Array]:
        """The results for the given arrays; views where numpy can make one."""
        atoms, order, shape = self._plan(tuple(array.shape for array in arrays), results)
        stacked = arrays[0] if len(arrays) == 1 else np.stack(arrays)
        moved = stacked.reshape(atoms).transpose(order)
        if results == 1:
            return [moved.reshape(shape)]
        return list(moved.reshape((results, *shape)))

    def _plan(
        self, shapes: tuple[Shape, ...], results: int
    ) -> tuple[Shape, tuple[int, ...], Shape]:
        """(shape by single axes, their order in the target, shape of one result)."""
        if len(set(shapes)) != 1:
            raise MappingError(f"op `{self}`: sources of different shapes {sorted(set(shapes))}")
        shape = shapes[0] if len(shapes) == 1 else (len(shapes), *shapes[0])
        source = _spread(self.source, len(shape))
        target = _spread(self.target, len(shape) - len(self.source) + len(self.target))
        if len(source) != len(shape):
            raise MappingError(f"op `{self}`: does not fit shape {shape}")
        sizes = {target[0][0]: results} if results > 1 and len(target[0]) == 1 else {}
        for axis, size in zip(source, shape, strict=True):
            _solve(axis, size, sizes, f"op `{self}`: does not fit shape {shape}")
        atoms = [name for axis in source for name in axis]
        order = tuple(atoms.index(name) for axis in target for name in axis)
        result = tuple(math.prod(sizes[name] for name in axis) for axis in target)
        return tuple(sizes[name] for name in atoms), order, result[1:] if results > 1 else result


def _axes(side: str, text: str) -> tuple[Axis, ...]:
    axes: list[Axis] = []
    group: list[str] | None = None
    position = 0
    while position < len(side.rstrip()):
        token = _TOKEN.match(side, position)
        if token is None:
            raise MappingError(f"op `{text}`: cannot read `{side[position:].strip()}`")
        position, word = token.end(), token[1]
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
    return " ".join(
        "1" if not axis else axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in axes
    )


def _spread(axes: tuple[Axis, ...], ndim: int) -> tuple[Axis, ...]:
    """Replace the ellipsis by as many axes as a tensor of `ndim` dimensions needs."""
    if ("...",) not in axes:
        return axes
    at = axes.index(("...",))
    return axes[:at] + tuple((f"...{i}",) for i in range(ndim - len(axes) + 1)) + axes[at + 1 :]


def _solve(axis: Axis, size: int, sizes: dict[str, int], complaint: str) -> None:
    """Record the sizes of the names in one axis of known size; at most one of them may still be
    unknown."""
    unknown = [name for name in axis if name not in sizes]
    known = math.prod(sizes[name] for name in axis if name in sizes)
    if len(unknown) > 1 or known == 0 or size % known or (not unknown and size != known):
        raise MappingError(complaint)
    if unknown:
        sizes[unknown[0]] = size // known
