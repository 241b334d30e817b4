"""What kind of file a path is, told by its content; only an index of shards by its name."""

from __future__ import annotations

from pathlib import Path

from ...errors import ConversionError
from ...io.weight_files import is_index
from ..checkpoint import SourceFile
from .hdf5 import is_hdf5
from .tensorflow import find_bundle
from .torch_file import is_torch

# first bytes -> what people have when they believe it is a checkpoint
_STRANGERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; run `git lfs pull`"),
    (b"<", "an HTML or XML page, probably a failed download; download the file again"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"GGUF", "a GGUF file, which is not supported"),
    (b"\x93NUMPY", "a numpy array, not a checkpoint"),
)


def sniff(path: Path) -> str:
    """What a path is.

    One of `hdf5`, `zip`, `json`, `safetensors`, `torch`, `tensorflow`, `repo` (a diffusers folder)
    or `model` (one folder of a repo).

    Raises:
        ConversionError: the path does not exist or is nothing that can be read; says what it looks
            like.
    """
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return "repo"
        if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
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
        raise ConversionError(
            f"{path}: a folder, but neither a diffusers repo nor a SavedModel or TensorFlow"
            " checkpoint"
        )
    if not path.exists():
        if find_bundle(path):
            return "tensorflow"
        raise ConversionError(f"{path}: no such file")
    file = SourceFile(path)
    try:
        return _sniff_file(file)
    finally:
        file.close()


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
    if len(head) > 9 and header_size < file.size and head[8:9] == b"{":
        return "safetensors"
    text = head.lstrip()
    for magic, meaning in _STRANGERS:
        if text.startswith(magic):
            raise ConversionError(f"{file.path}: {meaning}")
    if text.startswith(b"{"):
        # two indexes of shards, alike but for their names
        return "safetensors" if is_index(file.path.name) else "json"
    is_text = all(byte >= 0x20 or byte in b"\t\r\n" for byte in head)
    kind = "a text file" if is_text else "in no format known here"
    raise ConversionError(f"{file.path}: {kind}, not a checkpoint")
