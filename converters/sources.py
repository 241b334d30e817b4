"""Opens what the user names: a Keras file, a TensorFlow folder or a diffusers repo, as one checkpoint per component."""

from __future__ import annotations

import os
from pathlib import Path

from .checkpoint import Checkpoint
from .errors import ConversionError
from .keras import read_keras
from .keras_leaves import Lora
from .ldm import is_ldm, split
from .safetensors import read_safetensors
from .sniff import sniff
from .torch_file import read_torch

_STEMS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
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
    if kind in ("safetensors", "torch"):
        raw = read_safetensors(path) if kind == "safetensors" else read_torch(path)
        return split(raw, ema) if is_ldm(raw) else [_named(raw, "diffusers")]
    return read_keras(path, kind, lora or Lora())


def _open_repo(path: Path) -> list[Checkpoint]:
    """The weight files of a diffusers repo: the main variant of each component."""
    checkpoints = []
    for component, stem in _STEMS.items():
        index = path / component / f"{stem}.safetensors.index.json"
        single = path / component / f"{stem}.safetensors"
        variants = sorted((path / component).glob(f"{stem}.*.safetensors"))
        file = next((file for file in (index, single, *variants) if file.is_file()), None)
        if file is None:
            continue
        checkpoint = _named(read_safetensors(file), "diffusers")
        for opened in checkpoint.files:
            inside(path, opened.path)
        checkpoint.path, checkpoint.format, checkpoint.root = path, "diffusers repo", component
        checkpoints.append(checkpoint)
    if not checkpoints:
        raise ConversionError(f"{path}: a diffusers repo without safetensors weights in unet/, vae/ or text_encoder/")
    return checkpoints


def inside(repo: Path, file: Path) -> Path:
    """The file, if it lies in the repo or, for a snapshot in the Hub's cache, among the blobs that belong to it.

    Raises:
        ConversionError: the file is a link to elsewhere, whose content would end up in the output.
    """
    root, real = Path(os.path.realpath(repo)), Path(os.path.realpath(file))
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not {root, blobs} & set(real.parents):
        raise ConversionError(f"{file}: a link that leads out of the repo; put the file itself there")
    return file


def _named(checkpoint: Checkpoint, layout: str) -> Checkpoint:
    checkpoint.layout = layout
    return checkpoint
