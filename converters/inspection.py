"""What a file is and what would become of it, from its headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConversionError
from ..io.collector import collector_paused
from ..mappings.families import families
from .checkpoint import Tensor
from .layouts.ldm_evidence import image_size, prediction, stands_alone
from .layouts.source import Source
from .layouts.sources import open_source
from .planning.keys import collapse
from .planning.plan import unfit
from .planning.recognise import Recognition, recognise
from .planning.strays import without_strays

if TYPE_CHECKING:
    from .adapter_inspection import InspectedAdapter
    from .embedding_inspection import InspectedEmbedding


@dataclass(frozen=True)
class InspectedPart:
    """One component found in a file.

    Attributes:
        root: where in the file it lies, when a save nests several.
        part: `unet`, `text_encoder`, `decoder`, `image_encoder`, `vae`, or `unknown`.
        families: the families it may belong to; the nearest one if it is unknown.
        becomes: the folder of the repo, its class and the table that fills it.
        tensors: (collapsed key, number of tensors, dtype, bytes).
        skipped: reason -> number of tensors left out for it.
    """

    root: str
    format: str
    part: str
    families: tuple[str, ...]
    evidence: tuple[str, ...]
    becomes: str
    count: int
    nbytes: int
    dtypes: dict[str, int]
    tensors: tuple[tuple[str, int, str, int], ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    skipped: dict[str, int]


@dataclass(frozen=True)
class Inspection:
    """The answer of `weightport.inspect`.

    Attributes:
        parts: the components in the file.
        adapter: what the file changes, if it is an adapter; it has no parts then.
        embedding: the words that it holds, if it is a textual inversion; likewise.
    """

    path: str
    parts: tuple[InspectedPart, ...]
    adapter: InspectedAdapter | None = None
    embedding: InspectedEmbedding | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "path": self.path,
            "parts": [dict(vars(part)) for part in self.parts],
            "adapter": dict(vars(self.adapter)) if self.adapter else None,
            "embedding": asdict(self.embedding) if self.embedding else None,
        }


def inspect(path: Path, family: str | None = None) -> Inspection:
    """Open a file, recognise what it holds, and describe it; no weight is read.

    Args:
        family: of the models that an adapter is for, where it leaves a choice.

    Raises:
        ConversionError: the file cannot be read at all.
    """
    # LoRA is reported by its alpha only when it is merged: looking needs none
    source = Source(path, lora_alpha=1.0)
    with collector_paused():
        if source.is_embedding:
            from .embedding_inspection import inspect_embedding
            from .layouts.embeddings import open_embeddings

            return Inspection(str(path), (), embedding=inspect_embedding(open_embeddings(source)))
        if source.is_adapter:
            from .adapter_inspection import inspect_adapter
            from .layouts.adapters import open_adapter

            return Inspection(str(path), (), inspect_adapter(open_adapter(source), family))
        parts = open_source(source)
        found = without_strays([recognise(part) for part in parts])
        return Inspection(str(path), tuple(_inspected(part) for part in found))


def _inspected(found: Recognition) -> InspectedPart:
    checkpoint = found.checkpoint
    nearest = found.candidates[0]
    component = nearest.component
    becomes = f"{component.name}/ ({component.class_name}) by the table {nearest.table.name}"
    if not found.known:
        becomes = "nothing"
    elif (flaw := found.flaw or unfit(found)) is not None:
        becomes = f"nothing as it is: {flaw}"
    tensors = _collapsed(nearest.named(checkpoint))
    return InspectedPart(
        root=found.root if found.known else checkpoint.root,
        format=checkpoint.format,
        part=found.part,
        families=tuple(families()[name].title for name in found.families),
        evidence=_evidence(found),
        becomes=becomes,
        count=len(checkpoint.tensors),
        nbytes=sum(nbytes for _, _, _, nbytes in tensors),
        dtypes=dict(Counter(tensor.dtype for tensor in checkpoint.tensors.values())),
        tensors=tensors,
        missing=found.missing,
        unexpected=found.unexpected,
        skipped=dict(Counter(found.skipped.values())),
    )


def _evidence(found: Recognition) -> tuple[str, ...]:
    """Why the checkpoint is what it is said to be; of a UNet alone in a file also what it
    predicts."""
    if not found.known:
        return (f"nearest: {found.nearest}", *found.evidence)
    if not found.candidates[0].is_denoiser or not stands_alone(found.checkpoint):
        return found.evidence
    facts = list(found.evidence)
    metadata = found.checkpoint.metadata
    try:
        if predicted := prediction(found.families[0], found.checkpoint, None):
            facts.append(f"predicts {predicted.kind}: {predicted.evidence}")
            facts += [f"says of its schedule: {predicted.told}"] if predicted.configs else []
    except ConversionError:
        facts.append("nothing says what it predicts")
    size = image_size(metadata)
    if size is not None:
        facts.append(f"made for {size[0]} pixels: {size[1]}")
    return tuple(facts)


def _collapsed(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, int, str, int], ...]:
    """Collapsed keys with dtype and size; keys that differ in dtype are not put together."""
    by_dtype: dict[str, dict[str, int]] = {}
    for key, tensor in tensors.items():
        by_dtype.setdefault(tensor.dtype, {})[key] = tensor.nbytes
    return tuple(
        (pattern, len(keys), dtype, sum(map(nbytes.__getitem__, keys)))
        for dtype, nbytes in sorted(by_dtype.items())
        for pattern, keys in collapse(nbytes)
    )
