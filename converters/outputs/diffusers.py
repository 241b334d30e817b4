"""A diffusers repo with its report, staged so that it appears at once: what most people want."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ...io import atomic
from ...io.documents import read_json
from ..checkpoint import SourceFile
from ..conversion import Conversion, check_finite, total_nbytes
from ..layouts.diffusers_repo import class_name
from ..layouts.ldm_evidence import Prediction, image_size, prediction, stands_alone
from ..readers.sniff import INDEX
from ..repo.card import model_card
from ..repo.carried import carried_from
from ..repo.layout import write_repo
from ..repo.report import conversion_report
from ..settings import Settings
from ..writers.safetensors import WrittenFile, write_safetensors
from .ldm_residue import residue_of, residue_outputs, residue_path


def write(
    conversion: Conversion,
    output: Path,
    settings: Settings,
    progress: Callable[[int, int], None],
) -> None:
    """Write the repo and its `conversion.json`; fills in the conversion's report and notes."""
    total = total_nbytes(conversion, settings.dtype)
    predicted, settings = evidence(conversion, settings)
    whole = settings.component is None
    carried = carried_from(conversion.architecture, conversion.components, whole, conversion.base)
    with (
        _residue(conversion, output, settings),
        atomic.folder(output, settings.overwrite, settings.sync) as folder,
    ):
        atomic.check_space(output.absolute().parent, total + (carried.nbytes if carried else 0))
        written = write_repo(
            folder,
            conversion.architecture,
            conversion.components,
            settings,
            predicted,
            carried,
            lambda n: progress(n, total),
        )
        check_finite(conversion, written.nonfinite, written.overflowed, settings)
        conversion.notes += written.notes
        if conversion.baking:
            conversion.notes += conversion.baking.notes()
        _write_report(conversion, folder, settings, written.files)


def describe(conversion: Conversion, settings: Settings) -> None:
    """Fill in what a report says before anything is read or written: sources, tables, options."""
    _, settings = evidence(conversion, settings)
    conversion.report = _report(conversion, settings)


def pipeline_class(folder: Path) -> str | None:
    """The class that the index of a repo of ours names; a ControlNet alone has no index."""
    index = folder / INDEX
    return class_name(read_json(index, "model_index")) if index.exists() else None


# --- what the file of the denoiser says -----------------------------------------------------------


def evidence(conversion: Conversion, settings: Settings) -> tuple[Prediction | None, Settings]:
    """What the UNet predicts, and the settings with the image size; takes notes of both."""
    return _prediction(conversion, settings), _with_image_size(conversion, settings)


def _prediction(conversion: Conversion, settings: Settings) -> Prediction | None:
    """What the UNet of a single file predicts, or what is asked for.

    None for others, whose schedulers are known.
    """
    denoiser = conversion.denoiser
    if denoiser is None:
        return None
    checkpoint = denoiser.parts[0].checkpoint
    found = prediction(conversion.family, checkpoint, settings.prediction_type)
    if found:
        conversion.notes.append(f"the UNet predicts {found.kind}: {found.evidence}")
    if found and found.configs:
        conversion.notes.append(f"the file says of its schedule: {found.told}")
    return found


def _with_image_size(conversion: Conversion, settings: Settings) -> Settings:
    """The settings with the image size that a single file states, unless one was asked for."""
    denoiser = conversion.denoiser
    if denoiser is None or settings.image_size is not None:
        return settings
    checkpoint = denoiser.parts[0].checkpoint
    found = image_size(checkpoint.metadata) if stands_alone(checkpoint) else None
    if found is None:
        return settings
    size, evidence = found
    conversion.notes.append(f"made for {size} pixels: {evidence}")
    return replace(settings, image_size=size)


# --- what lies beside the weights -----------------------------------------------------------------


@contextlib.contextmanager
def _residue(conversion: Conversion, output: Path, settings: Settings) -> Iterator[None]:
    """Beside the repo, what it cannot hold of an original checkpoint.

    Appears after the repo, if at all.
    """
    wanted = settings.residue and settings.component is None
    rest = residue_of(conversion.components, conversion.architecture) if wanted else None
    if rest is None:
        yield
        return
    path = residue_path(output)
    with atomic.file(path, settings.overwrite, settings.sync) as staging:
        outputs, metadata = residue_outputs(rest)
        write_safetensors(
            staging.parent, staging.name, outputs, max_shard_size=1 << 62, metadata=metadata
        )
        yield
    if rest.tensors:
        conversion.notes.append(
            f"what a repo cannot hold ({len(rest.tensors)} tensors) is in {path}, for the way back"
        )


def _write_report(
    conversion: Conversion, folder: Path, settings: Settings, weights: Mapping[str, WrittenFile]
) -> None:
    """`conversion.json` and the model card."""
    hashes = settings.hashes
    conversion.report = _report(
        conversion,
        settings,
        sha256=_digests(conversion) if hashes else {},
        files=_files(folder, weights, hashes),
        adapters=conversion.baking.report(hashes) if conversion.baking else [],
        embeddings=[one.report(hashes) for one in conversion.taught],
    )
    text = json.dumps(conversion.report, indent=1, ensure_ascii=False)
    (folder / "conversion.json").write_text(text + "\n", encoding="utf-8")
    card = model_card(conversion.report, pipeline_class(folder))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _report(
    conversion: Conversion,
    settings: Settings,
    *,
    sha256: Mapping[str, str] = MappingProxyType({}),
    files: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    adapters: Sequence[Mapping[str, Any]] = (),
    embeddings: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """What `conversion.json` says, see `conversion_report`."""
    return conversion_report(
        family=conversion.family,
        components=conversion.components,
        sha256=sha256,
        options=replace(settings, base_model=_base_model(conversion, settings)).report(),
        files=files,
        notes=[*conversion.notes, *(f"lacks {gap}" for gap in conversion.lacks)],
        adapters=adapters,
        embeddings=embeddings,
    )


def _base_model(conversion: Conversion, settings: Settings) -> str | None:
    """The Hub id of the model that this one comes from.

    As given, or the one that the source layout's programs start from.
    """
    if settings.base_model:
        return settings.base_model
    for component in conversion.components.values():
        known = component.layout.base_models.get(conversion.family)
        if known is not None:
            return known
    return None


def _digests(conversion: Conversion) -> dict[str, str]:
    """sha256 of every source file that was used."""
    digests = {}
    for component in conversion.components.values():
        for part in component.parts:
            for file in part.checkpoint.files:
                digests[str(file.path)] = file.sha256()
    return digests


def _files(
    folder: Path, weights: Mapping[str, WrittenFile], hashes: bool
) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of the repo; those of weights were computed while writing."""
    described: dict[str, dict[str, Any]] = {}
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = str(path.relative_to(folder))
        described[name] = {"nbytes": path.stat().st_size}
        if hashes and name in weights:
            described[name]["sha256"] = weights[name].sha256
        elif hashes:
            described[name]["sha256"] = SourceFile(path).sha256()
    return described
