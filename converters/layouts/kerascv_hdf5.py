"""Keras models in HDF5: legacy files, `.weights.h5`, `.keras` archives and sharded weights."""

from __future__ import annotations

import struct
import zipfile
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

from ...errors import ConversionError, printable
from ...io.documents import read_json
from ..checkpoint import Checkpoint, SourceFile, Stored, Tensor
from ..readers.hdf5 import Dataset, Group, is_hdf5, read_hdf5
from .kerascv_component import OPTIMIZER, OTHER, Paths, Save
from .kerascv_layers import from_attributes, from_classes, keras_models, layer_class
from .source import Source

_MEMBER = "model.weights.h5"  # of a `.keras` archive
_ZIP_HEADER = 30  # bytes of a member's own header, before its name

_Names = tuple[str, ...]


def read_h5(source: Source) -> list[Checkpoint]:
    """The components of an HDF5 file, in any of Keras's layouts.

    Raises:
        ConversionError: it is damaged.
    """
    file = SourceFile(source.path)
    save = Save(source.path, "", [file], source.lora_alpha)
    return _read_tree(save, read_hdf5(file))


def read_archive(source: Source) -> list[Checkpoint]:
    """The components of a `.keras` zip, whose HDF5 member is stored as it is and read in place.

    Raises:
        ConversionError: it is damaged, or another kind of zip.
    """
    file = SourceFile(source.path)
    start, size = _stored_member(file, _MEMBER)
    if not is_hdf5(file, start):
        raise ConversionError(f"{source.path}: `{_MEMBER}` inside the archive is not an HDF5 file")
    save = Save(source.path, "", [file], source.lora_alpha)
    components = _read_tree(save, read_hdf5(file, start, size))
    for component in components:
        component.format = "Keras archive (.keras)"
    return components


def read_shards(source: Source) -> list[Checkpoint]:
    """The components of a sharded `.weights.json`, or of the folder of one.

    The union of its shards is one `.weights.h5` tree.

    Raises:
        ConversionError: index and shards disagree, or one of them is damaged.
    """
    path = source.path
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
        found = dict(_tensors(read_hdf5(file), file))
        for twice in found.keys() & paths.keys():
            raise ConversionError(f"{path}: `{'/'.join(map(printable, twice))}` is in two shards")
        paths |= found
    stored = sorted("/".join(("", *names)) for names in paths)
    for group in weight_map:
        place = bisect_left(stored, f"{group}/")
        if not stored[place : place + 1] or not stored[place].startswith(f"{group}/"):
            raise ConversionError(f"{path}: `{printable(group)}` is in none of the shards")
    save = Save(path, "sharded Keras weights (.weights.json)", files, source.lora_alpha)
    return _by_attribute(save, paths)


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
        with zipfile.ZipFile(file.path) as archive:
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


# --- layouts --------------------------------------------------------------------------------------


def _read_tree(save: Save, root: Group) -> list[Checkpoint]:
    """One HDF5 tree: legacy layout where a group lists `layer_names`, else layers by attribute."""
    weights = root.children.get("model_weights", root)
    if isinstance(weights, Group) and any(name.startswith("layer_names") for name in weights.attrs):
        whole = weights is not root
        form = "whole-model HDF5" if whole else "legacy HDF5 weights"
        return _legacy(replace(save, form=form), root, weights)
    paths = dict(_tensors(root, save.files[0]))
    return _by_attribute(replace(save, form="Keras weights (.weights.h5)"), paths)


def _by_attribute(save: Save, paths: Paths) -> list[Checkpoint]:
    """Components are the groups that directly hold Stable Diffusion blocks.

    They may lie at any depth: a trainer nests them.
    """
    roots = _roots(paths)
    save.check_number(len(roots))
    groups: dict[_Names, Paths] = defaultdict(dict)
    skipped: dict[str, str] = {}
    for names, tensor in paths.items():
        root = next((root for root in roots if _lies_in(names, root)), None)
        if names[0] == "optimizer" or "optimizer" in names[:-1]:
            skipped[tensor.name] = OPTIMIZER
        elif root is not None:
            groups[root][names[len(root) :]] = tensor
        else:
            skipped[tensor.name] = OTHER
    components = []
    for root, group in groups.items():
        leaves = save.placed(from_attributes, group)
        components.append(save.component("/".join(root), leaves, skipped))
    return components


