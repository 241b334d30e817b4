"""Tensor operations of the mapping language: rearrangements in einops notation.

    "... i o -> o i ..."   Dense and Conv kernels of any rank, Keras to PyTorch
    "1 1 i o -> o i"       a 1x1 convolution read as a linear layer
    "(p o) i -> p o i"     one fused tensor to as many targets as the row names; reversed, a merge
    "i 12 d -> (12 d) i"   a number is an axis of that size: 12 heads
    "(shift+scale) ... -> (scale+shift) ..."    two halves of an axis change places
    "(q+k+v+4m) ... -> q+k+v+4m ..."            one tensor to four, the last four times as long

An axis is a name, a number, `...` (any number of axes) or a group `(a b)`; `1` may be on one side
only, and counts for nothing in a group. Where an op has several results (or sources), the first
axis of that side counts them. One axis may be a sum of sections, which are of one length unless a
factor says otherwise: in parentheses they lie in one tensor, without each is a tensor of its own.
Sizes come from the shapes. Reversed, an op is undone. Notation, but for sums: https://einops.rocks
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import MappingError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

Shape = tuple[int, ...]
Axis = tuple[str, ...]  # the names merged in one axis; () is `1`, ("...",) the ellipsis

_ELLIPSIS: Axis = ("...",)
_SUM: Axis = ("+",)  # where the axis stands that is a sum
_TOKEN = re.compile(r"\s*(\(|\)|\.\.\.|[1-9]\d*(?!\w)|[A-Za-z_]\w*)\s*")
_SUM_TEXT = re.compile(r"(?P<group>\()?(?P<terms>\w+(?:\+\w+)+)(?(group)\))")
_TERM = re.compile(r"([1-9]\d*)?([A-Za-z_]\w*)")


class Run(NamedTuple):
    """Whole rows of one source that lie one after another in a result.

    Attributes:
        source: which source.
        first, last: from where to where, in equal shares of the source.
        of: how many such shares the source has.
    """

    source: int
    first: int
    last: int
    of: int


class Op(ABC):
    """What makes target tensors of source tensors; see the module's notation.

    Raises:
        MappingError: the text is no op, or does not fit the given shapes.
    """

    @staticmethod
    @cache
    def parse(text: str) -> Op:
        """Read `"source axes -> target axes"`."""
        source, arrow, target = text.partition("->")
        if not arrow:
            raise MappingError(f"op `{text}`: `->` is missing")
        if "+" in text:
            return Sections.read(source, target, text)
        return _rearrangement(_axes(source, text), _axes(target, text), text)

    @property
    @abstractmethod
    def inverse(self) -> Op:
        """The op that undoes this one."""

    @property
    @abstractmethod
    def results(self) -> int | None:
        """How many tensors it makes; None where the row that holds it says so."""

    @property
    @abstractmethod
    def keeps_order(self) -> bool:
        """Whether every result is whole rows of the sources, one run after another: `runs`."""

    @abstractmethod
    def runs(self, part: int, parts: int, sources: int) -> list[Run]:
        """Where the elements of one of `parts` results lie, if the op keeps their order."""

    @abstractmethod
    def permutation(self, ndim: int) -> tuple[int, ...] | None:
        """Source axes in target order, if that (and axes of size one) is all that this op changes.

        Then one result equals `source.transpose(permutation).reshape(target_shape)`.
        """

    @abstractmethod
    def shapes(self, sources: Sequence[Shape], results: int = 1) -> list[Shape]:
        """Shapes of the results for sources of the given shapes."""

    @abstractmethod
    def apply(self, arrays: Sequence[Array], results: int = 1) -> list[Array]:
        """The results for the given arrays; views where numpy can make one."""


@dataclass(frozen=True)
class Rearrangement(Op):
    """An op whose axes are products: they are split, merged and change places."""

    source: tuple[Axis, ...]
    target: tuple[Axis, ...]

    def __str__(self) -> str:
        return f"{_text(self.source)} -> {_text(self.target)}"

    @cached_property
    def inverse(self) -> Rearrangement:
        """The op that undoes this one."""
        return Rearrangement(self.target, self.source)

    @property
    def results(self) -> None:
        """As many as the row names."""
        return None

    @cached_property
    def keeps_order(self) -> bool:
        """Whether the elements stay in their order."""
        return _names(self.source) == _names(self.target)

    def runs(self, part: int, parts: int, sources: int) -> list[Run]:
        """The sources one after another, or one part of a source."""
        return [Run(source, part, part + 1, parts) for source in range(sources)]

    def permutation(self, ndim: int) -> tuple[int, ...] | None:
        """Source axes in target order, if no axis is split or merged."""
        source, target = self.spread(ndim)
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
        import numpy as np  # here, for who only looks at shapes does without it

        plan = self._plan([array.shape for array in arrays], results)
        stacked = arrays[0] if len(arrays) == 1 else np.stack(arrays)
        moved = stacked.reshape(plan.atoms).transpose(plan.order)
        if results == 1:
            return [moved.reshape(plan.result)]
        return list(moved.reshape((results, *plan.result)))

    def spread(self, ndim: int) -> tuple[tuple[Axis, ...], tuple[Axis, ...]]:
        """The axes of both sides, for a source of `ndim` dimensions."""
        more = len(self.target) - len(self.source)
        return _spread(self.source, ndim), _spread(self.target, ndim + more)

    def _plan(self, shapes: Sequence[Shape], results: int) -> _Plan:
        """How sources of the given shapes are rearranged."""
        if len(set(shapes)) != 1:
            raise MappingError(f"op `{self}`: sources of different shapes {sorted(set(shapes))}")
        shape = shapes[0] if len(shapes) == 1 else (len(shapes), *shapes[0])
        misfit = f"op `{self}`: does not fit shape {shape}"
        source, target = self.spread(len(shape))
        if len(source) != len(shape):
            raise MappingError(misfit)
        sizes = {name: int(name) for name in _names(source) if name.isdigit()}
        if results > 1 and len(target[0]) == 1:
            sizes[target[0][0]] = results
        for axis, size in zip(source, shape, strict=True):
            if not _solve(axis, size, sizes):
                raise MappingError(f"{misfit}: axis `{_axis_text(axis)}` of size {size}")
        names = _names(source)
        place = {name: i for i, name in enumerate(names)}
        rearranged = tuple(math.prod(sizes[name] for name in axis) for axis in target)
        return _Plan(
            atoms=tuple(sizes[name] for name in names),
            order=tuple(place[name] for name in _names(target)),
            result=rearranged[1:] if results > 1 else rearranged,
        )


class Term(NamedTuple):
    """One section of an axis that is a sum: its name, and its share of the axis."""

    name: str
    share: int

    def __str__(self) -> str:
        return f"{self.share}{self.name}" if self.share > 1 else self.name


class Sum(NamedTuple):
    """An axis that is a sum.

    Attributes:
        terms: its sections, in order.
        apart: whether each is a tensor of its own.
    """

    terms: tuple[Term, ...]
    apart: bool

    def __str__(self) -> str:
        text = "+".join(map(str, self.terms))
        return text if self.apart else f"({text})"

    @property
    def shares(self) -> int:
        """How many shares the whole axis has."""
        return sum(term.share for term in self.terms)


@dataclass(frozen=True)
class Sections(Op):
    """An op on the sections of one axis: they are cut apart, joined, or change places.

    Attributes:
        source, target: the sum, as the sources and as the targets have it.
        axes: what else happens; the sum is one axis in it.
    """

    source: Sum
    target: Sum
    axes: Rearrangement

    @staticmethod
    def read(source: str, target: str, text: str) -> Sections:
        """Read the two sides of an op in which an axis is a sum."""
        source_axes, source_sum = _with_sum(source, text)
        target_axes, target_sum = _with_sum(target, text)
        names = {term.name for term in source_sum.terms}
        same = sorted(source_sum.terms) == sorted(target_sum.terms)
        if not same or len(names) < len(source_sum.terms):
            raise MappingError(f"op `{text}`: both sums must hold the same sections, each once")
        axes = _rearrangement(source_axes, target_axes, text)
        return Sections(source_sum, target_sum, axes)

    def __str__(self) -> str:
        source = _text(self.axes.source).replace("+", str(self.source))
        target = _text(self.axes.target).replace("+", str(self.target))
        return f"{source} -> {target}"

    @cached_property
    def inverse(self) -> Sections:
        """The op that undoes this one."""
        return Sections(self.target, self.source, self.axes.inverse)

    @property
    def results(self) -> int:
        """One, or one for each section."""
        return len(self.target.terms) if self.target.apart else 1

    @cached_property
    def keeps_order(self) -> bool:
        """Whether every section is whole rows, which stay as they are."""
        axes = self.axes
        return axes.source == axes.target and axes.source[0] == _SUM

    def runs(self, part: int, parts: int, sources: int) -> list[Run]:
        """Where the sections of a result lie."""
        wanted = self.target.terms
        if self.target.apart:
            wanted = wanted[part : part + 1]
        return [self._run(term) for term in wanted]

    def _run(self, term: Term) -> Run:
        """Where a section lies in the sources."""
        place = self.source.terms.index(term)
        if self.source.apart:
            return Run(place, 0, 1, 1)
        before = sum(other.share for other in self.source.terms[:place])
        return Run(0, before, before + term.share, self.source.shares)

    def permutation(self, ndim: int) -> None:
        """Sections that move are no permutation of axes."""
        return None

    def shapes(self, sources: Sequence[Shape], results: int = 1) -> list[Shape]:
        """Shapes of the results for sources of the given shapes."""
        whole = self._whole([tuple(shape) for shape in sources])
        (moved,) = self.axes.shapes([whole])
        axis = self._axis(len(whole))[1]
        if not self.target.apart:
            return [moved]
        unit = moved[axis] // self.target.shares
        return [_resized(moved, axis, unit * term.share) for term in self.target.terms]

    def apply(self, arrays: Sequence[Array], results: int = 1) -> list[Array]:
        """The results for the given arrays; views of them where each section is a tensor."""
        import numpy as np

        whole = self._whole([array.shape for array in arrays])
        source_axis, target_axis = self._axis(len(whole))
        parts = list(arrays)
        if not self.source.apart:
            unit = whole[source_axis] // self.source.shares
            ends = np.cumsum([unit * term.share for term in self.source.terms])
            parts = np.split(arrays[0], ends[:-1], source_axis)
        moved = {
            term: self.axes.apply([part])[0]
            for term, part in zip(self.source.terms, parts, strict=True)
        }
        ordered = [moved[term] for term in self.target.terms]
        return ordered if self.target.apart else [np.concatenate(ordered, target_axis)]

    def _whole(self, shapes: Sequence[Shape]) -> Shape:
        """The shape of the source, of one tensor or of the sections joined."""
        terms = self.source.terms
        expected = len(terms) if self.source.apart else 1
        if len(shapes) != expected:
            raise MappingError(f"op `{self}`: takes {expected} tensors, not {len(shapes)}")
        first = shapes[0]
        axis = self._axis(len(first))[0]
        if not self.source.apart:
            self._unit(self.source, self.source.shares, first[axis])
            return first
        unit = self._unit(terms[0], terms[0].share, first[axis])
        for term, shape in zip(terms, shapes, strict=True):
            fits = _resized(first, axis, unit * term.share)
            if shape != fits:
                raise MappingError(
                    f"op `{self}`: section `{term}` has shape {shape}, and beside `{terms[0]}` of"
                    f" {first} it must have {fits}"
                )
        return _resized(first, axis, unit * self.source.shares)

    def _unit(self, axis: Sum | Term, shares: int, size: int) -> int:
        """The length of one share of an axis of the given size."""
        unit, rest = divmod(size, shares)
        if rest:
            raise MappingError(
                f"op `{self}`: axis `{axis}` of size {size} has not {shares} equal shares"
            )
        return unit

    def _axis(self, ndim: int) -> tuple[int, int]:
        """Where the sum is among the axes of the source and of the target."""
        source, target = self.axes.spread(ndim)
        if len(source) != ndim:
            raise MappingError(f"op `{self}`: does not fit {ndim} axes")
        return source.index(_SUM), target.index(_SUM)


def _resized(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _rearrangement(source: tuple[Axis, ...], target: tuple[Axis, ...], text: str) -> Rearrangement:
    """The op between two sides, each of which must hold the same axes."""
    names = _names(source)
    if sorted(names) != sorted(_names(target)) or len(set(names)) != len(names):
        raise MappingError(f"op `{text}`: both sides must hold the same axes, each once")
    return Rearrangement(source, target)


def _with_sum(side: str, text: str) -> tuple[tuple[Axis, ...], Sum]:
    """The axes of a side, with a place for its one sum, and that sum."""
    sums = list(_SUM_TEXT.finditer(side))
    if len(sums) != 1:
        raise MappingError(f"op `{text}`: each side must have one axis that is a sum")
    (found,) = sums
    terms = tuple(_term(word, text) for word in found["terms"].split("+"))
    before = _axes(side[: found.start()], text)
    after = _axes(side[found.end() :], text)
    return (*before, _SUM, *after), Sum(terms, apart=not found["group"])


def _term(word: str, text: str) -> Term:
    term = _TERM.fullmatch(word)
    if term is None:
        raise MappingError(f"op `{text}`: `{word}` is no section: a name, perhaps after a factor")
    return Term(term[2], int(term[1] or 1))


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
            if group is not None:
                raise MappingError(f"op `{text}`: a group in a group")
            group = []
        elif word == ")":
            if group is None:
                raise MappingError(f"op `{text}`: `)` without `(`")
            axes.append(tuple(group))
            group = None
        elif group is not None:
            group += () if word == "1" else (word,)
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
