"""Modules of an adapter over the layers that a convention has: fused ones are taken apart, others
put together. Nothing is rounded.

    up = [up_1; up_2; ...]       where all layers have the same down
    up = diag(up_1, up_2, ...)   over down = [down_1; down_2; ...] where they do not
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ...adapters.change import own_rows
from ...adapters.fusion import apart, ranks_told
from ...adapters.modules import Adapter, Module, Part, parts_of
from ...errors import ConversionError, printable
from ...io.arrays import Array
from ...mappings.conventions import Convention, Layer, Naming, stock_layers
from ...mappings.facts import facts
from ..checkpoint import Computed, Tensor
from ..layouts.adapters import AdapterFile
from .adapters_record import number_tensor

_TAKEN_APART = "rows of a fused layer"
_PUT_TOGETHER = "layers fused"
_NUMBERS = ("alpha", "scale")
_BIASES = ("up_bias", "diff_b")  # where a layer has none, it changes by 0

Place = tuple[str, str]


class TensorScissors:
    """What cuts tensors that lie in files."""

    def rows(self, tensor: Tensor, which: Array) -> Tensor:
        """Some rows."""
        shape = (len(which), *tensor.shape[1:])
        return _part(tensor, shape, lambda array: array[which])

    def columns(self, tensor: Tensor, which: slice) -> Tensor:
        """Some columns."""
        shape = (tensor.shape[0], which.stop - which.start, *tensor.shape[2:])
        return _part(tensor, shape, lambda array: array[:, which])

    def is_set(self, tensor: Tensor) -> Array:
        """Which elements have bits that are not 0."""
        array = np.ascontiguousarray(tensor.numpy())
        cells: Array = array.view(f"u{array.itemsize}") != 0
        return cells

    def number(self, value: float, like: Tensor) -> Tensor:
        """A tensor of one number."""
        return number_tensor(like.name, value, like.dtype, like.shape)


def _part(tensor: Tensor, shape: tuple[int, ...], cut: Callable[[Array], Array]) -> Tensor:
    return Computed(tensor.name, tensor.dtype, shape, (tensor,), cut, _TAKEN_APART)


@dataclass
class Regrouped:
    """An adapter whose modules are the layers of a convention.

    Attributes:
        modules: how each is named there, and what it is.
        ranks: name of a module that was put together -> the ranks of those that it is made of,
            where its left factor would tell others.
    """

    modules: list[tuple[Naming, Layer, Module[Tensor]]]
    ranks: dict[str, list[int]] = field(default_factory=dict)


def regrouped(
    file: AdapterFile,
    adapter: Adapter[Tensor],
    convention: Convention,
    ranks: Mapping[str, list[int]],
) -> Regrouped:
    """The modules of an adapter as a convention's.

    Args:
        ranks: what is known of modules that were put together; see `apart`.

    Raises:
        ConversionError: the convention has no name for one, or no place for its kind.
    """
    named: dict[Place, tuple[Naming, Layer]] = {}
    members: dict[Place, list[Module[Tensor]]] = {}
    for module in adapter.modules.values():
        for one in _pieces(file, adapter.family, module, convention, ranks):
            naming, layer = _layer(file, adapter.family, one, convention)
            place = (one.component, layer.name)
            named[place] = (naming, layer)
            members.setdefault(place, []).append(one)
    found = Regrouped([])
    for place, several in members.items():
        naming, layer = named[place]
        parts = parts_of(layer)
        (module, *others) = several
        if others or module.parts != parts:
            module = _Fusion(file, convention, layer, parts, several).module()
            made_of = _ranks_of(several, parts)
            if module.rank and len(parts) > 1 and made_of != ranks_told(module, TensorScissors()):
                found.ranks[layer.name] = made_of
        found.modules.append((naming, layer, module))
    return found


def single(file: AdapterFile, module: Module[Tensor]) -> list[Module[Tensor]]:
    """A module for each layer that a module is over.

    Raises:
        ConversionError: it cannot be taken apart.
    """
    try:
        return apart(module, TensorScissors())
    except ValueError as error:
        raise ConversionError(f"{file.path}: {error}") from None


def _pieces(
    file: AdapterFile,
    family: str,
    module: Module[Tensor],
    convention: Convention,
    ranks: Mapping[str, list[int]],
) -> list[Module[Tensor]]:
    """A module as it is, if the convention has its layer; else taken apart."""
    _, layer = _layer(file, family, module, convention)
    if module.parts == parts_of(layer):
        return [module]
    try:
        return apart(module, TensorScissors(), ranks.get(module.name))
    except ValueError as error:
        raise ConversionError(f"{file.path}: {error}, as {convention.title} has them") from None


def _layer(
    file: AdapterFile, family: str, module: Module[Tensor], convention: Convention
) -> tuple[Naming, Layer]:
    """How the convention names the layer that a module is in."""
    for naming in convention.of(module.component, family):
        layer = stock_layers(naming, family).get(module.path)
        if layer is not None:
            return naming, layer
    raise ConversionError(
        f"{file.path}: `{printable(module.name)}` has no name in {convention.title}"
    )


def _ranks_of(modules: Sequence[Module[Tensor]], parts: Sequence[Part]) -> list[int]:
    """The ranks of the modules of each part; empty if all have one right factor."""
    if _share(modules, parts):
        return []
    ranks = {module.path: module.rank for module in modules}
    return [ranks.get(part.path, 0) for part in parts]


def _share(modules: Sequence[Module[Tensor]], parts: Sequence[Part]) -> bool:
    """Whether the modules of all parts have the same tensors beside their rows."""
    if len(modules) < len(parts):
        return False
    shared = [_shared(module) for module in modules]
    first = shared[0]
    return all(
        one.keys() == first.keys() and all(_same(first[role], one[role]) for role in first)
        for one in shared[1:]
    )


def _shared(module: Module[Tensor]) -> dict[str, Tensor]:
    """The tensors that all layers have, but for numbers."""
    return {
        role: tensor
        for role, tensor in module.tensors.items()
        if role not in _row_roles(module) and role not in _NUMBERS
    }


def _row_roles(module: Module[Tensor]) -> set[str]:
    """The roles of which each layer has its rows."""
    roles = set(facts("adapters")["fused"]["rows"])
    if "on_input" in module.tensors and module.tensors["on_input"].numpy().any():
        roles.discard("whole")
    return roles


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits."""
    if a is b:
        return True
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return bool(a.numpy().tobytes() == b.numpy().tobytes())


