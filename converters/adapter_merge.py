"""Several adapters as one: the weighted sum of what they change.

    sum over k of m_k s_k up_k down_k  =  [m_1 s_1 up_1, m_2 s_2 up_2, ...] [down_1; down_2; ...]

Nothing is approximated: ranks add up. Where all m_k s_k of a module are alike, they become its
alpha, and the factors keep their bits; where not, they are multiplied into the left factors, which
are rounded once, to float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import numpy as np

from ..adapters.modules import Adapter, Module, Part
from ..errors import ConversionError, printable
from ..io.arrays import Array
from .checkpoint import Computed, Tensor
from .layouts.adapters import AdapterFile, weight_shape
from .outputs.adapters_fusion import single
from .outputs.adapters_record import number_tensor

_SUMS = ("diff", "w_norm", "b_norm", "diff_b")  # roles that add up as they are
_HOW = "merged"


class Share(NamedTuple):
    """An adapter in a merge, and how strongly."""

    file: AdapterFile
    adapter: Adapter[Tensor]
    strength: float


class _Part(NamedTuple):
    """A module of one adapter, and how strongly."""

    share: Share
    module: Module[Tensor]

    @property
    def scale(self) -> float:
        """m s: by what the product of its factors is multiplied."""
        return self.share.strength * self.module.factor

    @property
    def said(self) -> str:
        """How messages name it."""
        return f"{self.share.file.path}: `{printable(self.module.name)}`"


@dataclass
class Merge:
    """How it was done.

    Attributes:
        exact: modules whose tensors kept their bits.
        rounded: modules of which a factor or a sum was rounded, once, to float32.
    """

    exact: int = 0
    rounded: int = 0

    def note(self) -> str:
        """It, in a sentence."""
        if not self.rounded:
            return f"merged by concatenation; all {self.exact} modules keep the bits they had"
        return (
            f"merged by concatenation; {self.exact} modules keep the bits they had, of"
            f" {self.rounded} the scaled part was rounded once, to float32"
        )


def merge(shares: Sequence[Share]) -> tuple[Adapter[Tensor], Merge]:
    """The sum of adapters of one family.

    Raises:
        ConversionError: two change a module in ways that do not add up; names it.
    """
    parts: dict[tuple[str, str], list[_Part]] = {}
    shares = _over_same_layers(shares)
    for share in shares:
        for place, module in share.adapter.modules.items():
            parts.setdefault(place, []).append(_Part(share, module))
    how = Merge()
    family = shares[0].adapter.family
    modules = {place: _merged(family, some, how) for place, some in parts.items()}
    bundled: dict[str, Tensor] = {}
    for share in shares:
        for name, tensor in share.adapter.bundled.items():
            if name in bundled:
                raise ConversionError(
                    f"{share.file.path}: the embedding `{printable(name)}` is in another of the"
                    " adapters too"
                )
            bundled[name] = tensor
    return Adapter(family, modules, bundled), how


def _over_same_layers(shares: Sequence[Share]) -> list[Share]:
    """The adapters, with those modules taken apart whose layers others have otherwise."""
    known: dict[tuple[str, str], set[tuple[Part, ...]]] = {}
    for share in shares:
        for module in share.adapter.modules.values():
            for part in module.parts:
                known.setdefault((module.component, part.path), set()).add(module.parts)
    found = []
    for share in shares:
        modules = {}
        for module in share.adapter.modules.values():
            places = [(module.component, part.path) for part in module.parts]
            is_alike = all(len(known[place]) == 1 for place in places)
            for one in [module] if is_alike else single(share.file, module):
                modules[one.component, one.path] = one
        found.append(share._replace(adapter=replace(share.adapter, modules=modules)))
    return found


def _merged(family: str, parts: Sequence[_Part], how: Merge) -> Module[Tensor]:
    first = parts[0]
    if len(parts) == 1 and first.share.strength == 1:
        how.exact += 1
        return first.module
    for part in parts:
        _check(part, first)
    if "down" not in first.module.tensors:
        how.rounded += 1
        return replace(first.module, tensors=_sums(parts), alpha=None)
    return _concatenated(family, parts, how)


def _check(part: _Part, first: _Part) -> None:
    """Refuse what is no sum."""
    module = part.module
    if module.depends_on_base:
        raise ConversionError(
            f"{part.said} is {module.title}, whose change depends on the model's weight and is no"
            " sum with another or by a strength; bake both into the model, with --lora"
        )
    if module.flavour in ("loha", "lokr") or "mid" in module.tensors:
        raise ConversionError(
            f"{part.said} is {module.title}, of which only a LoRA can be merged; --expand makes one"
            " of it, unless it is a LoKr of two whole factors"
        )
    if module.flavour != first.module.flavour:
        raise ConversionError(
            f"{part.said} is {module.title}, and {first.module.title} in {first.share.file.path};"
            " bake both into the model, with --lora"
        )


def _concatenated(family: str, parts: Sequence[_Part], how: Merge) -> Module[Tensor]:
    """Factors beside each other."""
    first = parts[0].module
    kernel = weight_shape(family, first)[2:]
    inputs = {prod(part.module.tensors["down"].shape[1:]) for part in parts}
    if len(inputs) > 1:
        raise ConversionError(
            f"{parts[-1].said} is for a model of other input channels than that of"
            f" {parts[0].share.file.path}"
        )
    rank = sum(part.module.rank for part in parts)
    scales = {part.scale for part in parts}
    is_exact = len(scales) == 1
    factor = scales.pop() if is_exact else 1.0
    up_shape = (first.tensors["up"].shape[0], rank, *(1 for _ in kernel))
    down_shape = (rank, inputs.pop() // prod(kernel), *kernel)
    tensors: dict[str, Tensor] = {
        "down": _joined(parts, "down", down_shape, 0, [1.0] * len(parts)),
        "up": _joined(parts, "up", up_shape, 1, [part.scale / factor for part in parts]),
    }
    biases = _sums(parts) | _up_bias(parts, factor)
    alpha = factor * rank
    tensors["alpha"] = number_tensor(f"{first.name}.alpha", alpha, "F32", ())
    if is_exact and not biases:
        how.exact += 1
    else:
        how.rounded += 1
    tensors |= biases
    return replace(first, tensors=tensors, alpha=alpha, rank=rank, factor=factor)


def _joined(
    parts: Sequence[_Part],
    role: str,
    shape: tuple[int, ...],
    axis: int,
    scales: Sequence[float],
) -> Tensor:
    """The factors of all parts, as matrices, along an axis; of one dtype where all are."""
    tensors = [part.module.tensors[role] for part in parts]
    dtypes = {tensor.dtype for tensor in tensors}
    is_plain = all(scale == 1 for scale in scales)
    dtype = dtypes.pop() if is_plain and len(dtypes) == 1 else "F32"

    def compute(*arrays: Array) -> Array:
        matrices = [array.reshape(len(array), -1) for array in arrays]
        if not is_plain:
            wide = [matrix.astype(np.float64) for matrix in matrices]
            matrices = [
                (matrix * scale).astype(np.float32)
                for matrix, scale in zip(wide, scales, strict=True)
            ]
        elif dtype == "F32":
            matrices = [matrix.astype(np.float32) for matrix in matrices]
        return np.concatenate(matrices, axis).reshape(shape)

    return Computed(f"{parts[0].module.name}.{role}", dtype, shape, tuple(tensors), compute, _HOW)


def _sums(parts: Sequence[_Part]) -> dict[str, Tensor]:
    """What is no product: differences of weights, norms and biases."""
    weights = [part.share.strength for part in parts]
    sums = {}
    for role in _SUMS:
        if any(role in part.module.tensors for part in parts):
            sums[role] = _sum(parts, role, weights)
    return sums


def _up_bias(parts: Sequence[_Part], factor: float) -> dict[str, Tensor]:
    """Biases of left factors, which are multiplied as those are."""
    if not any("up_bias" in part.module.tensors for part in parts):
        return {}
    weights = [part.scale / factor for part in parts]
    return {"up_bias": _sum(parts, "up_bias", weights)}


def _sum(parts: Sequence[_Part], role: str, weights: Sequence[float]) -> Tensor:
    """The weighted sum of a role over the parts that have it."""
    found = [
        (part.module.tensors[role], weight)
        for part, weight in zip(parts, weights, strict=True)
        if role in part.module.tensors
    ]
    shape = found[0][0].shape

    def compute(*arrays: Array) -> Array:
        total = np.zeros(shape, np.float64)
        for array, (_, weight) in zip(arrays, found, strict=True):
            total += weight * array.astype(np.float64).reshape(shape)
        return total.astype(np.float32)

    inputs = tuple(tensor for tensor, _ in found)
    return Computed(f"{parts[0].module.name}.{role}", "F32", shape, inputs, compute, _HOW)
