"""diffusers' own layout: a repository, a folder of one, or a file under its names."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ...errors import ConversionError
from ...io.weight_files import SAFETENSORS_STEMS, find_main_weights
from ...mappings.families import component_names
from ..checkpoint import Checkpoint
from ..readers.safetensors import read_safetensors
from .ldm_extras import stated, without_extras
from .source import Source


def reads(source: Source) -> bool:
    """Whether this is a repository, a folder of one, or a bare file of tensors."""
    return source.kind in ("repo", "model") or source.raw is not None


def parts(source: Source) -> list[Checkpoint]:
    """The models of a repository, or the one of a folder or file.

    Raises:
        ConversionError: no weights are there, or they lie elsewhere.
    """
    if source.raw is not None:
        return [_file(source.raw)]
    if source.kind == "model":
        return [_model(source.path, "")]
    models = [
        _model(source.path, name) for name in component_names() if _weights(source.path / name)
    ]
    if not models:
        raise ConversionError(
            f"{source.path}: a diffusers repo without safetensors weights in unet/, vae/ or"
            " text_encoder/"
        )
    return models


def inside(repo: Path, file: Path) -> Path:
    """The file, if it lies in the repo or among the blobs that belong to it in the Hub's cache.

    Raises:
        ConversionError: the file is a link to elsewhere, whose content would end up in the output.
    """
    root = Path(os.path.realpath(repo))
    real = Path(os.path.realpath(file))
    snapshots = next((path for path in root.parents if path.name == "snapshots"), None)
    blobs = snapshots.parent / "blobs" if snapshots else root
    if not {root, blobs} & set(real.parents):
        raise ConversionError(
            f"{file}: a link that leads out of the repo; put the file itself there"
        )
    return file


def _file(raw: Checkpoint) -> Checkpoint:
    """A file of one part; what is not the model is left out, markers become metadata."""
    skipped = dict(raw.skipped)
    tensors = without_extras(raw.tensors, skipped)
    return replace(raw, layout="diffusers", tensors=tensors, skipped=skipped, metadata=stated(raw))


def _model(repo: Path, folder: str) -> Checkpoint:
    """The model in one folder of a repo, or in the repo itself."""
    file = _weights(repo / folder)
    if file is None:
        raise ConversionError(
            f"{repo}: no weights named {' or '.join(SAFETENSORS_STEMS)}.safetensors"
        )
    checkpoint = read_safetensors(file)
    for opened in checkpoint.files:
        inside(repo, opened.path)
    checkpoint.layout = "diffusers"
    checkpoint.path = repo
    checkpoint.root = folder
    checkpoint.format = "diffusers repo" if folder else "diffusers model"
    return checkpoint


def _weights(folder: Path) -> Path | None:
    """The main variant of the weights in one folder of a repo."""
    if not folder.is_dir():
        return None
    name = find_main_weights([path.name for path in folder.iterdir() if path.is_file()])
    return folder / name if name else None
