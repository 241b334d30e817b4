"""The road of an adapter: a file of LoRA or its relatives -> modules -> other names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..adapters.modules import Adapter
from ..errors import ConversionError
from ..io.atomic import check_apart
from ..mappings.conventions import conventions
from ..mappings.families import families
from .checkpoint import Tensor
from .conversion import Conversion
from .layouts.adapters import AdapterFile, open_adapter, reads, refuse_unfit
from .layouts.source import Source
from .outputs.adapters import Respelled, respelled, write
from .settings import Settings


def convert_adapters(
    sources: Sequence[Path],
    output: Path,
    settings: Settings,
    progress: Callable[[int, int], None],
) -> Conversion:
    """Write an adapter under the names of another convention.

    Raises:
        ConversionError: anything a user can act on; nothing is left behind.
    """
    check_apart(output, sources)
    if len(sources) != 1:
        raise ConversionError(f"--to {settings.to}: name one adapter, not {len(sources)}")
    file = opened(sources[0])
    adapter, made = _chosen(file, settings)
    conversion = Conversion(adapter.family, {}, None if settings.dry_run else output)
    conversion.notes += described(adapter)
    conversion.report["source"] = {
        "path": file.path.name,
        "files": {one.path.name: one.sha256() for one in file.checkpoint.files}
        if settings.hashes and not settings.dry_run
        else {},
    }
    if not settings.dry_run:
        written = write(made, output, settings, progress)
        conversion.report["files"] = {output.name: {"sha256": written.sha256}}
    for one in file.checkpoint.files:
        one.check_unchanged()
    return conversion


def opened(path: Path) -> AdapterFile:
    """Open an adapter.

    Raises:
        ConversionError: it cannot be read, or is none.
    """
    source = Source(path)
    if not reads(source):
        raise ConversionError(f"{path}: not an adapter; `weightport inspect` says what it is")
    return open_adapter(source)


def _chosen(file: AdapterFile, settings: Settings) -> tuple[Adapter[Tensor], Respelled]:
    """The adapter, of the family that it fits, under its new names.

    Of several families any will do where the names are the same.
    """
    convention = conventions()[settings.to]
    found = file.fitting(settings.family)
    for adapter in found:
        refuse_unfit(file, adapter)
    made = [respelled(file, adapter, convention) for adapter in found]
    names: list[Any] = [[(out.key, out.shape) for out in one.outputs] for one in made]
    if any(name != names[0] for name in names):
        titles = ", ".join(families()[adapter.family].title for adapter in found)
        raise ConversionError(f"{file.path}: fits {titles}, which differ in names; say --family")
    return found[0], made[0]


def described(adapter: Adapter[Tensor]) -> list[str]:
    """What an adapter changes, a line for each component and flavour."""
    counts = Counter((module.component, module.title) for module in adapter.modules.values())
    return [
        f"{component}: {count} modules, {title}" for (component, title), count in counts.items()
    ]
