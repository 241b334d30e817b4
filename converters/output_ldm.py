"""An original single-file checkpoint as output: the planned components through the LDM tables, read backwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..mappings.families import Family
from ..mappings.table import Link
from .conversion import Conversion, Settings, check_finite
from .errors import ConversionError
from .plan import PlannedComponent
from .repo import output_dtype
from .residue import Residue, read_residue, residue_of, residue_outputs, source_repo, written_by
from .staging import check_space, staged_file
from .writer import Output, write_safetensors

_LOST = "no residue file beside the source: buffers, constants and layers that a repo cannot hold are not written"


def output_ldm(
    conversion: Conversion, family: Family, output: Path, settings: Settings, progress: Callable[[int, int], None]
) -> None:
    """Write every component under its original keys into one `.safetensors` file, with the residue if there is one.

    Raises:
        ConversionError: the name is no `.safetensors`, or a component is incomplete.
    """
    if output.suffix != ".safetensors":
        raise ConversionError(f"{output}: name the checkpoint `something.safetensors`")
    residue = _residue(conversion, family, settings)
    if residue is None:
        conversion.notes.append(_LOST)
        residue = Residue({}, {}, {})
    outputs, _ = residue_outputs(residue)
    names = {}
    for component in conversion.components.values():
        for link in dict.fromkeys(written_by(component, family).links.values()):
            outputs.append(_output(link, component, residue, settings))
            names[outputs[-1].key] = f"{component.name} {link.targets[0]}"
    total = sum(tensor.nbytes for output in outputs for tensor in output.sources)
    with staged_file(output, settings.overwrite, settings.style.sync) as path:
        check_space(output.absolute().parent, total)
        written = write_safetensors(
            path.parent,
            path.name,
            outputs,
            max_shard_size=2 * total + 1,
            metadata={"format": "pt", **residue.metadata},
            progress=lambda n: progress(n, total),
            hashes=settings.style.hashes,
            sync=settings.style.sync,
        )
        nonfinite, overflow = (
            {names[key]: count for key, count in counts.items() if key in names}
            for counts in (written.nonfinite, written.overflow)
        )
        check_finite(conversion, nonfinite, overflow, settings)
    conversion.report["files"] = {output.name: {"sha256": written.files[0].sha256}}


def _residue(conversion: Conversion, family: Family, settings: Settings) -> Residue | None:
    """What the source repo's residue file holds, or what an original source still has itself."""
    if not settings.residue:
        return None
    repo = source_repo(conversion.components)
    return read_residue(repo) if repo is not None else residue_of(conversion.components, family)


def _output(link: Link, component: PlannedComponent, residue: Residue, settings: Settings) -> Output:
    """One original tensor, from the canonical ones that its link names."""
    planned = [component.tensors[target] for target in link.targets]
    back = link.inverse
    shapes = [tensor.shape for tensor in planned]
    shape = back.op.shapes(shapes)[0] if back.op else shapes[0]
    dtype = output_dtype(planned[0], settings.style.dtype)
    key = residue.keys.get(link.sources[0], link.sources[0])
    return Output(key, dtype, shape, tuple(tensor.tensor() for tensor in planned), back.op)
