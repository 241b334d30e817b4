"""What Keras files hold, whatever the model: `.h5`, `.weights.h5`, `.keras`, sharded weights."""

from __future__ import annotations

import struct
import zipfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from ...errors import ConversionError, printable
from ...io.documents import MAX_CONFIG, parse_json, read_json
from ..checkpoint import SourceFile, SourceReader, Stored, Tensor
from ..readers.hdf5 import Dataset, Group, read_hdf5
from ..readers.signatures import is_hdf5
from ..readers.sniff import CONFIG
from .keras_names import Paths

WEIGHTS = "Keras weights (.weights.h5)"
ARCHIVE = "Keras archive (.keras)"
SHARDS = "sharded Keras weights (.weights.json)"

_MEMBER = "model.weights.h5"  # of a `.keras` archive, and of a preset's folder
_INDEX = "model.weights.json"
_ZIP_HEADER = 30  # bytes of a member's own header, before its name

_Names = tuple[str, ...]


@dataclass(frozen=True)
class KerasFile:
    """The variables in a file or in shards, by the groups around them.

    Attributes:
        path: what the user named.
        form: a human name of the file format.
        files: every file that was opened.
        root: the outermost group; None of shards, whose union is one tree.
    """

    path: Path
    form: str
    files: list[SourceFile]
    root: Group | None
    paths: Paths

    @cached_property
    def config(self) -> Mapping[str, Any] | None:
        """What Keras says of the model, in the archive or in the folder of a preset.

        Raises:
            ConversionError: it is damaged.
        """
        if self.form == ARCHIVE:
            return _config_within(self.files[0])
        return _config_beside(_shard_index(self.path) if self.form == SHARDS else self.path)


def read_keras(path: Path, kind: str) -> KerasFile:
    """A file of Keras.

    Args:
        kind: one of `KERAS`.

    Raises:
        ConversionError: it is damaged, or its index and shards disagree.
    """
    return _READERS[kind](path)


def _read_hdf5(path: Path) -> KerasFile:
    file = SourceFile(path)
    root = read_hdf5(file)
    return KerasFile(path, WEIGHTS, [file], root, dict(tensors(root, file)))


def _read_archive(path: Path) -> KerasFile:
    """A `.keras` zip, whose HDF5 member is stored as it is and read in place."""
    file = SourceFile(path)
    start, size = _stored_member(file, _MEMBER)
    if not is_hdf5(file, start):
        raise ConversionError(f"{path}: `{_MEMBER}` inside the archive is not an HDF5 file")
    root = read_hdf5(file, start, size)
    return KerasFile(path, ARCHIVE, [file], root, dict(tensors(root, file)))


def _read_shards(path: Path) -> KerasFile:
    """A sharded `.weights.json`, or the folder of one."""
    index = _shard_index(path)
    weight_map = _weight_map(index)
    names = [name for shards in weight_map.values() for name in shards]
    paths: Paths = {}
    files: list[SourceFile] = []
    for name in dict.fromkeys(names):
        if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
            raise ConversionError(f"{path}: shard `{printable(name)}` is not a plain file name")
        file = SourceFile(index.parent / name)
        files.append(file)
        found = dict(tensors(read_hdf5(file), file))
        for twice in found.keys() & paths.keys():
            raise ConversionError(f"{path}: `{'/'.join(map(printable, twice))}` is in two shards")
        paths |= found
    known = sorted("/".join(("", *names)) for names in paths)
    for group in weight_map:
        place = bisect_left(known, f"{group}/")
        if not known[place : place + 1] or not known[place].startswith(f"{group}/"):
            raise ConversionError(f"{path}: `{printable(group)}` is in none of the shards")
    return KerasFile(path, SHARDS, files, None, paths)


_READERS = {"hdf5": _read_hdf5, "zip": _read_archive, "json": _read_shards}


# --- the config of the model ----------------------------------------------------------------------


def _config_beside(weights: Path) -> Mapping[str, Any] | None:
    """The config in the folder of a preset."""
    config = weights.with_name(CONFIG)
    if weights.name not in (_MEMBER, _INDEX) or not config.is_file():
        return None
    return read_json(config, limit=MAX_CONFIG)


