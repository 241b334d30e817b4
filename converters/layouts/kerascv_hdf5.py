"""KerasCV's models in HDF5: legacy files, `.weights.h5`, `.keras` archives and sharded weights."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TypeGuard

from ...errors import ConversionError, printable
from ..checkpoint import Checkpoint, SourceFile
from ..readers.hdf5 import Dataset, Group
from .keras_component import OPTIMIZER, OTHER, Save
from .keras_names import Paths
from .keras_saves import WEIGHTS, KerasFile, datasets, stored
from .kerascv_layers import from_attributes, from_classes, keras_models, layer_class
from .source import Source

_Names = tuple[str, ...]


def read_saved(source: Source) -> list[Checkpoint]:
    """The components of an HDF5 file, an archive or shards, in any of Keras's layouts.

    Raises:
        ConversionError: the file is damaged.
    """
    saved = source.saved
    assert saved is not None
    save = Save("kerascv", source.path, saved.form, saved.files, source.lora_alpha)
    if saved.root is not None:
        weights = saved.root.children.get("model_weights", saved.root)
        if isinstance(weights, Group) and _lists(weights):
            return _legacy(_legacy_save(save, saved, weights), saved.root, weights)
    return _by_attribute(save, saved.paths)


def _lists(weights: Group) -> bool:
    """Whether a group lists layers: the legacy layout."""
    return any(name.startswith("layer_names") for name in weights.attrs)


def _legacy_save(save: Save, saved: KerasFile, weights: Group) -> Save:
    if saved.form != WEIGHTS:
        return save
    whole = weights is not saved.root
    return replace(save, form="whole-model HDF5" if whole else "legacy HDF5 weights")


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
    optimizer = datasets(root.children.get("optimizer_weights"))
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
            layers[layer][names] = stored(names, dataset, file)
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


def _are_names(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