@dataclass(frozen=True)
class _Fusion:
    """Modules that are one in a convention."""

    file: AdapterFile
    convention: Convention
    layer: Layer
    parts: tuple[Part, ...]
    modules: list[Module[Tensor]]

    def module(self) -> Module[Tensor]:
        """The one.

        Raises:
            ConversionError: they are of several kinds or strengths.
        """
        first = self.modules[0]
        self._check(first)
        shares = _share(self.modules, self.parts)
        if not shares and (first.flavour not in ("lora", "bias") or "mid" in first.tensors):
            raise self._refused(f"is {first.title}, which is not that of all of them")
        rank = first.rank if shares else sum(module.rank for module in self.modules)
        whole = replace(
            first, name=self.layer.name, parts=self.parts, rank=rank, height=self._height
        )
        roles = dict.fromkeys(role for module in self.modules for role in module.tensors)
        tensors = {role: self._tensor(role, whole, shares) for role in roles}
        alpha = None if first.alpha is None else first.factor * rank
        return replace(whole, tensors=tensors, alpha=alpha)

    @property
    def _height(self) -> int:
        """Rows of the fused layer."""
        shares = {part.path: part.shares for part in self.parts}
        module = self.modules[0]
        own = shares[module.path]
        count = sum(last - first for first, last, _ in own)
        return module.height * own[0][2] // count

    def _check(self, first: Module[Tensor]) -> None:
        for module in self.modules:
            if module.flavour != first.flavour:
                raise self._refused(f"is {module.title}, and `{first.name}` {first.title}")
            if module.factor != first.factor:
                raise self._refused(
                    f"has the strength {module.factor:g} (alpha / rank), and `{first.name}`"
                    f" {first.factor:g}",
                    module,
                )
            if module.is_decomposed and not module.is_by_row:
                raise self._refused("is DoRA along input channels", module)
            if ("scale" in module.tensors) != ("scale" in first.tensors):
                raise self._refused("has a scale, and others have none", module)
            for role, tensor in module.tensors.items():
                other = first.tensors.get(role, tensor)
                if role not in _NUMBERS and tensor.dtype != other.dtype:
                    raise self._refused(
                        f"is in {tensor.dtype}, and others in {other.dtype}", module
                    )
        decomposed = [module for module in self.modules if module.is_decomposed]
        if decomposed and len(decomposed) < len(self.parts):
            raise self._refused("is DoRA, which others are not", decomposed[0])

    def _refused(self, why: str, module: Module[Tensor] | None = None) -> ConversionError:
        name = printable((module or self.modules[0]).name)
        return ConversionError(
            f"{self.file.path}: `{name}` {why}, and {self.convention.title} has one module for"
            f" {', '.join(part.path for part in self.parts)}"
        )

    def _tensor(self, role: str, whole: Module[Tensor], shares: bool) -> Tensor:
        """A tensor of the one."""
        first = next(module for module in self.modules if role in module.tensors)
        tensor = first.tensors[role]
        if role == "alpha":
            return TensorScissors().number(first.factor * whole.rank, tensor)
        if role == "scale":
            return tensor
        if role in _row_roles(first):
            is_block = role == "up" and not shares
            return self._stacked(role, whole.rank if is_block else 0)
        return tensor if shares else self._right_factors()

    def _right_factors(self) -> Tensor:
        """The right factors of all parts, one after another."""
        ordered = {module.path: module for module in self.modules}
        tensors = [
            ordered[part.path].tensors["down"] for part in self.parts if part.path in ordered
        ]
        first = tensors[0]
        shape = (sum(one.shape[0] for one in tensors), *first.shape[1:])
        if any(one.shape[1:] != first.shape[1:] for one in tensors):
            raise self._refused(f"has a down {list(first.shape)}, and others another")
        return Computed(
            first.name,
            first.dtype,
            shape,
            tuple(tensors),
            lambda *arrays: np.concatenate(arrays),
            _PUT_TOGETHER,
        )

    def _stacked(self, role: str, rank: int) -> Tensor:
        """The rows of all parts, of each in columns of its own if a rank is given."""
        ordered = {module.path: module for module in self.modules}
        places: list[tuple[Array, slice]] = []
        tensors: list[Tensor] = []
        start = 0
        for part in self.parts:
            module = ordered.get(part.path)
            if module is None:
                continue
            block = slice(start, start + module.rank) if rank else slice(None)
            start += module.rank
            if role in module.tensors:
                rows = own_rows(replace(module, parts=(part,), height=self._height))
                assert rows is not None
                if len(rows) != module.height:
                    raise self._refused(f"has {module.height} rows, not {len(rows)}", module)
                places.append((rows, block))
                tensors.append(module.tensors[role])
        first = tensors[0]
        width = (rank,) if rank else first.shape[1:2]
        shape = (self._height, *width, *first.shape[2:])

        def compute(*arrays: Array) -> Array:
            whole = np.zeros(shape, arrays[0].dtype)
            for array, (rows, block) in zip(arrays, places, strict=True):
                if whole.ndim == 1:
                    whole[rows] = array.reshape(-1)
                else:
                    whole[rows, block] = array
            return whole

        return Computed(first.name, first.dtype, shape, tuple(tensors), compute, _PUT_TOGETHER)
