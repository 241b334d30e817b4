"""Reads every file a KerasCV user has into one `Checkpoint` per component, without Keras,
TensorFlow or HDF5 libraries.

Legacy `.h5` and whole-model `.h5`, `.weights.h5` in its layouts, `.keras` archives, sharded
`.weights.json`, TensorFlow checkpoints, SavedModels and Keras 3 exports. Keys are canonical (see
keras_layers.py); optimizer state is skipped, and every skipped tensor is named with the reason. See
docs/formats.md.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ...errors import ConversionError, printable
from ..checkpoint import DTYPES, Checkpoint, SourceFile, Stored, Tensor
from ..readers.hdf5 import Dataset, Group, is_hdf5, read_hdf5
from ..readers.tensorflow import Bundle, find_bundle, read_bundle
from .kerascv_layers import (
    Leaves,
    from_attributes,
    from_classes,
    from_graph,
    graph_components,
    keras_models,
    layer_class,
)
from .kerascv_leaves import Lora, leaf_tensors

_OPTIMIZER = "optimizer state (and moving averages), not weights"
_OTHER = "a variable of the saved object itself, not of a component's layer"
_Paths = dict[tuple[str, ...], Tensor]


def read_keras(path: Path, kind: str, lora: Lora) -> list[Checkpoint]:
    """The components in a Keras file, recognised by content (`kind` comes from `sniff`).

    Raises:
        ConversionError: the file is damaged, hostile, or holds no layers of a Stable Diffusion
            component.
    """
    readers = {
        "hdf5": _read_h5,
        "zip": _read_archive,
        "json": _read_shards,
        "tensorflow": _read_tensorflow,
    }
    components = readers[kind](path, lora)
    if not components:
        raise ConversionError(
            f"{path}: a Keras file, but none of its layers belong to a KerasCV Stable Diffusion"
            " component"
        )
    if len(components) == 1:
        components[0].root = ""  # nothing to tell apart
    return components


# --- HDF5 -----------------------------------------------------------------------------------------


def _read_h5(path: Path, lora: Lora) -> list[Checkpoint]:
    file = SourceFile(path)
    root = read_hdf5(file)
    return _read_tree(path, [file], root, lora)


def _read_archive(path: Path, lora: Lora) -> list[Checkpoint]:
    """A `.keras` zip: its HDF5 member is stored uncompressed and read in place."""
    file = SourceFile(path)
    start, size = _stored_member(file, "model.weights.h5")
    if not is_hdf5(file, start):
        raise ConversionError(f"{path}: `model.weights.h5` inside the archive is not an HDF5 file")
    components = _read_tree(path, [file], read_hdf5(file, start, size), lora)
    for component in components:
        component.format = "Keras archive (.keras)"
    return components


def _stored_member(file: SourceFile, name: str) -> tuple[int, int]:
    """(offset, size) of an uncompressed zip member."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            members = [info for info in archive.infolist() if info.filename == name]
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ConversionError(
            f"{file.path}: damaged zip archive ({printable(error)}); is it truncated?"
        ) from None
    if not members:
        hint = (
            "a PyTorch checkpoint"
            if any(n.endswith("data.pkl") for n in names)
            else f"its members: {printable(names)}"
        )
        raise ConversionError(
            f"{file.path}: a zip archive without `{name}`, so not a .keras file ({hint})"
        )
    info = members[0]
    if len(members) > 1 or info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise ConversionError(
            f"{file.path}: `{name}` is compressed, encrypted or stored twice, which Keras never"
            " writes"
        )
    header = file.read(info.header_offset, 30)
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    if (
        header[:4] != b"PK\x03\x04"
        or file.read(info.header_offset + 30, name_length) != name.encode()
    ):
        raise ConversionError(f"{file.path}: the zip directory and the member `{name}` disagree")
    start = info.header_offset + 30 + name_length + extra_length
    if info.compress_size != info.file_size or start + info.file_size > file.size:
        raise ConversionError(
            f"{file.path}: damaged zip archive (the size of `{name}` is wrong); is it truncated?"
        )
    return start, info.file_size


