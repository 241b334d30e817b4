"""Opens what the user names: Keras or original files, a TensorFlow folder or a repo, as one
checkpoint per part."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import ConversionError
from ..checkpoint import Checkpoint
from ..readers.safetensors import is_index, read_safetensors
from ..readers.sniff import sniff
from ..readers.torch_file import read_torch
from .kerascv import read_keras
from .kerascv_leaves import Lora
from .ldm import is_ldm, named_by_diffusers, refuse_unsupported, split

_STEMS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "controlnet": "diffusion_pytorch_model",
}


def open_source(path: Path, lora: Lora | None = None, ema: bool = False) -> list[Checkpoint]:
    """The components that a path holds.

    Args:
        lora: how LoRA factors in a Keras file are treated.
        ema: take the moving average of an original checkpoint's weights.

    Raises:
        ConversionError: nothing readable is there.
    """
    kind = sniff(path)
    if kind == "repo":
        return _open_repo(path)
    if kind == "model":
        return [_open_model(path, "")]
    if kind in ("safetensors", "torch"):
        raw = read_safetensors(path) if kind == "safetensors" else read_torch(path)
        refuse_unsupported(raw)
        return split(raw, ema) if is_ldm(raw) else [named_by_diffusers(raw)]
    return read_keras(path, kind, lora or Lora())


def _open_repo(path: Path) -> list[Checkpoint]:
    """The weight files of a diffusers repo: the main variant of each component."""
    checkpoints = [
        _open_model(path, component) for component in _STEMS if _weights(path / component)
    ]
    if not checkpoints:
        raise ConversionError(
            f"{path}: a diffusers repo without safetensors weights in unet/, vae/ or text_encoder/"
        )
    return checkpoints


def _weights(folder: Path) -> Path | None:
    """The main variant of the weights in one folder of a repo."""
    for stem in dict.fromkeys(_STEMS.values()):
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        variants = sorted(path for path in folder.glob(f"{stem}.*.json") if is_index(path))
        for file in (index, single, *variants, *sorted(folder.glob(f"{stem}.*.safetensors"))):
            if file.is_file():
                return file
    return None


def _open_model(repo: Path, component: str) -> Checkpoint:
    """The model in one folder of a repo, or in the repo itself."""
    file = _weights(repo / component)
    if file is None:
        raise ConversionError(
            f"{repo}: no weights named {' or '.join(dict.fromkeys(_STEMS.values()))}.safetensors"
        )
    checkpoint = read_safetensors(file)
    checkpoint.layout = "diffusers"
    for opened in checkpoint.files:
        inside(repo, opened.path)
    checkpoint.path, checkpoint.root = repo, component
    checkpoint.format = "diffusers repo" if component else "diffusers model"
    return checkpoint


def inside(repo: Path, file: Path) -> Path:
    """The file, if it lies in the repo or, for a snapshot in the Hub's cache, among the blobs that
    belong to it.

    Raises:
        ConversionError: the file is a link to elsewhere, whose content would end up in the output.
    """
    root, real = Path(os.path.realpath(repo)), Path(os.path.realpath(file))
    snapshots = next((path for path in root.parents if path.name == "snapshots"), None)
    blobs = snapshots.parent / "blobs" if snapshots else root
    if not {root, blobs} & set(real.parents):
        raise ConversionError(
            f"{file}: a link that leads out of the repo; put the file itself there"
        )
    return file
