"""An original single-file checkpoint as output: the planned components through the LDM tables, read backwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..mappings.families import Family
from ..mappings.table import Link
from .conversion import Conversion, Settings, check_finite
from .errors import ConversionError
from .plan import PlannedComponent
from .recognise import Candidate, candidates
from .repo import output_dtype
from .staging import check_space, staged_file
from .writer import Output, write_safetensors


def output_ldm(
    conversion: Conversion, family: Family, output: Path, settings: Settings, progress: Callable[[int, int], None]
) -> None:
    """Write every component under its original keys into one `.safetensors` file.

    Raises:
        ConversionError: the name is no `.safetensors`, or a component is incomplete.
    """
    if output.suffix != ".safetensors":
        raise ConversionError(f"{output}: name the checkpoint `something.safetensors`")
    outputs = [
        _output(link, component, settings)
        for component in conversion.components.values()
        for link in _table(component, family).links.values()
    ]
    total = sum(tensor.nbytes for output in outputs for tensor in output.sources)
    with staged_file(output, settings.overwrite) as path:
        check_space(path.parent, total)
        written = write_safetensors(
            path.parent, path.name, outputs, max_shard_size=2 * total + 1, progress=lambda n: progress(n, total)
        )
        check_finite(conversion, written.nonfinite, written.overflow, settings)
    conversion.report["files"] = {output.name: written.files[0].sha256}


def _table(component: PlannedComponent, family: Family) -> Candidate:
    """The table that writes a component.

    Raises:
        ConversionError: there is none, or the component lacks tensors that it needs.
    """
    for candidate in candidates("ldm"):
        about = candidate.table.about
        if candidate.family == family and about["component"] == component.name and not about.get("read_only"):
            targets = (target for link in candidate.links.values() for target in link.targets)
            if missing := [target for target in targets if target not in component.tensors]:
                raise ConversionError(f"{component.name}: {len(missing)} tensors are lacking, {missing[0]} among them")
            return candidate
    raise ConversionError(f"{component.name}: no table writes it for {family.title}")


def _output(link: Link, component: PlannedComponent, settings: Settings) -> Output:
    """One original tensor, from the canonical ones that its link names."""
    planned = [component.tensors[target] for target in link.targets]
    back = link.inverse
    shapes = [tensor.shape for tensor in planned]
    shape = back.op.shapes(shapes)[0] if back.op else shapes[0]
    dtype = output_dtype(planned[0], settings.style.dtype)
    return Output(link.sources[0], dtype, shape, tuple(tensor.tensor() for tensor in planned), back.op)