def _read_shards(path: Path, lora: Lora) -> list[Checkpoint]:
    """A sharded `.weights.json`, or the folder of one: the union of its shards is one `.weights.h5`
    tree."""
    index = _shard_index(path)
    weight_map = _weight_map(index)
    names = [name for shards in weight_map.values() for name in shards]
    paths: _Paths = {}
    files: list[SourceFile] = []
    for name in dict.fromkeys(names):
        if Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
            raise ConversionError(f"{path}: shard `{printable(name)}` is not a plain file name")
        file = SourceFile(index.parent / name)
        files.append(file)
        found = dict(_datasets(read_hdf5(file), file))
        for twice in found.keys() & paths.keys():
            raise ConversionError(f"{path}: `{'/'.join(map(printable, twice))}` is in two shards")
        paths |= found
    missing = [
        key
        for key in weight_map
        if not any("/".join(("", *p)).startswith(f"{key}/") for p in paths)
    ]
    if missing:
        raise ConversionError(f"{path}: `{printable(missing[0])}` is in none of the shards")
    return _attribute_components(path, files, paths, "sharded Keras weights (.weights.json)", lora)


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
    try:
        document = json.loads(path.read_text()) if path.stat().st_size < 64 << 20 else None
    except (ValueError, RecursionError):
        document = None
    entries = document.get("weight_map") if isinstance(document, dict) else None
    shards = (
        {key: [v] if isinstance(v, str) else v for key, v in entries.items()}
        if isinstance(entries, dict)
        else {}
    )
    if not shards or not all(
        isinstance(v, list) and all(isinstance(name, str) for name in v) for v in shards.values()
    ):
        raise ConversionError(
            f"{path}: a JSON file, but not a sharded Keras `.weights.json` with a `weight_map`"
        )
    return shards


def _read_tree(path: Path, files: list[SourceFile], root: Group, lora: Lora) -> list[Checkpoint]:
    """One HDF5 tree: legacy layout where a group lists `layer_names`, else layers by attribute."""
    weights = root.children.get("model_weights", root)
    if isinstance(weights, Group) and any(name.startswith("layer_names") for name in weights.attrs):
        whole = weights is not root
        return _legacy_components(
            path, files, root, weights, "whole-model HDF5" if whole else "legacy HDF5 weights", lora
        )
    paths = dict(_datasets(root, files[0]))
    return _attribute_components(path, files, paths, "Keras weights (.weights.h5)", lora)


