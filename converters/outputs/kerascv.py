"""Keras files as output: the planned components through the KerasCV tables, read backwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from ...errors import ConversionError
from ...io import atomic
from ...mappings.layouts import layouts
from ..conversion import Conversion, check_finite, total_nbytes
from ..settings import Settings
from ..writers.safetensors import Written
from .keras_tensors import parts_of
from .kerascv_file import write_keras

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
    parts = parts_of(conversion, layouts()["kerascv"], settings, seen)
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
