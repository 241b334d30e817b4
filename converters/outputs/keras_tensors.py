"""The planned components through the tables of a layout of Keras, read backwards."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace

import numpy as np

from ...errors import ConversionError
from ...io.arrays import DTYPES, Array
from ...mappings.families import halves
from ...mappings.layouts import Layout
from ...mappings.table import Link
from ..conversion import Conversion
from ..planning.candidates import Candidate, candidates
from ..planning.keys import brief
from ..planning.plan import PlannedComponent
from ..settings import Settings
from ..writers.safetensors import Written
from .keras_file import Compute

Tensors = Mapping[str, Compute]
"""Canonical Keras key -> how to compute the tensor."""


def parts_of(
    conversion: Conversion, layout: Layout, settings: Settings, seen: Written
) -> dict[str, Tensors]:
    """The tensors of every part of a layout that there is.

    What is NaN, Inf or overflows then is counted in `seen`.

    Raises:
        ConversionError: the layout has none of these models, or no place for some of their tensors.
    """
    parts: dict[str, Tensors] = {}
    held: set[tuple[str, str]] = set()  # (component, tensor)
    for stock in candidates(layout.name):
        if stock.family.name != conversion.family or not _is_wanted(stock.part, settings):
            continue
        component = conversion.components.get(stock.component.name)
        if component is None or component.described.class_name != stock.component.class_name:
            continue
        candidate = stock
        if not stock.table.about.get("fixed"):
            candidate = replace(stock, config=component.config)
        if not _is_whole(candidate, component):
            continue
        parts[candidate.part] = {
            key: _inverted(link, key, component, settings.dtype, seen)
            for key, link in candidate.links.items()
        }
        links = candidate.links.values()
        held |= {(component.name, target) for link in links for target in link.targets}
    if not parts:
        raise ConversionError(f"nothing to write: {layout.title} has no model for these components")
    if settings.component not in halves():
        _check_left(conversion, layout, held)
    return parts


def _check_left(conversion: Conversion, layout: Layout, held: Set[tuple[str, str]]) -> None:
    """Refuse to leave tensors of a model out; a model that extends others is left out and noted.

    Args:
        held: (component, tensor) of everything that is written.
    """
    for name, component in conversion.components.items():
        left = [key for key in component.tensors if (name, key) not in held]
        kind = component.described.class_name
        if left and component.described.extends:
            conversion.notes.append(f"left out: {name}, as {layout.title} has no {kind}")
        elif left:
            others = [other for other in conversion.components if other != name]
            advice = f"; --component {others[0]} writes another part alone" if others else ""
            raise ConversionError(
                f"{name}: {layout.title} has no {kind} like it, and no place for {len(left)} of its"
                f" tensors: {brief(left)}{advice}"
            )


def _is_wanted(part: str, settings: Settings) -> bool:
    """Whether a part is asked for; who names a half wants that half only."""
    return settings.component not in halves() or settings.component == part


def _is_whole(candidate: Candidate, component: PlannedComponent) -> bool:
    """Whether a component has every tensor that a part takes."""
    links = candidate.links.values()
    return all(target in component.tensors for link in links for target in link.targets)


def _inverted(
    link: Link, key: str, component: PlannedComponent, dtype: str, seen: Written
) -> Compute:
    """How to compute a Keras tensor."""

    def compute() -> Array:
        arrays = [component.tensors[target].tensor().numpy() for target in link.targets]
        back = link.inverse
        if back.op is not None:
            arrays = back.op.apply(arrays, len(back.targets))
        array = arrays[back.targets.index(key)]
        wanted = component.tensors[link.targets[0]].output_dtype(dtype)
        return _cast(array, wanted, f"{component.name} {link.targets[0]}", seen)

    return compute


def _cast(array: Array, dtype: str, name: str, seen: Written) -> Array:
    """The array in a dtype.

    What is not finite before and after is counted by name.
    """
    with np.errstate(over="ignore"):  # counted instead
        cast: Array = array.astype(DTYPES[dtype], copy=False)
    before = _nonfinite(array)
    _count(seen.nonfinite, name, before)
    _count(seen.overflow, name, _nonfinite(cast) - before)
    return cast


def _nonfinite(array: Array) -> int:
    return int(np.count_nonzero(~np.isfinite(array)))


def _count(counts: dict[str, int], name: str, number: int) -> None:
    if number:
        counts[name] = counts.get(name, 0) + number
