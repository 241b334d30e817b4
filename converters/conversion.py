"""What a conversion answers: shared by the outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConversionError
from ..io.dtypes import ITEMSIZES
from ..mappings.families import Family, families
from .checkpoint import Computed, SourceFile
from .planning.keys import brief
from .planning.plan import PlannedComponent, PlannedTensor
from .settings import Settings

if TYPE_CHECKING:
    from .planning.baked import Baking
    from .planning.taught import Taught


@dataclass
class Conversion:
    """What a conversion did, or would do.

    Attributes:
        output: the repo, file or folder that was written; None for a dry run.
        report: the content of `conversion.json`; of the dry run of a repo what it would say, less
            sizes and hashes.
        notes: what the user should know, one sentence each.
        lacks: what the repo still needs before a pipeline can load it.
        baking: the adapters that change its weights.
        taught: the words that its text encoders get.
        base: what the sources are filled up from.
    """

    family: str
    components: dict[str, PlannedComponent]
    output: Path | None
    report: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    baking: Baking | None = None
    taught: list[Taught] = field(default_factory=list)
    base: Path | None = None

    @property
    def architecture(self) -> Family:
        """The family itself."""
        return families()[self.family]

    @property
    def files(self) -> list[SourceFile]:
        """Every file whose tensors it reads, each once."""
        parts = [part for component in self.components.values() for part in component.parts]
        checkpoints = [part.checkpoint for part in parts]
        checkpoints += [one for taught in self.taught for one in taught.checkpoints]
        if self.baking is not None:
            checkpoints += [one.checkpoint for one in self.baking.adapters]
        files = [file for checkpoint in checkpoints for file in checkpoint.files]
        return list({file.path: file for file in files}.values())

    @property
    def denoiser(self) -> PlannedComponent | None:
        """The component that predicts noise, if there is one."""
        return self.components.get(self.architecture.denoiser)


def check_finite(
    conversion: Conversion,
    nonfinite: Mapping[str, int],
    overflowed: Mapping[str, int],
    settings: Settings,
) -> None:
    """Refuse NaN, Inf and overflow, or note them where they are allowed. Names are `component
    key`."""
    too_large = f"too large for {settings.dtype}"
    for counts, what, advice in (
        (nonfinite, "NaN or Inf", "--allow-nan converts them anyway"),
        (overflowed, too_large, "use --dtype bfloat16, or --allow-nan to write Inf"),
    ):
        if not counts:
            continue
        found = f"{sum(counts.values())} values are {what}, in {brief(counts)}"
        if not settings.allow_nan:
            raise ConversionError(f"{_origin(conversion, next(iter(counts)))}: {found}; {advice}")
        conversion.notes.append(found)


def _origin(conversion: Conversion, name: str) -> Path:
    """The source that a tensor, `component key`, comes from."""
    component, key = name.split(" ", 1)
    parts = conversion.components[component].parts
    source = conversion.components[component].tensors[key].sources[0]
    while True:
        for part in parts:
            if any(source is tensor for tensor in part.checkpoint.tensors.values()):
                return part.checkpoint.path
        assert isinstance(source, Computed)
        source = source.inputs[0]  # of a tensor that adapters change: the one before


def total_nbytes(conversion: Conversion, dtype: str) -> int:
    """Bytes of all planned tensors in the dtype they are written in."""
    return sum(
        _nbytes(t, dtype)
        for component in conversion.components.values()
        for t in component.tensors.values()
    )


def _nbytes(tensor: PlannedTensor, dtype: str) -> int:
    return math.prod(tensor.shape) * ITEMSIZES[tensor.output_dtype(dtype)]


def describe(conversion: Conversion) -> Iterator[str]:
    """What a conversion did, or would do, in lines for people."""
    for name, component in conversion.components.items():
        for part in component.parts:
            source = part.checkpoint
            of_which = f" ({part.part})" if part.part != name else ""
            yield (
                f"{name:<13} {len(source.tensors):>5} tensors{of_which} from {source.path},"
                f" {source.format}"
            )
    yield from (f"note: {note}" for note in conversion.notes)
    yield from (f"lacks: {gap}" for gap in conversion.lacks)
    yield (
        f"wrote {conversion.output}"
        if conversion.output
        else "dry run: everything fits, nothing was written"
    )