def _datasets(
    group: Group, file: SourceFile, above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    for name, child in group.children.items():
        if isinstance(child, Group):
            yield from _datasets(child, file, (*above, name))
        else:
            yield (*above, name), _tensor((*above, name), child, file)


def _tensor(path: tuple[str, ...], dataset: Dataset, file: SourceFile) -> Tensor:
    return Stored("/".join(path), dataset.dtype, dataset.shape, file, dataset.offset)


def _attribute_components(
    path: Path, files: list[SourceFile], paths: _Paths, form: str, lora: Lora
) -> list[Checkpoint]:
    """Components are the groups that directly hold Stable Diffusion blocks, at any depth (a trainer
    nests them)."""
    roots: dict[tuple[str, ...], None] = {}
    for key in paths:
        for depth, segment in enumerate(key[:-1]):
            if layer_class(segment) in keras_models().blocks and "optimizer" not in key[:depth]:
                roots[key[:depth]] = None
                break
    groups: dict[tuple[str, ...], _Paths] = defaultdict(dict)
    skipped: dict[str, str] = {}
    for key, tensor in paths.items():
        root = next(
            (root for root in roots if key[: len(root)] == root and len(key) > len(root) + 2), None
        )
        if key[0] == "optimizer" or "optimizer" in key[:-1]:
            skipped[tensor.name] = _OPTIMIZER
        elif root is not None:
            groups[root][key[len(root) :]] = tensor
        else:
            skipped[tensor.name] = _OTHER
    return [
        _component(
            path, files, form, "/".join(root), _leaves(path, from_attributes, group), skipped, lora
        )
        for root, group in groups.items()
    ]


def _legacy_components(
    path: Path, files: list[SourceFile], root: Group, weights: Group, form: str, lora: Lora
) -> list[Checkpoint]:
    """Legacy layout: a component's layers are listed, or a trainer's save lists a whole component
    as one layer."""
    layers = _listed(weights, files[0])
    skipped = {
        "/".join(key): _OPTIMIZER
        for key, _ in _named_datasets(root.children.get("optimizer_weights"))
    }
    nested = {
        layer: paths
        for layer, paths in layers.items()
        if layer_class(layer) not in keras_models().top_level
    }
    holders = {layer: paths for layer, paths in nested.items() if _holds_blocks(paths)}
    if holders:
        others = {layer: paths for layer, paths in layers.items() if layer not in holders}
        skipped |= {
            "/".join((layer, *key)): _OTHER for layer, paths in others.items() for key in paths
        }
    else:
        flat = {key: tensor for paths in layers.values() for key, tensor in paths.items()}
        if len(flat) < sum(map(len, layers.values())):
            raise ConversionError(f"{path}: two layers hold weights of the same name")
        holders = {"": flat} if _holds_blocks(flat) else {}
    return [
        _component(path, files, form, layer, _leaves(path, from_classes, paths), skipped, lora)
        for layer, paths in holders.items()
    ]


def _listed(weights: Group, file: SourceFile) -> dict[str, _Paths]:
    """Layer -> its weights, as `layer_names` and `weight_names` list them."""
    layers: dict[str, _Paths] = defaultdict(dict)
    for layer in _strings(weights, "layer_names", file):
        group = weights.children.get(layer)
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
            key = tuple(name.split("/"))
            layers[layer][key] = _tensor(key, dataset, file)
    return layers


def _holds_blocks(paths: _Paths) -> bool:
    return any(
        layer_class(segment) in keras_models().blocks for key in paths for segment in key[:-1]
    )


def _strings(group: Group, name: str, file: SourceFile) -> list[str]:
    """A list attribute; Keras splits one over 64 kB into `name0`, `name1`, ..."""
    chunks = [name] if name in group.attrs else []
    while f"{name}{len(chunks)}" in group.attrs:
        chunks.append(f"{name}{len(chunks)}")
    values: list[str] = []
    for chunk in chunks:
        value = group.attrs[chunk]
        names = [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
        if not isinstance(value, list) or len(names) != len(value):
            raise ConversionError(f"{file.path}: attribute `{chunk}` is not a list of names")
        values += names
    return values


def _find(group: Group, path: str) -> Dataset | None:
    node: Group | Dataset | None = group
    for segment in path.split("/"):
        node = node.children.get(segment) if isinstance(node, Group) else None
    return node if isinstance(node, Dataset) else None


def _named_datasets(
    node: Group | Dataset | None, above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Dataset]]:
    if isinstance(node, Dataset):
        yield above, node
    elif node is not None:
        for name, child in node.children.items():
            yield from _named_datasets(child, (*above, name))


# --- TensorFlow -----------------------------------------------------------------------------------


def _read_tensorflow(path: Path, lora: Lora) -> list[Checkpoint]:
    prefix = find_bundle(path)
    if prefix is None:
        raise ConversionError(f"{path}: no TensorFlow checkpoint found")
    bundle = read_bundle(prefix)
    saved_model = (prefix.parent.parent / "saved_model.pb").is_file()
    form = "SavedModel" if saved_model else "TensorFlow checkpoint"
    components = graph_components(bundle.graph)
    if not components and any(key.startswith("_all_variables/") for key in bundle.tensors):
        return [_exported(path, bundle)]
    used: set[str] = set()
    checkpoints = []
    for root, layers in components.items():
        leaves = from_graph(bundle.graph, layers, bundle.tensors)
        used |= {tensor.name for variables in leaves.values() for tensor in variables.values()}
        checkpoints.append(
            _component(path, bundle.files, form, root, leaves, dict(bundle.skipped), lora)
        )
    for checkpoint in checkpoints:
        checkpoint.skipped |= {key: _reason(key) for key in bundle.tensors if key not in used}
    return checkpoints


def _reason(key: str) -> str:
    if key.startswith("_all_variables/"):
        return "a second copy of `variables/`"
    if "optimizer" in key or ".OPTIMIZER_SLOT" in key:
        return _OPTIMIZER
    return _OTHER


def _exported(path: Path, bundle: Bundle) -> Checkpoint:
    """Keras 3 `export`: variables by position in `model.weights`; `_all_variables` holds each a
    second time."""
    numbers = {
        key: re.fullmatch(r"variables/(\d{1,9})/\.ATTRIBUTES/VARIABLE_VALUE", key)
        for key in bundle.tensors
    }
    order = {int(number[1]): bundle.tensors[key] for key, number in numbers.items() if number}
    tensors = {f"variables.{index}": order[index] for index in sorted(order)}
    skipped = {key: _reason(key) for key, number in numbers.items() if number is None}
    return Checkpoint(path, "Keras 3 export", tensors, skipped | bundle.skipped, list(bundle.files))


# --- both -----------------------------------------------------------------------------------------


def _leaves(path: Path, place: Callable[[_Paths], Leaves], paths: _Paths) -> Leaves:
    """Canonical layer paths of a component's weights, each of which must have a place of its
    own."""
    leaves = place(paths)
    placed = {tensor.name for variables in leaves.values() for tensor in variables.values()}
    for tensor in paths.values():
        if tensor.name not in placed:
            raise ConversionError(
                f"{path}: `{printable(tensor.name)}` has the place of another weight"
            )
    return leaves


def _component(
    path: Path,
    files: list[SourceFile],
    form: str,
    root: str,
    leaves: Leaves,
    skipped: Mapping[str, str],
    lora: Lora,
) -> Checkpoint:
    tensors: dict[str, Tensor] = {}
    for layer, variables in leaves.items():
        for tensor in variables.values():
            if tensor.dtype not in DTYPES:
                raise ConversionError(
                    f"{path}: `{printable(tensor.name)}` holds {tensor.dtype}, which is not a"
                    " weight"
                )
        try:
            for name, tensor in leaf_tensors(layer, variables, lora).items():
                tensors[f"{layer}.{name}"] = tensor
        except ConversionError as error:
            raise ConversionError(f"{path}: {error}") from None
    return Checkpoint(path, form, tensors, dict(skipped), files, root=root)