def _roots(paths: Paths) -> list[_Names]:
    """The groups that directly hold blocks."""
    blocks = keras_models().blocks
    roots: dict[_Names, None] = {}
    for names in paths:
        for depth, name in enumerate(names[:-1]):
            if layer_class(name) in blocks and "optimizer" not in names[:depth]:
                roots[names[:depth]] = None
                break
    return list(roots)


def _lies_in(names: _Names, root: _Names) -> bool:
    """Whether a variable is one of a layer in a group, which has at least a name for its list."""
    return names[: len(root)] == root and len(names) > len(root) + 2


def _legacy(save: Save, root: Group, weights: Group) -> list[Checkpoint]:
    """Legacy layout: the layers of a component are listed.

    A trainer's save lists a whole component as one layer.
    """
    layers = _listed(weights, save.files[0])
    optimizer = _datasets(root.children.get("optimizer_weights"))
    skipped = {"/".join(names): OPTIMIZER for names, _ in optimizer}
    top_level = keras_models().top_level
    holders = {
        layer: paths
        for layer, paths in layers.items()
        if layer_class(layer) not in top_level and _holds_blocks(paths)
    }
    if holders:
        for layer, paths in layers.items():
            if layer not in holders:
                skipped |= {"/".join((layer, *names)): OTHER for names in paths}
    else:
        flat = {names: tensor for paths in layers.values() for names, tensor in paths.items()}
        if len(flat) < sum(map(len, layers.values())):
            raise ConversionError(f"{save.path}: two layers hold weights of the same name")
        holders = {"": flat} if _holds_blocks(flat) else {}
    save.check_number(len(holders))
    components = []
    for layer, paths in holders.items():
        leaves = save.placed(from_classes, paths)
        components.append(save.component(layer, leaves, skipped))
    return components


def _listed(weights: Group, file: SourceFile) -> dict[str, Paths]:
    """Layer -> its weights, as `layer_names` and `weight_names` list them."""
    layers: dict[str, Paths] = defaultdict(dict)
    for layer in _strings(weights, "layer_names", file):
        group = weights.children.get(layer)
        if layer in layers:
            raise ConversionError(f"{file.path}: layer `{printable(layer)}` is listed twice")
        if not isinstance(group, Group):
            raise ConversionError(
                f"{file.path}: layer `{printable(layer)}` is listed but not stored; is the file"
                " truncated?"
            )
        for name in _strings(group, "weight_names", file):
            dataset = _find(group, name)
            if dataset is None:
                raise ConversionError(
                    f"{file.path}: weight `{printable(name)}` is listed but not stored"
                )
            names = tuple(name.split("/"))
            layers[layer][names] = _tensor(names, dataset, file)
    return layers


def _holds_blocks(paths: Paths) -> bool:
    blocks = keras_models().blocks
    return any(layer_class(name) in blocks for names in paths for name in names[:-1])


# --- groups and datasets --------------------------------------------------------------------------


def _strings(group: Group, name: str, file: SourceFile) -> list[str]:
    """A list attribute; Keras splits one over 64 kB into `name0`, `name1`, ..."""
    chunks = [name] if name in group.attrs else []
    while f"{name}{len(chunks)}" in group.attrs:
        chunks.append(f"{name}{len(chunks)}")
    values: list[str] = []
    for chunk in chunks:
        value = group.attrs[chunk]
        if not _are_names(value):
            raise ConversionError(f"{file.path}: attribute `{chunk}` is not a list of names")
        values += value
    return values


def _find(group: Group, path: str) -> Dataset | None:
    node: Group | Dataset | None = group
    for segment in path.split("/"):
        node = node.children.get(segment) if isinstance(node, Group) else None
    return node if isinstance(node, Dataset) else None


def _tensors(group: Group, file: SourceFile) -> Iterator[tuple[_Names, Tensor]]:
    """Every variable in a group, by the names of the groups around it."""
    for names, dataset in _datasets(group):
        yield names, _tensor(names, dataset, file)


def _datasets(node: Group | Dataset | None, above: _Names = ()) -> Iterator[tuple[_Names, Dataset]]:
    if isinstance(node, Dataset):
        yield above, node
    elif node is not None:
        for name, child in node.children.items():
            yield from _datasets(child, (*above, name))


def _tensor(names: _Names, dataset: Dataset, file: SourceFile) -> Tensor:
    return Stored("/".join(names), dataset.dtype, dataset.shape, file, dataset.offset)
