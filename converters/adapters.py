"""The road of adapters: files of LoRA and its relatives -> modules -> one file, of other names or
of all of them together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..adapters.modules import Adapter
from ..errors import ConversionError
from ..io.atomic import check_apart
from ..mappings.conventions import conventions
from ..mappings.facts import facts
from ..mappings.families import Family, families
from ..mappings.layouts import CANONICAL
from .adapter_expansion import Expansion, expand
from .adapter_merge import Merge, Share, merge
from .checkpoint import Tensor
from .conversion import Conversion
from .factors import factors_of
from .layouts.adapters import AdapterFile, open_adapter, refuse_unfit
from .layouts.embeddings import open_embeddings
from .layouts.source import Source
from .outputs.adapters import Respelled, origin, respelled, write
from .outputs.adapters_record import RECORD
from .planning.plan import PlannedComponent
from .settings import Settings

_MERGED = "merged_from"  # the key of the header that names the adapters of a merge


def are_adapters(sources: Sequence[Source], settings: Settings) -> bool:
    """Whether what is converted are adapters, not models with factors beside their weights.

    A list of tensors that is neither is no adapter, unless an alpha speaks of factors.
    """
    if all(source.is_adapter for source in sources):
        return True
    return settings.lora_alpha is None and any(one.raw is not None for one in sources)


def convert_factors(
    components: Mapping[str, PlannedComponent],
    family: Family,
    output: Path,
    settings: Settings,
    progress: Callable[[int, int], None],
) -> Conversion:
    """Write the factors of LoRA that a model holds as an adapter, which leaves the weights out.

    Raises:
        ConversionError: there are none, or the convention has no name for one.
    """
    if settings.expand or settings.merge or settings.to == CANONICAL:
        raise ConversionError(
            "--merge and --expand are for adapters; take the factors out of the model first, with"
            " --to kohya or --to peft"
        )
    convention = conventions()[settings.to]
    file, adapter = factors_of(components, family, convention.name)
    made = respelled(file, adapter, convention)
    conversion = Conversion(family.name, {}, None if settings.dry_run else output)
    conversion.notes += described(adapter)
    conversion.notes.append(f"alpha {settings.lora_alpha:g}, as --lora-alpha says: no file does")
    if not settings.dry_run:
        written = write(made, output, settings, progress)
        conversion.report["files"] = {output.name: {"sha256": written.sha256}}
    file.checkpoint.check_unchanged()
    return conversion


def convert_adapters(
    sources: Sequence[Source],
    output: Path,
    settings: Settings,
    progress: Callable[[int, int], None],
) -> Conversion:
    """Write adapters as one, under the names of a convention: by default those that it has.

    Raises:
        ConversionError: anything a user can act on; nothing is left behind.
    """
    check_apart(output, [one.path for one in sources])
    strengths = _strengths(len(sources), settings)
    files = [_opened(source) for source in sources]
    made = _chosen(files, strengths, settings)
    conversion = Conversion(made.adapter.family, {}, None if settings.dry_run else output)
    conversion.notes += described(made.adapter)
    if made.merge is not None:
        conversion.notes.append(made.merge.note())
    hashed = settings.hashes and not settings.dry_run
    conversion.report["source"] = [
        {
            "path": file.path.name,
            "files": {one.path.name: one.sha256() for one in file.checkpoint.files}
            if hashed
            else {},
        }
        for file in files
    ]
    if not settings.dry_run:
        written = write(made.respelled, output, settings, progress)
        conversion.report["files"] = {output.name: {"sha256": written.sha256}}
    conversion.notes += [expansion.note() for expansion in made.expansions if expansion.modules]
    for file in files:
        file.checkpoint.check_unchanged()
    return conversion


def _strengths(count: int, settings: Settings) -> tuple[float, ...]:
    """How strongly each of so many adapters counts."""
    if not settings.merge:
        if count != 1:
            raise ConversionError(
                f"{count} adapters: name one, or --merge 0.7,0.4 with a strength for each"
            )
        return (1.0,)
    if len(settings.merge) != count:
        raise ConversionError(
            f"--merge: {len(settings.merge)} strengths are given for {count} adapters"
        )
    if 0 in settings.merge:
        raise ConversionError("--merge: a strength of 0; leave that adapter out")
    return settings.merge


def opened(path: Path) -> AdapterFile:
    """Open an adapter.

    Raises:
        ConversionError: it cannot be read, or is none.
    """
    return _opened(Source(path))


def _opened(source: Source) -> AdapterFile:
    if not source.is_adapter:
        raise ConversionError(
            f"{source.path}: not an adapter; `weightport inspect` says what it is"
        )
    return open_adapter(source)


class _Made(NamedTuple):
    """What is to be written, and how it came about."""

    adapter: Adapter[Tensor]
    respelled: Respelled
    expansions: list[Expansion]
    merge: Merge | None


def _chosen(files: Sequence[AdapterFile], strengths: Sequence[float], settings: Settings) -> _Made:
    """The adapters as one, of the family that they fit, under its new names.

    Of several families any will do where the names are the same.
    """
    made = [_made(files, some, strengths, settings) for some in _fitting(files, settings)]
    names: list[Any] = [[(out.key, out.shape) for out in one.respelled.outputs] for one in made]
    if any(name != names[0] for name in names):
        titles = ", ".join(families()[one.adapter.family].title for one in made)
        raise ConversionError(
            f"{files[0].path}: fits {titles}, which differ in names; say --family"
        )
    return made[0]


def _fitting(files: Sequence[AdapterFile], settings: Settings) -> list[tuple[Adapter[Tensor], ...]]:
    """The adapters, for each family that all of them fit."""
    found: list[dict[str, Adapter[Tensor]]] = []
    for file in files:
        adapters = file.fitting(settings.family)
        for adapter in adapters:
            refuse_unfit(file, adapter)
        found.append({adapter.family: adapter for adapter in adapters})
    common = [name for name in found[0] if all(name in some for some in found)]
    if not common:
        fits = "; ".join(
            f"{file.path} fits {', '.join(families()[name].title for name in some)}"
            for file, some in zip(files, found, strict=True)
        )
        raise ConversionError(f"the adapters are not for one model: {fits}")
    return [tuple(some[name] for some in found) for name in common]


def _made(
    files: Sequence[AdapterFile],
    adapters: Sequence[Adapter[Tensor]],
    strengths: Sequence[float],
    settings: Settings,
) -> _Made:
    """The adapters as one, of a family."""
    expansions = []
    shares = []
    for file, adapter, strength in zip(files, adapters, strengths, strict=True):
        if settings.expand:
            adapter, expansion = expand(adapter)
            expansions.append(expansion)
        shares.append(Share(file, adapter, strength))
    name = origin(adapters[0]) if settings.to == CANONICAL else settings.to
    convention = conventions()[name]
    if not convention.is_written:
        raise ConversionError(
            f"{files[0].path}: has {convention.title}'s names, which are read only; --to chooses"
            " others"
        )
    file = files[0]
    adapter = shares[0].adapter
    how = None
    if settings.merge:
        adapter, how = merge(shares)
        file = _of_all(files, strengths, settings)
    elif settings.expand:
        file = _with_metadata(file, _said(file))
    adapter = replace(adapter, bundled={**adapter.bundled, **_bundled(settings)})
    return _Made(adapter, respelled(file, adapter, convention), expansions, how)


def _bundled(settings: Settings) -> dict[str, Tensor]:
    """Embeddings to lie in the file, by their names there."""
    names = facts("embeddings")["bundled"]
    found: dict[str, Tensor] = {}
    for path in settings.embedding:
        file = open_embeddings(Source(Path(path)))
        for word in file.embeddings:
            for role, tensor in word.vectors.items():
                found[f"{word.token}.{names[role]}"] = tensor
    return found


def _of_all(
    files: Sequence[AdapterFile], strengths: Sequence[float], settings: Settings
) -> AdapterFile:
    """A file whose header names those that it is made of, and says nothing of one of them."""
    merged = [
        {"file": file.path.name, "strength": strength}
        for file, strength in zip(files, strengths, strict=True)
    ]
    if settings.hashes and not settings.dry_run:
        for entry, file in zip(merged, files, strict=True):
            entry["sha256"] = file.checkpoint.files[0].sha256()
    return _with_metadata(files[0], {"format": "pt", _MERGED: json.dumps(merged)})


def _said(file: AdapterFile) -> dict[str, str]:
    """A header, less what it says of a way back to other names: the factors are others now."""
    return {key: value for key, value in file.checkpoint.metadata.items() if key != RECORD}


def _with_metadata(file: AdapterFile, metadata: dict[str, str]) -> AdapterFile:
    return replace(file, checkpoint=replace(file.checkpoint, metadata=metadata))


def described(adapter: Adapter[Tensor]) -> list[str]:
    """What an adapter changes, a line for each component and flavour."""
    counts = Counter((module.component, module.title) for module in adapter.modules.values())
    return [
        f"{component}: {count} modules, {title}" for (component, title), count in counts.items()
    ]
