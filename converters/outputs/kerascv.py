"""Keras files as output: the planned components through the KerasCV tables, read backwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from ...errors import ConversionError
from ...io.atomic import staged_file
from ...mappings.families import Family, halves
from ...mappings.table import Link
from ..checkpoint import DTYPES, Array
from ..conversion import Conversion, Settings, check_finite, total_nbytes
from ..planning.candidates import candidates
from ..planning.plan import PlannedComponent
from ..writers.safetensors import Written
from .kerascv_file import write_keras


def output_keras(
    conversion: Conversion,
    family: Family,
    output: Path,
    settings: Settings,
    progress: Callable[[int, int], None],
) -> None:
    """One Keras file a part: `output` itself for a single part, `name.<part>.h5` for several, or
    files in a folder."""
    seen = Written()
    parts = _keras_parts(conversion, family, settings, seen)
    targets = _keras_targets(output, list(parts))
    total = total_nbytes(conversion, settings.style.dtype)
    with ExitStack() as stack:
        for part, tensors in parts.items():
            path = stack.enter_context(
                staged_file(targets[part], settings.overwrite, settings.style.sync)
            )
            write_keras(path, part, tensors, lambda n: progress(n, total))
            conversion.report.setdefault("files", []).append(str(targets[part]))
        check_finite(conversion, seen.nonfinite, seen.overflow, settings)


def _keras_targets(output: Path, parts: Sequence[str]) -> dict[str, Path]:
    suffix = next((s for s in (".weights.h5", ".h5") if output.name.endswith(s)), None)
    if suffix is None:
        raise ConversionError(
            f"{output}: name the Keras file `something.weights.h5` (Keras 2.15 and 3) or"
            " `something.h5` (legacy)"
        )
    if len(parts) == 1:
        return {parts[0]: output}
    stem = output.name.removesuffix(suffix)
    return {part: output.with_name(f"{stem}.{part}{suffix}") for part in parts}


def _keras_parts(
    conversion: Conversion, family: Family, settings: Settings, seen: Written
) -> dict[str, dict[str, Callable[[], Array]]]:
    """Part -> canonical Keras key -> how to compute it, for every KerasCV part the components can
    fill.

    What is NaN, Inf or overflows then is counted in `seen`.
    """
    parts = {}
    for candidate in candidates("kerascv"):
        component = conversion.components.get(str(candidate.table.about["component"]))
        if candidate.family.name != family.name or component is None:
            continue
        if settings.component in halves() and settings.component != candidate.part:
            continue
        if all(
            target in component.tensors
            for link in candidate.links.values()
            for target in link.targets
        ):
            parts[candidate.part] = {
                key: _inverted(link, key, component, settings.style.dtype, seen)
                for key, link in candidate.links.items()
            }
    if not parts:
        raise ConversionError("nothing to write: KerasCV has no model for these components")
    return parts


def _inverted(
    link: Link, key: str, component: PlannedComponent, dtype: str, seen: Written
) -> Callable[[], Array]:
    def compute() -> Array:
        arrays = [component.tensors[target].tensor().numpy() for target in link.targets]
        back = link.inverse
        array = (back.op.apply(arrays, len(back.targets)) if back.op else arrays)[
            back.targets.index(key)
        ]
        return _cast(array, dtype, f"{component.name} {link.targets[0]}", seen)

    return compute


def _cast(array: Array, dtype: str, name: str, seen: Written) -> Array:
    """The array in a dtype (or as it is, for "keep"); what is not finite before and after is
    counted by name."""
    with np.errstate(over="ignore"):  # counted instead
        cast = array if dtype == "keep" else array.astype(DTYPES[dtype])
    before, after = (int(np.count_nonzero(~np.isfinite(values))) for values in (array, cast))
    for counts, count in ((seen.nonfinite, before), (seen.overflow, after - before)):
        if count:
            counts[name] = counts.get(name, 0) + count
    return cast
