"""Keras files as output: the planned components through the KerasCV tables, read backwards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ...errors import ConversionError
from ...io import atomic
from ...mappings.families import halves
from ...mappings.table import Link
from ..checkpoint import DTYPES, Array
from ..conversion import Conversion, check_finite, total_nbytes
from ..planning.candidates import Candidate, candidates
from ..planning.keys import brief
from ..planning.plan import PlannedComponent
from ..settings import Settings
from ..writers.safetensors import Written
from .kerascv_file import Compute, write_keras

SUFFIXES = (".weights.h5", ".h5")


def write(
    conversion: Conversion,
    output: Path,
    settings: Settings,
    progress: Callable[[int, int], None],
) -> None:
    """One Keras file a part.

    `output` itself for a single part, `name.<part>.h5` beside it for several.

    Raises:
        ConversionError: the name is no Keras file's, or KerasCV has none of these models.
    """
    seen = Written()
    parts = _parts(conversion, settings, seen)
    targets = _targets(output, list(parts))
    total = total_nbytes(conversion, settings.dtype)
    with ExitStack() as stack:
        for part, tensors in parts.items():
            path = stack.enter_context(
                atomic.file(targets[part], settings.overwrite, settings.sync)
            )
            write_keras(path, part, tensors, lambda n: progress(n, total))
            conversion.report.setdefault("files", []).append(str(targets[part]))
        check_finite(conversion, seen.nonfinite, seen.overflow, settings)


def _targets(output: Path, parts: Sequence[str]) -> dict[str, Path]:
    """Part -> the file that it is written to."""
    suffix = next((suffix for suffix in SUFFIXES if output.name.endswith(suffix)), None)
    if suffix is None:
        raise ConversionError(
            f"{output}: name the Keras file `something.weights.h5` (Keras 2.15 and 3) or"
            " `something.h5` (legacy)"
        )
    if len(parts) == 1:
        return {parts[0]: output}
    stem = output.name.removesuffix(suffix)
    return {part: output.with_name(f"{stem}.{part}{suffix}") for part in parts}


def _parts(
    conversion: Conversion, settings: Settings, seen: Written
) -> dict[str, Mapping[str, Compute]]:
    """Part -> canonical Keras key -> how to compute it, for every part that there is.

    What is NaN, Inf or overflows then is counted in `seen`.
    """
    parts: dict[str, Mapping[str, Compute]] = {}
    held: set[tuple[str, str]] = set()  # (component, tensor)
    for candidate in candidates("kerascv"):
        if candidate.family.name != conversion.family or not _is_wanted(candidate.part, settings):
            continue
        component = conversion.components.get(candidate.component.name)
        if component is None or not _is_whole(candidate, component):
            continue
        parts[candidate.part] = {
            key: _inverted(link, key, component, settings.dtype, seen)
            for key, link in candidate.links.items()
        }
        links = candidate.links.values()
        held |= {(component.name, target) for link in links for target in link.targets}
    if not parts:
        raise ConversionError("nothing to write: KerasCV has no model for these components")
    if settings.component not in halves():
        _check_left(conversion, held)
    return parts


def _check_left(conversion: Conversion, held: Set[tuple[str, str]]) -> None:
    """Refuse to leave tensors of a model out; a model that extends others is left out and noted.

    Args:
        held: (component, tensor) of everything that is written.
    """
    for name, component in conversion.components.items():
        left = [key for key in component.tensors if (name, key) not in held]
        kind = component.described.class_name
        if left and component.described.extends:
            conversion.notes.append(f"left out: {name}, as KerasCV has no {kind}")
        elif left:
            others = [other for other in conversion.components if other != name]
            advice = f"; --component {others[0]} writes another part alone" if others else ""
            raise ConversionError(
                f"{name}: KerasCV has no {kind} like it, and no place for {len(left)} of its"
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