def _config_within(file: SourceFile) -> Mapping[str, Any] | None:
    """The config in an archive."""
    start, size = _stored_member(file, CONFIG)
    if size > MAX_CONFIG:
        raise ConversionError(f"{file.path}: `{CONFIG}` has {size} bytes, too many for a config")
    return parse_json(file.read(start, size), f"{file.path}: {CONFIG}")


# --- containers -----------------------------------------------------------------------------------


def _stored_member(file: SourceFile, name: str) -> tuple[int, int]:
    """(offset, size) of an uncompressed zip member."""
    info = _member(file, name)
    header = file.read(info.header_offset, _ZIP_HEADER)
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    start = info.header_offset + _ZIP_HEADER + name_length + extra_length
    if (
        header[:4] != b"PK\x03\x04"
        or file.read(info.header_offset + _ZIP_HEADER, name_length) != name.encode()
    ):
        raise ConversionError(f"{file.path}: the zip directory and the member `{name}` disagree")
    if info.compress_size != info.file_size or start + info.file_size > file.size:
        raise ConversionError(
            f"{file.path}: damaged zip archive (the size of `{name}` is wrong); is it truncated?"
        )
    return start, info.file_size


def _member(file: SourceFile, name: str) -> zipfile.ZipInfo:
    """What the directory of a zip says of its one member of a name."""
    try:
        with zipfile.ZipFile(SourceReader(file)) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ConversionError(
            f"{file.path}: damaged zip archive ({printable(error)}); is it truncated?"
        ) from None
    found = [info for info in members if info.filename == name]
    if not found:
        names = [info.filename for info in members]
        hint = f"its members: {printable(names)}"
        if any(member.endswith("data.pkl") for member in names):
            hint = "a PyTorch checkpoint"
        raise ConversionError(
            f"{file.path}: a zip archive without `{name}`, so not a .keras file ({hint})"
        )
    info = found[0]
    if len(found) > 1 or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ConversionError(
            f"{file.path}: `{name}` is compressed, encrypted or stored twice, which Keras never"
            " writes"
        )
    return info


def _shard_index(path: Path) -> Path:
    if path.is_file():
        return path
    indexes = sorted(path.glob("*.weights.json"))
    if len(indexes) != 1:
        raise ConversionError(
            f"{path}: holds {len(indexes)} `.weights.json` files; name one of them"
        )
    return indexes[0]


def _weight_map(path: Path) -> dict[str, list[str]]:
    """Group of variables -> the shards that hold it."""
    shards: dict[str, list[str]] = {}
    for group, entry in _entries(path).items():
        names = [entry] if isinstance(entry, str) else entry
        if not _are_names(names):
            shards.clear()
            break
        shards[group] = names
    if not shards:
        raise ConversionError(
            f"{path}: a JSON file, but not a sharded Keras `.weights.json` with a `weight_map`"
        )
    return shards


def _entries(path: Path) -> Mapping[str, object]:
    """The `weight_map` of an index, empty if it has none."""
    entries = read_json(path).get("weight_map")
    return entries if isinstance(entries, dict) else {}


def _are_names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


# --- groups and datasets --------------------------------------------------------------------------


def tensors(group: Group, file: SourceFile) -> Iterator[tuple[_Names, Tensor]]:
    """Every variable in a group, by the names of the groups around it."""
    for names, dataset in datasets(group):
        yield names, stored(names, dataset, file)


def datasets(node: Group | Dataset | None, above: _Names = ()) -> Iterator[tuple[_Names, Dataset]]:
    """Every array in a group, by the names of the groups around it."""
    if isinstance(node, Dataset):
        yield above, node
    elif node is not None:
        for name, child in node.children.items():
            yield from datasets(child, (*above, name))


def stored(names: _Names, dataset: Dataset, file: SourceFile) -> Tensor:
    """An array in a file as a tensor."""
    return Stored("/".join(names), dataset.dtype, dataset.shape, file, dataset.offset)
