"""What kind of file or folder a path is, told by its content; only an index of shards by its
name."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import ConversionError
from ...io.weight_files import find_main_weights, index_suffix
from ..checkpoint import SourceFile
from .bundles import find_bundle
from .safetensors import MAX_HEADER
from .signatures import is_hdf5, is_torch

INDEX = "model_index.json"
CONFIG = "config.json"
KERAS = ("hdf5", "zip", "json")
"""Kinds of files that Keras writes."""
_INDEXES = {"safetensors": "safetensors", "bin": "torch"}  # suffix of the shards -> what they are


def sniff(path: Path) -> str:
    """What a path is.

    A file: `hdf5`, `zip`, `json`, `safetensors`, `torch`, `tensorflow`, or `unknown`. A folder:
    `tensorflow`, `json`, `repo` (with models in its folders), `model` (one of those), or `folder`.

    Raises:
        ConversionError: the path does not exist, or is damaged.
    """
    if path.is_dir():
        return _sniff_folder(path)
    if not path.exists():
        if find_bundle(path):
            return "tensorflow"
        raise ConversionError(f"{path}: no such file")
    file = SourceFile(path)
    try:
        return _sniff_file(file)
    finally:
        file.close()


def file_names(folder: Path) -> list[str]:
    """The files of a folder, and links, in order."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_symlink() or entry.is_file())


def folder_names(folder: Path) -> list[str]:
    """The folders in a folder, in order."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def is_model(folder: Path) -> bool:
    """Whether a folder holds the weights of one model, and its config."""
    return (folder / CONFIG).is_file() and find_main_weights(file_names(folder)) is not None


def _sniff_folder(path: Path) -> str:
    if (path / INDEX).is_file():
        return "repo"
    if is_model(path):
        return "model"
    if find_bundle(path):
        return "tensorflow"
    if any(path.glob("*.weights.json")):
        return "json"
    if (path / "saved_model.pb").is_file():
        raise ConversionError(
            f"{path}: a SavedModel, but variables/variables.index is missing or damaged;"
            " download the whole folder"
        )
    if any(is_model(path / name) for name in folder_names(path)):
        return "repo"
    return "folder"


def _sniff_file(file: SourceFile) -> str:
    head = file.read(0, min(file.size, 64))
    if not head:
        raise ConversionError(f"{file.path}: the file is empty")
    if is_hdf5(file):
        return "hdf5"
    if is_torch(file):
        return "torch"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if find_bundle(file.path):
        return "tensorflow"
    header_size = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_size <= MAX_HEADER:  # also where the file ends before it
        return "safetensors"
    if head.lstrip().startswith(b"{"):
        # indexes of shards, alike but for their names
        return _INDEXES.get(index_suffix(file.path.name) or "", "json")
    return "unknown"
